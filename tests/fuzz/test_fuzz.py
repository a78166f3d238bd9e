"""A short run of each fuzzer, and handmade forgeries; the scripts run for any length of time."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import mlx.core as mx
import pytest

from mlx_stream.chat import manage
from mlx_stream.chat.recorder import Change, ChangeKind
from mlx_stream.chat.resume import open_session
from mlx_stream.chat.schema import SessionHeader
from mlx_stream.chat.session_files import session_paths
from mlx_stream.errors import SessionError, SnapshotError
from mlx_stream.load import load
from tests.fakes.conversations import said
from tests.fakes.killed_chat import OPTIONS, check_attended, turns_of
from tests.fuzz import checkpoints, driver, files, sessions
from tests.fuzz.session_mutations import rewrite
from tests.fuzz.sessions import Judge, line_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_STREAM_HOME", "set by what follows")
        sessions.prepare(place := tmp_path_factory.mktemp("mutations"))
    return place


@pytest.fixture(scope="module")
def judge(place: Path) -> Judge:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLX_STREAM_HOME", "set by what follows")
        return Judge(place, load(place / "model", dtype="float32", keep_quantized=False))


REFUSALS = {"CheckpointError", "ConfigError", "WeightsError", "TokenizerError", "TemplateError"}


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("checkpoints", {"ran", *REFUSALS}),
        ("sessions", {"read again", "refused", "as it was"}),
        ("sources", {"FollowedFile", "Notes", "Pipe"}),
    ],
)
def test_hostile_and_altered_files_do_no_harm(place, tmp_path, name, ends):
    lines: list[str] = []
    if name == "checkpoints":
        checkpoints.prepare(place := tmp_path)
    tally = driver.fuzz(name, driver.seeds_of(4, 60), place, lines.append)
    assert tally["BUG"] == 0, "\n".join(lines)
    assert tally.total() == 60 and tally.keys() >= ends


def reopened(judge: Judge) -> str:
    """Open an altered session, compare it with what was said, and return the notices about it."""
    notices: list[str] = []
    saved = open_session("x", judge.model, OPTIONS, notices.append)
    check_attended(saved.chat, judge.whole.said)
    said(saved.chat.reply("And now?"))
    check_attended(saved.chat, turns_of(saved.store.turns()))
    saved.close()
    return " ".join(notice for notice in notices if "again" in notice)


def places(header: dict[str, Any]) -> Any:
    return header["about"]["places"]


def leave_out_one(header: dict[str, Any], _: Any) -> None:
    """Attribute the attended ids to fewer turns."""
    del places(header)[-2]


def attend_to_what_was_not_answered(header: dict[str, Any], _: Any) -> None:
    number, start = places(header)[-1]
    assert number == 12, "11 was only asked"
    places(header)[-1:] = [[11, start], [12, start]]


FORGED: dict[str, Callable[[dict[str, Any], dict[str, mx.array]], Any]] = {
    "a place further on": lambda header, _: places(header)[-1].__setitem__(1, 2**40),
    "another turn's place": lambda header, _: places(header)[-1].__setitem__(0, 10),
    "a turn that is not there": lambda header, _: places(header)[-1].__setitem__(0, 13),
    "more turns than there are": lambda header, _: header["about"].update(turns=13),
    "fewer turns than are attended": lambda header, _: header["about"].update(turns=10),
    "no places": lambda header, _: places(header).clear(),
    "the same place twice": lambda header, _: places(header).append(places(header)[-1]),
    "a turn left out": leave_out_one,
    "a turn that was not answered": attend_to_what_was_not_answered,
    "its version": lambda header, _: header.update(version=1),
    "a place before the first": lambda header, _: places(header)[0].__setitem__(1, -9),
    "a size beyond 32 bits": lambda header, _: header["empty"].update(a=[[2**31], "float32"]),
    "a size of all memory": lambda header, _: header["empty"].update(a=[[2**31 - 1] * 2, "uint8"]),
    "zeros for keys": lambda header, arrays: header["empty"].update(
        {"keys.0": [list(arrays["keys.0"].shape), "float32"]}
    ),
    "a number for keys": lambda header, _: header["numbers"].update({"keys.0": 1}),
    "a truth value": lambda header, _: header["numbers"].update(sinks_at=False),
    "no number": lambda _, arrays: arrays.update(
        {"values.0": mx.full(arrays["values.0"].shape, float("nan"))}
    ),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_snapshot_is_not_used(judge, name):
    judge.fresh()
    assert reopened(judge) == ""
    judge.fresh()
    rewrite(session_paths("x").snapshot, FORGED[name])
    assert "reading" in reopened(judge)
    assert "snapshot after exchange" in manage.verify_session("x")


@pytest.mark.parametrize("change", [files.pipe, files.link, files.folder])
def test_a_pipe_link_or_folder_is_not_opened(judge, change):
    judge.fresh()
    snapshot = session_paths("x").snapshot
    change(snapshot, Random(0))
    if change is not files.link:
        with pytest.raises(SessionError, match="its snapshot is not") as caught:
            manage.verify_session("x")
        line_of(caught.value)
    if change is files.folder:  # a file cannot replace it
        with pytest.raises(SnapshotError, match="could not be written"):
            reopened(judge)
    else:
        assert "is not a regular file" in reopened(judge)
        assert "snapshot after exchange" in manage.verify_session("x")


def test_a_reply_of_special_tokens_is_read_as_text(judge):
    """They have no text, so the transcript would not show the turn they open."""
    judge.fresh()
    saved = open_session("x", judge.model, OPTIONS)
    last, number = saved.chat.exchanges[-1], saved.chat.number
    chat = saved.chat
    odd = {number: replace(last, reply_ids=(*last.reply_ids, 1, 2))}
    first, system, window = saved.store.state.first, chat.system, chat.stats.window
    state = chat.sampler.state()
    saved.store.write(Change(ChangeKind.STAND, number, odd, first, state, system, window))
    saved._let_go()
    again = open_session("x", judge.model, OPTIONS)
    found = again.chat.exchanges[-1]
    assert (found.reply, found.reply_ids) == (last.reply, ())
    again.close()


@pytest.mark.parametrize("created", ["9999-99-99T99:99:99Z", "0001-01-01T00:00:00Z"])
def test_a_time_that_no_clock_shows(created):
    header = SessionHeader("0" * 32, created, "m", "", None, window=1, sinks=0, evict="turn")
    with pytest.raises(ValueError, match="created"):
        header.check()
