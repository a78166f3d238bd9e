"""Prepares the process before MLX is imported, and describes this machine; independent of models.

MLX's Linux wheel has a slow reference BLAS (5 GFLOP/s). If the system's OpenBLAS is loaded first,
with global symbols, the wheel uses it: 30 times faster.
"""

import ctypes
import functools
import os
import sys

OPENBLAS = "libopenblas.so.0"
COMPILE = "MLX_STREAM_COMPILE"
CACHE_LIMIT = 256 * 2**20


def load_openblas() -> bool:
    """Load the system's OpenBLAS before MLX, on Linux; return whether MLX will use it."""
    if not sys.platform.startswith("linux"):
        return False
    if "mlx.core" in sys.modules:
        return False  # too late: MLX has bound its own BLAS. Import mlx_stream before mlx
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


def tracing() -> tuple[bool, bool]:
    """Return whether decode steps are traced with `mx.compile`: before a window is full, and then.

    `MLX_STREAM_COMPILE` decides, 0 or 1. Unset, Metal traces every step. The CPU backend traces
    only those of a full window, because it runs the system's C++ compiler for each fused kernel:
    1.5 s each, until the machine restarts.
    """
    chosen = os.environ.get(COMPILE, "")
    if chosen:
        return chosen != "0", chosen != "0"
    return on_metal(), on_metal() or has_compiler()


def prepare_compiling() -> None:
    """Turn off compilation in MLX if there is no compiler: MLX's own activations would fail."""
    import mlx.core as mx

    if not on_metal() and not has_compiler():
        mx.disable_compile()


@functools.cache
def has_compiler() -> bool:
    """Return whether MLX can compile on the CPU backend: it runs g++ (macOS: clang++)."""
    import shutil

    return shutil.which("g++" if sys.platform.startswith("linux") else "clang++") is not None


def device() -> dict[str, str | int]:
    """Return MLX's description of its device: architecture, name, memory on Metal."""
    import mlx.core as mx

    return mx.device_info()


def native_bfloat16() -> bool:
    """Return whether the GPU has bfloat16 arithmetic: M1 and M2 (g13, g14) emulate it."""
    return not str(device().get("architecture", "")).startswith(("applegpu_g13", "applegpu_g14"))


def memory_budget() -> int:
    """Return the bytes for a model and its ring.

    On Metal this is the recommended working set, elsewhere the physical memory.
    """
    recommended = device().get("max_recommended_working_set_size")
    if recommended:
        return int(recommended)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes() -> int:
    """Return this process's resident memory, in bytes; on macOS its peak."""
    from pathlib import Path

    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def set_cache_limit() -> None:
    """Bound the allocator's cache of freed buffers; for programs, never at import.

    The default is the whole memory limit, which starves a Mac's other programs.
    `mx.set_wired_limit` is never called: a controlled trial ties it to kernel panics
    (ml-explore/mlx issue 3186).
    """
    import mlx.core as mx

    mx.set_cache_limit(CACHE_LIMIT)


def describe() -> dict[str, str | int | bool]:
    """Return facts about this machine and the installed packages, for a report."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    try:
        mlx_lm = version("mlx-lm")
    except PackageNotFoundError:
        mlx_lm = "not installed"
    about = device()
    return {
        "mlx_stream": version("mlx_stream"),
        "mlx": version("mlx"),
        "mlx-lm": mlx_lm,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": str(about.get("device_name", platform.machine())),
        "metal": on_metal(),
        "openblas": openblas_loaded,
        "memory_budget_bytes": memory_budget(),
        "cores": os.cpu_count() or 1,
    }


def advice() -> list[str]:
    """Return what will be slow here, and what to do about it."""
    lines = []
    if on_metal():
        if not native_bfloat16():
            lines.append("M1 and M2 emulate bfloat16: such weights are cast to float16")
        return lines
    lines.append("MLX runs on its CPU backend here: for real speed, use a Mac with Apple Silicon")
    if sys.platform.startswith("linux") and not openblas_loaded:
        lines.append(
            f"{OPENBLAS} is missing, which makes float32 products 30 times slower: install it "
            "(Debian, Ubuntu: apt-get install libopenblas0-pthread)"
        )
    lines.append(
        "float16, bfloat16 and quantized products are slower than float32 on this backend: "
        "quantized weights are dequantized to float32 unless --keep-quantized is given"
    )
    return lines
