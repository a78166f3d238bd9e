"""`mlx_stream doctor`: describe this machine, what is slow on it, and what it gets wrong."""

from typing import Annotated

from typer import Argument, Option

from mlx_stream.cli import options
from mlx_stream.program.exits import fail, notify


@options.verb
def doctor(
    *,
    model: Annotated[
        str | None,
        Argument(
            metavar="MODEL",
            help="Model whose shapes --self-test uses. Default: a small generated one.",
        ),
    ] = None,
    self_test: Annotated[
        bool, Option("--self-test", help="Check that this device computes streams correctly.")
    ] = False,
    loading: options.LoadOptions,
    json: options.AsJson = False,
) -> None:
    """Describe this machine and what will be slow on it.

    --self-test checks attention, positions, buffers, seeds and saved streams on this machine; it
    exits with status 1 if any check fails.
    """
    from mlx_stream import backend
    from mlx_stream.cli.report import print_json, print_table, print_text
    from mlx_stream.program.paths import cache_root
    from mlx_stream.server.running import running_servers

    if self_test:
        check(model, loading, json)
        return
    if model is not None or loading != options.LoadOptions():
        fail("MODEL and its loading options are for --self-test: add --self-test")
    servers = "; ".join(running_servers()) or "none is running"
    facts = {**backend.describe(), "cache": str(cache_root()), "server": servers}
    advice = backend.advice()
    if json:
        print_json({**facts, "advice": advice})
        return
    print_table(["what", "here"], [[name, str(value)] for name, value in facts.items()])
    print()
    for line in advice or ["nothing here is slower than necessary"]:
        print_text(f"- {line}", indent=2)


def check(source: str | None, loading: options.LoadOptions, json: bool) -> None:
    """Run the self-test and print what it found."""
    from dataclasses import asdict

    from mlx_stream import backend, selftest
    from mlx_stream.cli.report import print_json, print_table, print_text
    from mlx_stream.selftest.tiny_model import make_tiny_model

    if source is not None:
        model = loading.load(source)
    elif loading.keep_quantized is None:
        model = make_tiny_model(loading.dtype)
    else:
        fail("--keep-quantized and --dequantize apply to a model's weights: give MODEL")
    answers = {True: "yes", False: "NO", None: "-"}
    findings = []
    for finding in selftest.run(model):
        notify(f"{finding.check}: {answers[finding.holds]}")
        findings.append(finding)
    failed = [finding for finding in findings if finding.holds is False]
    if json:
        about = {"model": model.name, "dtype": str(model.dtype).removeprefix("mlx.core.")}
        checks = [asdict(finding) for finding in findings]
        print_json({**about, "holds": not failed, "checks": checks, "machine": backend.describe()})
    else:
        print_table(
            ["check", "holds", "found"], [[f.check, answers[f.holds], f.found] for f in findings]
        )
        for one in failed:
            print_text(f"- {one.check}: {one.advice}", indent=2)
    if failed:
        raise SystemExit(1)
