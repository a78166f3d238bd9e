"""Phones, tablets and Macs as data, each figure with its source, and the machine at hand.

Knows no models. The data is `devices.toml` beside this file; a user's own devices come from a file
of the same form.
What one program may use of a device's memory is, on iOS, the app's limit, with the entitlement
`com.apple.developer.kernel.increased-memory-limit` and without; on macOS, what Metal calls the
recommended working set.
"""

import difflib
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import platformdirs

from mlx_stream import backend
from mlx_stream.errors import DeviceError

GB = 2**30  # of memory, as its makers count
KINDS = ("phone", "tablet", "laptop", "desktop")
NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
LARGEST_FILE = 2**20
LARGEST_GB = 2**20

TEXTS = ("name", "title", "kind", "chip", "source")
TEXTS += ("memory_estimate", "budget_source", "bandwidth_source", "bandwidth_estimate")
AMOUNTS = ("memory_gb", "budget_gb", "without_entitlement_gb", "bandwidth_gb_s")
REQUIRED = ("name", "kind", "memory_gb")


@dataclass(frozen=True)
class Figure:
    """A number with where it comes from: bytes, or bytes a second.

    `estimated` says that nobody published it; `source` is then how it was arrived at.
    """

    amount: int
    source: str
    estimated: bool = False


@dataclass(frozen=True)
class Device:
    """What a plan needs to know of a device.

    Attributes:
        memory: all of it.
        budget: what one program may use; on iOS with the increased-memory-limit entitlement.
        without_entitlement: what an app may use without it, on iOS.
        bandwidth: of the memory, in bytes a second; None if it is not known.
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
    """Return where a user's own devices are, which may not exist."""
    if home := os.environ.get("MLX_STREAM_HOME"):
        return Path(home).expanduser() / "devices.toml"
    return Path(platformdirs.user_config_dir("mlx_stream")) / "devices.toml"


def all_devices(own: Path | None = None) -> list[Device]:
    """Return every known device: ours, then those of `own`, else of the user's file if it exists.

    Raises:
        DeviceError: the file cannot be read, or says something that is not a device.
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
        DeviceError: there is none; the message names the nearest ones.
    """
    known = {device.name: device for device in all_devices(own)}
    if name in known:
        return known[name]
    sizes = [other for other in known if re.fullmatch(re.escape(name) + r"-\d+gb", other)]
    if sizes:
        raise DeviceError(f"--device {name}: say which: {', '.join(sizes)}")
    close = difflib.get_close_matches(name.lower(), known, 5, 0.5)
    meant = f"did you mean {', '.join(close)}? " if close else ""
    raise DeviceError(f"--device {name[:80]!r}: not known; {meant}`mlx_stream devices` lists all")


def without_entitlement(device: Device) -> Device:
    """Return the device as an app without the increased-memory-limit entitlement meets it.

    Raises:
        DeviceError: nothing there asks for an entitlement.
    """
    if device.without_entitlement is None:
        raise DeviceError(f"--no-entitlement is for phones and tablets, which {device.name} is not")
    return replace(device, budget=device.without_entitlement, without_entitlement=None)


def here() -> Device:
    """Return the machine at hand, with what MLX says of it."""
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
    """Return the bandwidth of Macs with this chip and memory, which tell one apart from another."""
    macs = (d for d in built_in() if d.kind in ("laptop", "desktop") and d.chip == chip)
    return next((d.bandwidth for d in macs if same_figure(d, memory)), None)


def same_figure(device: Device, memory: int) -> bool:
    return abs(device.memory.amount - memory) < GB


# --- reading ---


@cache
def data() -> dict[str, Any]:
    return tomllib.loads(files("mlx_stream.plan").joinpath("devices.toml").read_text("utf-8"))


@cache
def built_in() -> tuple[Device, ...]:
    return tuple(read_devices({"device": data()["device"]}, "devices.toml", set()))


