"""A decode step traced once: same tokens, one trace, buffers in place, nothing kept needlessly."""

import gc
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

import mlx_stream
from mlx_stream import backend
from mlx_stream.errors import ValueRefused
from mlx_stream.generate.token_stream import TokenStream, generate
from mlx_stream.sampling import Sampler, Sampling
from tests.fakes.tiny_models import some_ids

GREEDY = Sampling(0.0)
SAMPLINGS = (
    GREEDY,
    Sampling(0.8, top_k=7, top_p=0.9, min_p=0.02, seed=3),
    Sampling(1.3, top_p=1.0, repetition_penalty=1.4, seed=4),
    Sampling(0.0, repetition_penalty=1.3),
)


@pytest.fixture(params=["0", "1"], ids=["eager", "traced"])
def compiled(request, monkeypatch):
    monkeypatch.setenv(backend.COMPILE, request.param)
    return request.param == "1"


def stream_of(model, sinks=3, window=20, clock_limit=None, spare=0, kv_bits=None):
    cache = model.new_cache(sinks, window, spare, kv_bits=kv_bits)
    if clock_limit is not None:
        cache.clock_limit = max(clock_limit, cache.lowest_clock_limit)
    return TokenStream(model, cache)


def one_by_one(stream, prompt, sampler, count):
    """Yield what `generate` must yield, each token read and chosen separately."""
    logits = stream.read(prompt)
    for _ in range(count):
        token = sampler.choose(logits, stream.ids.attended)
        yield token
        logits = stream.read([token])


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize(("sinks", "window", "spare"), [(3, 20, 0), (0, 17, 0), (4, 300, 3)])
def test_the_same_tokens_as_one_by_one(tiny_model, monkeypatch, sampling, sinks, window, spare):
    model = tiny_model()
    found = {}
    for mode in ("plain", "0", "1"):
        monkeypatch.setenv(backend.COMPILE, mode.replace("plain", "0"))
        stream = stream_of(model, sinks, window, clock_limit=0, spare=spare)
        run = one_by_one if mode == "plain" else generate
        found[mode] = list(run(stream, some_ids(9), Sampler(sampling), 120))
    assert found["plain"] == found["0"] == found["1"]
    assert len(set(found["1"])) > 5


@pytest.mark.parametrize("kv_bits", [8, 4])
def test_a_packed_window_builds_ahead_too(tiny_model, kv_bits):
    model = tiny_model(head_dim=64)
    sampling = Sampling(1.0, seed=2)
    streams = [stream_of(model, clock_limit=0, kv_bits=kv_bits) for _ in range(2)]
    expected = list(one_by_one(streams[0], some_ids(9), Sampler(sampling), 90))
    assert list(generate(streams[1], some_ids(9), Sampler(sampling), 90)) == expected


def test_a_full_window_is_traced_once_and_before_it_a_few_times(tiny_model, monkeypatch):
    monkeypatch.setenv(backend.COMPILE, "1")
    model = tiny_model(max_position_embeddings=2_048)
    counts = []
    for _ in range(2):
        ids = generate(stream_of(model, 4, 600), some_ids(5), Sampler(GREEDY), 1_500)
        counts += [model.compiled_steps.count for _ in ids]
    # 256 and 512 rows of the buffer, all of them with a mask, and the full window.
    assert (counts[0], counts[700], counts[-1]) == (0, 4, 4)
    # Numbers are arrays: a new temperature needs no new trace, but a new kind of step does.
    for sampling, expected in ((0.5, 5), (0.9, 5), (0.0, 5)):
        stream = stream_of(model, 4, 20)
        stream.read(some_ids(40))
        list(generate(stream, [5, 6], Sampler(Sampling(sampling, seed=1)), 30))
        expected += 0 if sampling else 1  # greedy, over this smaller window
        assert model.compiled_steps.count == expected


