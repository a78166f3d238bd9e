"""Conversations that guess equal those that do not, turn by turn, evictions included."""

import itertools

import pytest

from mlx_stream.chat.resume import SessionOptions, new_chat, open_session
from mlx_stream.chat.session import ChatSession
from mlx_stream.errors import ValueRefused
from mlx_stream.load import load
from mlx_stream.program.notices import discard
from mlx_stream.sampling import Sampling
from tests.fakes.refusals import one_line
from tests.fakes.replies import Eager
from tests.fakes.shell import GREEDY, SMALL, done, parsed
from tests.fakes.tiny import write_model

QUESTIONS = ("the the the", "sand the sand", "What is the sand?", "the", "of the sand in the sand")


@pytest.fixture(scope="module")
def model(letters):
    return load(letters, dtype="float32")


def chat_of(model, speculate, **options):
    chat = ChatSession(model, speculate=speculate, max_tokens=25, **options)
    if speculate:
        assert chat.writer.speculator
        chat.writer.speculator.length = Eager()
    return chat


def turn(chat, question, pieces):
    said = chat.reply(question)
    found = list(itertools.islice(said, pieces))
    said.close()
    return found


def stands(chat):
    """Return, between turns, what guessing must not change, and how many tokens were guessed."""
    stats = {name: value for name, value in vars(chat.stats).items() if "seconds" not in name}
    guessed = stats.pop("drafted_tokens"), stats.pop("accepted_tokens")
    place = (chat.cache.length, chat.cache.oldest, chat.cache.attended, chat.cache.evicted)
    return (
        chat.conversation_state(),
        chat.exchanges,
        chat.tokens.ids.attended(),
        place,
        stats,
    ), guessed


@pytest.mark.parametrize("pieces", [None, 4])
@pytest.mark.parametrize("evict", ["turn", "token"])
@pytest.mark.parametrize(
    ("window", "temperature", "stop"), [(70, 0, ()), (130, 0.4, ()), (130, 0.2, ("ab", "q", "the"))]
)
def test_every_turn_leaves_what_plain_decoding_leaves(
    model, evict, window, temperature, stop, pieces
):
    options = {"window": window, "evict": evict, "stop": stop, "system": "Say."}
    options["sampling"] = Sampling(temperature, top_p=1.0, seed=4)
    plain, guessing = (chat_of(model, speculate, **options) for speculate in (False, True))
    right = 0
    for question in QUESTIONS:
        assert turn(guessing, question, pieces) == turn(plain, question, pieces)
        (expected, _), (found, (_, right)) = stands(plain), stands(guessing)
        assert found == expected
    assert pieces or (plain.stats.evicted and (right > 5 or temperature))


def test_retry_undo_and_edit_are_those_of_plain_decoding(model):
    options = {"window": 150, "sampling": Sampling(0.3, seed=4)}
    plain, guessing = (chat_of(model, speculate, **options) for speculate in (False, True))
    for chat in (plain, guessing):
        for question in QUESTIONS:
            turn(chat, question, 30)
            list(chat.retry())
            list(chat.edit(f"{question} again", max_tokens=7))
        chat.undo()
    assert stands(guessing)[0] == stands(plain)[0]


def test_exact_results_are_not_guessed_unless_asked_for(model, tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_STREAM_HOME", str(tmp_path))
    for seed, speculate, guesses in (
        (None, None, True),
        (3, None, False),
        (3, True, True),
        (None, False, False),
    ):
        options = SessionOptions(sampling=Sampling(1.0, seed=seed), speculate=speculate)
        assert bool(new_chat(model, options, discard).writer.speculator) == guesses
        saved = open_session(f"of-{seed}-{speculate}", model, options)
        assert bool(saved.chat.writer.speculator) == bool(speculate)
        saved.close()


def test_a_draft_model_guesses_and_changes_no_turn(model, tiny):
    options = {"window": 60, "sampling": Sampling(0.3, seed=4)}
    plain = chat_of(model, False, **options)
    guessing = chat_of(model, True, draft=load(tiny, dtype="float32"), **options)
    for question in QUESTIONS:
        turn(guessing, question, None)
        turn(plain, question, None)
        assert stands(guessing)[0] == stands(plain)[0]
    guessing.restart("Say.", 50)
    turn(guessing, "the", None)
    assert guessing.stats.drafted_tokens > 200


@pytest.mark.parametrize("size", [290, 310])
def test_a_draft_model_of_another_vocabulary_is_refused(model, tmp_path, size):
    draft = load(write_model(tmp_path / "other", vocab_size=size, **SMALL), dtype="float32")
    with pytest.raises(ValueRefused, match=r"`draft`.*same vocabulary.*same family"):
        ChatSession(model, draft=draft)


def test_the_program_says_the_same_with_and_without(letters, tiny):
    typed = ("generate", letters, "-p", "the sand " * 9, "--max-tokens", 40, *GREEDY, "--json")
    ways = ((), ("--no-speculate",), ("--speculate",), ("--draft", tiny))
    found = [parsed(done(*typed, *more).out) for more in ways]
    assert len({one["text"] for one in found}) == 1
    assert [one["drafted_tokens"] > 0 for one in found] == [True, False, True, True]
    chats = [
        done("chat", letters, "--max-tokens", 9, *GREEDY, *more, stdin="a\nb\n") for more in ways
    ]
    assert len({chat.out for chat in chats}) == 1
    for more in (("--speculate",), ("--draft", tiny)):
        said = one_line(*typed, "--kv-bits", 8, *more)
        assert said == f"{more[0]} does not work with --kv-bits: use only one of them"
