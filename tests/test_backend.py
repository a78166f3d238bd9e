"""The BLAS that MLX uses on Linux: chosen before MLX is imported, reported once; old Pythons."""

import _ctypes
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_stream import backend

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux chooses a BLAS")
# A process without OpenBLAS, in an environment of its own.
WITHOUT = """
import ctypes, sys
real = ctypes.CDLL
def load(name, *rest, **more):
    if str(name).startswith('libopenblas'):
        raise OSError(name)
    return real(name, *rest, **more)
ctypes.CDLL = load
sys.prefix = sys.argv[1]
"""
LOAD = """
import mlx_stream
from mlx_stream import backend
said = []
for _ in range(2):
    mlx_stream.load(sys.argv[2], notify=said.append)
print(backend.blas, said, sep='\\n')
"""


def printed(code: str, *arguments: object) -> list[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@LINUX
def test_a_missing_blas_is_reported_once_with_the_command(tiny: Path, tmp_path: Path) -> None:
    blas, said = printed(WITHOUT + LOAD, tmp_path, tiny)
    assert blas == "" and said.count("no fast BLAS was found") == 1
    assert "apt-get install libopenblas0-pthread" in said and "mlx_stream[blas]" in said


@LINUX
def test_the_library_of_the_mkl_wheel_is_used(tiny: Path, tmp_path: Path) -> None:
    """Any shared library will do here: only the wheel can show whether MLX computes with it."""
    lib = tmp_path / "lib"
    lib.mkdir()
    shutil.copy(_ctypes.__file__, lib / "libmkl_rt.so.2")
    assert printed(WITHOUT + LOAD, tmp_path, tiny) == [str(lib / "libmkl_rt.so.2"), "[]"]


@LINUX
def test_mlx_imported_first_is_reported(tiny: Path, tmp_path: Path) -> None:
    blas, said = printed("import sys, mlx.core\n" + LOAD, tmp_path, tiny)
    assert blas == "" and "import mlx_stream first" in said


@pytest.mark.skipif(not backend.blas, reason="no fast BLAS here")
def test_with_a_blas_nothing_is_reported() -> None:
    assert backend.notices == [] and backend.explain_slow_blas() == ""


def test_an_old_python_is_told_in_one_line() -> None:
    code = "import sys; sys.version_info = (3, 9, 6); import mlx_stream"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("mlx_stream needs Python 3.11 or newer, but this is 3.9")
    assert len(done.stderr.splitlines()) == 1
