"""Prepares the process before MLX is imported, and says what this machine is; knows no model.

The CPU backend's Linux wheel carries a reference BLAS that runs at 5 GFLOP/s. Where the system has
OpenBLAS, loading it with global symbols first makes the same wheel use it: 30 times faster. This
is the only place in the package that treats a platform apart.
"""

import ctypes
import os
import sys

OPENBLAS = "libopenblas.so.0"
CACHE_LIMIT = 256 * 2**20


def load_openblas() -> bool:
    """Load the system's OpenBLAS ahead of MLX; return whether it was found. Linux only."""
    if not sys.platform.startswith("linux"):
        return False
    # One-row products are up to ten times slower on two threads than on one.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        ctypes.CDLL(OPENBLAS, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


openblas_loaded = load_openblas()


def on_metal() -> bool:
    """Return whether MLX computes on Apple's GPU here."""
    import mlx.core as mx

    return mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu


def device() -> dict[str, str | int]:
    """Return what MLX says of its device: architecture, name, memory on Metal."""
    import mlx.core as mx

    return mx.device_info()


def native_bfloat16() -> bool:
    """Return whether the GPU has bf16 arithmetic: M1 and M2 (g13, g14) emulate it."""
    return not str(device().get("architecture", "")).startswith(("applegpu_g13", "applegpu_g14"))


def memory_budget() -> int:
    """Return the bytes a model and its ring may take.

    On Metal the device's recommended working set, elsewhere the physical memory.
    """
    recommended = device().get("max_recommended_working_set_size")
    if recommended:
        return int(recommended)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def set_cache_limit() -> None:
    """Bound the allocator's cache of freed buffers; for programs, never at import.

    The default is the whole memory limit, which starves a Mac's other programs.
    `mx.set_wired_limit` is never called: a controlled trial ties it to kernel panics
    (ml-explore/mlx issue 3186).
    """
    import mlx.core as mx

    mx.set_cache_limit(CACHE_LIMIT)
