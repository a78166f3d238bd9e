"""How a reply is driven: each request is run as a step, and closing or an error ends it at once."""

from collections.abc import Iterator

import pytest

from mlx_stream.generate.requests import (
    Coroutine,
    ReadRequest,
    ReadResult,
    Want,
    drive,
    read_ids,
    run_coroutine,
)


class Steps:
    """A stream that only notes what is read, a few ids a step; its fourth step fails if told to."""

    def __init__(self, longest: int = 3, fails: BaseException | None = None):
        self.longest, self.fails = longest, fails
        self.asked: list[tuple[list[int], Want, int]] = []

    def run(self, request: ReadRequest) -> ReadResult:
        self.asked.append(([*request.ids], request.want, request.chunk))
        if self.fails and len(self.asked) == 4:
            raise self.fails
        count = min(self.longest, request.chunk, len(request.ids))
        return ReadResult(count, seconds=1.0, token=request.ids[count - 1])


class Reply:
    """A reply that reads, gives letters, reads again; it knows how it ended."""

    def __init__(self, stream: Steps):
        self.stream, self.results, self.end = stream, [], "not begun"

    def write(self) -> Coroutine[str, str]:
        try:
            self.end = "open"
            for letter in "abc":
                self.results.append((yield ReadRequest(self.stream, [1, 2])))
                self.results.append((yield letter))
                self.results.append((yield from read_ids(self.stream, [3, 4, 5, 6])))
            self.end = "done"
            return "d"
        except GeneratorExit:
            self.end = "closed"
            raise
        except BaseException as error:
            self.end = f"raised {error}"
            raise


def whole(reply: Coroutine[str, str]) -> Iterator[str]:
    yield (yield from drive(reply))


def test_a_reply_is_sent_what_each_step_gave_and_gives_the_rest():
    stream = Steps()
    reply = Reply(stream)
    assert "".join(whole(reply.write())) == "abcd" and reply.end == "done"
    step, four = ReadResult(2, 1.0, None, 2), ReadResult(4, 2.0, None, 6)
    assert reply.results == [step, None, four] * 3
    assert [ids for ids, _, _ in stream.asked] == [[1, 2], [3, 4, 5, 6], [6]] * 3


def test_nothing_is_read_before_it_is_asked_for():
    stream = Steps()
    reply = Reply(stream)
    pieces = drive(reply.write())
    assert reply.end == "not begun" and not stream.asked
    assert next(pieces) == "a" and len(stream.asked) == 1
    assert next(pieces) == "b" and len(stream.asked) == 4


@pytest.mark.parametrize("asked", [1, 2, 3])
def test_closing_the_pieces_closes_the_reply(asked):
    stream = Steps()
    reply = Reply(stream)
    pieces = drive(reply.write())
    for _ in range(asked):
        next(pieces)
    read = len(stream.asked)
    pieces.close()
    assert reply.end == "closed" and len(stream.asked) == read


def test_pieces_that_are_dropped_close_the_reply():
    reply = Reply(Steps())
    assert next(drive(reply.write())) == "a"
    assert reply.end == "closed"


@pytest.mark.parametrize("error", [RuntimeError("no memory"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("way", [lambda reply: list(drive(reply)), run_coroutine])
def test_an_error_in_a_step_closes_the_reply(error, way):
    reply = Reply(Steps(fails=error))
    with pytest.raises(type(error)):
        way(reply.write())
    assert reply.end == "closed"


def test_an_error_of_the_reply_itself_is_raised():
    reply = Reply(Steps())
    pieces = drive(reply.write())
    next(pieces)
    reply.results = None  # type: ignore[assignment]
    with pytest.raises(AttributeError):
        next(pieces)
    assert reply.end.startswith("raised")
    with pytest.raises(StopIteration):
        next(pieces)


def test_run_gives_nothing_but_what_a_reply_returns():
    reply = Reply(Steps())
    assert run_coroutine(reply.write()) == "d" and reply.end == "done"


@pytest.mark.parametrize(("chunk", "steps"), [(1, 7), (2, 4), (3, 3), (100, 3)])
@pytest.mark.parametrize("want", [Want.NOTHING, Want.LOGITS])
def test_ids_are_read_in_as_many_steps_as_it_takes(chunk, steps, want):
    stream, told = Steps(), []
    found = run_coroutine(read_ids(stream, [*range(7)], want, told.append, chunk))
    assert found == ReadResult(7, seconds=float(steps), token=6)
    assert len(told) == len(stream.asked) == steps and sum(told) == 7
    assert all(one[1:] == (want, chunk) for one in stream.asked)
    done = 0
    for count, (ids, _, _) in zip(told, stream.asked, strict=True):
        assert ids == [*range(done, 7)]
        done += count


def test_what_was_read_before_an_error_was_told():
    told: list[int] = []
    with pytest.raises(RuntimeError):
        run_coroutine(read_ids(Steps(fails=RuntimeError()), [*range(20)], progress=told.append))
    assert told == [3, 3, 3]


def test_reading_can_end_between_steps():
    stream = Steps()
    reading = read_ids(stream, [*range(20)])
    request = next(reading)
    assert [*request.ids] == [*range(20)]
    reading.send(stream.run(request))
    reading.close()
    assert len(stream.asked) == 1
