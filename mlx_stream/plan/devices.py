"""Phones, tablets, Macs and this machine, with a source for each figure; independent of models.

The data is in `devices.toml` next to this file; users can list their own devices in a file of the
same format. A device's budget is the memory that one program may use: on iOS, the app's limit, with
and without the entitlement `com.apple.developer.kernel.increased-memory-limit`; on macOS, Metal's
recommended working set.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import platformdirs

from mlx_stream import backend
from mlx_stream.checkpoint.json_files import read_text_file
from mlx_stream.errors import CheckpointError, DeviceError, one_line

GB = 2**30  # a gigabyte of memory, as manufacturers count it
KINDS = ("phone", "tablet", "laptop", "desktop")
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
LARGEST_FILE = 2**20
LARGEST_GB = 2**20


@dataclass(frozen=True)
class Figure:
    """A number of bytes, or bytes per second, with its source.

    If the amount is `estimated` because it is not published, `source` describes the method.
    """

    amount: int
    source: str
    estimated: bool = False


@dataclass(frozen=True)
class Device:
    """A device to plan for.

    Attributes:
        memory: the device's total memory.
        budget: the memory for one program; on iOS with the increased-memory-limit entitlement.
        without_entitlement: the memory for an app without it, on iOS.
        bandwidth: memory bandwidth in bytes per second; None if unknown.
        metal: whether MLX computes on its GPU.
    """

    name: str
    title: str
    kind: str
    memory: Figure
    budget: Figure
    without_entitlement: Figure | None = None
    bandwidth: Figure | None = None
    chip: str = ""
    year: int | None = None
    metal: bool = True


def user_file() -> Path:
    """Return the path of the user's own device file; it may not exist."""
    if home := os.environ.get("MLX_STREAM_HOME"):
        return Path(home).expanduser() / "devices.toml"
    return Path(platformdirs.user_config_dir("mlx_stream")) / "devices.toml"


def all_devices(own: Path | None = None) -> list[Device]:
    """Return the built-in devices, then those in `own`, or else in the user's file if it exists.

    Raises:
        DeviceError: the file cannot be read, or an entry is not a device.
    """
    known = list(built_in())
    path = user_file() if own is None else own
    if own is not None or path.exists():
        taken = {device.name for device in known}
        known += read_devices(read_file(path), str(path), taken)
    return known


def find(name: str, own: Path | None = None) -> Device:
    """Return a device by its name.

    Raises:
        DeviceError: no device has this name; the message names similar ones.
    """
    known = {device.name: device for device in all_devices(own)}
    if name in known:
        return known[name]
    sizes = [other for other in known if re.fullmatch(re.escape(name) + r"-\d+gb", other)]
    if sizes:
        raise DeviceError(f"--device {name}: choose one of {', '.join(sizes)}")
    close = difflib.get_close_matches(name.lower(), known, 5, 0.5)
    meant = f"did you mean {', '.join(close)}? " if close else ""
    raise DeviceError(f"--device {name[:80]!r}: unknown; {meant}see `mlx_stream devices`")


def without_entitlement(device: Device) -> Device:
    """Return the device with the budget of an app without the increased-memory-limit entitlement.

    Raises:
        DeviceError: the device is not a phone or tablet.
    """
    if device.without_entitlement is None:
        raise DeviceError(
            f"--no-entitlement is for phones and tablets, but {device.name!r} is neither: choose "
            "one with --device"
        )
    return replace(device, budget=device.without_entitlement, without_entitlement=None)


def here() -> Device:
    """Return this machine, as MLX describes it."""
    about, metal = backend.device(), backend.on_metal()
    budget = Figure(backend.memory_budget(), "this machine")
    memory = int(about.get("memory_size") or budget.amount)
    chip = str(about.get("device_name", "")).removeprefix("Apple ")
    return Device(
        "here",
        f"this machine ({about.get('device_name', 'unknown')})",
        "computer",
        Figure(memory, "this machine"),
        budget,
        bandwidth=known_bandwidth(chip, memory) if metal else None,
        chip=chip,
        metal=metal,
    )


def known_bandwidth(chip: str, memory: int) -> Figure | None:
    """Return the bandwidth of Macs with this chip and memory."""
    macs = (d for d in built_in() if d.kind in ("laptop", "desktop") and d.chip == chip)
    return next((d.bandwidth for d in macs if abs(d.memory.amount - memory) < GB), None)


# --- reading ---


@cache
def data() -> dict[str, Any]:
    return tomllib.loads(files("mlx_stream.plan").joinpath("devices.toml").read_text("utf-8"))


@cache
def built_in() -> tuple[Device, ...]:
    return tuple(read_devices({"device": data()["device"]}, "devices.toml", set()))


def read_file(path: Path) -> dict[str, Any]:
    try:
        # A named pipe would block forever when opened.
        if path.exists() and not path.is_file():
            raise DeviceError(f"{path}: cannot be read: not a file")
        return tomllib.loads(read_text_file(path, LARGEST_FILE))
    except CheckpointError as error:
        raise DeviceError(str(error)) from error
    except RecursionError as error:
        raise DeviceError(f"{path}: nested too deeply to be read") from error
    except ValueError as error:  # TOMLDecodeError, or a number with thousands of digits
        raise DeviceError(f"{path}: not valid TOML: {one_line(error)}") from error


