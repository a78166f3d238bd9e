"""Models against mlx-lm and the slow reference; weights that fit and weights that do not."""

import functools
import json
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from mlx_lm.models import llama as mlx_lm_llama
from reference import SlowLlama
from tiny import tiny_config, tiny_weights

from mlx_stream.cache import Cache, StreamCache
from mlx_stream.config import read_config
from mlx_stream.errors import ConfigError, ValueRefused, WeightsError
from mlx_stream.generate import TokenStream
from mlx_stream.load import Model
from mlx_stream.models import CausalLM
from mlx_stream.rope import Rope
from mlx_stream.weights import SideBySide, build, weight_bytes

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
MISTRAL = {"model_type": "mistral"}

Tensors = dict[str, mx.array]


def make(
    raw: dict,
    tensors: Tensors,
    dtype: mx.Dtype = mx.float32,
    keep_quantized: bool = False,
) -> Model:
    """Build a model of tensors, without a tokenizer; the tensors are used up."""
    config = read_config(raw)
    needed = weight_bytes(config, tensors, dtype, keep_quantized)
    network = build(config, tensors, dtype, keep_quantized)
    assert not tensors, "the caller's handles are dropped"
    rope = Rope(config.rope, config.head_dim)
    nothing = cast(Any, None)
    return Model("tiny", config, network, nothing, rope, dtype, keep_quantized, needed)


def tensors_of(raw: dict, seed: int = 0) -> Tensors:
    return {name: mx.array(w) for name, w in tiny_weights(raw, seed).items()}


def some_ids(count: int, seed: int = 1) -> list[int]:
    return np.random.default_rng(seed).integers(0, 300, count).tolist()


def all_logits(model: Model, cache: Cache, ids: list[int], chunk: int) -> np.ndarray:
    """Return the logits (n, V) after each token."""
    stream = TokenStream(model, cache)
    hidden = mx.concatenate(list(stream.steps(ids, chunk)), axis=1)
    return np.array(model.network.logits(hidden)[0].astype(mx.float32))


def read_in_all_ways(model: Model, ids: list[int]) -> Iterable[np.ndarray]:
    window = len(ids) + 3
    yield all_logits(model, model.new_dense_cache(), ids, 17)
    yield all_logits(model, model.new_dense_cache(), ids[:20], 1)
    yield all_logits(model, model.new_cache(4, window), ids, 31)
    yield all_logits(model, model.new_cache(0, window), ids, 1)
    yield all_logits(model, model.new_cache(7, window, spare=5), ids, 500)


def peer_of(raw: dict, tensors: Tensors) -> mlx_lm_llama.Model:
    peer = mlx_lm_llama.Model(mlx_lm_llama.ModelArgs.from_dict(raw))
    peer.load_weights(list(tensors.items()))
    return peer


# -- a window that holds the text: as mlx-lm computes it ------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": None},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": True, "attention_bias": True, "num_key_value_heads": 1},
        {"head_dim": 24},
        {"head_dim": None, "hidden_size": 48},
        {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1},
        {"rope_theta": 500.0},
        {"rms_norm_eps": 0.1},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": YARN},
        {"rope_scaling": YARN | {"beta_fast": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3}},
        MISTRAL,
        {**MISTRAL, "tie_word_embeddings": True, "num_key_value_heads": 1},
    ],
    ids=str,
)
def test_dense_and_wide_streams_equal_mlx_lm(changes):
    raw = tiny_config(**changes)
    ids = some_ids(70)
    expected = np.array(peer_of(raw, tensors_of(raw))(mx.array(ids)[None])[0])
    model = make(raw, tensors_of(raw))
    for logits in read_in_all_ways(model, ids):
        np.testing.assert_allclose(logits, expected[: len(logits)], atol=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_theta": 1e5, **LLAMA3}},
        {"rope_parameters": {"rope_theta": 1e4, **YARN}},
        {"rope_scaling": YARN | {"attention_factor": 0.6}},
        {"rope_scaling": YARN | {"truncate": False}},
        {**MISTRAL, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
    ],
    ids=str,
)
def test_where_mlx_lm_is_wrong_the_reference_counts(changes):
    raw = tiny_config(**changes)
    ids = some_ids(70)
    expected = SlowLlama(raw, tiny_weights(raw), 0, None).logits(ids)
    model = make(raw, tensors_of(raw))
    for logits in read_in_all_ways(model, ids):
        np.testing.assert_allclose(logits, expected[: len(logits)], atol=1e-3)


