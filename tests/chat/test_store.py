"""A conversation's file: what goes in comes out, and stays; what was taken back is gone."""

import json
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlx_stream
from mlx_stream.chat import schema
from mlx_stream.chat.exchange import FINISHES, Exchange
from mlx_stream.chat.export import export_json, export_markdown
from mlx_stream.chat.store import SessionHeader, SessionProgress, Store
from mlx_stream.errors import SessionError

START = SessionProgress(1, "00ff")
HEADER = SessionHeader.new(
    model="./a model", fingerprint="f" * 16, system="Be é\0.", window=60, sinks=4, evict="turn"
)
IDS = st.lists(st.integers(0, 2**32 - 1), max_size=5).map(tuple)
EXCHANGES = st.builds(
    Exchange, st.text(), st.text(), IDS, IDS, IDS, st.text(), st.sampled_from(FINISHES)
)
ODD = [
    Exchange("Hi", "Hello.", (), (1, 2), (3,)),
    Exchange("", "", (7,), (), (), finish="interrupted"),
    Exchange(
        "a\0b\nÜ 🦙 \u202e", "\0", (2**32 - 1,), (0, 2**31), (2**32 - 1,) * 3000, "\0", "stop"
    ),
    Exchange("long " * 9000, "'; DROP TABLE messages; --", (1,), (2,), (3,), "rest", "length"),
]


def kept(path: Path, exchanges: list[Exchange], header: SessionHeader = HEADER) -> Path:
    """Write a session with these exchanges, and close it."""
    with Store.create(path, header, START) as store:
        for number, exchange in enumerate(exchanges, 1):
            store.append(exchange, SessionProgress(number, f"{number:02x}"))
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.b.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    """Return an open session of the exchanges in `ODD`."""
    with Store.open(kept(path, ODD)) as store:
        yield store


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(SessionError) as caught:
        function(*args, **kwargs)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500
    return line


def test_what_goes_in_comes_out(store: Store) -> None:
    assert (store.header, store.progress, store.count) == (HEADER, SessionProgress(4, "04"), 4)
    assert store.exchanges() == ODD
    assert [store.exchanges(first) for first in (3, 4, 5)] == [ODD[2:], ODD[3:], []]
    store.verify()


def test_what_comes_before_a_damage_can_still_be_shown(path: Path) -> None:
    connection = sqlite3.connect(kept(path, ODD))
    connection.execute("UPDATE messages SET text = 'No.' WHERE number = 6")
    connection.commit()
    connection.close()
    with Store.open(path) as store:
        exchanges, damage = store.whole()
    assert exchanges == ODD[:2] and "exchange 3 was altered" in damage


def test_a_header_says_when_and_which(path: Path) -> None:
    other = SessionHeader.new(
        model="m", fingerprint="", system=None, window=1, sinks=0, evict="token"
    )
    assert other.id != HEADER.id and len(other.created) == len("2026-05-09T17:03:00Z")
    with Store.create(path, other, START) as store:
        assert (store.header, store.count, store.exchanges()) == (other, 0, [])


changes = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["append", "replace"]), EXCHANGES),
        st.tuples(st.sampled_from(["undo", "reopen"]), st.none()),
        st.tuples(st.just("update"), st.text()),
    ),
    max_size=8,
)


@given(changes)
def test_it_is_a_list_of_exchanges(changes: list) -> None:
    said, header, progress = [], HEADER, START
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder) / "x.db", header, progress)
        for number, (change, value) in enumerate(changes):
            after = SessionProgress(1 + number % max(1, len(said)), f"{number:x}")
            if change == "reopen":
                store.close()
                store = Store.open(store.path)
                continue
            if change in ("undo", "replace") and not said:
                assert "no exchange" in refusal(
                    getattr(store, change), *([value] if value else []), START
                )
                continue
            progress = after if change != "undo" else START
            if change == "undo":
                store.undo(progress)
                said.pop()
            elif change == "append":
                store.append(value, progress)
                said.append(value)
            elif change == "replace":
                store.replace(value, progress)
                said[-1] = value
            else:
                header = replace(header, system=value, window=1 + number)
                store.update(header=header, progress=progress)
            assert (store.header, store.progress, store.count) == (header, progress, len(said))
            assert store.exchanges() == said
        heads = [store.head(number) for number in range(len(said) + 1)]
        assert len(set(heads)) == len(heads)
        store.verify()
        store.close()
        with Store.open(store.path) as store:
            assert (store.header, store.progress, store.exchanges()) == (header, progress, said)
            assert heads == [store.head(number) for number in range(len(said) + 1)]