def read_devices(table: Mapping[str, Any], file: str, taken: set[str]) -> Iterator[Device]:
    """Check a file's content and yield its devices; `taken` holds names it may not use."""
    if odd := sorted(table.keys() - {"device"}):
        raise DeviceError(f"{file}: unknown key {odd[0]!r:.60}; expected only [[device]] entries")
    entries = table.get("device", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DeviceError(f"{file}: device must be a list of tables, written [[device]]")
    for number, entry in enumerate(entries, 1):
        where = f"{file}: device {number}"
        check_entry(entry, where)
        name, sizes = entry["name"], entry["memory_gb"]
        # An entry describes one device per memory size that it lists.
        several = isinstance(sizes, list)
        for size in sizes if several else [sizes]:
            own_name = f"{name}-{size:g}gb" if several else name
            if own_name in taken:
                raise DeviceError(f"{where}: the name {own_name!r} is taken; choose another")
            taken.add(own_name)
            yield read_device(entry, own_name, size, file)


def is_line(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip()) and value.isprintable()


def is_amount(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= LARGEST_GB


def is_sizes(value: Any) -> bool:
    sizes = value if isinstance(value, list) else [value]
    return bool(sizes) and all(map(is_amount, sizes))


# The keys of an entry, each with a check and a description of valid values.
TEXTS = ("title", "chip", "source", "memory_estimate", "budget_source", "bandwidth_source")
AMOUNTS = ("budget_gb", "without_entitlement_gb", "bandwidth_gb_s")
KEYS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (
        lambda value: isinstance(value, str) and bool(NAME.fullmatch(value)),
        "1 to 64 characters from a-z, 0-9 and '-'",
    ),
    "kind": (lambda value: value in KINDS, f"one of {', '.join(KINDS)}"),
    "memory_gb": (is_sizes, "a positive number, or a list of them"),
    "year": (lambda value: type(value) is int and 2000 <= value < 2200, "a year"),
    **dict.fromkeys((*TEXTS, "bandwidth_estimate"), (is_line, "a line of text")),
    **dict.fromkeys(AMOUNTS, (is_amount, "a positive number")),
}


def check_entry(entry: Mapping[str, Any], where: str) -> None:
    """Refuse an entry with a missing or unknown key, or a wrong value."""
    for key in ("name", "kind", "memory_gb"):
        if key not in entry:
            raise DeviceError(f"{where}: {key} is missing")
    for key, value in entry.items():
        if key not in KEYS:
            raise DeviceError(
                f"{where}: unknown key {key!r:.60}; the known keys are {', '.join(KEYS)}"
            )
        is_right, expected = KEYS[key]
        if not is_right(value):
            raise DeviceError(f"{where}: {key} must be {expected}, not {value!r:.80}")
    on_ios = entry["kind"] in ("phone", "tablet")
    if "without_entitlement_gb" in entry and not (on_ios and "budget_gb" in entry):
        raise DeviceError(
            f"{where}: without_entitlement_gb is only for phones and tablets, and needs budget_gb"
        )


def read_device(entry: Mapping[str, Any], name: str, size: float, file: str) -> Device:
    def figure(of: str, amount: float) -> Figure:
        method = entry.get(f"{of}_estimate")
        source = entry.get(f"{of}_source", entry.get("source", file))
        return Figure(round(amount), method or source, estimated=method is not None)

    if "budget_gb" in entry:
        budget, lower = (
            figure("budget", int(entry[key] * GB)) if key in entry else None
            for key in ("budget_gb", "without_entitlement_gb")
        )
    else:
        budget, lower = usual_budgets(entry["kind"], size)
    assert budget is not None
    if budget.amount > size * GB:
        raise DeviceError(f"{file}: {name}: budget_gb is more than its memory of {size:g} GB")
    bandwidth = entry.get("bandwidth_gb_s")
    return Device(
        name,
        entry.get("title", name),
        entry["kind"],
        figure("memory", int(size * GB)),
        budget,
        lower,
        bandwidth=None if bandwidth is None else figure("bandwidth", bandwidth * 1e9),
        chip=entry.get("chip", ""),
        year=entry.get("year"),
    )


def usual_budgets(kind: str, size: float) -> tuple[Figure, Figure | None]:
    """Return the budgets of devices of this kind and memory, published or else estimated.

    The first is what one program may use; the second, on iOS, what an app may use without the
    entitlement.
    """
    for rule in data()["budget"]:
        if kind in rule["kinds"] and rule["memory_gb"] == size:
            amounts = (rule["budget_gb"], rule.get("without_entitlement_gb"))
            source, estimated = rule["source"], False
            break
    else:
        rule = next(
            rule
            for rule in data()["budget_estimate"]
            if kind in rule["kinds"] and size < rule.get("below_gb", float("inf"))
        )
        share = rule.get("without_entitlement_of_memory")
        amounts = (rule["budget_of_memory"] * size, None if share is None else share * size)
        source, estimated = rule["method"], True
    budget, lower = (
        None if amount is None else Figure(int(amount * GB), source, estimated)
        for amount in amounts
    )
    assert budget is not None
    return budget, lower
