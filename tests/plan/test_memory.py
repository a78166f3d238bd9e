"""Bytes of weights, ring and workspace, compared with real modules, buffers and steps."""

import json
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_stream.cache import StreamCache
from mlx_stream.cache.stream import CLOCK_LIMIT
from mlx_stream.config import ModelConfig, Quantization, read_config
from mlx_stream.generate.model import Model
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.load import load
from mlx_stream.models import layout
from mlx_stream.models.layout import QuantizationOf
from mlx_stream.models.window import PREFILL_CHUNK
from mlx_stream.plan import memory
from mlx_stream.plan.memory import uniform_quantization
from tests.fakes.shapes import Shape, shapes
from tests.fakes.tiny import tiny_config, tiny_weights, write_tiny
from tests.fakes.tiny_models import make, tensors_of

PUBLISHED = Path(__file__).parents[1] / "fakes" / "published"
# As their makers count them.
PARAMETERS = {
    "SmolLM2-135M": 134_515_008,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Llama-3.1-8B": 8_030_261_248,
    "Mistral-7B-v0.3": 7_248_023_552,
    "Mistral-Nemo-12B": 12_247_782_400,
}
DTYPES = {4: mx.float32, 2: mx.bfloat16}
WIDE = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3}


def config_of(**changes) -> ModelConfig:
    return read_config(tiny_config(**changes))


# --- weights ---


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_configs_have_as_many_parameters_as_published(name):
    config = read_config(json.loads((PUBLISHED / f"{name}.json").read_text()))
    assert layout.layout_of(config).parameters == PARAMETERS[name]


def built(raw: dict, held: QuantizationOf, dtype: mx.Dtype) -> Model:
    """Build a model whose matrices are quantized by MLX itself, as `held` says."""
    tensors = tensors_of(raw)
    recipe: dict = {"group_size": 64, "bits": 4}
    for part in layout.layout_of(read_config(raw)).matrices:
        quantization = held(part)
        recipe[part.path] = False
        if quantization is not None:
            settings: dict[str, Any] = {"group_size": quantization.group_size}
            settings["bits"] = quantization.bits
            recipe[part.path] = settings
            packed = mx.quantize(tensors[f"{part.path}.weight"], **settings)
            for kind, array in zip(("weight", "scales", "biases"), packed, strict=True):
                tensors[f"{part.path}.{kind}"] = array
    return make({**raw, "quantization": recipe}, tensors, dtype, keep_quantized=True)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("itemsize", [4, 2])
@pytest.mark.parametrize("bits", memory.BITS)
def test_weights_take_what_their_modules_take(bits, itemsize, tied):
    # Groups of 64 divide 64 and 128 inputs, not the 96 of the down projection, which
    # stays in floats.
    raw = tiny_config(tie_word_embeddings=tied, attention_bias=True, num_hidden_layers=3)
    held = uniform_quantization(bits)
    model = built(raw, held, DTYPES[itemsize])
    parameters = cast(list[tuple[str, mx.array]], tree_flatten(model.network.parameters()))
    allocated = sum(array.nbytes for _, array in parameters)
    assert layout.weights_bytes(layout.layout_of(model.config), held, itemsize) == allocated
    assert model.weight_bytes == allocated


def test_a_matrix_in_another_mode_has_no_biases():
    part = next(layout.layout_of(config_of()).matrices)
    packed = mx.quantize(mx.zeros((part.outputs, part.inputs)), 32, 4, mode="mxfp4")
    held = Quantization(32, 4, "mxfp4")
    assert layout.part_bytes(part, held, 2) == sum(array.nbytes for array in packed)


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_loading_peaks_where_the_last_parts_lie_beside_their_joined_copy(stored, tmp_path):
    raw = tiny_config(**WIDE | {"hidden_size": 512, "tie_word_embeddings": True})
    folder = write_tiny(tmp_path / "model", raw, tiny_weights(raw), dtype=stored)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load(folder, dtype="float32")
    measured = mx.get_peak_memory() - before
    shapes, held = layout.layout_of(model.config), uniform_quantization(16)
    file = 4 if stored == "float32" else 2
    planned = memory.loading_bytes(shapes, held, held, 4, file)
    assert model.weight_bytes < planned
    assert measured == pytest.approx(planned, rel=0.1)


# --- keys and values ---