def test_the_sliding_window_of_a_mistral_bounds_the_window():
    raw = tiny_config(**MISTRAL, sliding_window=20)
    ids = some_ids(90)
    expected = SlowLlama(raw, tiny_weights(raw), 4, 60).logits(ids)
    model = make(raw, tensors_of(raw))
    notices: list[str] = []
    cache = model.new_cache(4, 60, notify=notices.append)
    assert (cache.geometry.window, len(notices)) == (20, 1)
    assert "60" in notices[0] and "20" in notices[0] and "\n" not in notices[0]
    np.testing.assert_allclose(all_logits(model, cache, ids, 37), expected, atol=1e-3)
    model.new_cache(4, 20, notify=notices.append)
    assert len(notices) == 1


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16], ids=str)
def test_half_precision_is_near(dtype):
    raw = tiny_config()
    ids = some_ids(90)
    expected = SlowLlama(raw, tiny_weights(raw), 4, 30).logits(ids)
    model = make(raw, tensors_of(raw), dtype)
    for chunk in (1, 37):
        logits = all_logits(model, model.new_cache(4, 30), ids, chunk)
        error = np.abs(logits - expected).mean()
        assert error < (6e-3 if dtype == mx.float16 else 5e-2)


# -- C: a stream, against the reference -----------------------------------------------------------

TEXT = some_ids(300, seed=7)


@functools.cache
def streaming_reference(sinks: int, window: int) -> np.ndarray:
    raw = tiny_config()
    return SlowLlama(raw, tiny_weights(raw), sinks, window).logits(TEXT)


def nll(logits: np.ndarray) -> np.ndarray:
    logits = logits.astype(np.float64)[:-1]
    chosen = logits[np.arange(len(logits)), TEXT[1:]]
    return np.log(np.exp(logits).sum(axis=-1)) - chosen


@pytest.mark.parametrize("chunk", [1, 7, 37, 128, 500])
@pytest.mark.parametrize("window", [20, 60, 100])
@pytest.mark.parametrize("sinks", [0, 1, 4, 32])
def test_streams_equal_the_reference(tiny_model, sinks, window, chunk):
    model = tiny_model()
    expected = streaming_reference(sinks, window)
    cache = model.new_cache(sinks, window)
    logits = all_logits(model, cache, TEXT, chunk)
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    np.testing.assert_allclose(nll(logits), nll(expected), atol=2e-3)
    assert cache.attended == sinks + window
    assert cache.evicted == 300 - sinks - window


@pytest.mark.parametrize("chunk", [1, 50])
def test_models_stream_over_reanchorings_with_yarn_and_biases(chunk):
    raw = tiny_config(rope_scaling=YARN, attention_bias=True, num_key_value_heads=1)
    expected = SlowLlama(raw, tiny_weights(raw), 3, 20).logits(TEXT)
    model = make(raw, tensors_of(raw))
    cache = StreamCache(2, 4, 1, 16, model.rope, 3, 20, clock_limit=0)
    np.testing.assert_allclose(all_logits(model, cache, TEXT, chunk), expected, atol=1e-3)


# -- quantized checkpoints ------------------------------------------------------------------------

# How mlx-lm writes a recipe: a default, overrides by path, false for what is not quantized.
FOUR_BITS = {"group_size": 32, "bits": 4}
MIXED = {
    **FOUR_BITS,
    "model.layers.0.self_attn.v_proj": {"group_size": 32, "bits": 8},
    "model.layers.1.mlp.up_proj": {"group_size": 64, "bits": 4},
    "model.layers.1.self_attn.q_proj": False,
    "lm_head": {"group_size": 32, "bits": 6},
}
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}
RECIPES = {"4 bits": FOUR_BITS, "mixed": MIXED, "mxfp4": MXFP4}


