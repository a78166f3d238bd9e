"""The cache alone against the slow reference: every row of every step, whatever is done to it."""

import gc
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reference import SlowAttention, rope_inv_freq

from mlx_stream import rope as rope_module
from mlx_stream.cache import DenseCache, StreamCache
from mlx_stream.cache import steps as steps_module
from mlx_stream.cache import stream as stream_module
from mlx_stream.cache.plan import STEP_LENGTHS, Geometry, Place, padded
from mlx_stream.config import RopeConfig
from mlx_stream.errors import ValueRefused
from mlx_stream.generate import TokenStream
from mlx_stream.rope import Rope

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FAR = 2**62


@dataclass(frozen=True)
class Shape:
    """The parameters of a cache under test."""

    sinks: int = 2
    window: int = 5
    spare: int = 0
    kv_heads: int = 1
    group: int = 1
    head_dim: int = 8
    layers: int = 2
    clock_limit: int = 0
    yarn: bool = False
    dtype: mx.Dtype = mx.float32

    def rope(self) -> Rope:
        if not self.yarn:
            return Rope(RopeConfig(), self.head_dim)
        magnitude = rope_inv_freq(self.raw())[1]
        config = RopeConfig(
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=64,
            attention_factor=magnitude,
        )
        return Rope(config, self.head_dim)

    def raw(self) -> dict:
        return {"head_dim": self.head_dim} | ({"rope_scaling": YARN} if self.yarn else {})

    def cache(self) -> StreamCache:
        return StreamCache(
            self.layers,
            self.kv_heads * self.group,
            self.kv_heads,
            self.head_dim,
            self.rope(),
            self.sinks,
            self.window,
            self.spare,
            self.dtype,
            self.clock_limit,
        )

    def slow(self) -> list[SlowAttention]:
        inv_freq, magnitude = rope_inv_freq(self.raw())
        return [
            SlowAttention(
                self.sinks,
                self.window,
                inv_freq,
                self.head_dim**-0.5,
                self.spare,
                magnitude,
            )
            for _ in range(self.layers)
        ]


shapes = st.builds(
    Shape,
    sinks=st.integers(0, 6),
    window=st.integers(1, 24),
    spare=st.integers(0, 8),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    head_dim=st.sampled_from([2, 8, 16]),
    layers=st.integers(1, 2),
    clock_limit=st.sampled_from([0, 0, 60, 150, 2**14]),
    yarn=st.booleans(),
)


class Twins:
    """A cache and the slow reference, fed the same random queries, keys and values."""

    def __init__(self, shape: Shape, tolerance: float = 2e-4):
        self.shape, self.tolerance = shape, tolerance
        self.cache, self.slow = shape.cache(), shape.slow()
        self.random = np.random.default_rng(0)

    def heads(self, rows: int) -> mx.array:
        shape = self.shape
        count = shape.kv_heads * (shape.group + 2)
        heads = 1.5 * self.random.standard_normal((1, count, rows, shape.head_dim))
        return mx.array(heads.astype(np.float32)).astype(shape.dtype)

    def read(self, count: int, compare: Callable[[int], bool] = lambda token: True) -> None:
        """Read tokens in as few steps as the cache allows; compare every row of every layer."""
        while count:
            taken = self.cache.take(count)
            assert 1 <= taken <= count
            step = self.cache.begin(taken)
            assert step.count == taken <= step.rows
            heads = [self.heads(step.rows) for _ in range(self.shape.layers)]
            outs = [step.attend(layer, new) for layer, new in enumerate(heads)]
            self.cache.commit(step)
            mx.eval(outs, self.cache.arrays())
            for slow, new, out in zip(self.slow, heads, outs, strict=True):
                self.compare(slow, new, out, taken, compare)
            count -= taken

    def compare(
        self,
        slow: SlowAttention,
        new: mx.array,
        out: mx.array,
        taken: int,
        compare: Callable[[int], bool],
    ) -> None:
        assert out.dtype == self.shape.dtype
        got = np.array(out.astype(mx.float32))[0]
        assert np.isfinite(got).all(), "padded rows included"
        queries, keys, values = self.split(np.array(new.astype(mx.float32))[0])
        for row in range(taken):
            token = slow.n
            expected = slow.step(queries[:, row], keys[:, row], values[:, row])
            if compare(token):
                error = np.abs(got[:, row] - expected).max()
                assert error < self.tolerance, f"token {token}, row {row} of {taken}: {error}"

    def split(self, heads: np.ndarray) -> list[np.ndarray]:
        queries = self.shape.kv_heads * self.shape.group
        return np.split(heads, [queries, queries + self.shape.kv_heads])

    def check_numbers(self) -> None:
        slow, cache = self.slow[0], self.cache
        assert cache.length == slow.n
        assert cache.attended == len(slow.attended())
        assert cache.evicted == slow.n - len(slow.attended())
        assert cache.oldest == slow.oldest
        geometry = cache.geometry
        assert cache.attended_rows() == [geometry.row(token) for token in slow.attended()]
        complete = slow.oldest == slow.sinks
        assert cache.rewindable == (slow.n if complete else slow.n - slow.oldest)
        assert cache.place.clock <= cache.clock_limit
        for array in cache.arrays():
            assert not mx.any(mx.isnan(array)).item()


