"""`mlx_stream plan`: what a model will need on a device, before any of it is loaded."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from mlx_stream.cli import options
from mlx_stream.program.exits import exits_cleanly, notify

if TYPE_CHECKING:
    from mlx_stream.plan.devices import Device
    from mlx_stream.plan.planner import ModelSummary, Plan


@exits_cleanly
def plan(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a Hub id, a .gguf file, a config.json, or starter.",
        ),
    ] = "starter",
    device: Annotated[
        str | None,
        typer.Option("--device", help="See `mlx_stream devices`. Default: this machine."),
    ] = None,
    window: Annotated[
        int | None,
        typer.Option("--window", help="Latest tokens attended. Default: the most that fit."),
    ] = None,
    sinks: options.Sinks = None,
    bits: Annotated[
        int | None,
        typer.Option("--bits", help="2, 3, 4, 5, 6, 8, or 16: floats. Default: the most that fit."),
    ] = None,
    group_size: Annotated[
        int, typer.Option("--group-size", help="Weights that share a scale: 32, 64 or 128.")
    ] = 64,
    kv_bits: options.KvBits = None,
    dtype: options.Dtype = None,
    keep_quantized: options.KeepQuantized = None,
    no_entitlement: Annotated[
        bool,
        typer.Option(
            "--no-entitlement",
            help="On iOS, for an app without the increased-memory-limit entitlement.",
        ),
    ] = False,
    own: options.Devices = None,
    json: options.AsJson = False,
) -> None:
    """Say what a model will need, from its config and headers alone.

    Without --bits and --window it chooses: the most bits that fit with a window of 2,048, then
    the longest window.
    """
    from mlx_stream.cli.report import print_json, print_table
    from mlx_stream.plan import devices
    from mlx_stream.plan.inspect import summarize_model
    from mlx_stream.plan.planner import PlanRequest, make_plan

    place = devices.find(device, own) if device is not None else devices.here()
    if no_entitlement:
        place = devices.without_entitlement(place)
    outline = summarize_model(model, notify)
    asked = PlanRequest(dtype, keep_quantized, sinks, window, bits, group_size, kv_bits)
    chosen = make_plan(outline, place, asked, notify)
    if json:
        print_json(as_json(outline, chosen, kv_bits))
        return
    print(f"{outline.name} on {place.title}\n")
    print_table(["what", "needs"], rows(chosen, kv_bits))


def rows(plan: "Plan", kv_bits: int | None) -> list[list[str]]:
    device = plan.device
    ring = f", {kv_bits} bits" if kv_bits else ""
    table = [
        ["weights", f"{megabytes(plan.weights)}  {plan.recipe.name}"],
        ["ring", f"{megabytes(plan.ring)}  {plan.sinks:,} sinks, window {plan.window:,}{ring}"],
        ["workspace", f"{megabytes(plan.workspace)}  one chunk of a prompt"],
        ["total", f"{megabytes(plan.total)}  {budget_of(plan)}"],
        ["loading", f"{megabytes(plan.loading)}  at its peak, before there is a ring"],
    ]
    if plan.tokens_per_second is not None and device.bandwidth is not None:
        about = "about " if device.bandwidth.estimated else ""
        rate = f"{about}{device.bandwidth.amount / 1e9:g} GB/s"
        table.append(
            ["reads", f"{megabytes(plan.step)}  a token: at {rate}, {speed(plan)} at most"]
        )
    return table


def budget_of(plan: "Plan") -> str:
    device, missing = plan.device, f" by {megabytes(plan.missing)}" if plan.missing else ""
    about = "about " if device.budget.estimated else ""
    text = f"{plan.verdict}{missing}: one program has {about}{megabytes(device.budget.amount)}"
    if device.without_entitlement is None:
        return text
    lower = device.without_entitlement.amount
    return (
        f"{text} with the increased-memory-limit entitlement; "
        f"{plan.verdict_for(lower)} without, in {megabytes(lower)}"
    )


def speed(plan: "Plan") -> str:
    return f"{plan.tokens_per_second:,.3g} tokens/s"


def megabytes(amount: float) -> str:
    return f"{amount / 1e6:,.1f} MB"


def as_json(outline: "ModelSummary", plan: "Plan", kv_bits: int | None) -> dict[str, Any]:
    lower = plan.device.without_entitlement
    return {
        "model": outline.name,
        "device": plan.device.name,
        "recipe": plan.recipe.name,
        "bits": plan.recipe.bits,
        "dtype": plan.dtype,
        "kv_bits": kv_bits,
        "sinks": plan.sinks,
        "window": plan.window,
        "weights_bytes": plan.weights,
        "ring_bytes": plan.ring,
        "workspace_bytes": plan.workspace,
        "total_bytes": plan.total,
        "loading_bytes": plan.loading,
        "stored_bytes": outline.stored,
        "step_bytes": plan.step,
        **budgets_as_json(plan.device),
        "verdict": plan.verdict,
        "missing_bytes": plan.missing,
        "verdict_without_entitlement": None if lower is None else plan.verdict_for(lower.amount),
        "tokens_per_second": plan.tokens_per_second,
    }


def budgets_as_json(device: "Device") -> dict[str, Any]:
    lower, bandwidth = device.without_entitlement, device.bandwidth
    return {
        "budget_bytes": device.budget.amount,
        "budget_estimated": device.budget.estimated,
        "budget_bytes_without_entitlement": None if lower is None else lower.amount,
        "bandwidth_bytes_per_second": None if bandwidth is None else bandwidth.amount,
        "bandwidth_estimated": None if bandwidth is None else bandwidth.estimated,
    }
