"""An accepted config.json is complete and right; rotary settings are right or refused."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, MistralConfig

from mlx_stream.cache.positions import Rope
from mlx_stream.config import ModelConfig, read_config
from mlx_stream.rope import RopeConfig, inverse_frequencies
from tests.fakes.configs import read
from tests.fakes.tiny import LLAMA3, YARN, tiny_config
from tests.reference import rope_inv_freq

LINEAR = {"rope_type": "linear", "factor": 2.0}


# -- accepted -------------------------------------------------------------------------------------


def test_a_complete_config_is_read_as_it_is_and_frozen():
    whole = {
        **{"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "head_dim": 16},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300},
        **{"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 512},
    }
    config = read(**whole)
    assert config == read() == ModelConfig(**whole, rope=RopeConfig())
    biased = read(attention_bias=True, mlp_bias=True, tie_word_embeddings=True)
    assert (biased.attention_bias, biased.mlp_bias, biased.tie_word_embeddings) == (True,) * 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.vocab_size = 3  # type: ignore[misc]
    assert read(head_dim=24, hidden_size=50).head_dim == 24  # it need not divide the hidden size
    assert read(head_dim=None, hidden_size=48).head_dim == 12


BASE = ("hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "rms_norm_eps")


@pytest.mark.parametrize(("kind", "peer"), [("llama", LlamaConfig), ("mistral", MistralConfig)])
@pytest.mark.parametrize("absent", ["missing", "null"])
@pytest.mark.parametrize("heads", [4, 8])
def test_defaults_are_those_of_transformers(kind, peer, absent, heads):
    raw: dict[str, Any] = {key: tiny_config()[key] for key in BASE}
    raw |= {"model_type": kind, "num_attention_heads": heads}
    # transformers uses 8 key heads and a window of 4096 for a Mistral whose file does not set them.
    raw |= {"num_key_value_heads": heads, "sliding_window": None} if kind == "mistral" else {}
    expected = peer(**raw)
    if absent == "null":
        optional = ("num_key_value_heads", "head_dim", "rope_scaling", "rope_parameters")
        optional += ("tie_word_embeddings", "attention_bias", "mlp_bias", "rope_theta")
        raw |= dict.fromkeys((*optional, "max_position_embeddings", "layer_types", "hidden_act"))
    config = read_config(raw)
    for key in ("num_key_value_heads", "head_dim", "max_position_embeddings"):
        assert getattr(config, key) == getattr(expected, key)
    for key in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        assert getattr(config, key) == getattr(expected, key, False)
    for key in ("rope_theta", "rope_type"):
        assert getattr(config.rope, key) == expected.rope_parameters[key]
    assert config.sliding_window is None


def test_unknown_keys_are_ignored_and_so_are_neutral_values_of_those_that_would_matter():
    assert read(use_cache=True, torch_dtype="float16", surprise={"a": [1]}) == read()
    neutral = {
        **{"partial_rotary_factor": 1.0, "hidden_act": "silu", "attn_logit_softcapping": None},
        **{"logit_scale": 1, "no_rope_layers": [], "num_local_experts": 1, "qk_norm": False},
    }
    assert read(**neutral, layer_types=["full_attention"] * 2) == read()


def test_a_mistral_has_its_window():
    assert read(sliding_window=7).sliding_window is None
    assert read(model_type="mistral", sliding_window=7).sliding_window == 7
    assert read(model_type="mistral", sliding_window=None).sliding_window is None
    for kind, expected in (("full_attention", None), ("sliding_attention", 7)):
        changes = {"sliding_window": 7, "layer_types": [kind] * 2}
        assert read(model_type="mistral", **changes).sliding_window == expected


# -- rotary settings ------------------------------------------------------------------------------


def test_the_trained_length_beside_the_rotary_settings_counts():
    for rope in (YARN, LLAMA3):
        raw = tiny_config(rope_scaling=rope, original_max_position_embeddings=32)
        expected, _ = rope_inv_freq(raw)
        got = inverse_frequencies(read_config(raw).rope, 16)
        np.testing.assert_allclose(got, expected, rtol=1e-12)
        assert not np.allclose(got, inverse_frequencies(read(rope_scaling=rope).rope, 16))


NUMBERS = st.floats(1e-3, 1e6) | st.integers(1, 100_000)
NAMES = ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow")
# Mostly omitted, because each changes the frequencies or their factor.
OTHERS = st.fixed_dictionaries(
    {},
    optional={
        "original_max_position_embeddings": st.integers(1, 200_000),
        "attention_factor": st.floats(0.1, 9),
        "mscale": st.floats(0.1, 9),
        "mscale_all_dim": st.floats(0.1, 9) | st.just(0),
        "truncate": st.booleans(),
    },
)


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters", "both", "type"])
@given(
    st.sampled_from([{"rope_type": "default"}, LINEAR, LLAMA3, YARN]),
    st.dictionaries(st.sampled_from(NAMES), NUMBERS) | OTHERS,
    st.floats(1.5, 1e7),
    st.sampled_from([2, 16, 64, 128]),
)
@settings(max_examples=80)
def test_accepted_settings_have_the_reference_s_frequencies(spelling, rope, changes, theta, size):
    rope = {**rope, **changes}
    # Other values make no sense, and equal ones would divide by zero: see the refusals.
    assume(rope["rope_type"] != "llama3" or rope["low_freq_factor"] < rope["high_freq_factor"])
    if spelling == "type":
        rope["type"] = rope.pop("rope_type")
    raw = tiny_config(rope_theta=theta, head_dim=size)
    if spelling != "rope_parameters":
        raw["rope_scaling"] = dict(rope)
    if spelling in ("rope_parameters", "both"):
        raw["rope_parameters"] = {**rope, "rope_theta": theta}
    if spelling == "rope_parameters":
        del raw["rope_theta"]
    config = read_config(raw)
    expected, magnitude = rope_inv_freq(raw)
    got = inverse_frequencies(config.rope, size)
    assert np.isfinite(got).all() and (got > 0).all()
    np.testing.assert_allclose(got, expected, rtol=1e-9)
    rotation = Rope(config.rope, size)
    np.testing.assert_allclose(np.array(rotation.periods), 1 / expected, rtol=1e-6)
    assert config.rope.attention_factor == pytest.approx(magnitude, rel=1e-12)
    assert rotation.score_factor == pytest.approx(magnitude**2, rel=1e-12)
