"""Weights: quantized ones, their size, and those that do not fit the config."""

from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_stream.config import read_config
from mlx_stream.errors import ConfigError, WeightsError
from mlx_stream.models.layers import CausalLM
from mlx_stream.models.weights import QuantizedLinear, SideBySide
from tests.fakes.tiny import MISTRAL, tiny_config, tiny_weights
from tests.fakes.tiny_models import Tensors, all_logits, make, some_ids, tensors_of
from tests.reference import SlowLlama

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
    assert (QuantizedLinear in kinds) == keep_quantized
    assert (nn.QuantizedEmbedding in kinds) == keep_quantized
    assert (SideBySide in kinds) == (keep_quantized and recipe is MIXED)
    for chunk in (1, 25):
        logits = all_logits(model, model.new_cache(4, 30), ids, chunk)
        np.testing.assert_allclose(logits, expected, atol=1e-3)


def test_joined_projections_are_one_module_and_their_parts_are_gone():
    raw, tensors, _ = quantize(tiny_config(**QUANTIZABLE), MIXED)
    network = make(raw, tensors, keep_quantized=True).network
    shapes = {name: array.shape for name, array in parameters(network).items()}
    # Layer 0: V has 8 bits. Layer 1: Q is not quantized; up and gate have different group sizes.
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


@pytest.mark.parametrize("name", [
    *("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"),
    *("model.layers.1.self_attn.k_proj.weight", "model.layers.0.self_attn.o_proj.weight"),
    *("model.layers.1.mlp.down_proj.weight", "model.layers.1.post_attention_layernorm.weight"),
    "model.layers.0.self_attn.v_proj.bias",
])  # fmt: skip
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


@pytest.mark.parametrize("name", [
    *("model.layers.2.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.bias"),
    *("model.layers.0.self_attn.q_norm.weight", "model.layers.0.mlp.gate_proj.weight.lora_a"),
    *("lm_head.bias", "anything"),
])  # fmt: skip
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
        ({"group_size": 128, "bits": 4}, "not divisible into groups"),
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