def contents(cache: StreamCache) -> list:
    """What `state()` holds, copied, to be compared with `==`."""
    copies = []
    for name, value in cache.state().items():
        if isinstance(value, int):
            copies.append((name, value))
        else:
            copies.append((name, np.array(value.astype(mx.float32)).tobytes()))
    return copies


class StreamMachine(RuleBasedStateMachine):
    @initialize(shape=shapes)
    def start(self, shape: Shape):
        self.twins = Twins(shape)

    @property
    def cache(self) -> StreamCache:
        return self.twins.cache

    @rule(count=st.integers(1, 40))
    def read_a_text(self, count: int):
        self.twins.read(count)

    @rule(count=st.integers(1, 6))
    def decode(self, count: int):
        for _ in range(count):
            self.twins.read(1)

    @rule(data=st.data())
    def evict(self, data: st.DataObject):
        held = self.cache.attended - min(self.cache.length, self.cache.geometry.sinks)
        count = data.draw(st.integers(0, held))
        self.cache.evict(count)
        for slow in self.twins.slow if count else []:
            slow.evict(count)

    @rule(data=st.data())
    def rewind(self, data: st.DataObject):
        most = min(self.cache.rewindable, 12)
        count = data.draw(st.integers(0, most))
        self.cache.rewind(count)
        for slow in self.twins.slow:
            slow.rewind(count)

    @rule(count=st.integers(1, 20), layers=st.integers(0, 1))
    def abandon_a_step(self, count: int, layers: int):
        """What an interrupt does: a step is begun, perhaps evaluated, and never committed."""
        step = self.cache.begin(self.cache.take(count))
        for layer in range(layers):
            mx.eval(step.attend(layer, self.twins.heads(step.rows)))

    @rule(extra=st.integers(1, 2**70))
    def ask_for_too_much(self, extra: int):
        before = contents(self.cache)
        held = self.cache.attended - min(self.cache.length, self.cache.geometry.sinks)
        with pytest.raises(ValueRefused):
            self.cache.evict(held + extra)
        with pytest.raises(ValueRefused):
            self.cache.rewind(self.cache.rewindable + extra)
        for refused in (self.cache.rewind, self.cache.evict):
            with pytest.raises(ValueRefused):
                refused(-extra)
        for count in (0, -1, self.cache.take(2**20) + extra):
            with pytest.raises(ValueRefused):
                self.cache.begin(count)
        assert contents(self.cache) == before

    @precondition(lambda self: self.cache.length > 0)
    @rule(count=st.integers(1, 30))
    def continue_in_another_cache(self, count: int):
        old, new = self.cache, self.twins.shape.cache()
        new.restore(old.state())
        assert contents(new) == contents(old)
        for chunk in (count, 1, 1):
            step = old.begin(old.take(chunk))
            for layer in range(self.twins.shape.layers):
                step.attend(layer, self.twins.heads(step.rows))
            old.commit(step)
            mx.eval(old.arrays())
        self.twins.cache = new

    @invariant()
    def numbers_agree(self):
        self.twins.check_numbers()


