"""`mlx_stream doctor`: what this machine is, what will be slow and why, what it gets wrong."""

from typing import Annotated

import typer

from mlx_stream.cli import options
from mlx_stream.program.exits import exits_cleanly, fail, notify


@exits_cleanly
def doctor(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="For --self-test: on the shapes of this model. Default: of a small one made on "
            "the spot.",
        ),
    ] = None,
    self_test: Annotated[
        bool,
        typer.Option("--self-test", help="Check that this device computes what a stream needs."),
    ] = False,
    dtype: options.Dtype = None,
    keep_quantized: options.KeepQuantized = None,
    force: options.Force = False,
    json: options.AsJson = False,
) -> None:
    """Say what this machine is and what will be slow on it.

    With --self-test, whether attention, positions, buffers, seeds and saved streams are here what
    they must be; exits with 1 if one is not.
    """
    from mlx_stream import backend
    from mlx_stream.cli.report import print_json, print_table
    from mlx_stream.program.paths import cache_root

    if self_test:
        check(model, dtype, keep_quantized, force, json)
        return
    if model is not None or dtype is not None or keep_quantized is not None:
        fail("MODEL, --dtype and --keep-quantized are for --self-test: give that too")
    facts = backend.describe()
    facts["cache"] = str(cache_root())
    advice = backend.advice()
    if json:
        print_json({**facts, "advice": advice})
        return
    print_table(["what", "here"], [[name, str(value)] for name, value in facts.items()])
    print()
    for line in advice or ["nothing here will be slower than it must be"]:
        print(f"- {line}")


def check(
    source: str | None, dtype: str | None, keep_quantized: bool | None, force: bool, json: bool
) -> None:
    """Run the self-test and print what it found."""
    from dataclasses import asdict

    from mlx_stream import backend, selftest
    from mlx_stream.cli.report import print_json, print_table
    from mlx_stream.load import load
    from mlx_stream.selftest.tiny_model import make_tiny_model

    if source is None and keep_quantized is not None:
        fail("--keep-quantized and --dequantize are about a model's weights: give MODEL")
    model = (
        make_tiny_model(dtype)
        if source is None
        else load(source, dtype, keep_quantized, force, notify)
    )
    findings = []
    for finding in selftest.run(model):
        notify(f"{finding.check}: {describe_result(finding.holds)}")
        findings.append(finding)
    failed = [finding for finding in findings if finding.holds is False]
    if json:
        about = {"model": model.name, "dtype": str(model.dtype).removeprefix("mlx.core.")}
        checks = [asdict(finding) for finding in findings]
        print_json({**about, "holds": not failed, "checks": checks, "machine": backend.describe()})
    else:
        rows = [[one.check, describe_result(one.holds), one.found] for one in findings]
        print_table(["check", "holds", "found"], rows)
        for one in failed:
            print(f"- {one.check}: {one.advice}")
    if failed:
        raise SystemExit(1)


def describe_result(holds: bool | None) -> str:
    return {True: "yes", False: "NO", None: "-"}[holds]
