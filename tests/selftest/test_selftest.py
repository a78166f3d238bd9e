"""`doctor --self-test`: every check holds here, and fails when the code it checks is broken."""

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from mlx_stream import backend, selftest
from mlx_stream.cache import AttentionShape, StreamCache
from mlx_stream.cache.geometry import Geometry
from mlx_stream.cache.positions import Rope
from mlx_stream.cache.steps.batch import BatchStep
from mlx_stream.cache.steps.decode import DecodeStep
from mlx_stream.generate import snapshot
from mlx_stream.generate.model import Model
from mlx_stream.sampling import Sampling
from mlx_stream.selftest import kernels, streams
from mlx_stream.selftest.tiny_model import make_tiny_model
from tests.fakes.shell import done, parsed, run


@pytest.fixture(scope="module")
def model():
    return make_tiny_model()


def test_every_check_holds_or_does_not_apply(model):
    findings = {finding.check: finding for finding in selftest.run(model)}
    assert len(findings) == len(selftest.CHECKS)
    assert all(finding.holds is not False for finding in findings.values()), findings
    fused = findings["attention is one fused kernel for these shapes"]
    if not backend.on_metal():
        assert (fused.holds, fused.found) == (None, "not applicable: the CPU has no fused kernel")
    assert not any(finding.advice for finding in findings.values())


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        (mx.float32, {"model_type": "mistral"}),
        (mx.float16, {"num_key_value_heads": 4, "head_dim": 32}),
        (mx.bfloat16, {"tie_word_embeddings": True, "hidden_size": 48, "head_dim": 8}),
    ],
)
def test_the_checks_hold_in_other_shapes_and_dtypes(tiny_model, dtype, changes):
    model = tiny_model(dtype, **changes)
    assert [one.check for one in selftest.run(model) if one.holds is False] == []


# --- each check, with a fault in the code it checks ---

attend = mx.fast.scaled_dot_product_attention
FAR = mx.array([2**31 - 1], mx.int32)
KEY = mx.random.key(0)


def wrong_heads(queries, keys, values, *, scale, mask=None):
    return attend(queries, keys[:, ::-1], values[:, ::-1], scale=scale, mask=mask)


def no_mask(queries, keys, values, *, scale, mask=None):
    return attend(queries, keys, values, scale=scale)


def wrong_scale(queries, keys, values, *, scale, mask=None):
    return attend(queries, keys, values, scale=2 * scale, mask=mask)


def not_numbers(*arrays, **more):
    return attend(*arrays, **more) * float("nan")


def rotated_too_far(right: Any) -> Any:
    return lambda self, x, at, backwards=False: right(self, x, at + 5 * backwards, backwards)


def mask_of_too_much(right: Any) -> Any:
    def wrong(self: Geometry, rows: int) -> Any:
        blocks = right(self, rows)
        for block in blocks:
            block.mask[:, 1:] |= block.mask[:, :-1]
        return blocks

    return wrong


def swapping_streams(right: Any) -> Any:
    def wrong(self: BatchStep, layer: int, heads: mx.array) -> mx.array:
        found = right(self, layer, heads)
        return mx.concatenate([found[:, :, 1:], found[:, :, :1]], axis=2)

    return wrong


def holding_a_buffer(right: Any) -> Any:
    held = []

    def wrong(self: StreamCache, step: Any) -> None:
        held[:] = [self.current.keys[0]]
        right(self, step)

    return wrong


def tracing_what_is_new_each_time(right: Any) -> Any:
    def wrong(shape: AttentionShape, *rest: Any) -> DecodeStep:
        step = right(shape, *rest)
        new = {rope: copy(rope) for rope in shape.ropes}
        ropes = tuple(new[rope] for rope in shape.ropes)
        step.kind = replace(step.kind, shape=replace(shape, ropes=ropes))
        return step

    return wrong


def swapping_values(right: Any) -> Any:
    def wrong(path: Any) -> snapshot.Snapshot:
        found = right(path)
        return replace(found, state={**found.state, "values.0": found.state["values.1"]})

    return wrong