def settings_of(recipe: dict, path: str) -> dict[str, Any] | None:
    override = recipe.get(path)
    if override is False:
        return None
    return override or {key: v for key, v in recipe.items() if not isinstance(v, dict | bool)}


def quantize(raw: dict, recipe: dict) -> tuple[dict, Tensors, dict[str, np.ndarray]]:
    """Return a config and tensors as mlx-lm writes them, and the weights they stand for."""
    tensors, plain = {}, {}
    for name, weight in tensors_of(raw).items():
        path = name.removesuffix(".weight")
        settings = settings_of(recipe, path)
        if weight.ndim == 1 or settings is None:
            tensors[name], plain[name] = weight, np.array(weight)
            continue
        parts = mx.quantize(weight, **settings)
        for suffix, part in zip(("weight", "scales", "biases"), parts, strict=False):
            tensors[f"{path}.{suffix}"] = part
        plain[name] = np.array(mx.dequantize(*parts, **settings).astype(mx.float32))
    return {**raw, "quantization": recipe, "quantization_config": recipe}, tensors, plain


# Inputs of 64 and 128 can be divided into groups of 32 and 64.
QUANTIZABLE: dict = {"intermediate_size": 128}


@pytest.mark.parametrize("keep_quantized", [True, False], ids=["kept", "dequantized"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_quantized_checkpoints(recipe, tied, keep_quantized):
    raw = tiny_config(**QUANTIZABLE, tie_word_embeddings=tied, attention_bias=True)
    config, tensors, plain = quantize(raw, recipe)
    ids = some_ids(60)
    expected = SlowLlama(raw, plain, 4, 30).logits(ids)
    model = make(config, tensors, keep_quantized=keep_quantized)
    kinds = {type(module) for _, module in model.network.named_modules()}
    assert (nn.QuantizedLinear in kinds) == keep_quantized
    assert (nn.QuantizedEmbedding in kinds) == keep_quantized
    assert (SideBySide in kinds) == (keep_quantized and recipe is MIXED)
    for chunk in (1, 25):
        logits = all_logits(model, model.new_cache(4, 30), ids, chunk)
        np.testing.assert_allclose(logits, expected, atol=1e-3)


@pytest.mark.parametrize("keep_quantized", [True, False], ids=["kept", "dequantized"])
def test_quantized_models_equal_mlx_lm_s(keep_quantized):
    raw = tiny_config(**QUANTIZABLE)
    peer = peer_of(raw, tensors_of(raw))

    def predicate(path: str, module: nn.Module) -> bool | dict:
        if not hasattr(module, "to_quantized"):
            return False
        return cast(bool | dict, MIXED.get(path, True))

    nn.quantize(peer, group_size=32, bits=4, class_predicate=predicate)
    tensors = cast(Tensors, dict(cast(list, tree_flatten(peer.parameters()))))
    assert "model.layers.0.self_attn.v_proj.scales" in tensors
    assert "model.layers.1.self_attn.q_proj.scales" not in tensors
    ids = some_ids(40)
    expected = np.array(peer(mx.array(ids)[None])[0])
    model = make({**raw, "quantization": MIXED}, tensors, keep_quantized=keep_quantized)
    for chunk in (1, 40):
        logits = all_logits(model, model.new_dense_cache(), ids, chunk)
        np.testing.assert_allclose(logits, expected, atol=1e-3)


def test_joined_projections_are_one_module_and_their_parts_are_gone():
    raw, tensors, _ = quantize(tiny_config(**QUANTIZABLE), MIXED)
    network = make(raw, tensors, keep_quantized=True).network
    shapes = {name: array.shape for name, array in parameters(network).items()}
    # Layer 0: V has 8 bits. Layer 1: Q is not quantized. Up has other groups than gate there.
    assert shapes["layers.0.self_attn.qkv_proj.parts.2.weight"] == (32, 16)
    assert shapes["layers.0.mlp.gate_up_proj.weight"] == (256, 8)
    assert shapes["layers.1.self_attn.qkv_proj.parts.0.weight"] == (64, 64)
    assert "layers.1.mlp.gate_up_proj.parts.1.scales" in shapes
    plain = parameters(make(tiny_config(), tensors_of(tiny_config())).network)
    assert plain["layers.1.self_attn.qkv_proj.weight"].shape == (128, 64)
    assert plain["layers.1.mlp.gate_up_proj.weight"].shape == (192, 64)


def parameters(network: CausalLM) -> Tensors:
    return cast(Tensors, dict(cast(list, tree_flatten(network.parameters()))))


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16], ids=str)
@pytest.mark.parametrize("keep_quantized", [True, False], ids=["kept", "dequantized"])
@pytest.mark.parametrize("recipe", [None, *RECIPES.values()], ids=["plain", *RECIPES])
@pytest.mark.parametrize(
    "changes",
    [{}, {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 32}],
    ids=["untied", "tied, biases"],
)
def test_weight_bytes_are_those_of_the_built_model(changes, recipe, keep_quantized, dtype):
    raw = tiny_config(**QUANTIZABLE, **changes)
    tensors = tensors_of(raw)
    if recipe is not None:
        raw, tensors, _ = quantize(raw, recipe)
    model = make(raw, tensors, dtype, keep_quantized)
    held = parameters(model.network)
    assert model.weight_bytes == sum(array.nbytes for array in held.values())
    assert {array.dtype for array in held.values()} <= {dtype, mx.uint32, mx.uint8}


