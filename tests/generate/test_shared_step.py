"""Streams that share steps read, attend to and say what each would alone."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_stream import backend
from mlx_stream.cache.steps.verify import spare_rows
from mlx_stream.generate.model import Model
from mlx_stream.generate.requests import ReadRequest, ReadResult, Want
from mlx_stream.generate.shared_step import run_together
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.models import compiled
from mlx_stream.sampling import Sampler, Sampling
from tests.fakes.tiny import FAMILIES, tiny_config
from tests.fakes.tiny_models import make, some_ids, tensors_of

SAMPLINGS = (
    Sampling(temperature=0),
    Sampling(temperature=0, repetition_penalty=1.3),
    Sampling(temperature=0.9, top_k=30, top_p=0.9, min_p=0.01, seed=5),
)
MODELS = {
    name: make(config, tensors_of(config))
    for name, config in (
        ("llama", tiny_config(head_dim=64)),
        ("smollm3", tiny_config(**FAMILIES["smollm3"] | {"head_dim": 64})),
    )
}
kinds = st.tuples(
    st.integers(0, 4),
    st.sampled_from((1, 5, 24, 40)),
    st.sampled_from((None, None, 8)),
    st.sampled_from(SAMPLINGS),
)
reads = st.sampled_from(("token", "token", "token", "logits", "nothing", "rows"))
moves = st.tuples(
    st.sampled_from(("read", "read", "read", "evict", "rewind")),
    st.lists(st.tuples(st.integers(0, 4), reads, st.integers(1, 70)), min_size=1, max_size=5),
)


class Twin:
    """Two equal streams: one shares its steps, the other reads alone."""

    def __init__(self, model: Model, kind: Any, seed: int):
        sinks, window, bits, sampling = kind
        self.window, self.bits, self.text, self.ids = window, bits, some_ids(4_000, seed), 0
        caches = [model.new_cache(sinks, window, spare_rows(bits), kv_bits=bits) for _ in range(2)]
        self.shared, self.alone = (TokenStream(model, cache) for cache in caches)
        self.samplers = Sampler(sampling), Sampler(sampling)

    def requests(self, what: str, count: int) -> list[ReadRequest]:
        """Return the same request for both streams."""
        want = Want[what.upper()]
        if want is Want.TOKEN:
            count = 1
        elif want is Want.ROWS and (count := min(count, self.shared.cache.max_verify)) == 1:
            want = Want.LOGITS
        ids = self.text[self.ids : self.ids + count]
        return [
            ReadRequest(stream, ids, want, 64, sampler if want is Want.TOKEN else None)
            for stream, sampler in zip((self.shared, self.alone), self.samplers, strict=True)
        ]

    def check(self, ours: ReadResult | Exception, theirs: ReadResult) -> None:
        assert isinstance(ours, ReadResult), ours
        self.ids += ours.count
        assert (ours.count, ours.token) == (theirs.count, theirs.token)
        assert self.shared.ids.attended() == self.alone.ids.attended()
        assert (ours.logits is None) == (theirs.logits is None)
        if ours.logits is not None and theirs.logits is not None:
            found, expected = np.array(ours.logits), np.array(theirs.logits)
            # A different summation order can round a key or value to the next 8-bit code.
            near = 1e-2 * np.abs(expected).max() if self.bits else 1e-4
            assert np.abs(found - expected).max() < near

    def move(self, what: str, count: int) -> None:
        for stream in (self.shared, self.alone):
            cache: Any = stream.cache
            if what == "evict":
                cache.evict(min(count, cache.geometry.ring_count(cache.position)))
            else:
                stream.rewind(min(count, cache.rewindable))


@settings(max_examples=30)
@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("name", MODELS)
@given(kinds=st.lists(kinds, min_size=2, max_size=5), moves=st.lists(moves, max_size=12))
def test_streams_that_share_steps_are_those_alone(name, traced, kinds, moves):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "tracing", lambda: (False, traced))
        patch.setattr(compiled, "TRACED_AFTER", 1)
        twins = [Twin(MODELS[name], kind, seed) for seed, kind in enumerate(kinds)]
        for twin in twins:  # half of them begin with a full window
            if twin.window < 24:
                for request in twin.requests("nothing", 60):
                    request.stream.run(request)
                twin.ids += 60
        for what, parts in moves:
            chosen = {at % len(twins): rest for at, *rest in parts}
            if what != "read":
                for at, (_, count) in chosen.items():
                    twins[at].move(what, count)
                continue
            asked = {at: twins[at].requests(*rest) for at, rest in chosen.items()}
            found = run_together([ours for ours, _ in asked.values()])
            for at, ours in zip(asked, found, strict=True):
                theirs = asked[at][1]
                twins[at].check(ours, twins[at].alone.run(theirs))