class TestStream(StreamMachine.TestCase):  # type: ignore[name-defined]
    """Random streams, with every operation, against the reference."""


# -- chosen cases ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        (Shape(sinks=4, window=12), [100]),
        (Shape(sinks=4, window=12, clock_limit=2**14), [600, 1, 100]),  # longer than any step
        (Shape(sinks=0, window=1), [1, 1, 5, 1]),
        (Shape(sinks=6, window=1, group=2), [3, 2, 7, 1, 9]),
        (Shape(sinks=2, window=3, spare=8), [4, 20, 1]),
        (Shape(sinks=5, window=700, layers=1), [255, 1, 1, 60, 300, 1, 200, 1, 3]),
        (Shape(sinks=300, window=310, layers=1), [257, 60, 200, 1, 200, 1]),
        (Shape(sinks=3, window=20, kv_heads=2, group=4, yarn=True), [1] * 70),
    ],
    ids=str,
)
def test_chunks_equal_the_reference(shape, chunks):
    twins = Twins(shape)
    for count in chunks:
        twins.read(count)
        twins.check_numbers()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(mx.float16, 1e-2), (mx.bfloat16, 0.15)], ids=["float16", "bfloat16"]
)
@pytest.mark.parametrize("clock_limit", [0, 2**14])
def test_half_precision_stays_within_its_rounding(dtype, tolerance, clock_limit):
    twins = Twins(
        Shape(sinks=4, window=20, group=2, head_dim=16, dtype=dtype, clock_limit=clock_limit),
        tolerance,
    )
    for count in (1, 37, 1, 1, 30, 100, *[1] * 30):
        twins.read(count)
    twins.check_numbers()


def test_angles_hold_up_to_the_limit_of_the_clock():
    twins = Twins(Shape(window=6, layers=1, clock_limit=2**14), tolerance=1e-3)
    twins.read(2**14 - 300, compare=lambda token: token > 2**14 - 400)
    assert twins.cache.place.clock > 2**14 - 512
    twins.read(1)
    twins.read(600)
    assert twins.cache.place.clock < 1_000


def test_the_sinks_are_turned_after_a_reanchoring_even_to_where_they_were():
    twins = Twins(Shape(sinks=2, window=5, clock_limit=64))
    twins.read(7)
    twins.read(1)
    assert twins.cache.place.sinks_at == 1
    for _ in range(7):  # chunks that move o leave the rows of the sinks alone
        twins.read(8)
    assert (twins.cache.place.clock, twins.cache.place.sinks_at) == (64, 1)
    twins.read(1)
    assert (twins.cache.place.clock, twins.cache.place.sinks_at) == (8, 1)


@pytest.mark.parametrize("old_reads_on", [True, False])
def test_streams_that_share_a_state_do_not_disturb_each_other(old_reads_on):
    shape = Shape(sinks=3, window=6)
    twins = Twins(shape)
    twins.read(7)
    old, new = twins.cache, shape.cache()
    new.restore(old.state())
    other = old if old_reads_on else new
    other.evict(2)  # its next step turns its sinks, in place
    read_random(other, 4, chunk=1)
    twins.cache = new if old_reads_on else old
    twins.read(1)
    twins.read(1)


