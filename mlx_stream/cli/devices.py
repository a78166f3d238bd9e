"""`mlx_stream devices`: the phones, tablets and Macs that `plan` knows about."""

from typing import TYPE_CHECKING, Any

from mlx_stream.cli import options

if TYPE_CHECKING:
    from mlx_stream.plan.devices import Device, Figure

GB = 2**30
NOTES = (
    "Memory in GB of 2^30 bytes, bandwidth in GB/s of 10^9. One program: the memory that one app "
    "may use (on iOS, with and without the increased-memory-limit entitlement; on macOS, what "
    "Metal recommends). ~ marks an estimate: the figure is not published. --json shows the source "
    "of each figure, or how it was estimated."
)


@options.verb
def devices(*, own: options.Devices = None, json: options.AsJson = False) -> None:
    """List the devices you can plan for, including your own."""
    from mlx_stream.cli.report import print_json, print_table, print_text
    from mlx_stream.plan.devices import all_devices, user_file

    known = all_devices(own)
    if json:
        print_json({"devices": [as_json(device) for device in known]})
        return
    columns = ["name", "memory", "one program", "no entitlement", "bandwidth", "device"]
    print_table(columns, [row(device) for device in known])
    print()
    print_text(NOTES)
    print_text(f"Your own devices: {own or user_file()}")


def row(device: "Device") -> list[str]:
    memory = [device.memory, device.budget, device.without_entitlement]
    amounts = [*(amount(figure, GB) for figure in memory), amount(device.bandwidth, 1e9)]
    return [device.name, *amounts, device.title]


def amount(figure: "Figure | None", unit: float) -> str:
    if figure is None:
        return "-"
    return f"{'~' if figure.estimated else ''}{figure.amount / unit:.4g}"


def as_json(device: "Device") -> dict[str, Any]:
    return {
        "name": device.name,
        "title": device.title,
        "kind": device.kind,
        "chip": device.chip,
        "year": device.year,
        "memory_bytes": figure_as_json(device.memory),
        "budget_bytes": figure_as_json(device.budget),
        "budget_bytes_without_entitlement": figure_as_json(device.without_entitlement),
        "bandwidth_bytes_per_second": figure_as_json(device.bandwidth),
    }


def figure_as_json(figure: "Figure | None") -> dict[str, Any] | None:
    if figure is None:
        return None
    kind = "method" if figure.estimated else "source"
    return {"value": figure.amount, "estimated": figure.estimated, kind: figure.source}
