"""A fixed buffer of sinks and a ring (StreamingLLM, arXiv 2309.17453); independent of models.

A key is rotated once, to the position of a running clock, and then stored: rotary scores depend
only on the difference between positions. The sinks' positions are directly before the oldest
attended token, so their keys are also kept unrotated, and rotated again whenever that token
changes. When the clock gets too large for accurate float32 angles, the ring is rotated back once
and the clock is lowered (re-anchoring).

Worked example, S = 2, W = 3: token 6 attends to 0, 1, 4, 5, 6. Their clock positions are
2, 3, 4, 5, 6, so token i = 0 is at distance t - o + S - i = 6 - 4 + 2 - 0 = 4.
"""

import itertools
import weakref
from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_stream.cache.attention import AttentionShape
from mlx_stream.cache.geometry import STEP_LENGTHS, Geometry, StreamPosition, pad_length
from mlx_stream.cache.steps.decode import DecodeStep
from mlx_stream.cache.steps.prefill import PrefillStep
from mlx_stream.cache.steps.quantized import QuantizedDecodeStep
from mlx_stream.cache.steps.verify import VerifyStep, longest_verified
from mlx_stream.cache.storage import (
    BITS,
    GROUP_SIZE,
    CacheState,
    PlainStorage,
    QuantizedStorage,
    Rows,
    RowStorage,
)
from mlx_stream.errors import ValueRefused

# The clock stays below this (or twice the buffer). At 1e4, float32 angles change scores by 2e-4.
CLOCK_LIMIT = 2**14
# A chunk that moves o has an additive mask, H x T x N float32, of at most this many bytes.
MASK_BYTES = 128 * 2**20
# Maps names in a state, which saved streams contain, to the fields of a position.
STATE_NUMBERS = {
    "length": "length",
    "floor": "floor",
    "clock": "clock",
    "sinks_at": "sinks_at",
    "since": "clock_epoch",
    "lag": "clock_offset",
}


