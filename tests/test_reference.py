"""The slow reference against mlx-lm, transformers and numbers worked out by hand."""

import math
from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from transformers import LlamaConfig, modeling_rope_utils

from tests.fakes.peer import peer_of
from tests.fakes.tiny import (
    LLAMA3,
    YARN,
    tiny_config,
    tiny_weights,
)
from tests.reference import SlowAttention, SlowLlama, rope_inv_freq, stream_nll


def read(attention: SlowAttention, count: int = 1) -> np.ndarray:
    """Read tokens of one frequency, 1 radian per position; key i is (1, 0), value i is (1, i)."""
    out = np.empty((1, 2))
    for _ in range(count):
        value = np.array([[1.0, attention.n]])
        out = attention.step(np.array([[1.0, 0.0]]), np.array([[1.0, 0.0]]), value)
    return out


def one_frequency(sinks: int, window: int | None, spare: int = 0) -> SlowAttention:
    return SlowAttention(sinks, window, np.array([1.0]), 1.0, spare, dtype=np.float64)


def seen(distances: dict[int, int]) -> float:
    """Return element [0, 1] of a `read`, computed by hand: scores are cosines of distances."""
    weight = {token: math.exp(math.cos(distance)) for token, distance in distances.items()}
    return sum(token * w for token, w in weight.items()) / sum(weight.values())


# -- attended tokens and distances, on small numbers: 2 sinks, a window of 3 ----------------------


@pytest.mark.parametrize(
    ("token", "distances"),
    [
        (0, {0: 0}),
        (1, {0: 1, 1: 0}),
        (4, {0: 4, 1: 3, 2: 2, 3: 1, 4: 0}),
        (5, {0: 4, 1: 3, 3: 2, 4: 1, 5: 0}),
        (6, {0: 4, 1: 3, 4: 2, 5: 1, 6: 0}),
        (99, {0: 4, 1: 3, 97: 2, 98: 1, 99: 0}),
    ],
)
def test_a_plain_stream_stands_the_sinks_before_the_window(token, distances):
    attention = one_frequency(2, 3)
    out = read(attention, token + 1)
    assert dict(zip(attention.attended(), attention.distances(), strict=True)) == distances
    assert out[0, 1] == pytest.approx(seen(distances), abs=1e-12)


def test_dense_attends_everything_at_its_place_in_the_text():
    out = read(one_frequency(2, None), 7)
    assert out[0, 1] == pytest.approx(seen({j: 6 - j for j in range(7)}), abs=1e-12)


def test_no_sinks_is_a_plain_window_and_no_window_an_error():
    attention = one_frequency(0, 3)
    read(attention, 7)
    assert attention.attended() == [4, 5, 6]
    with pytest.raises(ValueError, match="window=0"):
        one_frequency(2, 0)


# -- early eviction -------------------------------------------------------------------------------


def test_early_eviction_moves_the_sinks_up():
    attention = one_frequency(2, 4)
    read(attention, 6)
    attention.evict(2)
    assert attention.attended() == [0, 1, 4, 5]
    out = read(attention)
    assert out[0, 1] == pytest.approx(seen({0: 4, 1: 3, 4: 2, 5: 1, 6: 0}), abs=1e-12)
    attention.evict(3)
    assert attention.attended() == [0, 1]
    with pytest.raises(ValueError, match="cannot evict"):
        attention.evict(1)
    assert read(attention)[0, 1] == pytest.approx(seen({0: 2, 1: 1, 7: 0}), abs=1e-12)


def test_rewind_without_spare_rows_leaves_a_shorter_window():
    attention = one_frequency(2, 3)
    read(attention, 7)
    attention.rewind(2)
    assert attention.attended() == [0, 1, 4]
    assert read(attention)[0, 1] == pytest.approx(seen({0: 3, 1: 2, 4: 1, 5: 0}), abs=1e-12)
    with pytest.raises(ValueError, match="cannot take back"):
        attention.rewind(3)


