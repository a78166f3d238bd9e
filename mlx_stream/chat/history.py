"""The turns of a message history, and the newest that fit in a window; independent of streams."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from mlx_stream.chat.exchange import Exchange, PlacedTurn, place_turns, question_of
from mlx_stream.chat.messages import Message, answering, calls_with_ids, check_message
from mlx_stream.chat.prompts import PromptBuilder
from mlx_stream.errors import ValueRefused
from mlx_stream.text.tool_calls import ToolCall


def exchanges_of(
    history: Sequence[Message], after: int = 0, calls: Sequence[ToolCall] = ()
) -> dict[int, Exchange]:
    """Return the exchanges of a history by number; their ids are not known yet.

    Args:
        after: the number of the turn before them.
        calls: the tool calls in that turn's reply.

    Raises:
        ValueRefused: the history does not end with a reply, a reply answers nothing, or tool
            results do not match the calls before them.
    """
    found: dict[int, Exchange] = {}
    asked = list[Message]()
    for message in history:
        check_message(message)
        if message.role != "assistant":
            asked.append(message)
            continue
        number = after + len(found) + 1
        if not asked:
            raise ValueRefused(f"reply {number} of the history has no message to answer")
        exchange = question_of(answering(asked, calls))
        asked, calls = [], calls_with_ids(message.calls, number)
        found[number] = replace(
            exchange, reply=message.text, thinking=message.thinking, calls=calls, finish="end"
        )
    if asked:
        raise ValueRefused("the history must end with a reply: pass what follows it to reply()")
    return found


def newest_turns(
    prompts: PromptBuilder, exchanges: Mapping[int, Exchange], window: int
) -> tuple[PlacedTurn, ...]:
    """Return the newest whole turns that fit in a window (at least one), with positions.

    A chain of tool calls is split only if nothing else fits in the window.

    Raises:
        TemplateError: the template rejects a turn that fits.
    """
    last = max(exchanges, default=0)
    newest = last + 1
    for number in reversed([*exchanges]):
        (alone,) = prompts.encode_again({number: exchanges[number]}).values()
        window -= len(alone.ids) + len(prompts.question("x", alone, first=False)[0])
        if window < 0 and newest <= last:
            break
        newest = number
    fitting = {n: exchange for n, exchange in exchanges.items() if n >= newest}
    questions = [n for n, exchange in fitting.items() if not exchange.answers_calls]
    fitting = {n: e for n, e in fitting.items() if n >= min(questions, default=newest)}
    encoded = prompts.encode_again(fitting)
    turns = [PlacedTurn(exchange, number, 0) for number, exchange in encoded.items()]
    return place_turns(turns, len(prompts.pinned))
