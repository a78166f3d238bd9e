"""Chooses the line that answers a request; changes nothing.

A line is one stream with a record of the turns that it has read, as digests. The cases for a
request's closed turns T and a line's turns R are:

    T are the last of R, or all of them      extended   the question is read
    one more in R, with the same question    retried    the reply is rolled back, 1 token is read
    one more in R                            edited     the turn is rolled back, in a copy
    more in R, or only the first T match     forked     a copy is rolled back; other turns are read
    T begin later than R                     shifted    the turns left out are evicted first
    any of these, but R is in a file         restored   as above, once the stream has been restored
    nothing matches                          cold       the newest turns that fit are read
    T is empty                               new

A line that is writing a reply is neither waited for nor copied.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mlx_stream.chat.messages import Message
from mlx_stream.models.window import THINKING_WINDOWS
from mlx_stream.server.conversation import (
    DIGEST_BYTES,
    TURN_BYTES,
    characters_of,
    longest_text,
)
from mlx_stream.server.kept_lines import KeptLine
from mlx_stream.server.line_record import Record
from mlx_stream.server.line_reply import Request
from mlx_stream.server.stream_line import StreamLine

Turn = Sequence[Message]
Match = tuple[StreamLine | KeptLine, int, int]


@dataclass(frozen=True)
class Choice:
    """How a request is answered.

    Attributes:
        cache: the name of the case; see the module's docstring.
        reason: why, in a few words.
        record: the line's record, up to the question; for a retry, including the question.
        source: the line to use, to copy or to restore; None for a new one.
        copy: whether to copy it.
        retry: whether its last question is answered again.
        back: how many of its last turns are rolled back.
        keep: how many of the newest turns left after that may stay attended; None for all.
        history: the messages of turns to read as text.
        unread: how many turns before them are not read.
    """

    cache: str
    reason: str
    record: Record
    source: StreamLine | KeptLine | None = None
    copy: bool = False
    retry: bool = False
    back: int = 0
    keep: int | None = None
    history: tuple[Message, ...] = ()
    unread: int = 0


def choose_line(
    request: Request,
    lines: Sequence[StreamLine],
    kept: Sequence[KeptLine],
    free: bool,
    window: int | None,
    copies: bool = True,
) -> Choice:
    """Return how to answer a request.

    Args:
        free: whether another line may be opened without closing one.
        window: a new line's window, in tokens; None for the model's default.
        copies: whether a line may be copied; otherwise everything is done in place.
    """
    turns = request.conversation.turns
    if not turns:
        return Choice("new", "there are no earlier turns", Record())
    best, why = best_match(request, lines, kept)
    if best is None:
        return read_newest(request, why, window)
    line, first, last = best
    count, behind, record = last - first, len(line.record) - last, line.record.copy()
    keep, shifted = (count, "shifted") if first else (None, "")
    left_out = f"; older turns that the client left out: {first:,}" if first else ""
    if count == len(turns) and not behind:
        reason = f"the stream has read these turns{left_out}"
        return named(Choice(shifted or "extended", reason, record, line, keep=keep))
    asked = line.record.digests[last * TURN_BYTES :][:DIGEST_BYTES]
    again = asked == request.asked and not request.conversation.begins_reply
    if count == len(turns) and behind == 1 and again:
        reason = f"the question has been answered before{left_out}"
        keep = keep and keep + 1
        return named(Choice(shifted or "retried", reason, record, line, retry=True, keep=keep))
    edited = count == len(turns) and behind == 1
    rest = turns[count:]
    if len(readable(rest, window)) < len(rest):
        return read_newest(request, "the turns to read fill the window", window)
    record.truncate(last)
    record.add(request.turns[count * TURN_BYTES :])
    # A copied line is the first to be closed, so an edit does not displace another line.
    place = free or (not edited and next_to_go(lines, line))
    reason = f"turns rolled back: {behind:,}{left_out}"
    if rest:
        shifted, reason = "", f"turns that the stream has read: {count:,} of {len(turns):,}"
    found = Choice(
        shifted or ("edited" if edited else "forked"),
        reason,
        record,
        line,
        copy=copies and bool(place),
        back=behind,
        keep=keep,
        history=messages_of_turns(rest),
    )
    return named(found)


def named(choice: Choice) -> Choice:
    """Return a choice, named `restored` if its line must be restored."""
    if not isinstance(choice.source, KeptLine):
        return choice
    return replace(choice, cache="restored", reason=f"{choice.reason}, as kept", copy=False)


def best_match(
    request: Request, lines: Sequence[StreamLine], kept: Sequence[KeptLine]
) -> tuple[Match | None, str]:
    """Return the line to use and the positions of the request's turns in its record.

    Matches are ranked by these criteria, in order: more turns match; the line need not be restored;
    all the request's turns match, at most one turn follows them, and nothing older must be evicted;
    the match ends later in the record; it reaches the record's end. If no line matches, return why.
    """
    found: list[tuple[tuple[Any, ...], Match]] = []
    why = "no stream has the same head"
    for line in (*lines, *kept):
        if line.head != request.head:
            continue
        live = isinstance(line, StreamLine)
        first, last = line.record.find(request.turns)
        if last == first:
            why = "no stream has read the first turn" if "head" in why else why
        elif live and line.reply:
            why = "the stream that has read these turns is writing a reply"
        elif not line.record.fits(first, last, line.window):
            why = "too many of these turns have been evicted"
        else:
            behind = len(line.record) - last
            asked = line.record.digests[last * TURN_BYTES :][:DIGEST_BYTES] == request.asked
            whole = last - first == len(request.conversation.turns)
            simple = whole and not first and behind < 2
            rank = (last - first, live, simple, last, not behind, asked, line.used)
            found.append((rank, (line, first, last)))
    best = max(found, key=lambda each: each[0], default=None)
    return (best[1] if best else None), why


def readable(turns: Sequence[Turn], window: int | None) -> Sequence[Turn]:
    """Return the newest turns, without those that are certain not to fit in a window."""
    # Each turn has at least one token.
    first = max(0, len(turns) - (window or THINKING_WINDOWS[0]))
    longest = longest_text(window)
    for at in range(len(turns) - 1, first - 1, -1):
        if characters_of(turns[at]) > longest:
            return turns[at + 1 :]
    return turns[first:]


def read_newest(request: Request, reason: str, window: int | None) -> Choice:
    record, turns = Record(), request.conversation.turns
    record.add(request.turns)
    newest = readable(turns, window)
    unread = len(turns) - len(newest)
    return Choice("cold", reason, record, history=messages_of_turns(newest), unread=unread)


def next_to_go(
    lines: Sequence[StreamLine], besides: StreamLine | KeptLine | None = None
) -> StreamLine | None:
    """Return the idle line to close if room is needed: copied ones first, then short ones."""
    idle = [x for x in lines if not (x.reply or x.copies or x is besides)]
    return min(idle, key=lambda x: (not x.spare, len(x.record) > 1, x.used), default=None)


def messages_of_turns(turns: Sequence[Turn]) -> tuple[Message, ...]:
    return tuple(message for turn in turns for message in turn)
