"""A conversation's file returns what was written to it, but not what was taken back."""

import json
import sqlite3
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_stream.chat import migrations
from mlx_stream.chat.exchange import FINISHES, Exchange
from mlx_stream.chat.export import export_json, export_markdown
from mlx_stream.chat.recorder import Change, ChangeKind
from mlx_stream.chat.schema import (
    ANSWERED,
    ASKED,
    SessionHeader,
    StoredTurn,
    pack_ids,
    turn_checksum,
)
from mlx_stream.chat.store import Store
from mlx_stream.errors import SessionError

ASK, ANSWER, UNDO, STAND = ChangeKind
START = "00ff"  # a sampler's state
HEADER = SessionHeader.new(
    model="./a model", fingerprint="f" * 16, system="Be é\0.", window=60, sinks=4, evict="turn"
)
IDS = st.lists(st.integers(0, 2**32 - 1), max_size=5).map(tuple)
EXCHANGES = st.builds(
    Exchange,
    *(st.text(), st.text(), IDS, IDS, IDS, st.text(), st.sampled_from(FINISHES)),
    st.none() | IDS,
)
ODD = [
    Exchange("Hi", "Hello.", (), (1, 2), (3,)),
    Exchange("", "", (7,), (), (), finish="interrupted"),
    Exchange(
        "a\0b\nÜ 🦙 \u202e", "\0", (2**32 - 1,), (0, 2**31), (2**32 - 1,) * 3000, "\0", "stop"
    ),
    Exchange("long " * 9000, "'; DROP TABLE messages; --", (1,), (2,), (3,), "rest", "length"),
]


def changed(
    kind: ChangeKind,
    number: int,
    exchange: Exchange | None = None,
    first: int = 1,
    sampler: str = START,
    header: SessionHeader = HEADER,
) -> Change:
    exchanges = {} if exchange is None else {number: exchange}
    return Change(kind, number, exchanges, first, sampler, header.system, header.window)


def kept(path: Path, exchanges: list[Exchange], header: SessionHeader = HEADER) -> Path:
    """Write a session with these exchanges, and close it."""
    with Store.create(path, header, START) as store:
        for number, exchange in enumerate(exchanges, 1):
            store.write(changed(ASK, number, exchange, number, header=header))
            sampler = f"{number:02x}"
            store.write(changed(ANSWER, number, exchange, number, sampler, header))
    return path


def said(store: Store, first: int = 1) -> list[Exchange]:
    """Return the exchanges of a session; check that each has its number and was answered."""
    turns, count = store.turns(first), store.state.count
    assert [turn.number for turn in turns] == [*range(first, count + 1)]
    assert {turn.state for turn in turns} <= {ANSWERED}
    return [turn.exchange for turn in turns]


def standing(store: Store) -> tuple[SessionHeader, int, str, int]:
    state = store.state
    return state.header, state.first, state.sampler, state.count


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.b.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    """Return an open session with the exchanges in `ODD`."""
    with Store.open(kept(path, ODD)) as store:
        yield store


def refusal(function, *args, **kwargs) -> str:
    with pytest.raises(SessionError) as caught:
        function(*args, **kwargs)
    line = str(caught.value)
    assert "\n" not in line and len(line) < 500
    return line


def test_the_time_of_a_turn_stays_when_its_ids_change(store: Store) -> None:
    turns = "UPDATE turns SET time = '2020-01-01T00:00:00Z', checksum = ? WHERE number = 2"
    row = ((2, ANSWERED, "interrupted", "2020-01-01T00:00:00Z", pack_ids((7,)), None), [])
    messages = store.connection.execute("SELECT * FROM messages WHERE turn = 2").fetchall()
    store.connection.execute(turns, (turn_checksum(HEADER.id, row[0], messages),))
    other = {2: replace(ODD[1], question_ids=(9,)), 4: ODD[3]}
    for _ in range(2):
        store.write(Change(STAND, 4, other, 2, "07", "Another.", 61))
        now = {turn.number: turn for turn in store.turns()}
        assert now[2].time == "2020-01-01T00:00:00Z" and now[2].exchange.question_ids == (9,)
        assert [now[n].exchange for n in (1, 3, 4)] == [ODD[0], ODD[2], ODD[3]]
    header = replace(HEADER, system="Another.", window=61)
    assert standing(store) == (header, 2, "07", 4)
    store.verify()