Fault = tuple[Callable[[Model], kernels.CheckOutcome], Any, str, Callable[[Any], Any]]
FAULTS: dict[str, Fault] = {
    "turned the wrong way": (
        *(kernels.rotation, Rope, "_apply"),
        lambda right: lambda self, x, at, scale: right(self, x, at, -scale),
    ),
    "a position that overflows": (
        *(kernels.rotation, Rope, "_apply"),
        lambda right: lambda self, x, at, scale: right(self, x, FAR if scale < 0 else at, scale),
    ),
    **{
        wrong.__name__: (
            *(kernels.attention, mx.fast, "scaled_dot_product_attention"),
            lambda _, wrong=wrong: wrong,
        )
        for wrong in (no_mask, wrong_heads, wrong_scale, not_numbers)
    },
    "a wrong product": (
        *(kernels.quantized_product, mx, "quantized_matmul"),
        lambda right: lambda *arrays, **more: 1.1 * right(*arrays, **more),
    ),
    "a wrong clock of the sinks": (
        *(streams.places, Geometry, "sinks_clock"),
        lambda right: lambda self, place, token: right(self, place, token) - 1,
    ),
    "a wrong row": (
        *(streams.places, Geometry, "row"),
        lambda right: lambda self, token: right(self, max(token - 1, 0)),
    ),
    "a wrong oldest token": (
        *(streams.places, Geometry, "oldest"),
        lambda right: lambda self, place, token: right(self, place, token) + 1,
    ),
    "not turned back": (streams.places, Rope, "rotate_all", rotated_too_far),
    "a chunk that sees too much": (streams.chunks, Geometry, "blocks", mask_of_too_much),
    "the rows of another stream": (streams.shared_step, BatchStep, "attend", swapping_streams),
    "a buffer that is held": (streams.in_place, StreamCache, "commit", holding_a_buffer),
    "traced again": (streams.traced_once, DecodeStep, "plan", tracing_what_is_new_each_time),
    "another state": (streams.snapshot_restores, snapshot, "load_snapshot", swapping_values),
    "draws without their key": (
        *(streams.seeds, mx.random, "categorical"),
        lambda right: lambda logits, key=None: right(logits),
    ),
    "one key for all": (streams.seeds, mx.random, "split", lambda _: lambda other: (KEY, KEY)),
    "streams without a seed that are alike": (
        *(streams.seeds, Sampling, "with_seed"),
        lambda _: lambda self: replace(self, seed=self.seed or 3),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(model, monkeypatch, fault):
    check, owner, name, make_wrong = FAULTS[fault]
    monkeypatch.setenv(backend.COMPILE, "1")
    assert check(model).holds is True
    monkeypatch.setattr(owner, name, make_wrong(getattr(owner, name)))
    assert check(model).holds is False


def test_a_missing_kernel_is_found(model, monkeypatch):
    """The CPU refuses `force_fused`, as Metal does for shapes without a kernel."""
    if backend.on_metal():
        pytest.skip("Metal has the kernel")
    monkeypatch.setattr(backend, "on_metal", lambda: True)
    found = kernels.fused_attention(model)
    assert found.holds is False and "head size 64, 1 tokens: " in found.what
    monkeypatch.setattr(
        mx.fast,
        "scaled_dot_product_attention",
        lambda *arrays, force_fused, **rest: attend(*arrays, **rest),
    )
    assert kernels.fused_attention(model).holds is True


def test_a_check_that_does_not_apply_says_why(tiny_model, monkeypatch):
    monkeypatch.setenv(backend.COMPILE, "0")
    small = tiny_model(max_position_embeddings=64)
    for check, why in ((streams.in_place, "too small"), (streams.traced_once, backend.COMPILE)):
        found = check(small)
        assert found.holds is None and why in found.what


def test_a_check_that_mlx_refuses_fails(model, monkeypatch):
    def refuse(*arrays: mx.array, **settings: Any) -> mx.array:
        raise RuntimeError("[metal] no kernel\nof that name")

    monkeypatch.setattr(mx, "quantized_matmul", refuse)
    [found] = [one for one in selftest.run(model) if one.holds is False]
    assert found.found == "MLX error: [metal] no kernel of that name"
    assert "--dequantize" in found.advice


# --- the command ---


def test_the_command_prints_every_check(tiny):
    result = done("doctor", tiny, "--self-test", "--json")
    found = parsed(result.out)
    assert found.keys() == {"model", "dtype", "holds", "checks", "machine"}
    assert (found["model"], found["dtype"], found["holds"]) == (str(tiny), "float32", True)
    assert [one["check"] for one in found["checks"]] == [one.name for one in selftest.CHECKS]
    assert result.err.count("\n") == len(selftest.CHECKS)


def test_the_command_exits_with_1_and_gives_advice(monkeypatch):
    right = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", lambda *a, **more: right(*a, **more) + 1)
    result = run("doctor", "--self-test")
    assert result.code == 1
    assert "NO     off by" in result.out
    assert result.out.splitlines()[-1] == (
        "- quantized matmuls equal those of the dequantized weights: update MLX; until then load "
        "with --dequantize"
    )


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["starter"], "are for --self-test"),
        (["--dtype", "float16"], "are for --self-test"),
        (["--self-test", "--keep-quantized"], "give MODEL"),
        (["--self-test", "--dtype", "int8"], "--dtype must be one of"),
        (["--self-test", "./nowhere"], "no such folder or file"),
    ],
)
def test_options_that_exclude_each_other_are_refused(options, expected):
    result = run("doctor", *options)
    assert (result.code, result.out) == (1, "")
    assert expected in result.err and result.err.count("\n") == 1