def test_rewind_within_the_spare_rows_is_as_if_never_read():
    attention = one_frequency(2, 3, spare=2)
    read(attention, 7)
    attention.rewind(2)
    assert attention.attended() == [0, 1, 2, 3, 4]
    read(attention, 4)
    attention.rewind(3)  # token 8 overwrote token 3: rows for 4 to 8
    assert attention.attended() == [0, 1, 4, 5]


def test_eviction_is_not_undone_by_rewind():
    attention = one_frequency(2, 3, spare=2)
    read(attention, 7)
    attention.evict(1)
    attention.rewind(1)
    assert attention.attended() == [0, 1, 5]


def test_a_stream_that_evicted_nothing_can_go_back_to_its_start():
    attention = one_frequency(2, 3)
    read(attention, 5)
    attention.rewind(4)
    assert attention.attended() == [0]
    assert read(attention)[0, 1] == pytest.approx(seen({0: 1, 1: 0}), abs=1e-12)
    attention.rewind(2)
    assert attention.attended() == []


# -- frequencies ----------------------------------------------------------------------------------


class FakeTensor(np.ndarray):
    def to(self, device=None, dtype=None):
        return self if dtype is None else self.astype(dtype)


def transformers_inv_freq(monkeypatch, config: dict) -> tuple[np.ndarray, float]:
    """Run transformers' own formulas, with numpy in place of torch."""
    torch = SimpleNamespace(
        int64=np.int64,
        float=np.float64,
        float32=np.float64,
        arange=lambda *args, dtype=None: np.arange(*args, dtype=dtype).view(FakeTensor),
        where=lambda *args: np.where(*args).view(FakeTensor),
        clamp=np.clip,
    )
    monkeypatch.setattr(modeling_rope_utils, "torch", torch, raising=False)
    parsed = LlamaConfig(**config)
    kind = (parsed.rope_parameters or {}).get("rope_type") or "default"
    inv_freq, magnitude = modeling_rope_utils.ROPE_INIT_FUNCTIONS[kind](parsed)
    return np.asarray(inv_freq), magnitude


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.5},
        {"type": "linear", "factor": 2.5},
        LLAMA3,
        LLAMA3 | {"low_freq_factor": 0.5, "high_freq_factor": 3.0},
        {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"},
        YARN,
        {"type": "yarn", "factor": 4.0},
        YARN | {"factor": 1.0},
        YARN | {"factor": None},
        YARN | {"attention_factor": 0.8},
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.3},
        YARN | {"mscale": 0.7},
        YARN | {"beta_fast": 4.0, "beta_slow": 0.5},
        YARN | {"truncate": False},
        YARN | {"original_max_position_embeddings": 4, "beta_fast": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
def test_frequencies_are_those_of_transformers(monkeypatch, rope, spelling):
    rope = dict(rope)
    config = tiny_config(rope_theta=50_000.0)
    if spelling == "rope_parameters":
        config["rope_parameters"] = rope | {"rope_theta": config.pop("rope_theta")}
    else:
        config["rope_scaling"] = rope
    inv_freq, magnitude = rope_inv_freq(config)
    expected, expected_magnitude = transformers_inv_freq(monkeypatch, config)
    np.testing.assert_allclose(inv_freq, expected, rtol=1e-12)
    assert magnitude == pytest.approx(expected_magnitude, rel=1e-12)
    assert not np.allclose(inv_freq, rope_inv_freq(tiny_config())[0])


def test_default_frequencies_and_the_refusal_of_dynamic_ones():
    expected = [1.0, 0.1, 0.01, 0.001]
    for theta in ({"rope_theta": 1e4}, {"rope_parameters": {"rope_theta": 1e4}}, {}):
        inv_freq, magnitude = rope_inv_freq({"head_dim": 8, **theta})
        np.testing.assert_allclose(inv_freq, expected, rtol=1e-12)
        assert magnitude == 1.0
    with pytest.raises(ValueError, match="dynamic"):
        rope_inv_freq(tiny_config(rope_scaling={"type": "dynamic", "factor": 2.0}))


# -- the model ------------------------------------------------------------------------------------


def some_ids(config: dict, count: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, config["vocab_size"], count)


def mlx_lm_logits(config: dict, weights: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    peer = peer_of(config, {name: mx.array(w) for name, w in weights.items()})
    return np.array(peer(mx.array(ids)[None])[0])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"head_dim": 24},
        {"head_dim": None, "hidden_size": 48},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": None},
        {"rope_theta": 500.0},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": LLAMA3},
        {"rope_scaling": YARN},
        {"rope_scaling": YARN | {"beta_fast": 4.0, "mscale": 0.7, "mscale_all_dim": 1.3}},
    ],
    ids=str,
)
def test_dense_is_mlx_lm(changes):
    config = tiny_config(**changes)
    weights = tiny_weights(config)
    ids = some_ids(config, 50)
    logits = SlowLlama(config, weights, 4, None).logits(ids)
    np.testing.assert_allclose(logits, mlx_lm_logits(config, weights, ids), atol=1e-3)


