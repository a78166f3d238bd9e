"""Prepares the process before MLX is imported, and describes this machine; independent of models.

MLX's Linux wheel has a slow reference BLAS (5 GFLOP/s). If OpenBLAS or MKL is loaded first, with
global symbols, the wheel uses that instead, which is 30 times faster.
"""

import ctypes
import functools
import os
import sys
from contextlib import suppress
from pathlib import Path

OPENBLAS = "libopenblas.so.0"
SLOWER = "float32 matmuls 30 times slower"
INSTALL = "apt-get install libopenblas0-pthread (Debian, Ubuntu), or pip install 'mlx_stream[blas]'"
IMPORTED_LATE = "mlx.core" in sys.modules  # if so, MLX has already bound its own BLAS
COMPILE = "MLX_STREAM_COMPILE"
CACHE_LIMIT = 256 * 2**20


def load_blas() -> str:
    """On Linux, load the system's OpenBLAS, or else the `mkl` wheel's library, before MLX.

    Returns:
        The library, or "" if MLX will use its own.
    """
    if not sys.platform.startswith("linux") or IMPORTED_LATE:
        return ""
    # Single-row products are up to ten times slower on two threads than on one.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    for library in (OPENBLAS, *map(str, Path(sys.prefix, "lib").glob("libmkl_rt.so*"))):
        with suppress(OSError):
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
            return library
    return ""


def explain_slow_blas() -> str:
    """Return why MLX uses its own slow BLAS on Linux, and what to do; "" if it does not."""
    if not sys.platform.startswith("linux") or blas:
        return ""
    if IMPORTED_LATE:
        return f"MLX was imported before mlx_stream, which makes {SLOWER}: import mlx_stream first"
    return f"no fast BLAS was found, which makes {SLOWER}: {INSTALL}"


blas = load_blas()
# Shown once, when a model is loaded.
notices = [line for line in (explain_slow_blas(),) if line]


def on_metal() -> bool:
    """Return whether MLX computes on Apple's GPU here."""
    import mlx.core as mx

    return mx.metal.is_available() and mx.default_device().type == mx.DeviceType.gpu


def tracing() -> tuple[bool, bool]:
    """Return whether `mx.compile` traces decode steps before the window is full, and afterwards.

    If `MLX_STREAM_COMPILE` is set, its value (0 or 1) decides. Otherwise, every step is traced on
    Metal. On the CPU backend, only steps with a full window are traced, because the system's C++
    compiler runs for each fused kernel, which takes 1.5 s per kernel after each restart of the
    machine.
    """
    chosen = os.environ.get(COMPILE, "")
    if chosen:
        return chosen != "0", chosen != "0"
    return on_metal(), on_metal() or has_compiler()


def prepare_compiling() -> None:
    """Disable MLX's compilation if there is no compiler; otherwise MLX's activations would fail."""
    import mlx.core as mx

    if not on_metal() and not has_compiler():
        mx.disable_compile()


@functools.cache
def has_compiler() -> bool:
    """Return whether MLX can compile on the CPU backend, for which it runs g++ (macOS: clang++)."""
    import shutil

    return shutil.which("g++" if sys.platform.startswith("linux") else "clang++") is not None


def device() -> dict[str, str | int]:
    """Return MLX's description of its device: architecture, name and, on Metal, memory."""
    import mlx.core as mx

    return mx.device_info()


def native_bfloat16() -> bool:
    """Return whether the GPU has bfloat16 arithmetic: M1 and M2 (g13, g14) emulate it."""
    return not str(device().get("architecture", "")).startswith(("applegpu_g13", "applegpu_g14"))


def memory_budget() -> int:
    """Return how many bytes a model and its ring may use.

    On Metal this is the recommended working set, elsewhere the physical memory.
    """
    recommended = device().get("max_recommended_working_set_size")
    if recommended:
        return int(recommended)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def resident_bytes() -> int:
    """Return this process's resident memory in bytes; on macOS, its peak."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def set_cache_limit() -> None:
    """Limit the allocator's cache of freed buffers; for programs to call, never on import.

    The default is the whole memory limit, which starves a Mac's other programs.
    `mx.set_wired_limit` is never called: a controlled trial linked it to kernel panics
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
        "openblas": blas == OPENBLAS,
        "blas": blas or "MLX's own",
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
    if slow := explain_slow_blas():
        lines.append(slow)
    lines.append(
        "float16, bfloat16 and quantized matmuls are slower than float32 on this backend: "
        "quantized weights are dequantized to float32 unless --keep-quantized is given"
    )
    return lines
