"""The chat commands that show or set a chat's model, temperature and turns."""

from dataclasses import replace
from typing import TYPE_CHECKING

from mlx_stream.chat.exchange import plural
from mlx_stream.chat.saving import saved_as, saved_turns
from mlx_stream.cli.report import local_time, shorten_line
from mlx_stream.errors import ValueRefused

if TYPE_CHECKING:
    from mlx_stream.chat.schema import StoredTurn
    from mlx_stream.chat.session import ChatSession


def model(chat: "ChatSession", argument: str, progress: object) -> str:
    from mlx_stream.cli.describe import describe_model, describe_window

    return f"{describe_model(chat.model)}\n{describe_window(chat.stats)}"


def temp(chat: "ChatSession", argument: str, progress: object) -> str:
    from mlx_stream.sampling import Sampler

    if argument:
        try:
            temperature = float(argument)
        except ValueError:
            raise ValueRefused(
                f"/temp takes a number, such as 0.6, not {shorten_line(argument)!r}"
            ) from None
        sampler = Sampler(replace(chat.sampler.sampling, temperature=temperature))
        sampler.restore(chat.sampler.state())
        chat.sampler = sampler
    return f"the temperature is {chat.sampler.sampling.temperature:g}"


def history(chat: "ChatSession", argument: str, progress: object) -> str:
    first, saved = first_attended(chat), saved_as(chat)
    lines = [
        f"{number:>4}  "
        + (f"{local_time(turn.time)}  " if saved else "")
        + shorten_line(turn.exchange.question)
        + ("" if number >= first else " (no longer attended to)")
        for number, turn in turns(chat).items()
    ]
    if first > 1 and not saved:
        lines.insert(0, f"not shown, because they were evicted and not saved: {plural(first - 1)}")
    return "\n".join(lines) or "no question has been asked yet"


def show(chat: "ChatSession", argument: str, progress: object) -> str:
    found = turns(chat)
    if not found:
        raise ValueRefused("there is nothing to show: no question has been asked yet")
    number = argument or str(max(found))
    turn = found.get(int(number)) if number.isdecimal() else None
    if turn is None:
        raise ValueRefused(
            f"there is no exchange {shorten_line(argument)!r}: /history lists the numbers"
        )
    return f"> {turn.exchange.question}\n\n{turn.exchange.reply}"


def first_attended(chat: "ChatSession") -> int:
    """Return the number of the oldest attended exchange, or of the next one if there is none."""
    return chat.number - bool(chat.unanswered) - len(chat.exchanges) + 1


def turns(chat: "ChatSession") -> "dict[int, StoredTurn]":
    """Return the turns by number; for an unsaved conversation, only the attended ones."""
    skipped = 0 if saved_as(chat) else first_attended(chat) - 1
    found = saved_turns(chat)[1]
    return {turn.number + skipped: turn for turn in found if turn.exchange.question}


def sessions(chat: "ChatSession", argument: str, progress: object) -> str:
    from mlx_stream.chat.summaries import session_summaries

    found = session_summaries()
    width = max((len(one.name) for one in found), default=0)
    lines = [
        f"{one.name:<{width}}  {local_time(one.used)}  {plural(one.exchanges)}" for one in found
    ]
    return "\n".join(lines) or "there are no saved sessions: /save NAME saves this one"
