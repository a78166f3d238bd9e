"""The cache alone against the slow reference: every row of every step, after any operation."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mlx_stream.cache import DenseCache, StreamCache
from mlx_stream.cache.geometry import Geometry, StreamPosition
from mlx_stream.cache.steps import decode
from mlx_stream.cache.steps.decode import DecodeKind
from mlx_stream.errors import ValueRefused
from tests.fakes.shapes import (
    FAR,
    Shape,
    Twins,
    check_erased,
    contents,
    everything,
    next_step,
    quantized_shapes,
    read_random,
    shapes,
)


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
        self.twins.evict(data.draw(st.integers(0, held)))

    @rule(data=st.data())
    def rewind(self, data: st.DataObject):
        self.twins.rewind(data.draw(st.integers(0, min(self.cache.rewindable, 12))))

    @rule(data=st.data())
    def guess(self, data: st.DataObject):
        """Read tokens in one step, and take some back, without losing any other attended token."""
        count, before = data.draw(st.integers(1, self.cache.max_verify)), self.cache.attended
        rejected = data.draw(st.integers(0, count - 1))
        self.twins.verify(count)
        self.twins.rewind(rejected)
        shape = self.twins.shape
        most = min(self.cache.length, shape.sinks) + shape.window
        assert self.cache.attended == min(before + count - rejected, most)

    @rule(count=st.integers(1, 20), layers=st.integers(0, 1))
    def abandon_a_step(self, count: int, layers: int):
        """Do what an interrupt does: plan a step, perhaps evaluate it, and never commit it."""
        count = self.cache.max_step(count)
        self.cache.prepare(count)
        version, before = self.cache.version, everything(self.cache)
        step = self.cache.plan(count)
        for layer in range(layers):
            mx.eval(step.attend(layer, self.twins.heads(step.rows)))
        assert self.cache.version is version and everything(self.cache) == before

    @rule(extra=st.integers(1, 2**70))
    def ask_for_too_much(self, extra: int):
        self.cache.prepare(1)
        before = self.twins.contents()
        held = self.cache.attended - min(self.cache.length, self.cache.geometry.sinks)
        with pytest.raises(ValueRefused):
            self.cache.evict(held + extra)
        with pytest.raises(ValueRefused):
            self.cache.rewind(self.cache.rewindable + extra)
        for refused in (self.cache.rewind, self.cache.evict):
            with pytest.raises(ValueRefused):
                refused(-extra)
        for count in (0, -1, self.cache.max_step(2**20) + extra):
            with pytest.raises(ValueRefused):
                self.cache.plan(count)
        for count in (0, -1, self.cache.max_verify + extra):
            with pytest.raises(ValueRefused):
                self.cache.plan(count, verify=True)
        assert self.twins.contents() == before

    @precondition(lambda self: self.cache.length > 0)
    @rule(count=st.integers(1, 30))
    def continue_in_another_cache(self, count: int):
        old, new = self.cache, self.twins.shape.cache()
        new.restore(old.state())
        assert contents(new) == self.twins.contents()
        check_erased(new)
        for chunk in (count, 1, 1):
            step = next_step(old, old.max_step(chunk))
            for layer in range(self.twins.shape.layers):
                step.attend(layer, self.twins.heads(step.rows))
            old.commit(step)
            mx.eval(old.arrays())
        self.twins.cache = new

    @invariant()
    def numbers_agree(self):
        self.twins.check_numbers()


class QuantizedMachine(StreamMachine):
    @initialize(shape=quantized_shapes)
    def start(self, shape: Shape):
        self.twins = Twins(shape, tolerance=1e-3)


class TestQuantizedStream(QuantizedMachine.TestCase):  # type: ignore[name-defined]
    """The same with keys and values in 8 and 4 bits: exact except for the rounding of rows."""


class TestStream(StreamMachine.TestCase):  # type: ignore[name-defined]
    """Random streams, with every operation, against the reference."""


# -- chosen cases ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "chunks"),
    [
        (Shape(sinks=4, window=12), [100]),
        (
            Shape(sinks=4, window=12, clock_limit=2**14),
            [600, 1, 100],
        ),  # 600 is longer than any step
        (Shape(sinks=0, window=1), [1, 1, 5, 1]),
        (Shape(sinks=6, window=1, group=2), [3, 2, 7, 1, 9]),
        (Shape(sinks=2, window=3, spare=8), [4, 20, 1]),
        (Shape(sinks=5, window=700, layers=1), [255, 1, 1, 60, 300, 1, 200, 1, 3]),
        (Shape(sinks=300, window=310, layers=1), [257, 60, 200, 1, 200, 1]),
        (Shape(sinks=3, window=20, kv_heads=2, group=4, yarn=True), [1] * 70),
        (Shape(sinks=3, window=20, kv_heads=2, group=9), [1] * 30),  # too many heads to group
    ],
    ids=str,
)
def test_chunks_equal_the_reference(shape, chunks):
    twins = Twins(shape)
    for count in chunks:
        twins.read(count)
        twins.check_numbers()


def test_the_heads_of_a_long_ring_are_not_grouped(monkeypatch):
    monkeypatch.setattr(decode, "TWO_PASSES", 20)
    twins = Twins(Shape(sinks=3, window=30, spare=7, group=4))
    twins.read(10)
    for _ in range(40):
        twins.read(1)
        twins.check_numbers()


@given(st.integers(0, 40), st.integers(1, 24), st.integers(1, 8), st.integers(0, 90) | st.just(FAR))
def test_which_rows_a_full_window_leaves_out_follows_from_the_row(sinks, window, spare, more):
    geometry, token = Geometry(sinks, window, spare), sinks + window - 1 + more
    place = StreamPosition(token, max(sinks, token - geometry.ring), 0)
    kind = DecodeKind(Shape().attention(), sinks, geometry.rows, spare)
    attended = np.array(kind.attended_mask(mx.array([geometry.row(token)], mx.int32)))
    expected = geometry.decode_mask(place, geometry.rows)
    assert expected is not None and attended.shape == (1, geometry.rows)
    assert attended[0].tolist() == expected.tolist()


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
    assert twins.cache.position.clock > 2**14 - 512
    twins.read(1)
    twins.read(600)
    assert twins.cache.position.clock < 1_000


def test_the_sinks_are_turned_after_a_reanchoring_even_to_where_they_were():
    twins = Twins(Shape(sinks=2, window=5, clock_limit=64))
    twins.read(7)
    twins.read(1)
    assert twins.cache.position.sinks_at == 1
    for _ in range(7):  # chunks that move o do not change the rows of the sinks
        twins.read(8)
    assert (twins.cache.position.clock, twins.cache.position.sinks_at) == (64, 1)
    twins.read(1)
    assert (twins.cache.position.clock, twins.cache.position.sinks_at) == (8, 1)


@pytest.mark.parametrize("old_reads_on", [True, False])
def test_streams_that_share_a_state_do_not_disturb_each_other(old_reads_on):
    shape = Shape(sinks=3, window=6)
    twins = Twins(shape)
    twins.read(7)
    old, new = twins.cache, shape.cache()
    new.restore(old.state())
    other = old if old_reads_on else new
    other.evict(2)  # its next step rotates its sinks in place
    read_random(other, 4, chunk=1)
    twins.cache = new if old_reads_on else old
    twins.read(1)
    twins.read(1)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("count", [1, 4])
def test_rows_written_after_a_rewind_past_a_lowered_clock_have_the_new_clock(sinks, count):
    twins = Twins(Shape(sinks=sinks, window=20, head_dim=64, layers=1, bits=8), tolerance=1e-3)
    for _ in range(3):
        lag, since = twins.cache.position.clock_offset, twins.cache.position.clock_epoch
        while (twins.cache.position.clock_offset, twins.cache.position.clock_epoch) == (lag, since):
            twins.read(1)
        assert twins.cache.position.clock_epoch == twins.cache.length - 1
        twins.rewind(6)
        for _ in range(5):
            twins.read(count)


@pytest.mark.parametrize(("sinks", "window", "spare"), [(4, 0, 0), (-1, 8, 0), (4, 8, -1)])
def test_impossible_streams_are_refused(sinks, window, spare):
    with pytest.raises(ValueRefused, match=f"{sinks}, {window} and {spare}"):
        Shape(sinks=sinks, window=window, spare=spare).cache()


@pytest.mark.parametrize(("bits", "dim"), [(2, 64), (16, 64), (8, 80), (4, 32)])
def test_rows_that_cannot_be_quantized_are_refused(bits, dim):
    with pytest.raises(ValueRefused, match="`kv_bits`"):
        StreamCache(Shape(head_dim=dim).attention(), bits=bits)


@pytest.mark.parametrize(("bits", "share"), [(8, 0.53125), (4, 0.28125)])
def test_the_bytes_of_a_quantized_ring(bits, share):
    """The ring is compared with a 16-bit one; sinks and their unrotated copy keep their size."""
    whole, quantized = (
        Shape(sinks=sinks, window=1_000, kv_heads=2, head_dim=128, dtype=mx.float16, bits=b).cache()
        for sinks, b in ((0, None), (0, bits))
    )
    assert quantized.nbytes == share * whole.nbytes
    with_sinks = Shape(4, 1_000, 0, 2, 1, 128, dtype=mx.float16, bits=bits).cache()
    assert with_sinks.nbytes - quantized.nbytes == 2 * 2 * 3 * 4 * 2 * 128  # layers, bytes, K V S


def test_a_dense_cache_attends_to_everything_and_rewinds():
    shape = Shape(window=400, sinks=0)
    twins = Twins(shape)
    dense = DenseCache(shape.attention())
    twins.cache = dense  # type: ignore[assignment]
    for count in (1, 40, 1, 250, 1):
        twins.read(count)
    twins.rewind(45)
    saved = dense.state()
    twins.read(20)
    other = DenseCache(shape.attention())
    other.restore(saved)
    assert (dense.attended, dense.evicted, other.length) == (268, 0, 248)
    for refused in (lambda: dense.rewind(269), lambda: dense.rewind(-1)):
        with pytest.raises(ValueRefused):
            refused()
    assert dense.length == 268
