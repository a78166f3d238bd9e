"""`doctor --self-test`: every check holds here, and fails when what it checks is broken."""

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from mlx_stream import backend, selftest
from mlx_stream.cache import AttentionShape, StreamCache
from mlx_stream.cache.geometry import Geometry
from mlx_stream.cache.positions import Rope
from mlx_stream.cache.steps.decode import DecodeStep
from mlx_stream.generate import snapshot
from mlx_stream.sampling import Sampling
from mlx_stream.selftest import kernels, streams
from mlx_stream.selftest.tiny_model import make_tiny_model
from tests.fakes.shell import done, parsed, run


@pytest.fixture(scope="module")
def model():
    return make_tiny_model()


attend = mx.fast.scaled_dot_product_attention


def test_every_check_holds_here_or_is_said_not_to_apply(model):
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
def test_it_takes_the_shapes_and_the_dtype_of_the_model_at_hand(tiny_model, dtype, changes):
    model = tiny_model(dtype, **changes)
    assert [one.check for one in selftest.run(model) if one.holds is False] == []


# --- each check, what it checks being broken ---


def test_a_rotation_the_wrong_way_is_seen(model, monkeypatch):
    right = Rope._apply
    monkeypatch.setattr(Rope, "_apply", lambda self, x, at, scale: right(self, x, at, -scale))
    assert kernels.rotation(model).holds is False


def test_a_position_that_overflows_is_seen(model, monkeypatch):
    right = Rope._apply
    wrong = mx.array([2**31 - 1], mx.int32)
    monkeypatch.setattr(
        Rope, "_apply", lambda self, x, at, scale: right(self, x, wrong if scale < 0 else at, scale)
    )
    assert kernels.rotation(model).holds is False


@pytest.mark.parametrize("fault", ["mask", "heads", "scale", "nan"])
def test_wrong_attention_is_seen(model, monkeypatch, fault):
    def wrong(queries, keys, values, *, scale, mask=None):
        if fault == "mask":
            return attend(queries, keys, values, scale=scale)
        if fault == "heads":
            return attend(queries, keys[:, ::-1], values[:, ::-1], scale=scale, mask=mask)
        out = attend(queries, keys, values, scale=2 * scale, mask=mask)
        return out if fault == "scale" else out * float("nan")

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", wrong)
    assert kernels.attention(model).holds is False


def test_a_kernel_that_is_not_there_is_seen(model, monkeypatch):
    """As on a Mac: the CPU refuses `force_fused`, as Metal does for shapes it has no kernel for."""
    if backend.on_metal():
        pytest.skip("Metal has the kernel")
    monkeypatch.setattr(backend, "on_metal", lambda: True)
    found = kernels.fused_attention(model)
    assert found.holds is False and "heads of 64 numbers, 1 tokens: " in found.what
    # And with a kernel that is there:
    monkeypatch.setattr(
        mx.fast,
        "scaled_dot_product_attention",
        lambda *arrays, force_fused, **rest: attend(*arrays, **rest),
    )
    assert kernels.fused_attention(model).holds is True


def test_a_wrong_quantized_product_is_seen(model, monkeypatch):
    right = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", lambda *a, **more: 1.1 * right(*a, **more))
    assert kernels.quantized_product(model).holds is False


@pytest.mark.parametrize("method", ["sinks_clock", "row", "oldest"])
def test_a_wrong_place_is_seen(model, monkeypatch, method):
    right = getattr(Geometry, method)
    wrong = {
        "sinks_clock": lambda self, place, token: right(self, place, token) - 1,
        "row": lambda self, token: right(self, max(token - 1, 0)),
        "oldest": lambda self, place, token: right(self, place, token) + 1,
    }
    monkeypatch.setattr(Geometry, method, wrong[method])
    assert streams.places(model).holds is False


def test_a_ring_that_is_not_turned_back_is_seen(model, monkeypatch):
    right = Rope.rotate_all

    def wrong(self: Rope, x: mx.array, position: int, backwards: bool = False) -> mx.array:
        return right(self, x, position + 5 if backwards else position, backwards)

    monkeypatch.setattr(Rope, "rotate_all", wrong)
    assert streams.places(model).holds is False


def test_a_chunk_that_sees_too_much_is_seen(model, monkeypatch):
    right = Geometry.blocks

    def wrong(self: Geometry, rows: int) -> Any:
        blocks = right(self, rows)
        for block in blocks:
            block.mask[:, 1:] |= block.mask[:, :-1]
        return blocks

    monkeypatch.setattr(Geometry, "blocks", wrong)
    assert streams.chunks(model).holds is False