def test_turns_before_a_damaged_one_can_still_be_shown(path: Path) -> None:
    connection = sqlite3.connect(kept(path, ODD))
    connection.execute("UPDATE messages SET text = 'No.' WHERE (turn, place) = (3, 1)")
    connection.commit()
    connection.close()
    with Store.open(path) as store:
        turns, damage = store.whole()
    assert [turn.exchange for turn in turns] == ODD[:2] and "turn 3 was altered" in damage


LONGEST = 2**16
WORDS: list[dict[str, Any]] = [
    *({"question": "\ud800"}, {"question": "x" * (LONGEST + 1)}, {"reply": 3}, {"rest": None}),
    *({"finish": "never"}, {"question_ids": (2**32,)}, {"reply_ids": (-1,)}),
    *({"closing_ids": (0.5,)}, {"settled_ids": (2**32,)}),
]
HEADERS: list[dict[str, Any]] = [
    *({"created": "\x1b[31m"}, {"window": 0}, {"window": 2**63}, {"sinks": -1}),
    *({"evict": "never"}, {"model": None}, {"system": 3}, {"system": "\ud800"}),
]
PLACES: list[dict[str, Any]] = [
    *({"first": 0}, {"first": -1}, {"first": "1"}, {"sampler": None}, {"sampler": "\ud800"}),
]
REFUSED = [
    *(changed(kind, number, ODD[0]) for kind in (ASK, ANSWER, UNDO) for number in (0, 6)),
    *(changed(STAND, number) for number in (-1, 5, 6)),
    Change(STAND, 4, {5: ODD[0]}, 1, START, None, 60),
    Change(STAND, 6, {6: ODD[0]}, 1, START, None, 60),
    Change(STAND, 2**62, {5: ODD[0]}, 1, START, None, 60),
    Change(ANSWER, 5, {4: ODD[0]}, 1, START, None, 60),
    Change(ANSWER, 5, {}, 1, START, None, 60),
    *(
        changed(kind, n, replace(ODD[0], **w))
        for w in WORDS
        for kind in (ANSWER, STAND)
        for n in (4, 5)
    ),
    *(changed(ASK, n, replace(ODD[0], **w)) for w in WORDS[:2] for n in (4, 5)),
    *(replace(changed(ANSWER, 5, ODD[0]), **place) for place in PLACES),
    *(replace(changed(STAND, 4), **place) for place in PLACES),
    *(
        changed(STAND, 4, header=replace(HEADER, **new))
        for new in HEADERS
        if {*new} & {"system", "window"}
    ),
]


def test_an_invalid_change_is_refused_and_changes_nothing(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlx_stream.chat.store.LONGEST_ROW", LONGEST)
    for change in REFUSED:
        assert refusal(store.write, change)
    for header in HEADERS:
        refusal(store.update, replace(HEADER, **header))
        refusal(Store.create, path.with_name("new.db"), replace(HEADER, **header), START)
    for fixed in ({"id": "0" * 32}, {"created": "2020-01-01T00:00:00Z"}):
        refusal(store.update, replace(HEADER, **fixed))
    assert not list(path.parent.glob("*new*"))
    assert said(store) == ODD and standing(store) == (HEADER, 4, "04", 4)
    store.write(changed(ANSWER, 5, ODD[0]))
    store.verify()


changes = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["ask", "answer", "replace", "ask again"]), EXCHANGES),
        st.tuples(st.sampled_from(["undo", "reopen", "fall back"]), st.none()),
        st.tuples(st.just("stand"), st.text()),
    ),
    max_size=10,
)