def test_many_reanchorings_add_no_error():
    twins = Twins(Shape(sinks=2, window=4, layers=1))
    clocks = []
    for _ in range(300):
        twins.read(1)
        clocks.append(twins.cache.place.clock)
    turned_back = sum(later < sooner for sooner, later in itertools.pairwise(clocks))
    assert turned_back > 30
    assert max(clocks) <= 12


def test_decode_equals_one_chunk():
    def run(chunk: int) -> tuple[np.ndarray, StreamCache]:
        random = np.random.default_rng(3)
        heads = mx.array(random.standard_normal((1, 4, 90, 8)).astype(np.float32))
        cache = Shape(group=2, clock_limit=2**14).cache()
        outs, first = [], 0
        while first < 90:
            step = cache.begin(cache.take(min(chunk, 90 - first)))
            count = step.count
            new = heads[:, :, first : first + count]
            padding = mx.full((1, 4, step.rows - count, 8), 1e4)
            outs.append(step.attend(0, mx.concatenate([new, padding], axis=2))[:, :, :count])
            step.attend(1, mx.zeros((1, 4, step.rows, 8)))
            cache.commit(step)
            mx.eval(outs, cache.arrays())
            first += count
        return np.array(mx.concatenate(outs, axis=2)), cache

    one, cache = run(83)  # rows that pad a step hold huge numbers
    many, other = run(1)
    np.testing.assert_allclose(one, many, atol=2e-5)
    assert cache.place.length == other.place.length == 90
    np.testing.assert_allclose(
        np.array(cache.values[0]), np.array(other.values[0]), atol=1e-6, err_msg="padding stored"
    )


def test_buffers_start_as_zeros():
    cache = Shape(window=1_000, kv_heads=3).cache()
    assert all(not mx.any(array != 0).item() for array in cache.arrays())


@pytest.mark.parametrize(("sinks", "window", "spare"), [(4, 0, 0), (-1, 8, 0), (4, 8, -1)])
def test_impossible_streams_are_refused(sinks, window, spare):
    with pytest.raises(ValueRefused, match=f"{sinks}, {window} and {spare}"):
        Shape(sinks=sinks, window=window, spare=spare).cache()


def test_a_dense_cache_attends_to_everything_and_rewinds():
    shape = Shape(window=400, sinks=0)
    twins = Twins(shape)
    dense = DenseCache(2, 1, 1, 8, shape.rope())
    twins.cache = dense  # type: ignore[assignment]
    for count in (1, 40, 1, 250, 1):
        twins.read(count)
    dense.rewind(45)
    for slow in twins.slow:
        slow.rewind(45)
    saved = dense.state()
    twins.read(20)
    other = DenseCache(2, 1, 1, 8, shape.rope())
    other.restore(saved)
    assert (dense.attended, dense.evicted, other.length) == (268, 0, 248)
    for refused in (lambda: dense.rewind(269), lambda: dense.rewind(-1), lambda: dense.evict(1)):
        with pytest.raises(ValueRefused):
            refused()
    assert dense.length == 268


# -- the plan: rows, masks, clocks ----------------------------------------------------------------


def test_the_worked_example():
    geometry = Geometry(sinks=2, window=3)
    rows = {geometry.row(token): token for token in range(7)}
    assert [rows[row] for row in range(geometry.rows)] == [0, 1, 5, 6, 4]
    place = Place(length=7, floor=4, clock=7)
    # "On the clock these stand at 2, 3, 4, 5, 6"
    assert geometry.oldest(place, 6) == 4
    assert geometry.sinks_clock(place, 6) == 2


@st.composite
def places(draw: st.DrawFn) -> tuple[Geometry, Place]:
    """A geometry and a place a stream can reach, early, late, or near 2^62."""
    geometry = Geometry(draw(st.integers(0, 6)), draw(st.integers(1, 24)), draw(st.integers(0, 8)))
    length = draw(
        st.one_of(
            st.integers(0, 80),
            st.integers(FAR - 1_000, FAR + 1_000),
            st.just(2**63 - 600),
        )
    )
    lowest = max(geometry.sinks, length - geometry.ring)
    floor = draw(st.integers(lowest, max(length, geometry.sinks)))
    base = draw(st.integers(max(0, floor - geometry.sinks - 1_000), floor - geometry.sinks))
    return geometry, Place(length, floor, length - base)


