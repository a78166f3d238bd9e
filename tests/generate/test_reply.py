"""A reply as a coroutine: what it requests, what it yields, and its statistics along the way."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from mlx_stream.generate.reply import write_reply
from mlx_stream.generate.requests import ReadRequest, ReadResult, Want
from mlx_stream.generate.speculative import Writer
from mlx_stream.generate.stats import Stats
from mlx_stream.generate.token_stream import generate
from mlx_stream.sampling import Sampler, Sampling
from mlx_stream.text.pieces import Piece
from tests.fakes.replies import ids_of, letters_of, reply_of_ids, writer_of
from tests.fakes.tiny_models import some_ids

GREEDY = Sampling(0.0)
PROMPT = [1, 2, 3, 4] * 9


def expected_of(model, prompt: Sequence[int], count: int, window: int = 120) -> list[int]:
    stream = writer_of(model, False, window).tokens
    return [*generate(stream, prompt, Sampler(GREEDY), count)]


def steps_of(writer: Writer, limit: int, **options: Any) -> Iterator[ReadRequest | Piece]:
    """Run the steps that a greedy reply requests; yield its requests and its pieces."""
    options = {
        "prompt": PROMPT, "ends": (), "reply": reply_of_ids(), "stats": Stats(), **options
    }  # fmt: skip
    steps = write_reply(writer, sampler=Sampler(GREEDY), limit=limit, **options)
    result: ReadResult | None = None
    while True:
        try:
            item = steps.send(result)
        except StopIteration as end:
            yield end.value
            return
        yield item
        result = item.stream.run(item) if isinstance(item, ReadRequest) else None


@pytest.mark.parametrize("guesses", [False, True])
def test_it_asks_for_the_prompt_then_for_token_after_token(tiny_model, guesses):
    model, told = tiny_model(vocab_size=8, num_hidden_layers=1), []
    prompt = [id % 8 for id in some_ids(300)]
    writer, stats = writer_of(model, guesses, window=100), Stats()
    items = [*steps_of(writer, 40, prompt=prompt, stats=stats, progress=told.append)]
    asked = [item for item in items if isinstance(item, ReadRequest)]
    assert all(request.stream is writer.tokens for request in asked)
    first = [request for request in asked if request.want is Want.LOGITS]
    assert asked[: len(first)] == first and len(first) == len(told) > 1 and sum(told) == 300
    kinds = {request.want for request in asked[len(first) :]}
    assert kinds == ({Want.TOKEN, Want.ROWS} if guesses else {Want.TOKEN})
    ids = [id for item in items if not isinstance(item, ReadRequest) for id in ids_of(item.text)]
    assert ids == expected_of(model, prompt, 40, 100)
    single = [request for request in asked if request.want is Want.TOKEN]
    assert all(len(request.ids) == 1 and request.sampler for request in single)
    if not guesses:
        assert [[*request.ids] for request in single] == [[id] for id in ids[:-1]]
        assert [request.more for request in single] == [True] * 38 + [False]
        assert writer.tokens.length == 300 + 39, "the last one is not read"
    verified = [request for request in asked if request.want is Want.ROWS]
    assert stats.drafted_tokens == sum(len(request.ids) - 1 for request in verified)
    assert stats.reply_tokens == 40 == 1 + len(single) + len(verified) + stats.accepted_tokens


@pytest.mark.parametrize("guesses", [False, True])
def test_numbers_are_right_whenever_a_piece_is_given(tiny_model, guesses):
    model, stats = tiny_model(vocab_size=8, num_hidden_layers=1), Stats()
    writer = writer_of(model, guesses, window=45)
    plain = writer_of(model, False, 45)
    plain.tokens.read(PROMPT)
    ids, seen = expected_of(model, PROMPT, 30, 45), 0
    for item in steps_of(writer, 30, stats=stats):
        if isinstance(item, ReadRequest):
            continue
        seen += 1
        assert stats.prompt_tokens == len(PROMPT) and stats.prompt_seconds > 0
        assert (stats.reply_tokens, stats.decoded_tokens) == (seen, seen - 1)
        assert (stats.attended, stats.evicted) == (plain.cache.attended, plain.cache.evicted)
        assert (stats.reply_seconds > 0) == (seen > 1)
        if seen < 30:
            plain.tokens.read([ids[seen - 1]])
    assert seen == 30 and stats.evicted > 5
    assert guesses == (stats.accepted_tokens > 5)


@pytest.mark.parametrize("guesses", [False, True])
def test_room_is_made_for_each_token_before_it_is_read(tiny_model, guesses):
    model = tiny_model(vocab_size=8, num_hidden_layers=1)
    writer, made = writer_of(model, guesses), []

    def make_room(count: int) -> None:
        made.append((count, writer.tokens.length))

    items = steps_of(writer, 30, make_room=make_room)
    assert isinstance(next(items), ReadRequest)
    steps = 0
    for item in items:
        steps += isinstance(item, ReadRequest)
        # Room is made before a piece is yielded: when it is shown, what it evicts has left.
        expected = steps + (not isinstance(item, ReadRequest) and not writer.tokens.lookahead)
        assert len(made) == expected - (item.finish is not None if isinstance(item, Piece) else 0)
    assert {count for count, _ in made} == {1} and len(made) == steps
    places = [place for _, place in made]
    assert places == sorted({*places}) and places[0] == len(PROMPT)
    assert (steps < 20) == guesses


@pytest.mark.parametrize("guesses", [False, True])
@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("way", ["end", "stop", "length"])
def test_however_it_ends_nothing_is_read_beyond(tiny_model, guesses, at, way):
    model = tiny_model(vocab_size=8, num_hidden_layers=1)
    prompt = [3, 1, 3, 5, 5, 3] * 6
    ids = expected_of(model, prompt, 30)
    firsts = [place for place in range(30) if ids[place] not in ids[:place]]
    place = firsts[at % len(firsts)] if way == "end" else 2 + 4 * at
    # The shortest ending of the text that does not occur earlier in it.
    text, stop = letters_of(ids[: place + 1]), ""
    while way == "stop" and text.index(stop) + len(stop) <= place:
        stop = text[len(text) - len(stop) - 1 :]
    writer, stats = writer_of(model, guesses), Stats()
    pieces = [
        item
        for item in steps_of(
            writer,
            place + 1 if way == "length" else 30,
            prompt=prompt,
            stats=stats,
            ends={ids[place]} if way == "end" else (),
            reply=reply_of_ids([stop] if way == "stop" else ()),
        )
        if isinstance(item, Piece)
    ]
    said = {"end": text[:-1], "stop": text.removesuffix(stop), "length": text}[way]
    assert "".join(piece.text for piece in pieces) == said
    assert [piece.finish for piece in pieces] == [None] * (len(pieces) - 1) + [way]
    stream = writer.tokens
    assert stream.lookahead == 0 and stream._pending is None
    assert stream.ids.since(0) == [*prompt, *ids[:place]]
    assert stats.reply_tokens == place + (way != "end")
    assert (stats.attended, stats.evicted) == (len(prompt) + place, 0)
