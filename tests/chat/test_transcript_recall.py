"""What has left a saved conversation is found, forgotten and indexed again, from the transcript."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlx_stream.chat.export import export_json, export_markdown
from mlx_stream.chat.manage import remove_session, verify_session
from mlx_stream.chat.resume import SessionOptions, open_session
from mlx_stream.chat.saving import SavedSession, saved_turns
from mlx_stream.chat.search import search_sessions
from mlx_stream.chat.session_files import session_paths
from mlx_stream.errors import ValueRefused
from mlx_stream.recall.quote import BEGIN
from mlx_stream.sampling import Sampling
from tests.fakes.conversations import decoded, leave_unanswered, said

SECRET = "My zebra is called Quagga."
ABOUT = "What is my zebra called? Quagga?"
OPTIONS = SessionOptions(
    window=400, sampling=Sampling(0, seed=1), max_tokens=10, recall_tokens=200, speculate=False
)


def chat_about(model, *questions: str, name: str = "s") -> SavedSession:
    saved = open_session(name, model, OPTIONS)
    for question in questions:
        said(saved.chat.reply(question))
    return saved


def fill(saved: SavedSession, turns: int = 6) -> None:
    for number in range(turns):
        said(saved.chat.reply(f"Let us talk of number {number} now."))


def quoted(saved: SavedSession, question: str = ABOUT) -> list[int]:
    *_, last = saved.chat.reply(question)
    return [passage.number for passage in last.recalled]


def files_with(text: str) -> set[str]:
    home = Path(os.environ["MLX_STREAM_HOME"])
    found = (path for path in home.rglob("*") if path.is_file())
    return {path.suffix for path in found if text.encode() in path.read_bytes().lower()}


def test_what_has_left_is_quoted_and_is_said(model):
    saved = chat_about(model, SECRET)
    assert quoted(saved) == []  # it is attended
    saved.chat.undo()
    fill(saved)
    *_, last = saved.chat.reply(ABOUT)
    assert [passage.number for passage in last.recalled] == [1] and SECRET in last.recalled[0].line
    assert 0 < last.recalled_tokens <= 200
    assert saved.chat.stats.recalled == 1 and saved.chat.recalled == last.recalled
    question = saved.store.turns(saved.chat.number)[0].exchange
    assert question.question == ABOUT and "zebra is" not in saved.chat.exchanges[-1].question
    *_, again = saved.chat.retry()
    assert again.recalled == last.recalled
    *_, other = saved.chat.reply("Hi!")
    assert other.recalled == () and other.recalled_tokens == 0 and saved.chat.stats.recalled == 0
    saved.close()


def test_it_is_quoted_after_a_restart_whatever_became_of_the_index(model):
    saved = chat_about(model, SECRET)
    fill(saved)
    saved.close()
    index = session_paths("s").index
    for damage in (
        lambda: None,
        index.unlink,
        lambda: index.write_bytes(b"x"),
        lambda: index.write_bytes(index.read_bytes()[:9_000]),
        lambda: empty(index),
        lambda: index.symlink_to("/dev/null") if index.unlink() is None else None,
    ):
        damage()
        saved = open_session("s", model, OPTIONS)
        assert quoted(saved) == [1]
        saved.chat.undo()
        saved.close()
        assert "recall" not in verify_session("s")


def empty(index: Path) -> None:
    with sqlite3.connect(index) as connection:
        connection.execute("INSERT INTO words(words) VALUES ('delete-all')")
        connection.execute("UPDATE state SET checksum = 'f'")


def test_verify_finds_an_index_that_differs(model):
    saved = chat_about(model, SECRET)
    assert "recall" not in verify_session("s")  # nothing has left yet
    fill(saved)
    saved.close()
    assert "recall" not in verify_session("s")
    with sqlite3.connect(session_paths("s").index) as connection:
        connection.execute("INSERT INTO words(words) VALUES ('delete-all')")
    connection.close()
    assert "the recall index differs" in verify_session("s")


def test_nothing_before_a_clear_is_recalled(model):
    saved = chat_about(model, SECRET)
    fill(saved)
    saved.chat.clear()
    assert quoted(saved) == []
    saved.close()
    saved = open_session("s", model, OPTIONS)
    fill(saved)
    # The questions asked since are found.
    assert quoted(saved) == [8]
    assert saved.recall and saved.recall.find(SECRET, "", 1, 8, False)[0].number == 1
    saved.close()


def test_what_is_forgotten_is_in_no_file(model):
    saved = chat_about(model, "Hello.", SECRET)
    saved.write_snapshot()
    fill(saved)
    assert {suffix[:3] for suffix in files_with("quagga")} == {".db", ".re"}
    with pytest.raises(ValueRefused, match="/undo"):
        saved.forget(saved.chat.number)
    with pytest.raises(ValueRefused, match="does not exist"):
        saved.forget(99)
    assert saved.forget(2).question == SECRET
    assert files_with("quagga") == files_with("zebra") == set()
    assert quoted(saved) == []
    saved.close()
    assert verify_session("s").startswith("9 exchanges") and "recall" not in verify_session("s")
    again = open_session("s", model, OPTIONS)
    assert again.chat.number == 9
    assert list(again.store.exchanges()) == [1, *range(3, 10)]
    again.close()


def test_what_is_undone_is_in_no_file(model):
    saved = chat_about(model, SECRET)
    fill(saved)
    assert saved.recall
    saved.chat.clear(saved.chat.number)
    said(saved.chat.reply("My kudu is called Quiz."))
    saved.recall.leave(saved.chat.number, "My kudu is called Quiz.", "")  # as if it had left
    assert {suffix[:3] for suffix in files_with("kudu")} == {".db", ".re"}
    saved.chat.undo()
    assert files_with("kudu") == files_with("quiz") == set()
    assert quoted(saved) == [1]
    saved.close()


def test_a_quotation_is_in_no_file_and_no_export(model):
    saved = chat_about(model, SECRET)
    fill(saved)
    assert quoted(saved) == [1]
    saved.write_snapshot()
    header, turns = saved_turns(saved.chat)
    exports = json.dumps(export_json(header, turns)), export_markdown(header, turns)
    assert all(SECRET in text and BEGIN not in text for text in exports)
    pieces = saved.chat.retry()
    next(pieces)  # in the middle of a reply
    assert files_with(BEGIN.lower()) == set()
    pieces.close()
    saved.close()
    assert files_with(BEGIN.lower()) == set()
    again = open_session("s", model, OPTIONS)
    assert again.chat.stats.settled == 0  # its ids come from the snapshot
    assert BEGIN not in decoded(again.chat, again.chat.tokens.ids.by_row)
    again.close()


def test_removing_a_conversation_removes_its_index(model):
    saved = chat_about(model, SECRET)
    fill(saved)
    saved.close()
    assert session_paths("s").index.exists()
    remove_session("s")
    assert files_with("quagga") == set() and not session_paths("s").index.exists()


def test_an_exchange_that_came_back_and_is_undone_is_not_in_the_index(model):
    saved = chat_about(model, SECRET)
    fill(saved)
    assert saved.recall
    saved.recall.leave(saved.chat.number, "as if it", "had left")
    assert [p.number for p in saved.recall.find("5", "", 1, 9, False)] == [7]
    saved.chat.undo()
    said(saved.chat.reply("Farewell."))
    assert saved.recall.find("5", "", 1, 9, False) == []
    assert [p.number for p in saved.recall.find("zebra", "", 1, 9, False)] == [1]
    saved.close()


def test_an_unanswered_question_is_no_exchange(model):
    saved = chat_about(model, "Hello.")
    leave_unanswered(saved, SECRET)
    saved = open_session("s", model, OPTIONS)
    fill(saved)
    assert quoted(saved) == []
    saved.close()


def test_a_failure_of_the_index_ends_no_reply(model):
    saved = chat_about(model, SECRET)
    fill(saved)
    assert saved.recall
    saved.recall.path.parent.joinpath("s.recall").unlink()
    saved.recall.close_index()
    saved.recall.path = Path("/dev/null/s.recall")
    notices = []
    saved.recall.notify = notices.append
    assert quoted(saved) == []
    assert quoted(saved) == [] and len(notices) == 1 and "recall is off" in notices[0]
    saved.close()


def test_other_conversations_are_searched_but_not_recalled(model):
    chat_about(model, SECRET, name="one").close()
    saved = chat_about(model, "Hello.", name="two")
    fill(saved)
    assert quoted(saved) == []
    saved.close()
    found = {name: [p.number for p in hits] for name, hits in search_sessions("zebras", print)}
    assert found["one"] == [1] and found["two"] == [8]


def test_recall_is_off_where_it_cannot_work(model):
    notices = []
    for change, expected in (
        ({"evict": "token"}, "single tokens"),
        ({"recall_tokens": None, "window": 255}, "too small"),
    ):
        options = {**vars(OPTIONS), **change}
        saved = open_session("x", model, SessionOptions(**options), notices.append)
        saved.close()
        assert expected in notices.pop()
        remove_session("x")
    with pytest.raises(ValueRefused, match="from 0 to 200"):
        open_session("x", model, SessionOptions(**{**vars(OPTIONS), "recall_tokens": 201}))


INDEXING = """
import sys
from pathlib import Path
from mlx_stream.recall.index import WordIndex
index = WordIndex.open(Path(sys.argv[1]), "me")
print("begun", flush=True)
for number in range(index.last + 1, 10**6):
    index.add([(number, f"number {number} " * 50)], number, str(number))
"""


def test_a_killed_index_is_whole(tmp_path):
    from mlx_stream.recall.index import WordIndex

    path = tmp_path / "x.recall"
    for turn in range(5):
        command = [sys.executable, "-c", INDEXING, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout and process.stdout.readline()
            time.sleep(0.01 * turn)
            process.send_signal(signal.SIGKILL)
        index = WordIndex.open(path, "me")
        assert index.checksum == (str(index.last) if index.last else "")
        assert index.count == index.last == len(index.numbers("number", 1, 10**6))
        index.close()