# -- weights that do not fit ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.layers.0.self_attn.o_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.0.self_attn.v_proj.bias",
    ],
)
@pytest.mark.parametrize("fault", ["missing", "transposed", "longer", "int32", "uint32"])
def test_what_is_wrong_with_a_tensor_is_said_with_its_name(name, fault):
    raw = tiny_config(attention_bias=True)
    tensors = tensors_of(raw)
    tensor = tensors.pop(name)
    if fault == "transposed":
        tensor = mx.expand_dims(tensor, 0) if tensor.ndim == 1 else tensor.reshape(-1)
    elif fault == "longer":
        tensor = mx.concatenate([tensor, tensor[:1]])
    elif fault != "missing":
        tensor = tensor.astype(getattr(mx, fault))
    if fault != "missing":
        tensors[name] = tensor
    with pytest.raises(WeightsError, match=r"^weights: [^\n]*$") as error:
        make(raw, tensors)
    assert repr(name) in str(error.value)
    wanted = {"missing": "missing", "int32": "int32", "uint32": "uint32"}
    assert wanted.get(fault, "shape") in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.layers.0.mlp.gate_proj.weight.lora_a",
        "lm_head.bias",
        "anything",
    ],
)
def test_unknown_tensors_are_refused_by_name(name):
    raw = tiny_config()
    tensors = tensors_of(raw) | {name: mx.zeros(4)}
    with pytest.raises(WeightsError, match=r"unknown tensor [^\n]*$") as error:
        make(raw, tensors)
    assert repr(name) in str(error.value)


def test_a_mistral_has_no_biases_whatever_its_config_says():
    raw = tiny_config()
    biased = tensors_of(tiny_config(attention_bias=True))
    mistral = tiny_config(**MISTRAL, attention_bias=True, mlp_bias=True)
    make(mistral, tensors_of(raw))
    with pytest.raises(WeightsError, match=r"self_attn\.k_proj\.bias"):
        make(mistral, biased)