class StreamCache:
    """All layers of one stream: S sinks and a ring of R = W + X tokens, allocated once.

    It has more methods than other classes because `Cache` has 20, and reading, rolling back,
    evicting, re-anchoring and restoring all replace the same state as a whole.

    Args:
        shape: the model's attention.
        sinks: S >= 0, how many of the first tokens are never evicted.
        window: W >= 1, how many of the latest tokens are attended.
        spare: X >= 0, rows beyond the window: up to X tokens can be rolled back without loss.
        dtype: the type of keys and values.
        clock_limit: re-anchor before the clock passes it (at least twice the buffer's rows).
        bits: 8 or 4 quantizes the keys and values of the ring, but not those of the sinks.

    Attributes:
        current: the current state.

    Raises:
        ValueRefused: a number is out of range, or the heads cannot be quantized.
    """

    def __init__(
        self,
        shape: AttentionShape,
        sinks: int = 4,
        window: int = 1_020,
        spare: int = 0,
        dtype: mx.Dtype = mx.float32,
        clock_limit: int = CLOCK_LIMIT,
        bits: int | None = None,
    ):
        if sinks < 0 or window < 1 or spare < 0:
            raise ValueRefused(
                f"a stream needs sinks >= 0, window >= 1 and spare rows >= 0, "
                f"not {sinks}, {window} and {spare}"
            )
        if bits is not None:
            check_quantizable(shape.head_dim, bits)
        self.shape, self.geometry = shape, Geometry(sinks, window, spare)
        kv_heads, head_dim = shape.kv_heads, shape.head_dim
        self.storage: RowStorage
        if bits is None:
            self.storage = PlainStorage(kv_heads, self.geometry.rows, head_dim, dtype)
        else:
            ring = self.geometry.ring
            self.storage = QuantizedStorage(kv_heads, sinks, ring, head_dim, dtype, bits)
        self.clock_limit = max(clock_limit, self.lowest_clock_limit)
        # Otherwise MLX would reuse freed buffers that are slightly too large, and it never updates
        # those in place.
        mx.clear_cache()
        self.current = CacheState(
            StreamPosition(length=0, floor=sinks, clock=0),
            [self.storage.empty() for _ in range(shape.layers)],
            [self.storage.empty() for _ in range(shape.layers)],
            mx.zeros((shape.layers, kv_heads, sinks, head_dim), dtype),
        )
        self._erased = weakref.ref(self.current)  # the last state whose unattended rows were zeroed
        mx.eval(self.arrays())

    @property
    def position(self) -> StreamPosition:
        return self.current.position

    @property
    def length(self) -> int:
        return self.current.position.length

    @property
    def attended(self) -> int:
        position = self.current.position
        return min(position.length, self.geometry.sinks) + self.geometry.ring_count(position)

    @property
    def evicted(self) -> int:
        return self.length - self.attended

    @property
    def oldest(self) -> int:
        """The oldest attended token that is not a sink: the newest token's o."""
        position = self.current.position
        return self.geometry.oldest(position, position.length - 1)

    @property
    def room(self) -> int:
        """How many tokens can be read before the oldest one must be evicted."""
        return self.geometry.room(self.current.position)

    @property
    def rewindable(self) -> int:
        return self.length if self.evicted == 0 else self.geometry.ring_count(self.position)

    @property
    def lowest_clock_limit(self) -> int:
        """The lowest limit at which all tokens before a re-anchoring are gone by the next one."""
        spare = STEP_LENGTHS[-1] if self.storage.clocks > 1 else 0
        return 2 * self.geometry.rows + spare

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays())

    def arrays(self) -> list[mx.array]:
        state = self.current
        rows = (self.storage.arrays(rows).values() for rows in (*state.keys, *state.values))
        return [*itertools.chain.from_iterable(rows), state.sinks]

    def row(self, token: int) -> int:
        return self.geometry.row(token)

    def attended_rows(self, before: int = 0) -> list[int]:
        length, geometry = self.length - before, self.geometry
        sinks = range(min(length, geometry.sinks))
        oldest = geometry.oldest(self.position, length - 1)
        return [geometry.row(t) for t in (*sinks, *range(oldest, length))]

    def attended_next(self) -> np.ndarray:
        geometry, position = self.geometry, self.position
        mask = geometry.decode_mask(position, geometry.rows)
        attended = np.ones(geometry.rows, bool) if mask is None else mask
        attended[geometry.row(position.length)] = False
        return attended

    @property
    def version(self) -> object:
        return self.current

    @property
    def max_verify(self) -> int:
        if not isinstance(self.storage, PlainStorage):
            return 1  # a quantized row is written only once its token is certain
        return longest_verified(self.shape, self.geometry, self.position)

    def is_ready(self, count: int) -> bool:
        state = self.current
        clock = state.position.clock + pad_length(count)
        return not state.pending_turn and clock <= self.clock_limit

    def max_step(self, waiting: int) -> int:
        if waiting == 1:
            return 1
        geometry, position = self.geometry, self.position
        # With two clocks, tokens stored under the first must be gone before a third one starts.
        limit = self.clock_limit - self.storage.clocks * geometry.rows
        room = geometry.room(position)
        if room == 0 and geometry.sinks:
            row_bytes = 4 * self.shape.query_heads * (geometry.rows + STEP_LENGTHS[-1])
            limit = min(limit, max(1, MASK_BYTES // row_bytes))
        longest = max(length for length in STEP_LENGTHS if length <= limit)
        return min(waiting, longest, room or waiting)

    def prepare(self, count: int) -> None:
        """Re-anchor if the clock would pass its limit within the next `count` tokens."""
        self._turn_back()  # if an interrupt left it half done
        if not self.is_ready(count):
            self._reanchor()

    def plan(
        self, count: int, verify: bool = False, pad: bool = True
    ) -> DecodeStep | QuantizedDecodeStep | PrefillStep | VerifyStep:
        longest = self.max_verify if verify else self.max_step(count)
        if not 1 <= count <= longest or not self.is_ready(count):
            raise ValueRefused(f"a step of {count} tokens must be split or prepared: see max_step")
        shape, geometry, state = self.shape, self.geometry, self.current
        if verify and count > 1 and isinstance(self.storage, PlainStorage):
            return VerifyStep(shape, self.storage, geometry, state, count)
        if count > 1:
            return PrefillStep(shape, self.storage, geometry, state, count, pad)
        if isinstance(self.storage, QuantizedStorage):
            return QuantizedDecodeStep(shape, self.storage, geometry, state)
        return DecodeStep.plan(shape, self.storage, geometry, state)

    def commit(self, step: Any) -> None:
        before, sinks = self.current.position, self.current.sinks
        if step.new_sinks:
            first = before.length
            read = min(step.count, self.geometry.sinks - first)
            sinks = mx.array(sinks)  # a new handle: a state returned earlier stays unchanged
            sinks[:, :, first : first + read] = mx.concatenate(step.new_sinks)
            mx.eval(sinks)  # nothing else in the step evaluates them
        position = self.geometry.advance(before, step.count, step.sinks_at)
        self.current = CacheState(position, step.keys, step.values, sinks)

    def rewind(self, count: int) -> None:
        """Roll back the newest `count` tokens.

        The last X (the spare rows) cost nothing. Each token beyond them leaves one fewer attended
        token until the window has filled again.

        Raises:
            ValueRefused: tokens have been evicted, and `count` exceeds what the ring holds.
        """
        if not 0 <= count <= self.rewindable:
            raise ValueRefused(f"cannot roll back {count} tokens, only up to {self.rewindable}")
        self._move(self.geometry.rewind(self.position, count))

    def evict(self, count: int) -> None:
        """Evict the oldest `count` attended tokens that are not sinks.

        Raises:
            ValueRefused: `count` is larger than the number of tokens in the window.
        """
        held = self.geometry.ring_count(self.position)
        if not 0 <= count <= held:
            raise ValueRefused(f"cannot evict {count} tokens: the window holds {held}")
        if count:
            self._move(replace(self.position, floor=self.oldest + count))

    def release(self) -> None:
        """Release the buffers, whose contents are unknown after a failed step.

        No token can be read afterwards. Tokens can still be counted and rolled back.
        """
        self.current = replace(self.current, keys=[], values=[], sinks=mx.zeros(0))

    def erase(self) -> None:
        """Zero every row that the newest token does not attend to.

        A state therefore contains no tokens that were rolled back or evicted. A later rewind
        cannot bring them back.
        """
        self._turn_back()
        if self.current is self._erased():
            return
        current, geometry = self.current, self.geometry
        runs = geometry.unattended_runs(self.attended_rows())
        sinks = mx.array(current.sinks)
        sinks[:, :, min(self.length, geometry.sinks) :] = 0
        self.current = replace(
            current,
            position=replace(current.position, floor=self.oldest),
            keys=[self.storage.zero(rows, runs) for rows in current.keys],
            values=[self.storage.zero(rows, runs) for rows in current.values],
            sinks=sinks,
        )
        del current, sinks  # only the update may hold the buffers
        mx.eval(self.arrays())
        self._erased = weakref.ref(self.current)

    def state(self) -> dict[str, mx.array | int]:
        self.erase()
        return self._state()

    def _state(self) -> dict[str, mx.array | int]:
        numbers = vars(self.position)
        state: dict[str, mx.array | int] = {n: numbers[f] for n, f in STATE_NUMBERS.items()}
        state["sinks"] = self.current.sinks
        for kind, layers in (("keys", self.current.keys), ("values", self.current.values)):
            for layer, rows in enumerate(layers):
                for part, array in self.storage.arrays(rows).items():
                    state[f"{kind}.{layer}{part}"] = array
        return state

    def restore(self, state: dict[str, mx.array | int]) -> None:
        """Continue from a copy of `state`.

        Raises:
            ValueRefused: `state` does not come from a cache with these parameters.
        """
        self._turn_back()
        wanted = self._state()
        if state.keys() != wanted.keys():
            odd = sorted(state.keys() ^ wanted.keys())
            raise ValueRefused(f"not a state of this stream: {odd[0]!r} is missing or unknown")
        for name, mine in wanted.items():
            given = state[name]
            if not isinstance(mine, mx.array):
                if type(given) is not int:  # not a bool either
                    raise ValueRefused(f"not a state of this stream: {name!r} must be an integer")
            elif not isinstance(given, mx.array) or (given.shape, given.dtype) != (
                mine.shape,
                mine.dtype,
            ):
                raise ValueRefused(
                    f"not a state of this stream: {name!r} must be {mine.dtype} {mine.shape}"
                )
        numbers: dict[str, Any] = {field: state[name] for name, field in STATE_NUMBERS.items()}
        position = StreamPosition(**numbers)
        self._check(position)
        mx.clear_cache()  # as in __init__
        copied = {
            name: mx.contiguous(mx.array(state[name]) + 0)
            for name, mine in wanted.items()
            if isinstance(mine, mx.array)
        }
        mx.eval(copied)
        self.current = CacheState(
            position, self._rows("keys", copied), self._rows("values", copied), copied["sinks"]
        )

    def _rows(self, kind: str, arrays: dict[str, mx.array]) -> list[Rows]:
        """Return each layer's rows, built from the arrays of a state."""
        parts = self.storage.arrays(self.current.keys[0])
        return [
            self.storage.from_arrays({part: arrays[f"{kind}.{layer}{part}"] for part in parts})
            for layer in range(self.shape.layers)
        ]

    def _check(self, position: StreamPosition) -> None:
        """Reject a position that no stream can have: tokens would attend to unwritten rows."""
        geometry = self.geometry
        base = position.length - position.clock
        consistent = (
            0 <= position.length < 2**63
            and max(geometry.sinks, position.length - geometry.ring) <= position.floor
            and position.floor <= max(position.length, geometry.sinks)
            and 0 <= base <= position.floor - geometry.sinks
            and position.clock <= self.clock_limit
            and (position.length > geometry.sinks or position.floor == geometry.sinks)
            and -1 <= position.sinks_at <= self.clock_limit
            and 0 <= position.clock_epoch <= position.length
            and 0
            <= position.clock_offset
            <= (self.clock_limit if isinstance(self.storage, QuantizedStorage) else 0)
        )
        if not consistent:
            raise ValueRefused(f"not a state of this stream: inconsistent numbers ({position})")

    def _reanchor(self) -> None:
        """Rotate the ring back so that its oldest usable token is directly after the sinks.

        Quantized rows stay unchanged; until they are evicted, queries are rotated further for them.
        """
        if isinstance(self.storage, QuantizedStorage):
            self._move(self.geometry.lower_clock(self.position))
            return
        base = self.position.length - self.position.clock
        pending = self.position.floor - self.geometry.sinks - base
        mx.clear_cache()  # as in __init__
        self.current = replace(self.current, pending_turn=pending)
        self._turn_back()

    def _turn_back(self) -> None:
        """Rotate the remaining layers one at a time, so that at most one layer's K exists twice."""
        while self.current.pending_turn and self.current.layers_turned < self.shape.layers:
            current, layer = self.current, self.current.layers_turned
            keys, by = list(current.keys), current.pending_turn
            keys[layer] = self.shape.ropes[layer].rotate_all(keys[layer], by, backwards=True)
            mx.eval(keys[layer])
            self.current = replace(current, keys=keys, layers_turned=layer + 1)
        current = self.current
        if current.pending_turn:
            position = replace(
                current.position, clock=current.position.clock - current.pending_turn, sinks_at=-1
            )
            self.current = replace(current, position=position, pending_turn=0, layers_turned=0)

    def _move(self, position: StreamPosition) -> None:
        self.current = replace(self.current, position=position)


def check_quantizable(head_dim: int, bits: int) -> None:
    if bits not in BITS:
        raise ValueRefused(f"`kv_bits` must be {BITS[0]} or {BITS[1]}, not {bits}")
    if head_dim % GROUP_SIZE:
        raise ValueRefused(
            f"`kv_bits` needs a head dimension that is a multiple of {GROUP_SIZE}; this model's is "
            f"{head_dim}: leave out `kv_bits`"
        )
