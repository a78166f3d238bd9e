"""What happens after MLX fails: the tests in failures.py, each in its own process.

A failure leaves MLX's count of its tasks wrong: after a few dozen, on one core, it waits forever.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

FAILURES = Path(__file__).with_name("failures.py")
NAMES = [
    node.name
    for node in ast.parse(FAILURES.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
]


@pytest.mark.parametrize("name", NAMES)
def test_after_a_failure(name):
    words = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{FAILURES}::{name}")
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and " passed" in ended.stdout, ended.stdout + ended.stderr
