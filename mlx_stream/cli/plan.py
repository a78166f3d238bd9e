"""`mlx_stream plan`: show what a model will need on a device, before any of it is loaded."""

from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from mlx_stream.cli import options
from mlx_stream.cli.report import megabytes
from mlx_stream.errors import MlxStreamError
from mlx_stream.program.exits import notify

if TYPE_CHECKING:
    from mlx_stream.plan.planner import ModelSummary, Plan


@options.verb
def plan(
    *,
    model: Annotated[
        str | None,
        Argument(
            metavar="MODEL",
            help="A folder, a Hub id, a .gguf file, a config.json, or starter. Default: the config "
            "file's, else the starter.",
        ),
    ] = None,
    device: Annotated[
        str | None, Option(help="A device that `mlx_stream devices` lists. Default: this machine.")
    ] = None,
    window: Annotated[
        int | None, Option(help="Number of recent tokens to attend to. Default: as many as fit.")
    ] = None,
    sinks: options.Sinks = None,
    bits: Annotated[
        int | None,
        Option(
            help="Bits per weight: 2, 3, 4, 5, 6, 8, or 16 for floats. Default: the most that fit."
        ),
    ] = None,
    group_size: Annotated[int, Option(help="Weights that share a scale: 32, 64 or 128.")] = 64,
    kv_bits: options.KvBits = None,
    streams: Annotated[int, Option(help="Number of conversations open at once.")] = 1,
    dtype: options.Dtype = None,
    keep_quantized: options.KeepQuantized = None,
    no_entitlement: Annotated[
        bool,
        Option(
            "--no-entitlement",
            help="Plan for an iOS app without the increased-memory-limit entitlement.",
        ),
    ] = False,
    own: options.Devices = None,
    json: options.AsJson = False,
) -> None:
    """Show what a model needs on a device, from its config and headers alone.

    Without --bits and --window, it chooses the most bits that fit with a window of 2,048, then the
    largest window.
    """
    from mlx_stream.chat.prompts import LONG_HEAD, long_head_notice
    from mlx_stream.cli.report import print_json, print_table, print_text
    from mlx_stream.cli.show import read_prompts
    from mlx_stream.plan import devices
    from mlx_stream.plan.inspect import local_model, summarize_model
    from mlx_stream.plan.planner import PlanRequest, make_plan

    model = options.default_model() if model is None else model
    place = devices.find(device, own) if device is not None else devices.here()
    if no_entitlement:
        place = devices.without_entitlement(place)
    summary = summarize_model(model, notify)
    asked = PlanRequest(dtype, keep_quantized, sinks, window, bits, group_size, kv_bits, streams)
    chosen = make_plan(summary, place, asked, notify)
    with suppress(MlxStreamError):  # a model that cannot chat can still be planned for
        path = local_model(model)
        prompts = read_prompts(path, None) if path else None
        if prompts and len(prompts.pinned) >= LONG_HEAD:
            notify(long_head_notice(len(prompts.pinned)))
    if json:
        print_json(as_json(summary, chosen, kv_bits))
        return
    print_text(f"{summary.name} on {place.title}\n")
    print_table(["what", "needs"], rows(chosen, kv_bits))


def rows(plan: "Plan", kv_bits: int | None) -> list[list[str]]:
    bandwidth = plan.device.bandwidth
    ring = f", {kv_bits} bits" if kv_bits else ""
    several = f"{plan.streams} streams of " if plan.streams > 1 else ""
    needs = [
        ("weights", plan.weights, plan.recipe.name),
        ("ring", plan.ring, f"{several}{plan.sinks:,} sinks, window {plan.window:,}{ring}"),
        ("workspace", plan.workspace, "chunks of prompts" if several else "one chunk of a prompt"),
        ("total", plan.total, verdict(plan)),
        ("loading", plan.loading, "at its peak, before the ring is allocated"),
    ]
    if plan.tokens_per_second is not None and bandwidth is not None:
        about = "about " if bandwidth.estimated else ""
        rate = f"{about}{bandwidth.amount / 1e9:g} GB/s"
        speed = f"{plan.tokens_per_second:,.3g} tokens/s"
        per = f"step of {plan.streams} tokens" if several else "token"
        needs.append(("reads", plan.step, f"per {per}: at {rate}, {speed} at most"))
    return [[name, f"{megabytes(amount)} MB  {text}"] for name, amount, text in needs]


def verdict(plan: "Plan") -> str:
    device, missing = plan.device, f" by {megabytes(plan.missing)} MB" if plan.missing else ""
    about = "about " if device.budget.estimated else ""
    budget = megabytes(device.budget.amount)
    text = f"{plan.verdict}{missing}: one program may use {about}{budget} MB"
    if device.without_entitlement is None:
        return text
    lower = device.without_entitlement.amount
    return (
        f"{text} with the increased-memory-limit entitlement; "
        f"without it, {megabytes(lower)} MB: {plan.verdict_for(lower)}"
    )


def as_json(summary: "ModelSummary", plan: "Plan", kv_bits: int | None) -> dict[str, Any]:
    device = plan.device
    lower, bandwidth = device.without_entitlement, device.bandwidth
    return {
        "model": summary.name,
        "device": device.name,
        "recipe": plan.recipe.name,
        "bits": plan.recipe.bits,
        "dtype": plan.dtype,
        "kv_bits": kv_bits,
        "sinks": plan.sinks,
        "window": plan.window,
        "streams": plan.streams,
        "weights_bytes": plan.weights,
        "ring_bytes": plan.ring,
        "workspace_bytes": plan.workspace,
        "total_bytes": plan.total,
        "loading_bytes": plan.loading,
        "stored_bytes": summary.stored,
        "step_bytes": plan.step,
        "budget_bytes": device.budget.amount,
        "budget_estimated": device.budget.estimated,
        "budget_bytes_without_entitlement": lower and lower.amount,
        "bandwidth_bytes_per_second": bandwidth and bandwidth.amount,
        "bandwidth_estimated": bandwidth and bandwidth.estimated,
        "verdict": plan.verdict,
        "missing_bytes": plan.missing,
        "verdict_without_entitlement": lower and plan.verdict_for(lower.amount),
        "tokens_per_second": plan.tokens_per_second,
    }
