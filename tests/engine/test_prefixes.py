"""A beginning that several sessions share is read once, and its rows are copied bit for bit."""

from typing import Any

import mlx.core as mx
import pytest

import mlx_stream
from mlx_stream.chat.session import ChatSession
from mlx_stream.generate.prefix_cache import MOST_PREFIXES, PrefixCache
from tests.fakes.conversations import said
from tests.fakes.engines import DEADLINE, GREEDY, engine_of
from tests.fakes.tiny import tiny_config, write_letters

SYSTEM = "You are as brief as you can be, and you never explain. " * 8


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Any:
    """Return a model whose keys and values can be quantized."""
    folder = tmp_path_factory.mktemp("prefixes") / "wide"
    return write_letters(folder, tiny_config(head_dim=64, max_position_embeddings=2_000))


@pytest.fixture(scope="module")
def model(wide) -> mlx_stream.Model:
    return mlx_stream.load(wide, dtype="float32", keep_quantized=False)


def session(model: mlx_stream.Model, prefixes: PrefixCache | None, **options: Any) -> ChatSession:
    options = {"system": SYSTEM, "window": 90, "max_tokens": 20, "sampling": GREEDY, **options}
    return ChatSession(model, prefixes=prefixes, speculate=False, **options)


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("window", [30, 90, 700])
def test_a_copy_is_to_the_bit_what_reading_gives(model, bits, window):
    prefixes = PrefixCache(lambda _: True)
    said(session(model, prefixes, kv_bits=bits).reply("Hi"))
    copied = session(model, prefixes, window=window, kv_bits=bits)
    read = session(model, None, window=window, kv_bits=bits)
    for question in ("One?", "Two?", "Three? " * 20, "Four?"):
        assert said(copied.reply(question)) == said(read.reply(question))
        ours, theirs = copied.tokens.state(), read.tokens.state()
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            mine: Any = ours[name]
            assert mx.array_equal(mine, value) if isinstance(value, mx.array) else mine == value
    pinned = len(read.prompts.pinned)
    assert read.stats.prompt_tokens - copied.stats.prompt_tokens == pinned > 100


def test_only_the_same_beginning_is_copied(model):
    prefixes = PrefixCache(lambda _: True)
    said(session(model, prefixes).reply("Hi"))
    others: list[dict[str, Any]] = [
        {"system": SYSTEM + "!"}, {"sinks": 700, "window": 90}, {"kv_bits": 8}, {"kv_bits": 4}
    ]  # fmt: skip
    for options in others:
        chat = session(model, prefixes, **options)
        said(chat.reply("Hi"))
        assert chat.stats.prompt_tokens > len(chat.prompts.pinned), options
    again = session(model, prefixes)
    said(again.reply("Hi"))
    assert again.stats.prompt_tokens < len(again.prompts.pinned)


def test_the_latest_beginnings_that_fit_are_kept(model):
    room = 10**9
    prefixes = PrefixCache(lambda count: count <= room)
    for number in range(MOST_PREFIXES + 2):
        said(session(model, prefixes, system=f"{number} {SYSTEM}").reply("Hi"))
    each = prefixes.nbytes // MOST_PREFIXES
    room = 3 * each
    said(session(model, prefixes, system=f"x {SYSTEM}").reply("Hi"))
    assert each < prefixes.nbytes <= room
    latest = session(model, prefixes, system=f"x {SYSTEM}")
    said(latest.reply("Hi"))
    assert latest.stats.prompt_tokens < len(latest.prompts.pinned)
    room = 0
    said(session(model, prefixes, system=f"y {SYSTEM}").reply("Hi"))
    assert prefixes.nbytes == 0


def test_beginnings_make_room_for_a_session(wide):
    with engine_of(wide) as engine:
        first = engine.session(system=SYSTEM, window=90, max_tokens=5, sampling=GREEDY)
        assert said(first.reply("Hi"))
        used, kept = engine.memory[0], engine._host.prefix_bytes
        assert kept > 0
        ring = first.stats.cache_bytes
        engine._host.budget.limit = used + ring - kept // 2
        second = engine.session(system=SYSTEM, window=90, max_tokens=5, sampling=GREEDY)
        second.wait(DEADLINE)
        assert said(second.reply("Hi")) and engine.memory[0] == used - kept + ring
