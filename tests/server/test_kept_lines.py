"""Conversations kept in files: what is read once they are closed, and files that are unusable."""

import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

import mlx_stream
from mlx_stream.errors import SessionError, ValueRefused
from mlx_stream.generate import snapshot
from mlx_stream.server import kept_lines
from mlx_stream.server.kept_lines import KeptLine, KeptLines
from mlx_stream.server.line_record import Record
from mlx_stream.server.lines import Lines
from tests.chat.test_settle import SCRIPT, THINKS
from tests.fakes.clients import SYSTEM, Client, attended_texts, ids_to_attend
from tests.fakes.conversations import assert_well_formed, said
from tests.fakes.engines import DEADLINE, GREEDY, engine_of, eventually
from tests.fakes.shell import SMALL
from tests.fakes.thinkers import write_thinker
from tests.fakes.tiny import tiny_config, write_letters

WINDOW = 150
QUESTIONS = ("Hi", "And?", "More?", "Yes?", "Hm", "Oh", "Well?")
Notices = list[str]


@contextmanager
def keeping(
    model: Path, folder: Path, notices: Notices | None = None, limit: int = 2**30, **options: Any
) -> Iterator[Lines]:
    """Yield lines that are kept in a folder, on an engine of their own."""
    kept = KeptLines(folder, limit, [].append if notices is None else notices.append)
    try:
        with engine_of(model) as engine:
            yield Lines(engine, **{"window": WINDOW, "kept": kept, "shared": False} | options)
        assert engine.close(DEADLINE)
    finally:
        kept.close()


def finished(lines: Lines) -> None:
    """Wait until nothing is computed or written."""
    worker = lines.engine._worker

    def idle() -> bool:
        with worker.lock:
            return not any(queue.ready() for queue in worker.queues)

    eventually(lambda: not worker.busy() and idle())


def usable(lines: Lines) -> list[KeptLine]:
    assert lines._kept
    return lines._kept.usable()


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def converse(client: Client, twin: Any = None, questions: Any = QUESTIONS) -> None:
    for question in questions:
        client.ask(question)
        if twin:
            said(twin.reply(question))


@pytest.fixture
def twin(letters: Path) -> mlx_stream.ChatSession:
    """Return a conversation that is never closed."""
    model = mlx_stream.load(letters, dtype="float32", keep_quantized=False)
    options = {"window": WINDOW, "max_tokens": 8, "sampling": GREEDY, "speculate": False}
    return mlx_stream.ChatSession(model, SYSTEM.text, **options)


@pytest.mark.parametrize("turns", [1, 3, 7])
def test_a_history_is_found_again_after_a_restart(
    letters: Path, tmp_path: Path, twin: Any, turns: int
) -> None:
    with keeping(letters, tmp_path / "kept") as lines:
        client = Client(lines)
        converse(client, twin, QUESTIONS[:turns])
    notices = Notices()
    for number in range(3):
        with keeping(letters, tmp_path / "kept", notices) as lines:
            client.lines = lines
            for name in ("restored", "extended"):
                client.ask(f"{name} {number}?")
                last = [*twin.reply(f"{name} {number}?")][-1]
                assert (client.reply.cache, client.said) == (name, twin.exchanges[-1].reply)
                assert client.reply.read == last.read
                assert client.reply.evicted_tokens == twin.cache.evicted
                assert ids_to_attend(client.chat) == ids_to_attend(twin)
            assert_well_formed(client.chat)
        assert len(files(tmp_path / "kept")) == 1 and not notices


def test_a_line_that_made_room_comes_back(letters: Path, tmp_path: Path, twin: Any) -> None:
    with keeping(letters, tmp_path, streams=1) as lines:
        client, other = Client(lines), Client(lines)
        for number, question in enumerate(QUESTIONS):
            client.ask(question)
            last = [*twin.reply(question)][-1]
            other.ask(question + "?")
            assert client.reply.cache == other.reply.cache == ("restored" if number else "new")
            assert client.reply.read == last.read and len(lines.state()) == 1
        client.ask("End?")
        said(twin.reply("End?"))
        assert ids_to_attend(client.chat) == ids_to_attend(twin)
        finished(lines)
        assert len(files(tmp_path)) == 2