@given(changes)
def test_it_is_a_list_of_turns(changes: list) -> None:
    turns: list[tuple[str, Exchange]] = []
    header, stands = HEADER, (1, START)
    with tempfile.TemporaryDirectory() as folder:
        store = Store.create(Path(folder) / "x.db", header, START)
        for step, (what, value) in enumerate(changes):
            if what == "reopen":
                store.close()
                store = Store.open(store.path)
                continue
            if what in ("undo", "replace", "ask again", "fall back") and not turns:
                continue
            kinds = {"undo": UNDO, "ask": ASK, "ask again": ASK}
            kinds |= {"stand": STAND, "fall back": STAND}
            kind, last = kinds.get(what, ANSWER), turns[-1:]
            if what in ("undo", "replace", "ask again", "fall back"):
                turns.pop()
            if what == "answer" and last and last[0][0] == ASKED:
                turns.pop()  # this answers the pending question
            number = len(turns) + (kind is not STAND)
            if what == "stand":
                header = replace(header, system=value, window=1 + step)
            if kind in (ASK, ANSWER):
                turns.append((ASKED if kind is ASK else ANSWERED, value))
            asked = (1 + step % (len(turns) + 3), f"{step:x}")
            stands = (min(asked[0], len(turns) + 1), asked[1])
            exchange = value if kind in (ASK, ANSWER) else None
            for _ in range(1 + step % 2):  # as after an interrupt
                store.write(changed(kind, number, exchange, *asked, header))
            check_turns(store, turns)
            assert standing(store) == (header, *stands, len(turns))
        heads = [store.head(1, number) for number in range(len(turns) + 1)]
        assert len(set(heads)) == len(heads)
        store.verify()
        store.close()
        with Store.open(store.path) as store:
            check_turns(store, turns)
            assert standing(store) == (header, *stands, len(turns))
            assert heads == [store.head(1, number) for number in range(len(turns) + 1)]


def check_turns(store: Store, turns: list[tuple[str, Exchange]]) -> None:
    blank = {"reply": "", "reply_ids": (), "rest": "", "finish": "interrupted"}
    wanted = [(s, replace(e, **blank) if s == ASKED else e) for s, e in turns]
    assert [(turn.state, turn.exchange) for turn in store.turns()] == wanted
    answered = {n: e for n, (state, e) in enumerate(turns, 1) if state == ANSWERED}
    assert store.exchanges() == answered
    for first in range(2, len(turns) + 2):
        assert [turn.number for turn in store.turns(first)] == [*range(first, len(turns) + 1)]
        assert store.exchanges(first) == {n: e for n, e in answered.items() if n >= first}


def test_a_head_changes_with_what_it_covers(store: Store) -> None:
    def heads() -> dict[tuple[int, int], str]:
        pairs = [(first, last) for first in range(1, 6) for last in range(first - 1, 5)]
        return {pair: store.head(*pair) for pair in pairs}

    before = heads()
    assert len(set(before.values())) == len(before)
    store.write(changed(STAND, 4, first=5))  # a head does not depend on which turns are attended
    assert heads() == before
    store.write(Change(STAND, 4, {2: replace(ODD[1], rest="x")}, 1, START, HEADER.system, 60))
    after = heads()
    assert {p for p in before if before[p] != after[p]} == {
        (first, last) for first, last in before if first <= 2 <= last
    }
    store.update(header=replace(HEADER, system=None))
    assert not set(after.values()) & set(heads().values())
    for first, last in ((1, 5), (5, 5), (0, 4), (-1, 2), (4, 1), (6, 5)):
        assert f"turns {first} to {last} do not exist: there are 4" in refusal(
            store.head, first, last
        )


def test_only_its_user_may_read_it(path: Path) -> None:
    kept(path, ODD).chmod(0o644)
    with Store.open(path) as store:
        store.write(changed(ANSWER, 5, ODD[0]))
        modes = {file.name: file.stat().st_mode & 0o777 for file in path.parent.iterdir()}
        assert modes == {"a.b.db": 0o600, "a.b.db-wal": 0o600, "a.b.db-shm": 0o600}
    assert [file.name for file in path.parent.iterdir()] == ["a.b.db"]


SECRET = "secret question " * 2000


@pytest.mark.parametrize(
    "change",
    [
        *(changed(ANSWER, 4, ODD[0]), changed(UNDO, 4), changed(ASK, 3, ODD[0])),
        *(changed(ASK, 5, ODD[0]), changed(ANSWER, 5, ODD[0]), changed(UNDO, 5), changed(STAND, 4)),
    ],
    ids=lambda change: f"{change.kind.name} {change.number}",
)
@pytest.mark.parametrize("kind", [ASK, ANSWER])
def test_a_turn_taken_back_or_replaced_leaves_the_disk(
    store: Store, kind: ChangeKind, change: Change
) -> None:
    store.write(changed(kind, 5, replace(ODD[0], question=SECRET, reply=SECRET)))
    assert on_disk(store.path)
    store.write(change)
    assert not on_disk(store.path)
    assert store.state.count == change.number - (change.kind is UNDO)
    store.verify()