def attends(geometry: Geometry, place: Place, token: int) -> set[int]:
    """Rule 1, literally; None of it looks at rows."""
    sinks = {i for i in range(geometry.sinks) if i <= token}
    oldest = max(geometry.sinks, place.floor, token - geometry.window + 1)
    return sinks | set(range(oldest, token + 1))


def holders(geometry: Geometry, newest: int) -> list[int | None]:
    """Which token each row holds if `newest` was the last one written."""
    held: list[int | None] = [None] * geometry.rows
    recent = range(max(0, newest - 2 * geometry.ring - geometry.sinks), newest + 1)
    for token in (*range(min(geometry.sinks, newest + 1)), *recent):
        held[geometry.row(token)] = token
    return held


@given(places(), st.integers(1, 70))
def test_segments_store_the_last_of_the_new_tokens_in_their_rows(given_place, count):
    geometry, place = given_place
    first = place.length
    stored = {}
    for start, stop, row in geometry.segments(first, count):
        assert 0 <= start < stop <= count
        assert row + stop - start <= geometry.rows
        for source in range(start, stop):
            assert row + source - start not in stored, "rows are written once"
            stored[row + source - start] = first + source
    assert all(geometry.row(token) == row for row, token in stored.items())
    new = range(first, first + count)
    ring = [token for token in new if token >= geometry.sinks][-geometry.ring :]
    assert sorted(stored.values()) == [t for t in new if t < geometry.sinks] + ring


@given(places())
def test_the_mask_of_one_token_is_rule_1(given_place):
    geometry, place = given_place
    token = place.length
    expected = attends(geometry, place, token)
    for extent in {geometry.extent(token), geometry.rows}:
        mask = geometry.decode_mask(place, extent)
        held = holders(geometry, token)[:extent]
        wanted = [row in expected for row in held]
        if mask is None:
            assert all(wanted) and extent == geometry.rows
        else:
            assert mask.dtype == bool and mask.tolist() == wanted
        assert expected <= set(held), "no attended token is outside the extent"


@given(places(), st.integers(1, 40))
def test_the_mask_of_a_chunk_is_rule_1_in_every_row(given_place, rows):
    geometry, place = given_place
    first = place.length
    extent = geometry.extent(first - 1) if first else 0
    mask = geometry.chunk_mask(place, extent, rows)
    assert mask.dtype == bool and mask.shape == (rows, extent + rows)
    columns = [*holders(geometry, first - 1)[:extent], *range(first, first + rows)]
    for row in range(rows):
        expected = attends(geometry, place, first + row)
        assert mask[row].tolist() == [column in expected for column in columns]
        assert expected <= set(columns)


@given(places(), st.integers(0, 30))
def test_the_sinks_stand_directly_before_the_oldest_token(given_place, ahead):
    geometry, place = given_place
    token = place.length + ahead
    clock = place.clock + ahead
    oldest = geometry.oldest(place, token)
    if token < geometry.sinks:
        return
    sink = geometry.sinks_clock(place, token)
    assert sink >= 0, "Metal computes positions unsigned"
    assert clock - sink == token - oldest + geometry.sinks  # rule 2, for sink 0


