"""A ping comes back from the engine's thread, unless a step is in progress or the engine closed."""

import threading
from pathlib import Path

import pytest

from mlx_stream.engine.worker import Worker
from mlx_stream.errors import EngineClosed
from tests.fakes.engines import DEADLINE, engine_of, eventually


def test_a_ping_waits_for_the_step_in_progress(
    letters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hold, run = threading.Event(), Worker._run_round

    def run_late(self: Worker, queues: object) -> None:
        hold.wait(DEADLINE)
        run(self, queues)  # type: ignore[arg-type]

    with engine_of(letters) as engine:
        engine.ping().result(DEADLINE)
        eventually(lambda: engine.step_seconds == 0)
        monkeypatch.setattr(Worker, "_run_round", run_late)
        ping = engine.ping()
        eventually(lambda: engine.step_seconds > 0)
        assert not ping.done()
        other = engine.ping()
        engine.close(0)
        hold.set()
        for each in (ping, other):
            if error := each.exception(DEADLINE):
                assert isinstance(error, EngineClosed)
    with pytest.raises(EngineClosed):
        engine.ping()


def test_a_ping_is_answered_while_the_model_loads_or_has_failed(tmp_path: Path) -> None:
    with engine_of(tmp_path / "none") as engine:
        assert engine.ping().result(DEADLINE) is None
        assert engine.error