def test_each_case_of_a_kept_line(letters: Path, tmp_path: Path) -> None:
    with keeping(letters, tmp_path / "kept") as lines:
        first = Client(lines)
        converse(first, questions=QUESTIONS[:4])

    def restored(ask: Callable[[Client], Any], **options: Any) -> Client:
        with keeping(letters, tmp_path / "kept", **options) as lines:
            client = Client(lines, first.messages)
            ask(client)
            assert client.reply.cache == "restored" and "as kept" in client.reply.reason
            held = attended_texts(client.chat)
            assert held == client.texts[-len(held) :]
            assert_well_formed(client.chat)
            return client

    def retry(client: Client) -> None:
        del client.messages[-1]
        client.ask(max_tokens=3)

    def edit(client: Client) -> None:
        client.take_back(1)
        client.ask("Else?")

    def fork(client: Client) -> None:
        client.take_back(2)
        client.ask("Else?")

    def trim(client: Client) -> None:
        client.trim(2)
        client.ask("Next?")

    client = restored(lambda client: client.ask("Next?"))
    most = client.reply.read
    assert most < 40 and len(files(tmp_path / "kept")) == 1
    assert restored(fork).reply.read <= most + 2
    assert len(files(tmp_path / "kept")) == 2  # the original stays
    assert restored(edit).reply.read <= most + 2
    first = restored(lambda client: client.ask("Next?"))
    first = restored(retry)
    assert first.reply.read == 1
    assert restored(trim).reply.read <= most + 2


def test_a_head_a_window_and_a_busy_line_do_not_match(letters: Path, tmp_path: Path) -> None:
    with keeping(letters, tmp_path) as lines:
        client = Client(lines)
        converse(client)
        finished(lines)
        other = Client(lines, client.messages)
        reply = client.begin("Long?", max_tokens=40)
        next(reply)
        other.ask("And?")  # as the line was before it began to reply
        assert other.reply.cache == "restored" and other.reply.line == 2
        said(reply)
        finished(lines)
        assert len(files(tmp_path)) == 2
        client.messages = client.messages[:-1]
    changes: list[dict[str, Any]] = [{"window": WINDOW + 1}, {"sinks": 9}]
    for change in changes:
        with keeping(letters, tmp_path, **change) as lines:
            other = Client(lines, client.messages)
            other.ask("Next?")
            assert other.reply.cache == "cold"
    with keeping(letters, tmp_path) as lines:
        client = Client(lines, [replace(SYSTEM, text="Be long."), *client.messages[1:]])
        client.ask("Next?")
        assert client.reply.cache == "cold"


@pytest.mark.parametrize("name", THINKS)
def test_thinking_that_was_settled_is_restored(name: str, tmp_path: Path) -> None:
    path = write_thinker(tmp_path / "model", THINKS[name], SCRIPT, "<|im_end|>")
    messages = [SYSTEM]
    for number, question in enumerate(QUESTIONS):
        with keeping(path, tmp_path / "kept", window=200) as lines:
            client = Client(lines, messages, max_tokens=20)
            client.ask(question)
            assert client.reply.cache == ("restored" if number else "new")
            assert client.said == "jklmno"
            assert_well_formed(client.chat)
            finished(lines)
            messages = client.messages


def test_a_reply_that_was_cut_is_kept(letters: Path, tmp_path: Path) -> None:
    with keeping(letters, tmp_path) as lines:
        client = Client(lines)
        client.ask("Hi")
        reply = client.begin("Long?", max_tokens=10**6)
        taken = [next(reply) for _ in range(3)]
    client.messages[-1:] = [client.messages[-1], replace(client.messages[2], text=said(taken))]
    with keeping(letters, tmp_path) as lines:
        client.lines = lines
        client.ask("And?")
        assert client.reply.cache == "restored" and attended_texts(client.chat) == client.texts


