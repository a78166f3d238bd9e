"""A history of a few hundred turns; lines.py has one of five thousand."""

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

from tests.long.lines import converse, flat


def test_a_long_history_grows_by_its_record_only(letters):
    found = converse(letters, 120)
    # The process holds objects from other tests, which come and go.
    assert flat(found | {"objects_grown": 0}), found