def test_a_window_that_holds_the_text_is_dense_and_a_smaller_one_is_not():
    config = tiny_config()
    weights = tiny_weights(config)
    ids = some_ids(config, 40)
    dense = SlowLlama(config, weights, 0, None).logits(ids)
    for sinks, window in ((3, 37), (0, 40), (40, 1)):
        np.testing.assert_array_equal(SlowLlama(config, weights, sinks, window).logits(ids), dense)
    streamed = SlowLlama(config, weights, 3, 36).logits(ids)
    np.testing.assert_array_equal(streamed[:-1], dense[:-1])
    assert np.abs(streamed[-1] - dense[-1]).max() > 0.02


def test_one_layer_streams_as_if_the_attended_tokens_were_the_whole_text():
    config = tiny_config(num_hidden_layers=1)
    weights = tiny_weights(config)
    ids = some_ids(config, 60)
    streamed = SlowLlama(config, weights, 2, 7).logits(ids)
    for t in (9, 30, 59):
        alone = SlowLlama(config, weights, 0, None).logits([*ids[:2], *ids[t - 6 : t + 1]])
        np.testing.assert_allclose(streamed[t], alone[-1], atol=1e-5)


def test_evict_and_rewind_reach_all_layers():
    config = tiny_config()
    weights = tiny_weights(config)
    ids = some_ids(config, 20)
    model = SlowLlama(config, weights, 2, 8, spare=3)
    model.logits(ids[:15])
    model.evict(5)
    assert model.attended() == [0, 1, 12, 13, 14]
    expected = model.logits(ids[15:18])
    model.rewind(3)
    np.testing.assert_array_equal(model.logits(ids[15:18]), expected)


def test_the_sliding_window_of_a_mistral_bounds_the_window():
    config = tiny_config(model_type="mistral", sliding_window=6)
    weights = tiny_weights(config)
    ids = some_ids(config, 30)
    model = SlowLlama(config, weights, 2, 20)
    logits = model.logits(ids)
    assert model.attended() == [0, 1, 24, 25, 26, 27, 28, 29]
    config["sliding_window"] = None
    np.testing.assert_array_equal(logits, SlowLlama(config, weights, 2, 6).logits(ids))


@pytest.mark.parametrize(("sinks", "window"), [(4, 12), (0, 16), (3, 1), (2, 500), (0, None)])
@pytest.mark.parametrize("changes", [{}, {"rope_scaling": YARN, "attention_bias": True}], ids=str)
def test_layer_by_layer_is_token_by_token(sinks, window, changes):
    config = tiny_config(**changes)
    weights = tiny_weights(config)
    ids = some_ids(config, 150)
    logits = SlowLlama(config, weights, sinks, window, dtype=np.float64).logits(ids[:-1])
    total = np.log(np.exp(logits).sum(axis=-1))
    expected = total - logits[np.arange(len(ids) - 1), ids[1:]]
    np.testing.assert_allclose(stream_nll(config, weights, ids, sinks, window), expected, atol=1e-4)