def test_the_beginning_of_a_line_is_kept_with_it(tmp_path: Path, monkeypatch: Any) -> None:
    """A template that prints the hour renders the same head after a restart."""
    source = "{{ strftime_now('%H:%M') }}"
    folder = write_letters(tmp_path / "letters", tiny_config(**SMALL))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["chat_template"] = source + config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    hours = [datetime(2026, 12, 1, 9), datetime(2026, 12, 1, 10), datetime(2026, 12, 1, 11)]

    class Clock:
        @staticmethod
        def now() -> datetime:
            return hours.pop(0)

    monkeypatch.setattr("mlx_stream.server.lines.datetime", Clock)
    caches, messages = [], [SYSTEM]
    for question in ("Hi", "And?", "More?"):
        with keeping(folder, tmp_path / "kept") as lines:
            lines.engine.wait()
            client = Client(lines, messages)
            client.ask(question)
            caches.append(client.reply.cache)
            messages = client.messages
    assert caches == ["new", "restored", "restored"]


# --- files ---


def damage_end(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


def damage_text(path: Path) -> None:
    """Change a text without moving it, which only the checksum detects."""
    path.write_bytes(path.read_bytes().replace(b'"Hm', b'"Ho'))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


def pipe_in_its_place(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def another_stream(path: Path) -> None:
    write = json.dumps({"__metadata__": {"header": "{}"}}).encode()
    path.write_bytes(len(write).to_bytes(8, "little") + write)


@pytest.mark.parametrize(
    "damage",
    [damage_end, damage_text, cut, empty, folder_in_its_place, pipe_in_its_place, another_stream],
)
def test_a_damaged_file_is_cold_and_reported_once(
    letters: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    with keeping(letters, tmp_path) as lines:
        client = Client(lines)
        converse(client)
    (path,) = files(tmp_path)
    damage(path)
    notices = Notices()
    with keeping(letters, tmp_path, notices) as lines:
        again = Client(lines, client.messages)
        again.ask("Next?")
        assert again.reply.cache == "cold" and len(notices) == 1
        assert "\n" not in notices[0] and not any(question in notices[0] for question in QUESTIONS)
        other = Client(lines, client.messages)
        other.ask("Other?")
        assert other.reply.cache == "edited" and len(notices) == 1


def test_a_file_of_another_model_or_that_vanishes_is_cold(letters: Path, tmp_path: Path) -> None:
    with keeping(letters, tmp_path / "kept") as lines:
        client = Client(lines)
        converse(client)
    notices = Notices()
    other = write_letters(tmp_path / "other", tiny_config(**SMALL, rms_norm_eps=1e-4))
    with keeping(other, tmp_path / "kept", notices) as lines:
        again = Client(lines, client.messages)
        again.ask("Next?")
        assert again.reply.cache == "cold" and "another model" in notices[0] and len(notices) == 1
        again.ask("Next?")
        assert again.reply.cache == "extended"
    with keeping(letters, tmp_path / "kept", notices) as lines:
        for path in files(tmp_path / "kept"):
            path.unlink()
        again = Client(lines, client.messages)
        again.ask("Next?")
        assert again.reply.cache == "cold" and "does not exist" in notices[1]


def test_a_file_that_was_replaced_is_cold(letters: Path, tmp_path: Path) -> None:
    with keeping(letters, tmp_path) as lines:
        clients = [Client(lines), Client(lines)]
        for number, client in enumerate(clients):
            converse(client, questions=(f"{number}?", "And?"))
    notices = Notices()
    with keeping(letters, tmp_path, notices) as lines:
        first, second = files(tmp_path)
        first.write_bytes(second.read_bytes())
        caches = []
        for client in clients:
            client.lines = lines
            client.ask("Next?")
            caches.append(client.reply.cache)
            assert attended_texts(client.chat) == client.texts
    assert sorted(caches) == ["cold", "restored"]
    assert len(notices) == 1 and "it was replaced" in notices[0]


def test_a_file_that_is_removed_while_it_is_written_does_not_come_back(
    tmp_path: Path, twin: Any
) -> None:
    said(twin.reply("Hi"))
    record = Record(bytes(64), [9], 1)
    kept = KeptLines(tmp_path, 2**30, print)
    for count in (0, 3):
        name = kept.new_name()
        steps = kept.save(KeptLine(name, bytes(32), record, 9, datetime.now()), twin)
        for _ in range(count):
            next(steps)
        kept.remove(name)
        assert not any(steps) and not files(tmp_path) and not kept.usable()
    kept.close()


def test_other_files_are_left_alone(letters: Path, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir(mode=0o700)
    mine = tmp_path / "kept" / "model.safetensors"
    mine.write_bytes(b"mine")
    partial = tmp_path / "kept" / ".0123456789abcdef.safetensors.0000.partial"
    partial.mkdir()
    notices = Notices()
    with keeping(letters, tmp_path / "kept", notices, limit=1) as lines:
        Client(lines).ask("Hi")
    assert mine.read_bytes() == b"mine" and not partial.exists()
    assert len(notices) == 1 and "--keep-size" in notices[0]


def test_only_the_user_can_read_what_is_kept(letters: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "kept"
    with keeping(letters, folder) as lines:
        Client(lines).ask("Hi")
        with pytest.raises(SessionError, match=rf"used by another server, process {os.getpid()}"):
            KeptLines(folder, 2**30, print)
    assert folder.stat().st_mode & 0o777 == 0o700
    modes = {path.name[:3]: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert len(modes) == 3 and set(modes.values()) == {0o600}
    folder.chmod(0o750)
    with pytest.raises(ValueRefused, match="chmod 700"):
        KeptLines(folder, 2**30, print)
    folder.chmod(0o700)
    (folder / "key").chmod(0o644)
    with pytest.raises(ValueRefused, match="key"):
        KeptLines(folder, 2**30, print)
    (folder / "key").unlink()
    for make in (lambda path: path.write_bytes(b"x"), os.mkfifo, lambda path: path.symlink_to("x")):
        make(folder / "key")
        with pytest.raises(ValueRefused, match="key"):
            KeptLines(folder, 2**30, print)
        (folder / "key").unlink()
    with pytest.raises(ValueRefused, match="--keep"):
        KeptLines(files(folder)[0], 2**30, print)


def test_without_the_key_nothing_is_recognized(letters: Path, tmp_path: Path) -> None:
    with keeping(letters, tmp_path) as lines:
        client = Client(lines)
        converse(client)
    (tmp_path / "key").unlink()
    with keeping(letters, tmp_path) as lines:
        client.lines = lines
        client.ask("Next?")
        assert client.reply.cache == "cold"


def test_what_is_kept_is_bounded(letters: Path, tmp_path: Path) -> None:
    """The least recently used are removed, one-turn conversations first."""
    with keeping(letters, tmp_path / "size") as lines:
        converse(Client(lines), questions=QUESTIONS[:2])
    size = files(tmp_path / "size")[0].stat().st_size
    with keeping(letters, tmp_path / "kept", limit=3 * size + size // 2, streams=1) as lines:
        clients = [Client(lines) for _ in range(5)]
        for number, client in enumerate(clients[:3]):
            converse(client, questions=(f"{number}", "And?"))
        Client(lines).ask("Title?")
        finished(lines)
        assert len(usable(lines)) == len(files(tmp_path / "kept")) == 3
        for number, client in enumerate(clients[3:], 3):
            converse(client, questions=(f"{number}", "And?"))
        finished(lines)
    with keeping(letters, tmp_path / "kept") as lines:
        found = []
        for client in clients:
            client.lines = lines
            client.ask("Next?")
            found.append(client.reply.cache)
    assert found == ["cold", "cold", "restored", "restored", "restored"]
    with keeping(letters, tmp_path / "kept", limit=size + size // 2) as lines:
        assert len(usable(lines)) == len(files(tmp_path / "kept")) == 1


def test_the_number_of_kept_conversations_is_bounded(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_lines, "MOST_LINES", 2)
    with keeping(letters, tmp_path) as lines:
        for number in range(4):
            Client(lines).ask(f"{number}?")
            finished(lines)
        texts = [path.read_bytes() for path in files(tmp_path)]
        assert len(usable(lines)) == len(texts) == 2
    assert sorted(b"3?" in text for text in texts) == [False, True]


def test_a_full_disk_is_reported_once_and_the_old_file_stays(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notices = Notices()
    with keeping(letters, tmp_path, notices) as lines:
        client = Client(lines)
        client.ask("Hi")
        finished(lines)
        (path,), before = files(tmp_path), files(tmp_path)[0].read_bytes()

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(snapshot.os, "fsync", full)
            for question in ("And?", "More?"):
                client.ask(question)
                assert client.reply.cache == "extended"
                finished(lines)
        assert len(notices) == 1 and "No space" in notices[0]
        assert path.read_bytes() == before and len([*tmp_path.iterdir()]) == 3
        client.ask("Yes?")
    assert path.read_bytes() != before


def test_a_line_that_a_client_closes_is_removed(letters: Path, tmp_path: Path) -> None:
    with keeping(letters, tmp_path) as lines:
        client, other = Client(lines), Client(lines)
        for each in (client, other):
            each.ask("Hi" if each is client else "Ho")
            each.ask("And?")
        reply = client.begin("Long?", max_tokens=10**6)
        next(reply)
        lines.close(1)
        eventually(lambda: len(files(tmp_path)) == 1)
        with pytest.raises(mlx_stream.errors.EngineClosed, match="closed by another request"):
            said(reply)
    assert len(files(tmp_path)) == 1


def test_evicted_turns_are_kept_as_digests_only(letters: Path, tmp_path: Path) -> None:
    with keeping(letters, tmp_path) as lines:
        client = Client(lines)
        client.ask("The canary sings")
        converse(client)
        converse(client)
        assert client.reply.evicted_turns > 3
    (path,) = files(tmp_path)
    text = path.read_bytes()
    assert b"Well?" in text and b"canary" not in text


def test_a_turn_takes_less_than_a_hundred_bytes() -> None:
    record = Record()
    for number in range(5_000):
        record.add(os.urandom(64))
        record.set_attended([number] * min(number + 1, 9))
    line = KeptLine("x", bytes(32), record, 99, datetime.now())
    assert len(json.dumps(line.note())) < 100 * 5_000


@pytest.mark.parametrize("limit", [0, 1])
def test_the_next_question_does_not_wait_for_a_file(
    letters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """What is being written is abandoned; an earlier file stays until the next one is complete."""
    flush, slow = os.fsync, []

    def flush_slowly(file: int) -> None:
        time.sleep(0.2 if slow else 0)
        flush(file)

    monkeypatch.setattr(snapshot.os, "fsync", flush_slowly)
    with keeping(letters, tmp_path) as lines:
        client = Client(lines)
        for question in QUESTIONS[:limit]:
            client.ask(question)
            finished(lines)
        before = [path.read_bytes() for path in files(tmp_path)]
        assert len(before) == limit
        slow.append(1)
        started = time.monotonic()
        for question in QUESTIONS[:5]:
            client.ask(question)
        assert time.monotonic() - started < 5 * 0.2 + 2
        assert [path.read_bytes() for path in files(tmp_path)] == before
        slow.clear()
    assert [path.read_bytes() for path in files(tmp_path)] != before and len(files(tmp_path)) == 1
