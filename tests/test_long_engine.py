"""Many sessions for ten seconds; long_engine.py has them for as many minutes."""

from long_engine import run


def test_many_sessions_at_random_stay_apart_and_nothing_grows(letters):
    found = run(letters, minutes=10 / 60, sessions=12, seed=1)
    assert found["good"], found
    for act in ("reply", "cut", "retry", "edit", "undo", "closed", "forgotten", "heard as fed"):
        assert found["done"][act] > 0
