"""Many sessions for ten seconds; engine.py runs them for ten minutes."""

from collections import Counter

from tests.long.engine import run

ACTS = ("reply", "cut", "retry", "edit", "undo", "fork", "closed", "forgotten", "heard as fed")


def test_many_sessions_at_random_stay_apart_and_nothing_grows(letters):
    done: Counter[str] = Counter()
    for seed in range(1, 7):  # on a busy machine ten seconds are not enough for all of it
        found = run(letters, minutes=10 / 60, sessions=12, seed=seed)
        assert found["good"], found
        done.update(found["done"])
        if all(done[act] for act in ACTS):
            return
    raise AssertionError(done)
