"""A short run of the fuzzer of checkpoints; `fuzz_checkpoints.py` runs as long as one likes."""

from pathlib import Path

from tests.fuzz.checkpoints import fuzz

REFUSALS = {"CheckpointError", "ConfigError", "WeightsError", "TokenizerError", "TemplateError"}


def test_hostile_files_are_refused_in_a_line_or_run(tmp_path: Path) -> None:
    said: list[str] = []
    tally = fuzz(150, 4, tmp_path, said.append)
    assert tally["BUG"] == 0, "\n".join(said)
    assert tally.total() == 150 and tally["ran"] > 20
    assert tally.keys() >= REFUSALS