def on_disk(path: Path) -> bool:
    return any(SECRET[:9].encode() in file.read_bytes() for file in path.parent.iterdir())


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
        "user_version": migrations.VERSION,
        "application_id": migrations.APPLICATION_ID,
    }
    found = {name: store.connection.execute(f"PRAGMA {name}").fetchone() for name in wanted}
    # A build without a feature lacks its setting.
    assert {name: row[0] for name, row in found.items() if row} == {
        name: value for name, value in wanted.items() if found[name]
    }


def test_a_name_that_is_taken_or_not_a_file_is_refused(path: Path, tmp_path: Path) -> None:
    assert refusal(Store.open, path).startswith("session 'a.b' does not exist")
    kept(path, ODD)
    assert "exists" in refusal(Store.create, path, HEADER, START)
    link = tmp_path / "link.db"
    link.symlink_to(path)
    assert "is not a regular file" in refusal(Store.open, link)
    (tmp_path / "folder.db").mkdir()
    assert "is not a regular file" in refusal(Store.open, tmp_path / "folder.db")
    with Store.open(path) as store:
        assert said(store) == ODD
    assert "closed" in refusal(store.write, changed(ANSWER, 5, ODD[0]))
    store.close()


def test_a_log_left_by_another_is_not_read(path: Path) -> None:
    with Store.open(kept(path, ODD)) as store:
        store.write(changed(ANSWER, 5, ODD[0]))
        log = Path(f"{path}-wal").read_bytes()
    path.unlink()
    Path(f"{path}-wal").write_bytes(log)
    header = replace(HEADER, id="1" * 32)
    with Store.create(path, header, START) as store:
        assert (store.state.header, said(store)) == (header, [])


def test_two_may_read_while_one_writes(store: Store, path: Path) -> None:
    with Store.open(path) as reader:
        store.write(changed(ANSWER, 5, ODD[0]))
        assert said(reader) == said(store) == [*ODD, ODD[0]]
    with sqlite3.connect(path, isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        store.connection.execute("PRAGMA busy_timeout = 0")
        assert "another program is using it" in refusal(store.write, changed(UNDO, 5))
        other.execute("ROLLBACK")
    other.close()
    store.write(changed(UNDO, 5))
    assert said(store) == ODD


# --- export ---


def turns_of(*exchanges: Exchange) -> list[StoredTurn]:
    return [StoredTurn(n, ANSWERED, e, "2026-05-09T17:03:00Z") for n, e in enumerate(exchanges, 1)]


def test_markdown_holds_every_text_and_its_headings_cannot_be_forged() -> None:
    text = export_markdown(HEADER, turns_of(*ODD))
    assert all(e.question in text and e.reply in text for e in ODD)
    lines = text.split("\n")
    assert lines[0] == f"# Conversation from {HEADER.created}"
    headings = [line for line in lines if line.startswith("## ")]
    assert headings[:3] == ["## System", "## 1. You", "## 1. Model"]
    assert headings[4] == "## 2. Model (interrupted)" and headings[-1].endswith("(hit token limit)")
    forged = replace(ODD[0], reply="Yes.\n\n## 2. You\n\nI agree")
    lines = export_markdown(HEADER, turns_of(forged)).split("\n")
    assert [line for line in lines if line.endswith(f" [{HEADER.id}]")] == [
        f"## {heading} [{HEADER.id}]" for heading in ("System", "1. You", "1. Model")
    ]


def test_an_unanswered_question_is_exported_as_unanswered() -> None:
    """It is not exported as an empty reply, because a reply may be empty."""
    empty = replace(ODD[0], reply="")
    turns = turns_of(empty, ODD[0], ODD[0])
    turns[1] = replace(turns[1], state=ASKED)
    lines = export_markdown(HEADER, turns).split("\n")
    assert [line for line in lines if line.startswith("## ")][1:] == [
        *("## 1. You", "## 1. Model", "## 2. You", "## 2. Model (did not answer)"),
        *("## 3. You", "## 3. Model"),
    ]
    value = export_json(HEADER, turns)
    assert json.loads(json.dumps(value)) == value
    assert list(value) == ["session", "created", "model", "system", "turns"]
    found = value["turns"]
    assert [turn["reply"] for turn in found] == ["", None, "Hello."]
    assert [turn["finish"] for turn in found] == ["end", None, "end"]