def test_a_held_buffer_is_seen(model, monkeypatch):
    right, held = StreamCache.commit, []

    def wrong(self: StreamCache, step: Any) -> None:
        held[:] = [self.current.keys[0]]
        right(self, step)

    monkeypatch.setattr(StreamCache, "commit", wrong)
    assert streams.in_place(model).holds is False


def test_a_window_too_small_to_tell_is_said_to_be(tiny_model):
    found = streams.in_place(tiny_model(max_position_embeddings=64))
    assert found.holds is None and "too small" in found.what


def test_a_step_that_is_traced_again_is_seen(model, monkeypatch):
    """As if a number that grows were a part of what is fixed in a trace."""
    monkeypatch.setenv(backend.COMPILE, "1")
    assert streams.traced_once(model).holds is True
    right = DecodeStep.plan

    def wrong(shape: AttentionShape, *rest: Any) -> DecodeStep:
        step = right(shape, *rest)
        growing = shape.layers + rest[-1].position.length
        step.kind = replace(step.kind, shape=replace(shape, layers=growing))
        return step

    monkeypatch.setattr(DecodeStep, "plan", wrong)
    assert streams.traced_once(model).holds is False


def test_where_nothing_is_traced_that_is_said(tiny_model, monkeypatch):
    monkeypatch.setenv(backend.COMPILE, "0")
    found = streams.traced_once(tiny_model())
    assert found.holds is None and "MLX_STREAM_COMPILE" in found.what


def test_draws_without_their_key_are_seen(model, monkeypatch):
    right = mx.random.categorical
    monkeypatch.setattr(mx.random, "categorical", lambda logits, key=None: right(logits))
    assert "one seed gave two texts" in streams.seeds(model).what


def test_one_key_for_all_is_seen(model, monkeypatch):
    key = mx.random.key(0)
    monkeypatch.setattr(mx.random, "split", lambda other: (key, key))
    assert streams.seeds(model).what == "two seeds gave one text; every draw was the same"


def test_unseeded_streams_that_are_the_same_are_seen(model, monkeypatch):
    monkeypatch.setattr(Sampling, "with_seed", lambda self: replace(self, seed=self.seed or 3))
    assert streams.seeds(model).what == "without a seed two were the same"


def test_a_state_that_comes_back_otherwise_is_seen(model, monkeypatch):
    right = snapshot.load_snapshot

    def wrong(path: Any) -> snapshot.Snapshot:
        found = right(path)
        return replace(found, state={**found.state, "values.0": found.state["values.1"]})

    monkeypatch.setattr(snapshot, "load_snapshot", wrong)
    assert streams.snapshot_restores(model).holds is False


def test_what_mlx_refuses_does_not_hold(model, monkeypatch):
    def refuse(*arrays: mx.array, **settings: Any) -> mx.array:
        raise RuntimeError("[metal] no kernel\nof that name")

    monkeypatch.setattr(mx, "quantized_matmul", refuse)
    [found] = [one for one in selftest.run(model) if one.holds is False]
    assert found.found == "MLX refused: [metal] no kernel of that name"
    assert "--dequantize" in found.advice


# --- the command ---


def test_the_command_says_what_holds(tiny):
    result = done("doctor", tiny, "--self-test", "--json")
    found = parsed(result.out)
    assert found.keys() == {"model", "dtype", "holds", "checks", "machine"}
    assert (found["model"], found["dtype"], found["holds"]) == (str(tiny), "float32", True)
    assert [one["check"] for one in found["checks"]] == [one.name for one in selftest.CHECKS]
    assert result.err.count("\n") == len(selftest.CHECKS)


def test_the_command_exits_with_1_and_says_what_to_do(monkeypatch):
    right = mx.quantized_matmul
    monkeypatch.setattr(mx, "quantized_matmul", lambda *a, **more: right(*a, **more) + 1)
    result = run("doctor", "--self-test")
    assert result.code == 1
    assert "NO     off by" in result.out
    assert result.out.splitlines()[-1] == (
        "- quantized products are those of the dequantized weights: update MLX; until then load "
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
def test_options_that_do_not_go_together_are_refused(options, expected):
    result = run("doctor", *options)
    assert (result.code, result.out) == (1, "")
    assert expected in result.err and result.err.count("\n") == 1
