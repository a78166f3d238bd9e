"""The plan of a cache: rows, masks and clocks produce the right distances, even near 2^62."""

from hypothesis import assume, given
from hypothesis import strategies as st

from mlx_stream.cache.geometry import BLOCK, Geometry, StreamPosition
from tests.fakes.shapes import FAR


def test_the_worked_example():
    geometry = Geometry(sinks=2, window=3)
    rows = {geometry.row(token): token for token in range(7)}
    assert [rows[row] for row in range(geometry.rows)] == [0, 1, 5, 6, 4]
    place = StreamPosition(length=7, floor=4, clock=7)
    # On the clock these are at 2, 3, 4, 5 and 6.
    assert geometry.oldest(place, 6) == 4
    assert geometry.sinks_clock(place, 6) == 2


@st.composite
def places(draw: st.DrawFn) -> tuple[Geometry, StreamPosition]:
    """Draw a geometry and a position that a stream can reach: early, late, or near 2^62."""
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
    return geometry, StreamPosition(length, floor, length - base)


def attends(geometry: Geometry, place: StreamPosition, token: int) -> set[int]:
    """Return what a token attends to, from the definition alone, without looking at rows."""
    sinks = {i for i in range(geometry.sinks) if i <= token}
    oldest = max(geometry.sinks, place.floor, token - geometry.window + 1)
    return sinks | set(range(oldest, token + 1))


def holders(geometry: Geometry, newest: int) -> list[int | None]:
    """Return which token each row holds if `newest` was the last one written."""
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
    for extent in {geometry.prefix_rows(token), geometry.rows}:
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
    extent = geometry.chunk_prefix_rows(first - 1) if first else 0
    mask = geometry.chunk_mask(place, extent, rows)
    assert mask.dtype == bool and mask.shape == (rows, extent + rows)
    columns = [*holders(geometry, first - 1)[:extent], *range(first, first + rows)]
    for row in range(rows):
        expected = attends(geometry, place, first + row)
        assert mask[row].tolist() == [column in expected for column in columns]
        assert expected <= set(columns)


@given(places(), st.integers(1, 300))
def test_the_blocks_of_a_chunk_at_a_full_window_are_rule_1_in_every_row(given_place, rows):
    geometry, place = given_place
    assume(geometry.room(place) == 0)
    first, before = place.length, geometry.window - 1
    sinks = range(geometry.sinks)
    old = [*range(first - before, first)]
    columns = [*old, *sinks, *range(first, first + rows)]
    held = holders(geometry, first - 1)
    stored = geometry.segments(first - before, before)
    assert [held[row + i] for start, stop, row in stored for i in range(stop - start)] == old
    blocks = geometry.blocks(rows)
    assert [row for block in blocks for row in range(block.start, block.stop)] == [*range(rows)]
    for block in blocks:
        assert block.stop - block.start <= BLOCK
        seen = columns[block.first : block.first + block.mask.shape[1]]
        assert seen[block.sinks_at : block.sinks_at + geometry.sinks] == [*sinks]
        for row in range(block.start, block.stop):
            expected = attends(geometry, place, first + row)
            assert block.mask[row - block.start].tolist() == [token in expected for token in seen]
            assert expected <= {*seen}
        if block.start <= before:
            assert len(seen) <= before + geometry.sinks + BLOCK, "no more than its rows see"


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
    assert clock - sink == token - oldest + geometry.sinks  # the distance from sink 0


@given(places(), st.integers(1, 70), st.integers(-1, 70))
def test_a_place_moves_as_its_tokens_do(given_place, count, sinks_at):
    geometry, place = given_place
    after = geometry.advance(place, count, sinks_at)
    assert (after.length, after.clock) == (place.length + count, place.clock + count)
    assert after.sinks_at == sinks_at
    assert after.clock_epoch == place.clock_epoch and after.clock_offset == place.clock_offset
    assert after.floor == max(place.floor, after.length - geometry.ring)
    back = geometry.rewind(after, count)
    assert (back.length, back.clock, back.floor) == (place.length, place.clock, after.floor)
    room = geometry.room(place)
    tokens = [place.length + i for i in range(room)]
    assert all(geometry.oldest(place, token) == place.floor for token in tokens)
    assert geometry.oldest(place, place.length + room) > place.floor
    assert geometry.ring_count(place) == len(
        [t for t in attends(geometry, place, place.length - 1) if t >= geometry.sinks]
    )


@given(st.integers(0, 2_000), st.integers(0, 6), st.integers(1, 1_500))
def test_extents_hold_what_was_written_in_few_sizes(last, sinks, window):
    geometry = Geometry(sinks, window)
    extent = geometry.prefix_rows(last)
    assert max(geometry.row(token) for token in range(last + 1)) < extent <= geometry.rows
    assert extent in (256, 512, 1_024, geometry.rows)
    finer = geometry.chunk_prefix_rows(last)
    assert max(geometry.row(token) for token in range(last + 1)) < finer <= extent
    assert finer == geometry.rows or (finer % 128 == 0 and finer - last <= max(128, last / 4))
