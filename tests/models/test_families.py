"""Models and their streams against mlx-lm and the slow reference."""

import functools
from collections.abc import Iterable

import mlx.core as mx
import numpy as np
import pytest

from mlx_stream.cache import StreamCache
from mlx_stream.errors import ValueRefused
from mlx_stream.generate.model import Model
from mlx_stream.models.window import bounded_windows
from tests.fakes.peer import peer_of
from tests.fakes.tiny import (
    FAMILIES,
    LLAMA3,
    LONGROPE,
    MINISTRAL3,
    MISTRAL,
    PHI3,
    QWEN2,
    QWEN3,
    SMOLLM3,
    YARN,
    tiny_config,
    tiny_weights,
)
from tests.fakes.tiny_models import all_logits, make, some_ids, tensors_of
from tests.reference import SlowLlama

LONGROPE_6 = LONGROPE["rope_scaling"]
LONGROPE_WHOLE = LONGROPE_6 | {"short_factor": [1.0 + i / 8 for i in range(8)]}


def read_in_all_ways(model: Model, ids: list[int]) -> Iterable[np.ndarray]:
    window = len(ids) + 3
    yield all_logits(model, model.new_dense_cache(), ids, 17)
    yield all_logits(model, model.new_dense_cache(), ids[:20], 1)
    yield all_logits(model, model.new_cache(4, window), ids, 31)
    yield all_logits(model, model.new_cache(0, window), ids, 1)
    yield all_logits(model, model.new_cache(7, window, spare=5), ids, 500)


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
        MINISTRAL3,
        {**MINISTRAL3, "tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 24},
        {**MINISTRAL3, "sliding_window": 400},
        QWEN2,
        {**QWEN2, "tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": None},
        {**QWEN2, "num_key_value_heads": 4, "rope_theta": 1e6, "rms_norm_eps": 1e-2},
        QWEN3,
        {**QWEN3, "tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 32},
        {**QWEN3, "num_key_value_heads": 4, "rope_theta": 1e6, "rms_norm_eps": 1e-2},
        PHI3,
        {**PHI3, "tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": None},
        {**PHI3, "partial_rotary_factor": 0.5, "num_key_value_heads": 4},
        SMOLLM3,
        {**SMOLLM3, "tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": None},
        {**SMOLLM3, "no_rope_layers": None, "attention_bias": True, "rope_theta": 5e6},
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
        {**QWEN2, "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}},
        {**QWEN3, "attention_bias": True},
        {**PHI3, **LONGROPE},
        {**PHI3, **LONGROPE, "num_key_value_heads": 1, "original_max_position_embeddings": 400},
        {**PHI3, "rope_scaling": LONGROPE_WHOLE, "original_max_position_embeddings": 128},
        {**SMOLLM3, "rope_scaling": YARN},
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


def test_a_mistral_s_biases_are_not_read():
    """transformers builds no biases for a Mistral, even if the config asks for them."""
    raw = tiny_config(**MISTRAL, attention_bias=True, mlp_bias=True)
    plain = tensors_of(raw | {"attention_bias": False, "mlp_bias": False})
    assert not any(name.endswith("bias") for name, _ in make(raw, plain).network.named_tensors())


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


def test_a_growing_factor_on_queries_bounds_sinks_and_window():
    """The factor is 1 within the original context of 128 places; beyond, it would be left out."""
    raw = tiny_config(**MINISTRAL3)
    model = make(raw, tensors_of(raw))
    notices: list[str] = []
    assert model.resolve_window(4, 200, notices.append) == (4, 124)
    assert len(notices) == 1 and "200" in notices[0] and "124" in notices[0]
    assert model.resolve_window(4, 124, notices.append) == (4, 124) and len(notices) == 1
    assert bounded_windows(model.config, 4, (60, 300)) == (60, 124)
    with pytest.raises(ValueRefused, match="128"):
        model.resolve_window(128, 10)
    without = {**raw["rope_parameters"], "llama_4_scaling_beta": 0}
    plain = make(raw | {"rope_parameters": without}, tensors_of(raw))
    assert plain.resolve_window(4, 200) == (4, 200)


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


@pytest.mark.parametrize(
    ("changes", "part"),
    [(QWEN2, "q_proj.bias"), (QWEN2, "v_proj.bias"), (QWEN3, "q_norm"), (QWEN3, "k_norm")],
    ids=str,
)
def test_each_part_of_a_family_changes_the_logits(changes, part):
    """Otherwise, a model that leaves out the part would pass as one of the family."""
    raw = tiny_config(**changes)
    left_out = {
        name: tensor * 0 + ("norm" in part) if part in name else tensor
        for name, tensor in tensors_of(raw).items()
    }
    models = make(raw, tensors_of(raw)), make(raw, left_out)
    whole, without = (all_logits(model, model.new_cache(4, 60), TEXT, 37) for model in models)
    assert np.abs(whole - without).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        (
            {**PHI3, **LONGROPE},
            {"rope_scaling": {**LONGROPE["rope_scaling"], "short_factor": [1.0] * 6}},
        ),
        (
            {**PHI3, **LONGROPE},
            {"rope_scaling": {**LONGROPE["rope_scaling"], "attention_factor": 1.0}},
        ),
        ({**PHI3, "partial_rotary_factor": 0.75}, {"partial_rotary_factor": 1.0}),
        (SMOLLM3, {"no_rope_layers": [1, 1, 1, 1]}),
        ({**SMOLLM3, "no_rope_layers": None}, {"no_rope_layers": [1, 1, 1, 1]}),
    ],
    ids=str,
)
def test_each_setting_of_positions_changes_the_logits(changes, other):
    raws = tiny_config(**changes), tiny_config(**{**changes, **other})
    models = (make(raw, tensors_of(raw)) for raw in raws)
    found, without = (all_logits(model, model.new_cache(4, 60), TEXT, 37) for model in models)
    assert np.abs(found - without).max() > 0.1


def test_longrope_bounds_sinks_and_window():
    """Within the original context of 128 places the short factors hold; beyond, the long ones."""
    raw = tiny_config(**PHI3, **LONGROPE)
    model, notices = make(raw, tensors_of(raw)), []
    assert model.resolve_window(4, 200, notices.append) == (4, 124) and len(notices) == 1
    assert model.resolve_window(4, None, notices.append) == (4, 124)


# -- a stream, against the reference --------------------------------------------------------------

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


@pytest.mark.parametrize(("sinks", "chunk"), [(0, 1), (1, 7), (4, 37), (4, 128)])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_stream_over_reanchorings(family, sinks, chunk):
    raw = tiny_config(**FAMILIES[family])
    expected = SlowLlama(raw, tiny_weights(raw), sinks, 20).logits(TEXT)
    model = make(raw, tensors_of(raw))
    cache = StreamCache(model.attention, sinks, 20, clock_limit=0)
    logits = all_logits(model, cache, TEXT, chunk)
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    np.testing.assert_allclose(nll(logits), nll(expected), atol=2e-3)
