"""The blocks of GGUF's quantized types: repacked for MLX, or dequantized; reads no files.

A type with one scale for every 32 codes corresponds to MLX's affine groups: its codes are repacked,
and nothing is rounded. The other types have groups of 16, which MLX does not support: they become
floats. For the layouts, see ggml's `ggml-common.h` and `ggml-quants.c`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

GROUP = 32
# Codes (blocks, groups, codes of a group), scales and minimums (blocks, groups).
Unpacked = tuple[np.ndarray, np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class BlockFormat:
    """A quantized type: a value is scale * (code - zero), or scale * code + minimum.

    Attributes:
        layout: the fields of a block: scale d, minimum m, packed scales s, codes q, high bits h.
        unpack: blocks -> codes, scales, and minimums if the type has them.
        bits: bits per code.
        zero: the code for zero; 0 if there are minimums.
        repacked: whether it is kept quantized.
    """

    layout: np.dtype
    unpack: Callable[[np.ndarray], Unpacked]
    bits: int
    zero: int = 0
    repacked: bool = True

    def words(self, blocks: np.ndarray) -> np.ndarray:
        """Return the codes of (rows, blocks) as `mx.quantize` packs them: (rows, words) uint32."""
        packed = pack_codes(self.unpack(blocks.reshape(-1))[0], self.bits)
        return packed.view("<u4").reshape(len(blocks), -1)

    def scales(self, blocks: np.ndarray) -> np.ndarray:
        """Return the scales of (rows, blocks): (rows, groups) float16, or float32 (K types)."""
        return self.unpack(blocks.reshape(-1))[1].reshape(len(blocks), -1)

    def biases(self, blocks: np.ndarray) -> np.ndarray:
        """Return the value of code 0: the minimum, or -zero * scale (exact unless it overflows)."""
        _, scales, minimums = self.unpack(blocks.reshape(-1))
        found = scales * scales.dtype.type(-self.zero) if minimums is None else minimums
        return found.reshape(len(blocks), -1)

    def floats(self, blocks: np.ndarray) -> np.ndarray:
        """Dequantize (rows, blocks), computing in float32; return (rows, columns) float16."""
        codes, scales, minimums = self.unpack(blocks.reshape(-1))
        numbers = scales[..., None] * (codes.astype(np.float32) - self.zero)
        if minimums is not None:
            numbers += minimums[..., None]
        return numbers.astype(np.float16).reshape(len(blocks), -1)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Pack uint8 codes, a multiple of 8 of them, into bytes: code i starts at bit i * bits."""
    whole = 8 % bits == 0  # if a byte holds whole codes, the words are bytes, which is faster
    count = 8 // bits if whole else 8
    parts = codes.reshape(-1, count)
    words = np.zeros(len(parts), np.uint8 if whole else "<u8")
    for place in range(count):
        words |= parts[:, place].astype(words.dtype) << words.dtype.type(bits * place)
    packed = words.view(np.uint8).reshape(len(words), -1)[:, : bits * count // 8]
    return np.ascontiguousarray(packed).reshape(-1)


def planes(packed: np.ndarray, width: int, bits: int) -> np.ndarray:
    """Return codes (blocks, groups of 32): the lowest bits of `width` bytes hold that many codes,
    and the next higher bits hold as many again."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    spread = packed.reshape(len(packed), -1, 1, width) >> shifts & np.uint8(2**bits - 1)
    return spread.reshape(len(packed), -1, GROUP)


def legacy(blocks: np.ndarray) -> Unpacked:
    """Q4_0, Q4_1, Q5_0, Q5_1."""
    codes = planes(blocks["q"], 16, 4)
    fields = blocks.dtype.names or ()
    if "h" in fields:
        codes |= np.unpackbits(blocks["h"], axis=-1, bitorder="little")[:, None] << np.uint8(4)
    return codes, blocks["d"][:, None], blocks["m"][:, None] if "m" in fields else None


def q8_0(blocks: np.ndarray) -> Unpacked:
    return (blocks["q"] ^ np.uint8(0x80))[:, None], blocks["d"][:, None], None


def k_45(blocks: np.ndarray) -> Unpacked:
    """Q4_K and Q5_K: each of 8 groups has a scale d * s and a minimum -m * t; with 6-bit s, t."""
    codes = planes(blocks["q"], 32, 4)
    if "h" in (blocks.dtype.names or ()):
        codes |= planes(blocks["h"], 32, 1) << np.uint8(4)
    # Bytes 0 to 3: scales 0 to 3, with the high bits of scales 4 to 7; 4 to 7: the same for the
    # minimums; 8 to 11: the low 4 bits of scales and minimums 4 to 7.
    low, middle, rest = blocks["s"][:, :4], blocks["s"][:, 4:8], blocks["s"][:, 8:]
    scales = np.concatenate([low & 63, (rest & 15) | (low >> 6 << 4)], axis=1)
    minimums = np.concatenate([middle & 63, (rest >> 4) | (middle >> 6 << 4)], axis=1)
    return codes, single(blocks["d"]) * scales, -(single(blocks["m"]) * minimums)


def q2_k(blocks: np.ndarray) -> Unpacked:
    codes = planes(blocks["q"], 32, 2).reshape(len(blocks), 16, 16)
    scales = single(blocks["d"]) * (blocks["s"] & 15)
    return codes, scales, -(single(blocks["m"]) * (blocks["s"] >> 4))


def q3_k(blocks: np.ndarray) -> Unpacked:
    codes = planes(blocks["q"], 32, 2) | planes(blocks["h"], 32, 1) << np.uint8(2)
    # The low 4 bits of 16 scales in 8 bytes, then their high 2 bits in 4 bytes.
    low = np.concatenate([blocks["s"][:, :8] & 15, blocks["s"][:, :8] >> 4], axis=1)
    high = np.concatenate([blocks["s"][:, 8:] >> shift & 3 for shift in (0, 2, 4, 6)], axis=1)
    scales = (low | high << 4).astype(np.float32) - 32
    return codes.reshape(len(blocks), 16, 16), single(blocks["d"]) * scales, None


def q6_k(blocks: np.ndarray) -> Unpacked:
    codes = planes(blocks["q"], 64, 4) | planes(blocks["h"], 32, 2) << np.uint8(4)
    return codes.reshape(len(blocks), 16, 16), single(blocks["d"]) * blocks["s"], None


def single(halves: np.ndarray) -> np.ndarray:
    return halves[:, None].astype(np.float32)


def layout(**fields: str | int) -> np.dtype:
    """Return a block's layout: a type, or a number of bytes, for each field in order."""
    return np.dtype([(n, "u1", k) if isinstance(k, int) else (n, k) for n, k in fields.items()])


FORMATS = {
    "Q4_0": BlockFormat(layout(d="<f2", q=16), legacy, 4, 8),
    "Q4_1": BlockFormat(layout(d="<f2", m="<f2", q=16), legacy, 4),
    "Q5_0": BlockFormat(layout(d="<f2", h=4, q=16), legacy, 5, 16),
    "Q5_1": BlockFormat(layout(d="<f2", m="<f2", h=4, q=16), legacy, 5),
    "Q8_0": BlockFormat(layout(d="<f2", q=32), q8_0, 8, 128),
    "Q4_K": BlockFormat(layout(d="<f2", m="<f2", s=12, q=128), k_45, 4),
    "Q5_K": BlockFormat(layout(d="<f2", m="<f2", s=12, h=32, q=128), k_45, 5),
    "Q2_K": BlockFormat(layout(s=16, q=64, d="<f2", m="<f2"), q2_k, 2, repacked=False),
    "Q3_K": BlockFormat(layout(h=32, q=64, s=12, d="<f2"), q3_k, 3, 4, repacked=False),
    "Q6_K": BlockFormat(layout(q=128, h=64, s="16i1", d="<f2"), q6_k, 6, 32, repacked=False),
}