def test_unset_the_cpu_traces_only_what_never_changes_again(tiny_model, monkeypatch):
    monkeypatch.delenv(backend.COMPILE, raising=False)
    model = tiny_model()
    counts = []
    for _ in generate(stream_of(model), some_ids(5), Sampler(GREEDY), 60):
        counts.append(model.compiled_steps.count)
    early = 1 if backend.on_metal() else 0
    assert counts[10] == early
    assert counts[-1] == early + backend.has_compiler()


def test_no_more_is_traced_than_is_kept(tiny_model, monkeypatch):
    monkeypatch.setenv(backend.COMPILE, "1")
    monkeypatch.setattr("mlx_stream.models.compiled.MOST_TRACES", 2)
    model = tiny_model()
    for window in (20, 21, 22, 20):
        stream = stream_of(model, window=window)
        stream.read(some_ids(40))
        list(generate(stream, [5, 6], Sampler(GREEDY), 4))
    assert model.compiled_steps.count == 4
    assert len(model.compiled_steps._kept) == 2


def test_buffers_stay_in_place(tiny_model, compiled):
    model = tiny_model(max_position_embeddings=8_192)
    stream = stream_of(model, 4, 8_000)
    stream.read(some_ids(8_100))
    ids = generate(stream, [5, 6], Sampler(GREEDY), 40)
    for _ in range(4):
        next(ids)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(32):
        next(ids)
    layer = stream.cache.state()["keys.0"].nbytes  # type: ignore[union-attr]
    assert mx.get_peak_memory() - before < layer
    assert mx.get_active_memory() - before < layer


def test_a_step_built_ahead_is_used_only_for_what_it_was_built_for(tiny_model, compiled):
    model, sampler = tiny_model(), Sampler(Sampling(1.0, seed=1))
    text = some_ids(60)

    def after(change):
        stream, fresh = (stream_of(model, spare=4) for _ in range(2))
        for one in (stream, fresh):
            one.read(text[:50])
        stream.next(7, sampler)
        assert stream._pending is not None
        fresh.read([7])
        for one in (stream, fresh):
            change(one)
        assert stream.ids.attended() == fresh.ids.attended()
        found, expected = (np.array(one.read([9])) for one in (stream, fresh))
        np.testing.assert_allclose(found, expected, atol=1e-4)
        greedy = Sampler(GREEDY)
        assert stream.next(11, greedy)[0] == np.argmax(np.array(fresh.read([11])))

    after(lambda stream: None)
    after(lambda stream: stream.rewind(3))
    after(lambda stream: stream.cache.evict(5))
    after(lambda stream: stream.read(text[50:57]))
    after(lambda stream: stream.restore(stream.state()))
    after(lambda stream: stream.drop_pending())


def test_a_step_built_ahead_does_not_hold_what_is_read_next(tiny_model, compiled):
    model = tiny_model()
    stream = stream_of(model)
    stream.read(some_ids(50))
    ids = generate(stream, [5], Sampler(GREEDY), 9)
    next(ids)
    next(ids)
    assert stream._pending is not None
    ids.close()
    assert stream._pending is None


def test_a_model_that_is_let_go_frees_what_its_traces_hold(tiny_model, monkeypatch):
    monkeypatch.setenv(backend.COMPILE, "1")

    def use():
        model = replace(tiny_model(hidden_size=128, vocab_size=4_000))
        list(generate(stream_of(model), some_ids(5), Sampler(GREEDY), 40))
        return model.weight_bytes

    use()
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    size = use()
    gc.collect()
    mx.clear_cache()
    assert mx.get_active_memory() - before < size / 4


def test_the_switch_is_0_or_1(tmp_path, monkeypatch):
    monkeypatch.setenv(backend.COMPILE, "yes")
    with pytest.raises(ValueRefused, match="MLX_STREAM_COMPILE must be 0 or 1, not 'yes'"):
        mlx_stream.load(tmp_path)
