"""Nothing that was taken back, cleared or cut is left in a state or snapshot: no ids, no keys."""

import numpy as np
import pytest

from mlx_stream import Engine
from mlx_stream.chat.resume import SessionOptions, open_session
from mlx_stream.chat.session_files import session_paths
from mlx_stream.generate import snapshot
from mlx_stream.generate.ngram import NgramLookup
from mlx_stream.sampling import Sampling
from tests.fakes.conversations import said
from tests.fakes.shapes import check_erased
from tests.fakes.shell import edit
from tests.fakes.tiny import CHAT_TEMPLATE, write_model

SECRET = "zebra quagga okapi"
OTHER = "Hello there."


def cut(pieces, after: int = 3) -> None:
    for _ in range(after):
        next(pieces)
    pieces.close()


def undone_when_saved(saved) -> None:
    said(saved.chat.reply(SECRET))
    saved.write_snapshot()
    saved.chat.undo()


def edited_when_longer(saved) -> None:
    said(saved.chat.reply((SECRET + " ") * 8))
    cut(saved.chat.edit("And then?"))


def cleared(saved) -> None:
    cut(saved.chat.reply(SECRET))
    saved.chat.clear()


@pytest.fixture(params=[None, 8, "guessing"])
def options(request) -> SessionOptions:
    bits = request.param if request.param == 8 else None
    # Guesses are verified, and wrong ones are taken back.
    return SessionOptions(
        window=120,
        sampling=Sampling(0),
        max_tokens=12,
        kv_bits=bits,
        speculate=request.param == "guessing",
    )


def ids_of(model, text: str) -> bytes:
    # Starts at the second word, because the first may share an id with its surroundings.
    ids = model.tokenizer.encode(text, special=False)[2:6]
    return np.array(ids, np.uint32).tobytes()


def check(tokens, model) -> None:
    """Check that a stream's state holds what is attended and nothing else."""
    state, cache = tokens.state(), tokens.cache
    ids = np.array(state["ids"])
    assert ids_of(model, SECRET) not in ids.tobytes()
    attended = set(cache.attended_rows())
    assert all(id == 0 for row, id in enumerate(ids.tolist()) if row not in attended)
    check_erased(cache)
    for past in tokens.ids.observers:
        assert isinstance(past, NgramLookup)
        known = np.array(past._ids)[: past.count]
        assert ids_of(model, SECRET) not in known.astype(np.uint32).tobytes()
        assert not np.any(np.array(past._ids)[past.count :])


@pytest.mark.parametrize(
    "way",
    [undone_when_saved, edited_when_longer, cleared],
)
@pytest.mark.parametrize("first", [False, True], ids=["later", "first"])
def test_no_state_and_no_snapshot_has_it(model, options, way, first):
    saved = open_session("s", model, options)
    assert bool(saved.chat.tokens.ids.observers) == bool(options.speculate)
    if not first:
        said(saved.chat.reply(OTHER))
    way(saved)
    check(saved.chat.tokens, model)
    saved.close()
    where, wanted = session_paths("s"), ids_of(model, SECRET)
    for path in (where.snapshot, where.database):
        stays = way is cleared and path == where.database  # the transcript keeps what was said
        if path.exists() and not stays:
            assert SECRET.encode() not in path.read_bytes()
            assert wanted not in path.read_bytes()
    if where.snapshot.exists():
        again = open_session("s", model, options)
        check(again.chat.tokens, model)
        again.close()
    else:
        assert first and way is undone_when_saved


@pytest.mark.parametrize("all_taken_back", [False, True])
def test_an_unusable_snapshot_goes_with_the_next_one(model, options, all_taken_back):
    saved = open_session("s", model, options)
    said(saved.chat.reply(OTHER))
    said(saved.chat.reply(SECRET))
    saved.write_snapshot()
    saved.chat.undo()
    saved._let_go()  # as if killed before the snapshot is written again
    again = open_session("s", model, options)
    paths = session_paths("s")
    assert paths.snapshot.exists()
    if all_taken_back:
        again.chat.undo()
    again.close()
    assert paths.snapshot.exists() != all_taken_back
    assert all_taken_back or ids_of(model, SECRET) not in paths.snapshot.read_bytes()


def test_a_listener_keeps_nothing_of_a_cut_answer(tmp_path, monkeypatch):
    """Where the template trims replies, spaces at a cut answer's end are taken back."""
    template = CHAT_TEMPLATE.replace("message['content']", "(message['content'] | trim)")
    folder = write_model(tmp_path / "model")
    edit(folder / "tokenizer_config.json", chat_template=template)
    monkeypatch.setenv("MLX_STREAM_COMPILE", "0")
    path, sampling = tmp_path / "state", Sampling(1.5, top_p=1.0, seed=5)
    with Engine(folder, dtype="float32") as engine:
        listener = engine.listen(window=200, sampling=sampling, max_tokens=40)
        for count in range(1, 20):
            listener.feed("The train is late. ")
            pieces = listener.ask("When?")
            for _ in range(count):
                next(pieces, None)
            pieces.close()
            listener.save(path, {})
            check_file(path)


def check_file(path) -> None:
    """Check that a snapshot's keys and values are zero except for what is attended."""
    state = snapshot.load_snapshot(path).state
    length, floor = (int(str(state[name])) for name in ("length", "floor"))
    sinks, rows = (np.array(state[name]).shape[2] for name in ("sinks", "keys.0"))
    ring = rows - sinks
    attended = {*range(min(sinks, length))}
    attended |= {sinks + (token - sinks) % ring for token in range(floor, length)}
    for name in ("keys.0", "values.0"):
        used = np.flatnonzero(np.abs(np.array(state[name])).max(axis=(0, 1, 3)))
        assert set(used.tolist()) == attended
    assert np.array(state["ids"]).size == max(attended) + 1