def test_a_head_changes_with_what_is_before_it(store: Store) -> None:
    before = [store.head(number) for number in range(5)]
    store.replace(replace(ODD[3], reply="another"), START)
    after = [store.head(number) for number in range(5)]
    assert after[:4] == before[:4] and after[4] != before[4]
    store.update(header=replace(HEADER, system=None))
    assert not set(after) & {store.head(number) for number in range(5)}
    assert "no exchange 5, of 4" in refusal(store.head, 5)
    assert "no exchange -1" in refusal(store.head, -1)


def test_only_its_user_may_read_it(path: Path) -> None:
    kept(path, ODD).chmod(0o644)
    with Store.open(path) as store:
        store.append(ODD[0], START)
        modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
        assert modes == {"a.b.db": 0o600, "a.b.db-wal": 0o600, "a.b.db-shm": 0o600}
    assert [file.name for file in path.parent.iterdir()] == ["a.b.db"]


def test_what_is_taken_back_is_on_no_disk(path: Path) -> None:
    secrets = [f"secret {number} " * 2000 for number in range(3)]
    with Store.create(path, HEADER, START) as store:
        for text in secrets[:2]:
            store.append(replace(ODD[0], reply=text), START)
        store.replace(replace(ODD[0], reply=secrets[2]), START)
        store.undo(START)
        left = b"".join(file.read_bytes() for file in path.parent.iterdir())
    assert [text.encode()[:9] in left for text in secrets] == [True, False, False]


def test_sqlite_is_set_to_lose_nothing_and_trust_nothing(store: Store) -> None:
    wanted = {
        "journal_mode": "wal",
        "synchronous": 2,
        "fullfsync": 1,
        "secure_delete": 1,
        "trusted_schema": 0,
        "cell_size_check": 1,
        "mmap_size": 0,
        "temp_store": 2,
        "user_version": len(schema.MIGRATIONS),
        "application_id": schema.APPLICATION_ID,
    }
    found = {name: store.connection.execute(f"PRAGMA {name}").fetchone() for name in wanted}
    # A build without a feature has no such setting.
    assert {name: row[0] for name, row in found.items() if row} == {
        name: value for name, value in wanted.items() if found[name]
    }