def test_old_buffers_and_the_copy_of_a_tied_embedding_are_dropped():
    raw = tiny_config(tie_word_embeddings=True)
    tensors = tensors_of(raw)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.zeros(8)
    tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = mx.zeros(8)
    tensors["lm_head.weight"] = mx.full((300, 64), 7.0)
    ids = some_ids(10)
    model = make(raw, tensors)
    expected = SlowLlama(raw, tiny_weights(raw), 0, None).logits(ids)
    got = all_logits(model, model.new_dense_cache(), ids, 10)
    np.testing.assert_allclose(got, expected, atol=1e-3)


def quantized_tensors() -> tuple[dict, Tensors]:
    raw, tensors, _ = quantize(tiny_config(**QUANTIZABLE), FOUR_BITS)
    return raw, tensors


@pytest.mark.parametrize("keep_quantized", [True, False], ids=["kept", "dequantized"])
@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.layers.0.self_attn.k_proj.biases", None),
        ("model.layers.0.self_attn.k_proj.weight", None),
        ("model.layers.0.self_attn.k_proj.scales", None),
        ("model.embed_tokens.scales", None),
        ("model.embed_tokens.weight", lambda w: w[:, :-1]),
        ("model.embed_tokens.weight", lambda w: w.astype(mx.int32)),
        ("lm_head.scales", lambda w: w[:, :1]),
        ("lm_head.scales", lambda w: w.astype(mx.uint8)),
        ("model.layers.1.mlp.down_proj.biases", lambda w: w.T),
        ("model.layers.1.mlp.down_proj.biases", lambda w: w.astype(mx.uint32)),
    ],
)
def test_quantized_tensors_that_do_not_fit(name, change, keep_quantized):
    raw, tensors = quantized_tensors()
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor)
    path = name.rpartition(".")[0]
    with pytest.raises(WeightsError, match=r"^weights: [^\n]*$") as error:
        make(raw, tensors, keep_quantized=keep_quantized)
    assert path in str(error.value)


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (None, "does not say how it is quantized"),
        ({**FOUR_BITS, "model.layers.0.self_attn.q_proj": False}, "self_attn.q_proj"),
        ({"group_size": 128, "bits": 4}, "do not divide"),
        ({"group_size": 64, "bits": 4}, "shape"),
        ({"group_size": 32, "bits": 8}, "shape"),
    ],
)
def test_scales_that_the_config_does_not_explain(quantization, expected):
    raw, tensors = quantized_tensors()
    del raw["quantization_config"]
    with pytest.raises(WeightsError, match=expected):
        make({**raw, "quantization": quantization}, tensors)


@pytest.mark.parametrize("group_size", [16, 32, 64, 128])
@pytest.mark.parametrize("mode, bits", [("affine", 4), ("mxfp4", 4), ("mxfp8", 8), ("nvfp4", 4)])
def test_the_config_accepts_what_mlx_can_compute_and_nothing_else(mode, bits, group_size):
    settings: dict[str, Any] = {"group_size": group_size, "bits": bits, "mode": mode}
    raw = tiny_config(hidden_size=128, intermediate_size=128, quantization=settings)
    try:
        mx.eval(mx.quantize(mx.zeros((64, 128)), **settings))
    except (ValueError, RuntimeError):
        with pytest.raises(ConfigError):
            read_config(raw)
    else:
        read_config(raw)


# -- the stream of ids ----------------------------------------------------------------------------


class OnlyIds:
    """A network that computes nothing, to drive a cache by ids."""

    def __call__(self, ids: list[int], cache: Cache) -> mx.array:
        step = cache.begin(len(ids))
        tokens = mx.array([[*ids, *[0] * (step.rows - step.count)]], mx.float32)
        step.attend(0, mx.broadcast_to(tokens[:, None, :, None], (1, 3, step.rows, 2)))
        cache.commit(step)
        return tokens[:, : step.count, None]

    def logits(self, hidden: mx.array) -> mx.array:
        return hidden


ONLY_IDS = cast(Model, SimpleNamespace(network=OnlyIds()))
operations = st.lists(
    st.tuples(
        st.sampled_from(["read", "decode", "evict", "rewind"]),
        st.integers(0, 5) | st.integers(0, 40),
    ),
    max_size=25,
)


