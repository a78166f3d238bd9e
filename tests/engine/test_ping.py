"""A ping comes back from the engine's thread, unless a step is running or the engine is closed."""

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

    def run_and_hold(self: Worker, queues: object) -> None:
        run(self, queues)  # type: ignore[arg-type]
        hold.wait(DEADLINE)

    with engine_of(letters) as engine:
        engine.ping().result(DEADLINE)
        eventually(lambda: engine.step_seconds == 0)
        monkeypatch.setattr(Worker, "_run_round", run_and_hold)
        engine.ping().result(DEADLINE)
        eventually(lambda: engine.step_seconds > 0)
        waiting = engine.ping()
        assert not waiting.done()
        engine.close(0)
        hold.set()
        assert isinstance(waiting.exception(DEADLINE), EngineClosed)
    with pytest.raises(EngineClosed):
        engine.ping()


def test_a_ping_is_answered_while_the_model_loads_or_has_failed(tmp_path: Path) -> None:
    with engine_of(tmp_path / "none") as engine:
        assert engine.ping().result(DEADLINE) is None
        assert engine.error
