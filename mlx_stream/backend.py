"""Prepares the process before MLX is imported, and says what this machine is; knows no model.

The CPU backend's Linux wheel carries a reference BLAS that runs at 5 GFLOP/s. Where the system has
OpenBLAS, loading it with global symbols first makes the same wheel use it: 30 times faster. This
is the only place in the package that treats a platform apart.
"""

import ctypes
import os
import sys

OPENBLAS = "libopenblas.so.0"


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