@given(st.integers(0, 5), st.integers(1, 12), st.integers(0, 6), operations)
def test_attended_ids_are_those_the_cache_attends(sinks, window, spare, operations):
    rope = Rope(read_config(tiny_config()).rope, 2)
    cache = StreamCache(1, 1, 1, 2, rope, sinks, window, spare, clock_limit=0)
    stream = TokenStream(ONLY_IDS, cache)
    text: list[int] = []  # the id of each token, by its number
    for operation, amount in operations:
        if operation in ("read", "decode"):
            new = [1_000 + len(text) + i for i in range(max(1, amount))]
            text += new
            last = stream.read(new, chunk=1 if operation == "decode" else 7)
            assert last.item() == new[-1]
        elif operation == "rewind":
            count = min(amount, cache.rewindable)
            stream.rewind(count)
            del text[len(text) - count :]
        else:
            stream.evict(min(amount, cache.attended - min(cache.length, sinks)))
        first = range(min(sinks, len(text)))
        attended = [text[t] for t in (*first, *range(cache.oldest, len(text)))]
        assert stream.attended_ids() == attended
        assert stream.length == len(text)
        # The cache's values are the ids: what is attended is what is said to be.
        held = np.array(cache.values[0])[0, 0, cache.attended_rows(), 0]
        assert held.astype(int).tolist() == attended


def test_a_stream_can_go_back_into_its_sinks(tiny_model):
    stream = TokenStream(tiny_model(), tiny_model().new_cache(3, 10))
    stream.read([1, 2, 3, 4, 5])
    stream.rewind(4)
    assert stream.attended_ids() == [1]
    stream.read([6, 7, 8])
    assert stream.attended_ids() == [1, 6, 7, 8]
    stream.rewind(4)
    assert stream.attended_ids() == []


def test_refused_moves_leave_the_ids_as_they_were(tiny_model):
    stream = TokenStream(tiny_model(), tiny_model().new_cache(2, 10))
    stream.read(some_ids(30))
    before = stream.attended_ids()
    for refused in (stream.rewind, stream.evict):
        for count in (-1, 11):
            with pytest.raises(ValueRefused):
                refused(count)
    assert stream.attended_ids() == before == [*some_ids(30)[:2], *some_ids(30)[-10:]]


def test_reading_in_chunks_equals_reading_at_once_and_progress_adds_up(tiny_model):
    model = tiny_model()
    ids = some_ids(150)
    whole = TokenStream(model, model.new_dense_cache()).read(ids, 512)
    told: list[int] = []
    for chunk in (1, 7, 128):
        stream = TokenStream(model, model.new_cache(4, 200))
        logits = stream.read(ids, chunk, told.append)
        np.testing.assert_allclose(np.array(logits), np.array(whole), atol=1e-3)
        assert logits.shape == (300,)
        assert sum(told) == 150
        told.clear()
    with pytest.raises(ValueRefused):
        TokenStream(model, model.new_cache(4, 200)).read([])


@pytest.mark.parametrize(
    ("sinks", "window", "says"),
    [
        (-1, 10, "--sinks"),
        (512, 10, "--sinks"),
        (4, 0, "--window"),
        (4, -3, "--window"),
        (4, 509, "512.*508"),
        (511, None, None),
        (4, 508, None),
        (None, None, None),
    ],
)
def test_the_trained_context_bounds_a_stream(tiny_model, sinks, window, says):
    model = tiny_model()
    if says is None:
        cache = model.new_cache(sinks, window)
        assert cache.geometry.sinks + cache.geometry.window == 512
        return
    with pytest.raises(ValueRefused, match=says):
        model.new_cache(sinks, window)


def test_a_config_s_json_is_enough(tmp_path):
    """What the tests call a config is what JSON can say."""
    for changes in ({}, MISTRAL, {"quantization": MIXED}, {"rope_scaling": YARN}):
        raw = tiny_config(**changes)
        assert read_config(json.loads(json.dumps(raw))) == read_config(raw)