@given(places(), st.integers(1, 70))
def test_a_place_moves_as_its_tokens_do(given_place, count):
    geometry, place = given_place
    after = geometry.after(place, count)
    assert (after.length, after.clock) == (place.length + count, place.clock + count)
    assert after.floor == max(place.floor, after.length - geometry.ring)
    back = geometry.rewound(after, count)
    assert (back.length, back.clock, back.floor) == (place.length, place.clock, after.floor)
    room = geometry.room(place)
    tokens = [place.length + i for i in range(room)]
    assert all(geometry.oldest(place, token) == place.floor for token in tokens)
    assert geometry.oldest(place, place.length + room) > place.floor
    assert geometry.held(place) == len(
        [t for t in attends(geometry, place, place.length - 1) if t >= geometry.sinks]
    )


@given(st.integers(0, 2_000), st.integers(0, 6), st.integers(1, 1_500))
def test_extents_hold_what_was_written_in_few_sizes(last, sinks, window):
    geometry = Geometry(sinks, window)
    extent = geometry.extent(last)
    assert max(geometry.row(token) for token in range(last + 1)) < extent <= geometry.rows
    assert extent in (256, 512, 1_024, geometry.rows)


def test_large_rings_mask_as_rule_1_says_while_they_fill():
    geometry = Geometry(sinks=5, window=590, spare=8)
    for length in (0, 5, 255, 256, 257, 511, 512, 594, 595, 603, 604, 2_000, FAR):
        place = Place(length, max(geometry.sinks, length - geometry.ring), 0)
        expected = attends(geometry, place, length)
        extent = geometry.extent(length)
        mask = geometry.decode_mask(place, extent)
        assert mask is not None
        assert mask.tolist() == [t in expected for t in holders(geometry, length)[:extent]]


def test_padded_lengths():
    assert [padded(count) for count in (1, 2, 3, 48, 49, 511, 512)] == [1, 2, 4, 48, 64, 512, 512]
    assert sorted(STEP_LENGTHS) == list(STEP_LENGTHS)


# -- state ----------------------------------------------------------------------------------------

FULL = Shape(sinks=3, window=10, spare=2, clock_limit=64)


def read_random(cache: StreamCache, count: int, seed: int = 0, chunk: int = 512) -> None:
    random = np.random.default_rng(seed)
    heads = cache.query_heads + 2 * cache.kv_heads
    while count:
        step = cache.begin(cache.take(min(count, chunk)))
        for layer in range(cache.layers):
            shape = (1, heads, step.rows, cache.keys[0].shape[-1])
            step.attend(layer, mx.array(random.standard_normal(shape).astype(np.float32)))
        cache.commit(step)
        mx.eval(cache.arrays())
        count -= step.count


@pytest.mark.parametrize(
    "change",
    [
        {"length": -1},
        {"length": 41},
        {"length": 10**30},
        {"length": 40.0},
        {"length": "40"},
        {"length": None},
        {"length": mx.array(40)},
        {"length": 2**63, "floor": 2**63 - 5},
        {"floor": 2},
        {"floor": 27},
        {"floor": 41},
        {"floor": -1},
        {"floor": float("nan")},
        {"clock": 41},
        {"clock": 65},
        {"clock": -1},
        {"clock": 14},
        {"clock": "many"},
        {"sinks_at": -2},
        {"sinks_at": 65},
        {"sinks_at": 2**40},
        {"sinks": mx.zeros((2, 1, 2, 8))},
        {"sinks": mx.zeros((2, 1, 3, 8), mx.float16)},
        {"sinks": 3},
        {"keys.0": mx.zeros((1, 1, 16, 8))},
        {"keys.1": mx.zeros((1, 1, 15, 8), mx.float16)},
        {"keys.1": mx.zeros((1, 1, 15, 8), mx.int32)},
        {"keys.1": np.zeros((1, 1, 15, 8), np.float32)},
        {"keys.1": mx.zeros((1, 1, 15))},
        {"keys.1": None},
        {"values.0": mx.zeros((1, 2, 15, 8))},
        {"values.0": mx.zeros((2, 1, 15, 8))},
        {"values.2": mx.zeros((1, 1, 15, 8))},
        {"name": "x"},
    ],
    ids=lambda change: ", ".join(f"{k}={v}"[:30].replace("\n", "") for k, v in change.items()),
)
def test_a_state_that_cannot_be_is_refused_and_changes_nothing(change):
    source, target = FULL.cache(), FULL.cache()
    read_random(source, 40)
    read_random(target, 20, seed=1)
    state = source.state()
    assert (state["length"], state["floor"], state["clock"]) == (40, 28, 40)
    before = contents(target)
    with pytest.raises(ValueRefused, match=r"^not a state of this stream: [^\n]*$"):
        target.restore({**state, **change})
    assert contents(target) == before
    target.restore(state)