def read_file(path: Path) -> dict[str, Any]:
    try:
        # A named pipe would block for ever when opened.
        if path.exists() and not path.is_file():
            raise DeviceError(f"{path}: cannot be read: not a file")
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise DeviceError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(content) > LARGEST_FILE:
        raise DeviceError(f"{path}: larger than {LARGEST_FILE >> 20} MB, which no such file is")
    try:
        return tomllib.loads(content.decode())
    except UnicodeDecodeError as error:
        raise DeviceError(f"{path}: not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise DeviceError(f"{path}: nested too deeply to be read") from error
    except ValueError as error:  # TOMLDecodeError, or a number with thousands of digits
        raise DeviceError(f"{path}: not valid TOML: {' '.join(str(error).split())}") from error


def read_devices(table: Mapping[str, Any], file: str, taken: set[str]) -> Iterator[Device]:
    """Check a file's content and yield its devices; `taken` are names it may not use."""
    if odd := sorted(table.keys() - {"device"}):
        raise DeviceError(f"{file}: unknown key {odd[0]!r:.60}; expected only [[device]] entries")
    entries = table.get("device", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise DeviceError(f"{file}: device must be a list of tables, written [[device]]")
    for number, entry in enumerate(entries, 1):
        where = f"{file}: device {number}"
        check_device_file(entry, where)
        for name, size in named_sizes(entry):
            if name in taken:
                raise DeviceError(f"{where}: the name {name!r} is taken; choose another")
            taken.add(name)
            yield read_device(entry, name, size, file)


def named_sizes(entry: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the device's name for each size of memory it is sold with."""
    name, sizes = entry["name"], entry["memory_gb"]
    return (
        [(f"{name}-{size:g}gb", size) for size in sizes]
        if isinstance(sizes, list)
        else [(name, sizes)]
    )


def check_device_file(entry: Mapping[str, Any], where: str) -> None:
    """Refuse an entry with a key that is missing or unknown, or a value that is not one of its."""
    known = (*TEXTS, *AMOUNTS, "year")
    if odd := sorted(entry.keys() - set(known)):
        raise DeviceError(f"{where}: unknown key {odd[0]!r:.60}; known are {', '.join(known)}")
    for key in REQUIRED:
        if key not in entry:
            raise DeviceError(f"{where}: {key} is missing")
    for key in TEXTS:
        value = entry.get(key, "-")
        if not isinstance(value, str) or not value.strip() or not value.isprintable():
            raise DeviceError(f"{where}: {key} must be a line of text, not {value!r:.60}")
    check_amounts(entry, where)
    if not NAME.fullmatch(entry["name"]):
        raise DeviceError(
            f"{where}: name must be of a-z, 0-9 and '-', at most 64, not {entry['name']!r:.80}"
        )
    kind = entry["kind"]
    if kind not in KINDS:
        raise DeviceError(f"{where}: kind must be one of {', '.join(KINDS)}, not {kind!r:.60}")
    on_ios = kind in ("phone", "tablet")
    if "without_entitlement_gb" in entry and not (on_ios and "budget_gb" in entry):
        raise DeviceError(
            f"{where}: without_entitlement_gb is for phones and tablets, beside budget_gb"
        )


def check_amounts(entry: Mapping[str, Any], where: str) -> None:
    for key in AMOUNTS:
        values = entry.get(key, 1)
        for value in values if key == "memory_gb" and isinstance(values, list) else [values]:
            if not is_amount(value):
                raise DeviceError(f"{where}: {key} must be a positive number, not {value!r:.60}")
    if entry["memory_gb"] == []:
        raise DeviceError(f"{where}: memory_gb must name at least one size")
    year = entry.get("year", 2000)
    if not isinstance(year, int) or isinstance(year, bool) or not 2000 <= year < 2200:
        raise DeviceError(f"{where}: year must be a year, not {year!r:.60}")


def is_amount(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 < value <= LARGEST_GB


def read_device(entry: Mapping[str, Any], name: str, size: float, file: str) -> Device:
    source = entry.get("source", file)
    budget, lower = budgets(entry, size, source)
    if budget.amount > size * GB:
        raise DeviceError(f"{file}: {name}: budget_gb is more than its memory of {size:g} GB")
    return Device(
        name,
        entry.get("title", name),
        entry["kind"],
        read_figure(int(size * GB), entry, "memory", source),
        budget,
        lower,
        bandwidth=read_figure(round(entry["bandwidth_gb_s"] * 1e9), entry, "bandwidth", source)
        if "bandwidth_gb_s" in entry
        else None,
        chip=entry.get("chip", ""),
        year=entry.get("year"),
    )


def read_figure(amount: int, entry: Mapping[str, Any], of: str, source: str) -> Figure:
    method = entry.get(f"{of}_estimate")
    if method is not None:
        return Figure(amount, method, estimated=True)
    return Figure(amount, entry.get(f"{of}_source", source))


def budgets(entry: Mapping[str, Any], size: float, source: str) -> tuple[Figure, Figure | None]:
    """Return what one program may use, and on iOS what an app may without the entitlement.

    What the entry does not say is what is published of devices of this kind and memory, or else
    estimated.
    """
    if "budget_gb" not in entry:
        return usual_budgets(entry["kind"], size)
    where = entry.get("budget_source", source)
    lower = entry.get("without_entitlement_gb")
    budget = Figure(int(entry["budget_gb"] * GB), where)
    return budget, None if lower is None else Figure(int(lower * GB), where)


def usual_budgets(kind: str, size: float) -> tuple[Figure, Figure | None]:
    for rule in data()["budget"]:
        if kind in rule["kinds"] and rule["memory_gb"] == size:
            lower = rule.get("without_entitlement_gb")
            return Figure(int(rule["budget_gb"] * GB), rule["source"]), (
                None if lower is None else Figure(int(lower * GB), rule["source"])
            )
    rule = next(
        rule
        for rule in data()["budget_estimate"]
        if kind in rule["kinds"] and size < rule.get("below_gb", float("inf"))
    )
    share = rule.get("without_entitlement_of_memory")
    return Figure(int(rule["budget_of_memory"] * size * GB), rule["method"], True), (
        None if share is None else Figure(int(share * size * GB), rule["method"], True)
    )