@given(shape=shapes)
def test_a_ring_takes_what_it_allocates(shape: Shape):
    config = config_of(
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.kv_heads * shape.group,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
    )
    itemsize = shape.dtype.size
    planned = layout.ring_bytes(config, shape.sinks, shape.window, itemsize, spare=shape.spare)
    assert planned == shape.cache().nbytes


@pytest.mark.parametrize(("bits", "share"), [(8, 0.53125), (4, 0.28125)])
def test_a_quantized_ring_takes_its_share_and_sinks_stay_whole(bits, share):
    config = config_of(head_dim=64)
    full = layout.ring_bytes(config, 0, 1_000, 2)
    assert layout.ring_bytes(config, 0, 1_000, 2, bits) == share * full
    sinks = layout.ring_bytes(config, 7, 1_000, 2) - full
    assert layout.ring_bytes(config, 7, 1_000, 2, bits) == share * full + sinks


# --- workspace ---


def after(cache: StreamCache, length: int) -> StreamCache:
    """Return a stream's cache as it is after `length` tokens, without reading them."""
    state = cache.state()
    state |= {"length": length, "clock": length, "sinks_at": -1}
    cache.restore(state)
    return cache


@example(heads=32, sinks=4, window=8_188)
@given(heads=st.integers(1, 40), sinks=st.integers(1, 9), window=st.integers(1, 40_000))
def test_the_longest_chunk_is_what_the_cache_takes(heads, sinks, window):
    shape = Shape(sinks, window, group=heads, head_dim=2, layers=1, clock_limit=CLOCK_LIMIT)
    cache = after(shape.cache(), sinks + window)
    config = config_of(num_attention_heads=heads, num_key_value_heads=1)
    assert memory.longest_moving_chunk(config, sinks, window) == cache.max_step(PREFILL_CHUNK)


WORKS = [
    ({"num_attention_heads": 8, "head_dim": 64}, 2_044),
    ({"num_attention_heads": 2, "head_dim": 64}, 508),
    ({"num_attention_heads": 8, "head_dim": 32}, 4_092),
    ({"num_hidden_layers": 16}, 1_020),
    ({"intermediate_size": 4_096}, 508),
]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(("changes", "window"), WORKS)
def test_the_workspace_is_what_a_chunk_holds(changes, window, dtype):
    raw = tiny_config(max_position_embeddings=8_192, **{**WIDE, **changes})
    model = make(raw, tensors_of(raw), dtype)
    planned = memory.workspace_bytes(model.config, 4, window, dtype.size)
    # The last chunk that fits the ring, and the first that moves the oldest token.
    peaks = [chunk_peak(model, window, length) for length in (window - 124, window + 4)]
    assert max(peaks) == pytest.approx(planned, rel=0.1)


def chunk_peak(model: Model, window: int, length: int) -> int:
    """Return the peak bytes that one chunk holds after `length` tokens."""
    cache = after(model.new_cache(4, window), length)
    stream = TokenStream(model, cache)
    ids = [7] * cache.max_step(PREFILL_CHUNK)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    list(stream.steps(ids))
    return mx.get_peak_memory() - before


def test_a_fused_kernel_or_no_sinks_take_less():
    config = config_of(head_dim=64)
    sinks = memory.workspace_bytes(config, 1, 2_047, 4)
    assert memory.workspace_bytes(config, 1, 2_047, 4, fused=True) < sinks
    assert memory.workspace_bytes(config, 0, 2_048, 4) < sinks
    fused = [memory.is_fused(config_of(head_dim=size), metal=True) for size in (64, 256)]
    assert fused == [True, False] and not memory.is_fused(config, metal=False)


# --- a step, and a forged config ---


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_the_head_but_not_the_embedding(tied):
    config = config_of(tie_word_embeddings=tied)
    shapes, held = layout.layout_of(config), uniform_quantization(16)
    table = config.vocab_size * config.hidden_size * 2
    weights = layout.weights_bytes(shapes, held, 2)
    read = memory.step_bytes(config, shapes, held, 2, ring=1_000)
    assert read == weights + 1_000 - (0 if tied else table)


def test_a_forged_config_is_a_number_not_an_allocation():
    before = mx.get_active_memory()
    config = config_of(
        hidden_size=2**30, intermediate_size=2**31 - 1, vocab_size=2**31 - 1, num_hidden_layers=50
    )
    shapes = layout.layout_of(config)
    assert layout.weights_bytes(shapes, uniform_quantization(16), 2) > 2**60
    assert memory.workspace_bytes(config, 4, 500, 2) > 2**40
    assert mx.get_active_memory() == before