@pytest.mark.parametrize("name", ["length", "floor", "clock", "sinks_at", "sinks", "values.1"])
def test_a_state_without_one_of_its_parts_is_refused(name):
    cache = FULL.cache()
    state = cache.state()
    del state[name]
    with pytest.raises(ValueRefused, match=name):
        cache.restore(state)


@pytest.mark.parametrize(
    "other",
    [
        replace(FULL, window=11),
        replace(FULL, sinks=2),
        replace(FULL, layers=3),
        replace(FULL, kv_heads=2),
        replace(FULL, dtype=mx.bfloat16),
        replace(FULL, head_dim=16),
    ],
    ids=["window", "sinks", "layers", "kv_heads", "dtype", "head_dim"],
)
def test_a_state_of_another_cache_is_refused(other):
    with pytest.raises(ValueRefused):
        other.cache().restore(FULL.cache().state())


def test_young_states_are_restored_and_impossible_young_ones_refused():
    for length in (0, 1, 2, 3, 4, 12, 13, 14, 16):
        source, target = FULL.cache(), FULL.cache()
        read_random(source, length)
        target.restore(source.state())
        assert contents(target) == contents(source)
    source = FULL.cache()
    read_random(source, 2)
    for change in ({"floor": 2}, {"floor": 4}, {"clock": 1}, {"length": 3}):
        with pytest.raises(ValueRefused):
            FULL.cache().restore({**source.state(), **change})


# -- D: a stream longer than any number below 2^63 ------------------------------------------------


def continue_from(model, cache: StreamCache, chunks: list[int]) -> np.ndarray:
    """Read random ids in these chunks; return all logits."""
    stream = TokenStream(model, cache)
    random = np.random.default_rng(5)
    logits = []
    for count in chunks:
        ids = random.integers(0, model.config.vocab_size, count).tolist()
        for hidden in stream.steps(ids, chunk=count):
            logits.append(np.array(model.network.logits(hidden)[0]))
    return np.concatenate(logits)


def spy_on_arrays(monkeypatch: pytest.MonkeyPatch, seen: list[int]) -> None:
    """Record the largest whole number the cache and the rotation hand to MLX."""

    class Spy:
        def __getattr__(self, name: str):
            return getattr(mx, name)

        @staticmethod
        def array(value, *args, **kwargs):
            if not isinstance(value, mx.array) and np.asarray(value).dtype.kind in "iub":
                seen.append(max(abs(int(number)) for number in np.ravel(value)))
            return mx.array(value, *args, **kwargs)

    for module in (stream_module, steps_module, rope_module):
        monkeypatch.setattr(module, "mx", Spy())