@pytest.mark.parametrize(
    "change",
    [
        {"question": "\ud800"},
        {"reply": 3},
        {"rest": None},
        {"finish": "never"},
        {"question_ids": (2**32,)},
        {"reply_ids": (-1,)},
        {"closing_ids": (0.5,)},
        {"question": "x" * 70_000},
    ],
    ids=lambda change: f"{change!r:.30}",
)
def test_what_cannot_be_stored(store: Store, change: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_stream.chat.store.LONGEST_ROW", 2**16)
    for method in (store.append, store.replace):
        refusal(method, replace(ODD[0], **change), START)
    assert store.exchanges() == ODD and store.progress == SessionProgress(4, "04")
    store.append(ODD[0], SessionProgress(5, ""))
    store.verify()


@pytest.mark.parametrize("first", [0, -1, 7, 2**70, "1"])
def test_progress_that_cannot_be(store: Store, first) -> None:
    refusal(store.append, ODD[0], SessionProgress(first, ""))
    refusal(store.update, progress=SessionProgress(first, ""))
    assert store.exchanges() == ODD and store.progress == SessionProgress(4, "04")


@pytest.mark.parametrize(
    "change",
    [
        {"id": "0" * 32},
        {"created": "2020-01-01T00:00:00Z"},
        {"created": "\x1b[31m"},
        {"window": 0},
        {"window": 2**63},
        {"sinks": -1},
        {"evict": "never"},
        {"model": None},
        {"system": 3},
        {"system": "\ud800"},
    ],
    ids=str,
)
def test_headers_that_cannot_be(store: Store, path: Path, change: dict) -> None:
    refusal(store.update, header=replace(HEADER, **change))
    assert store.header == HEADER
    if change not in ({"id": "0" * 32}, {"created": "2020-01-01T00:00:00Z"}):
        new = path.with_name("new.db")
        refusal(Store.create, new, replace(HEADER, **change), START)
        assert not list(path.parent.glob("*new*"))


def test_a_name_that_is_taken_or_is_no_file(path: Path, tmp_path: Path) -> None:
    assert refusal(Store.open, path).startswith("session 'a.b': there is none")
    kept(path, ODD)
    assert "exists" in refusal(Store.create, path, HEADER, START)
    link = tmp_path / "link.db"
    link.symlink_to(path)
    assert "is a link" in refusal(Store.open, link)
    (tmp_path / "folder.db").mkdir()
    assert "no file" in refusal(Store.open, tmp_path / "folder.db")
    with Store.open(path) as store:
        assert store.exchanges() == ODD
    assert "closed" in refusal(store.append, ODD[0], START)
    store.close()


def test_a_log_left_by_another_is_not_read(path: Path) -> None:
    with Store.open(kept(path, ODD)) as store:
        store.append(ODD[0], START)
        log = Path(f"{path}-wal").read_bytes()
    path.unlink()
    Path(f"{path}-wal").write_bytes(log)
    header = replace(HEADER, id="1" * 32)
    with Store.create(path, header, START) as store:
        assert (store.header, store.exchanges()) == (header, [])


def test_versions(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept(path, ODD)
    with monkeypatch.context() as patch:
        half = (*schema.MIGRATIONS, ("CREATE TABLE more (x INTEGER) STRICT", "no SQL"))
        patch.setattr(schema, "MIGRATIONS", half)
        assert "syntax error" in refusal(Store.open, path)
    with Store.open(path) as store:
        assert store.exchanges() == ODD
    with monkeypatch.context() as patch:
        newer = (*schema.MIGRATIONS, ("CREATE TABLE more (x INTEGER) STRICT",))
        patch.setattr(schema, "MIGRATIONS", newer)
        with Store.open(path) as store:
            assert store.exchanges() == ODD
            store.verify()
    schema.schema.cache_clear()
    assert "written by a newer mlx_stream" in refusal(Store.open, path)


def test_two_may_read_while_one_writes(store: Store, path: Path) -> None:
    with Store.open(path) as reader:
        store.append(ODD[0], START)
        assert reader.exchanges() == store.exchanges() == [*ODD, ODD[0]]
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        store.connection.execute("PRAGMA busy_timeout = 0")
        assert "another program is using it" in refusal(store.undo, START)
        other.execute("ROLLBACK")
    other.close()
    store.undo(START)
    assert store.exchanges() == ODD


def test_nothing_here_imports_mlx() -> None:
    code = (
        "import sys, types; package = types.ModuleType('mlx_stream');"
        f"package.__path__ = {mlx_stream.__path__!r}; sys.modules['mlx_stream'] = package;"
        "import mlx_stream.program.lock, mlx_stream.chat.export;"
        "assert not {'mlx', 'numpy', 'tokenizers'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- export ---


def test_markdown_holds_every_text_and_headings_nobody_can_forge() -> None:
    text = export_markdown(HEADER, ODD)
    assert all(e.question in text and e.reply in text for e in ODD)
    lines = text.split("\n")
    assert lines[0] == f"# Conversation of {HEADER.created}"
    headings = [line for line in lines if line.startswith("## ")]
    assert headings[:3] == ["## System", "## 1. You", "## 1. Model"]
    assert headings[4] == "## 2. Model (interrupted)" and headings[-1].endswith(
        "(cut at its limit)"
    )
    forged = replace(ODD[0], reply="Yes.\n\n## 2. You\n\nI agree")
    lines = export_markdown(HEADER, [forged]).split("\n")
    assert [line for line in lines if line.endswith(f" [{HEADER.id}]")] == [
        f"## {heading} [{HEADER.id}]" for heading in ("System", "1. You", "1. Model")
    ]


def test_json_survives_a_file() -> None:
    value = export_json(HEADER, ODD)
    assert json.loads(json.dumps(value)) == value
    assert list(value) == ["session", "created", "model", "system", "turns"]
    assert value["turns"][0] == {"question": "Hi", "reply": "Hello.", "finish": "end"}