@pytest.mark.parametrize(
    ("sinks", "window", "spare", "clock_limit"),
    [(4, 20, 0, 0), (4, 20, 3, 0), (0, 9, 2, 0), (2, 33, 0, 2**14), (4, 300, 5, 0)],
)
def test_a_stream_near_2_to_62_is_bit_identical(
    tiny_model, monkeypatch, sinks, window, spare, clock_limit
):
    model = tiny_model()

    def new_cache() -> StreamCache:
        return StreamCache(2, 4, 2, 16, model.rope, sinks, window, spare, clock_limit=clock_limit)

    cache = new_cache()
    continue_from(model, cache, [window, 7, 1, sinks + 2 * spare + 30])
    state = cache.state()
    ring = window + spare
    shift = FAR // ring * ring
    far = new_cache()
    far.restore({**state, "length": state["length"] + shift, "floor": state["floor"] + shift})
    chunks = [1, 1, 17, 64, 1, 1, 1, 8, 100, 1, 2, 200, *[1] * 40]
    seen: list[int] = []
    spy_on_arrays(monkeypatch, seen)
    expected = continue_from(model, cache, chunks)
    near = max(seen)
    seen.clear()
    got = continue_from(model, far, chunks)
    assert np.array_equal(got, expected)
    assert len(seen) > len(chunks)
    assert far.length == cache.length + shift > FAR - ring
    assert far.place.clock == cache.place.clock
    rows = cache.geometry.rows
    assert near == max(seen) < max(2**14, 2 * rows) + 512
    for one, other in zip(cache.arrays(), far.arrays(), strict=True):
        assert mx.array_equal(one, other).item()


# -- E: memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
def test_a_cache_takes_the_bytes_it_says(dtype):
    shape = Shape(sinks=4, window=1_000, spare=12, kv_heads=3, head_dim=16, layers=5, dtype=dtype)
    gc.collect()
    before = mx.get_active_memory()
    cache = shape.cache()
    expected = 5 * dtype.size * 3 * 16 * (2 * (4 + 1_012) + 4)
    assert cache.nbytes == expected
    # The allocator rounds each of the 11 arrays up to its pages.
    assert expected <= mx.get_active_memory() - before < expected + 12 * 16_384


@pytest.fixture(params=[0, 4 * 2**20], ids=["no cache", "4 MB of cache"])
def limit(request: pytest.FixtureRequest) -> Iterator[int]:
    """Bound MLX's cache of freed buffers, for one test."""
    mx.clear_cache()
    before = mx.set_cache_limit(request.param)
    yield request.param
    mx.set_cache_limit(before)


def test_memory_does_not_grow_with_the_stream(tiny_model, limit):
    model = tiny_model()
    cache = model.new_cache(sinks=4, window=60)
    stream = TokenStream(model, cache)
    random = np.random.default_rng(0)

    def read(count: int, chunk: int) -> None:
        mx.eval(stream.read(random.integers(0, 300, count).tolist(), chunk))
        assert mx.get_cache_memory() <= limit

    def active() -> int:
        gc.collect()
        return mx.get_active_memory()

    read(127, 37)
    read(1, 1)  # a stream holds the hidden states of its last step
    after_two_windows, size = active(), cache.nbytes
    # A chunk moves K and V, and what the allocator takes from its cache may be a bit too large.
    rounding = 16_384 if limit else 0
    for _ in range(6):
        read(400, 100)
        hidden_states = 100 * 64 * 4  # of the last chunk
        assert abs(active() - after_two_windows) <= rounding + hidden_states
        read(100, 1)
        assert abs(active() - after_two_windows) <= rounding
    assert (cache.nbytes, cache.length) == (size, 3_128)


@pytest.mark.parametrize("sinks", [0, 4])
def test_a_decode_step_writes_in_place(tiny_model, sinks):
    model = tiny_model(num_hidden_layers=8, max_position_embeddings=8_192, head_dim=32)
    cache = model.new_cache(sinks=sinks, window=4_096)
    length = 10_000
    cache.restore(
        cache.state() | {"length": length, "floor": length - 4_096, "clock": length, "sinks_at": -1}
    )
    stream = TokenStream(model, cache)
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for token in range(32):
        mx.eval(stream.read([token]))
    rise = mx.get_peak_memory() - before
    one = cache.keys[0].nbytes
    assert rise < one / 2, f"{rise} bytes; a layer's K is {one}, all {cache.nbytes}"
    assert abs(mx.get_active_memory() - before) <= 16_384  # hidden states, logits
