"""Guessing never changes the text: id by id, it equals plain decoding, whatever is guessed."""

import itertools
from collections import Counter
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_stream.errors import ValueRefused
from mlx_stream.generate.draft_length import DraftLengthController
from mlx_stream.generate.draft_model import DraftModel
from mlx_stream.generate.ngram import LENGTHS, NgramLookup
from mlx_stream.generate.reply import write_reply
from mlx_stream.generate.requests import ReadRequest
from mlx_stream.generate.speculative import Speculator, Writer, choose_verified, writer_factory
from mlx_stream.generate.stats import Stats
from mlx_stream.generate.token_stream import TokenStream, generate
from mlx_stream.sampling import Sampler, Sampling
from tests.fakes.replies import reply_of_ids, write_ids, writer_of
from tests.fakes.tiny_models import some_ids

SAMPLINGS = [
    Sampling(0),
    Sampling(0.3, seed=5),
    Sampling(0.5, top_k=3, top_p=0.9, min_p=0.05, repetition_penalty=1.3, seed=7),
    Sampling(0, repetition_penalty=1.2),
]


def plain(model, window=40):
    return writer_of(model, False, window).tokens


def guessing(model, window=40, draft=None):
    return writer_of(model, True, window, draft)


# --- what is guessed ---


def slow_draft(ids: list[int], floor: int, next: int, most: int) -> list[int]:
    """Return what followed the last occurrence of the longest pattern that ends with `next`."""
    whole = [*ids, next]
    for n in reversed(LENGTHS):
        pattern = whole[len(whole) - n :]
        if len(whole) - n < floor:
            continue
        for end in range(len(ids), floor + n - 1, -1):
            if whole[end - n : end] == pattern:
                followed = whole[end:]
                return [*itertools.islice(itertools.cycle(followed), most)]
    return []


operations = st.lists(
    st.tuples(st.sampled_from(["read", "read", "rewind"]), st.integers(0, 30)), max_size=12
)


@given(operations, st.integers(20, 70), st.integers(2, 4), st.randoms(use_true_random=False))
def test_a_guess_is_what_followed_the_last_time(operations, kept, letters, random):
    past, ids, floor = NgramLookup(kept), [], 0
    for operation, count in operations:
        if operation == "read":
            new = [random.randrange(letters) for _ in range(count)]
            past.read(new)
            ids += new
            floor = max(floor, len(ids) - kept)
        else:
            past.rewind(count)
            del ids[len(ids) - min(count, len(ids) - floor) :]
        for next in range(letters):
            draft = past.draft(next, 9)
            assert list(draft.ids) == slow_draft(ids, floor, next, 9)
            matched = draft.matched
            assert not matched or matched >= LENGTHS[0]
    past.restart([1, 2, 3, 1])
    assert past.draft(2, 4).ids == (3, 1, 2, 3)


def test_a_past_does_not_grow():
    past = NgramLookup(100)
    sizes = []
    for _ in range(3):
        past.read(some_ids(1_000))
        sizes.append(
            [len(part) for part in (past._ids, *past._tables.values(), *past._before.values())]
        )
    assert sizes[0] == sizes[2]


# --- the text ---


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("window", [12, 60])
def test_the_ids_are_those_of_plain_decoding(tiny_model, sampling, window):
    model = tiny_model(vocab_size=8)
    prompt = [id % 8 for id in some_ids(30)]
    writer, other, stats = guessing(model, window), plain(model, window), Stats()
    found = list(write_ids(writer, prompt, Sampler(sampling), 150, stats=stats))
    assert found == list(generate(other, prompt, Sampler(sampling), 150))
    stream = writer.tokens
    assert stream.length == other.length and stream.lookahead == 0
    assert stream.ids.attended() == other.ids.attended()
    right, all = stats.accepted_tokens, stats.drafted_tokens
    assert 20 < right < all, "some guesses right and some wrong"


def test_a_stream_taken_back_or_restored_guesses_on(tiny_model):
    model, sampling = tiny_model(vocab_size=8), Sampling(0.3, seed=2)
    writer, other, stats = guessing(model), plain(model), Stats()
    for prompt in ([1, 2, 3] * 9, [4, 5] * 9, [1, 2, 3, 4] * 9):
        found = list(write_ids(writer, prompt, Sampler(sampling), 40, stats=stats))
        assert found == list(generate(other, prompt, Sampler(sampling), 40))
        for stream in (writer.tokens, other):
            stream.rewind(20)
            stream.restore(stream.state())
    assert stats.accepted_tokens > 10


def test_two_tokens_have_the_distribution_of_the_model(tiny_model):
    """Chi-square over pairs of tokens; any kind of wrong acceptance makes it far too large."""
    runs, vocabulary, warm = 2_000, 4, 3.0
    model = tiny_model(vocab_size=vocabulary, num_hidden_layers=1)
    prompt = [id % vocabulary for id in some_ids(30)]
    writer, sampler = guessing(model, window=20), Sampler(Sampling(warm, top_p=1.0, seed=11))
    stream, speculator = writer.tokens, writer.speculator
    assert speculator is not None
    stream.read(prompt[:-1])
    pairs: Counter[tuple[int, int]] = Counter()
    drafted = accepted = 0
    for _ in range(runs):
        guess = speculator.guess(stream, prompt[-1], 1, ())
        rows = stream.verify([prompt[-1], *guess.ids])
        chosen, keys = choose_verified(stream, sampler, guess.ids, rows)
        speculator.learn(guess, chosen, 0.0)
        drafted, accepted = drafted + len(guess.ids), accepted + len(chosen) - 1
        assert len(keys) == len(chosen) and keys[-1] is sampler.random.key
        if len(chosen) == 1:
            chosen.append(stream.next(chosen[0], sampler, more=False)[0])
        pairs[chosen[0], chosen[1]] += 1
        stream.rewind(2)
    assert 0.1 * runs < accepted < 0.9 * drafted
    expected = np.zeros((vocabulary, vocabulary))
    first = np.array(mx.softmax(last_logits(model, prompt) / warm))
    for token in range(vocabulary):
        expected[token] = first[token] * np.array(
            mx.softmax(last_logits(model, [*prompt, token]) / warm)
        )
    found = np.array([[pairs[a, b] for b in range(vocabulary)] for a in range(vocabulary)])
    assert expected.min() * runs > 5
    chi = ((found - runs * expected) ** 2 / (runs * expected)).sum()
    assert chi < 37.7, "15 degrees of freedom: one fair sampler in a thousand is above"


def last_logits(model, ids):
    return plain(model, window=20).read(ids)


# --- a draft model ---


@pytest.mark.parametrize("seed", [0, 1])
def test_a_draft_model_changes_no_text(tiny_model, seed):
    model, draft = tiny_model(), tiny_model(seed=seed)
    sampling, prompt = Sampling(0.2, seed=2), some_ids(20)
    writer, other, stats = guessing(model, draft=draft), plain(model), Stats()
    found = list(write_ids(writer, prompt, Sampler(sampling), 120, stats=stats))
    assert found == list(generate(other, prompt, Sampler(sampling), 120))
    share = stats.accepted_tokens / stats.drafted_tokens
    assert share > 0.4 if seed == 0 else share < 0.2


def test_a_draft_model_is_kept_in_step(tiny_model):
    """Whatever was guessed, read and taken back, the draft holds what the stream holds."""
    model = tiny_model()
    writer = guessing(model, draft=model)
    stream, speculator = writer.tokens, writer.speculator
    list(write_ids(writer, some_ids(20), Sampler(Sampling(0.5, seed=3)), 100))
    stream.rewind(7)
    list(write_ids(writer, [5, 6], Sampler(Sampling(0.5, seed=4)), 50))
    stream.ids.record()
    assert speculator is not None and isinstance(speculator.drafter, DraftModel)
    drafter = speculator.drafter
    drafter.draft(9, 2)
    held = [*stream.ids.attended(), 9]
    assert drafter.stream.ids.attended()[-20:] == [*held, drafter._ahead[-1]][-20:]
    assert drafter.stream.length == stream.length + 2


# --- when it pays ---


def paced(costs: dict[int, float]) -> DraftLengthController:
    pace = DraftLengthController()
    for rows, seconds in costs.items():
        for _ in range(4):
            pace.record_step(rows, seconds)
    return pace


@pytest.mark.parametrize(
    ("costs", "chances", "expected"),
    [
        (dict.fromkeys(range(1, 9), 1.0), [0.9] * 7, 7),
        ({rows: 1.0 * rows for rows in range(1, 9)}, [0.9] * 7, 0),
        ({rows: 1.0 + 0.1 * rows for rows in range(1, 9)}, [0.1] * 7, 0),
        ({1: 1.0, 2: 1.1, 3: 1.2, 4: 1.3, 5: 2.6, 6: 2.7, 7: 2.8, 8: 2.9}, [0.8] * 7, 3),
        ({1: 1.0, 2: 1.01}, [0.02], 0),
        ({}, [0.9] * 7, 7),
        ({}, [], 0),
    ],
)
def test_as_many_are_verified_as_pay(costs, chances, expected):
    assert paced(costs).choose(chances) == expected


def test_the_cost_of_guesses_counts():
    pace = paced(dict.fromkeys(range(1, 9), 1.0))
    assert pace.choose([0.8] * 7, each=0.0) == 7
    assert 0 < pace.choose([0.8] * 7, each=0.2) < 7
    assert pace.choose([0.8] * 7, each=0.9) == 0


def test_chances_follow_what_was_chosen():
    pace = DraftLengthController()
    for _ in range(60):
        pace.judge(2, [1, 2, 3], [9])
        pace.judge(20, [1, 2, 3], [1, 2, 3, 4])
    assert pace.chance(2) < 0.1 and pace.chance(30) > 0.95
    for _ in range(60):
        pace.judge(2, [1], [1])
    assert pace.chance(2) > 0.8


def test_guessing_turns_itself_off_and_looks_again():
    """When eight rows cost eight times as much as one, hardly any step has more than one token."""
    pace = paced({rows: float(rows) for rows in range(1, 9)})
    steps = []
    for _ in range(2_000):
        count = pace.choose([0.9] * 7)
        pace.record_step(count + 1, float(count + 1))
        steps.append(count)
    assert 3 < sum(count > 0 for count in steps) < 10
    for _ in range(20):
        count = pace.choose([0.9] * 7) or 7
        pace.record_step(count + 1, 1.1)
    assert pace.choose([0.9] * 7) > 0


def test_a_stream_measures_its_own_steps(tiny_model):
    model, measured, stats = tiny_model(vocab_size=8), [], Stats()

    class Measuring(DraftLengthController):
        def record_step(self, rows: int, seconds: float) -> None:
            measured.append((rows, seconds))
            super().record_step(rows, seconds)

    cache, speculator = model.new_cache(4, 40, 7), Speculator(Measuring())
    writer = Writer(TokenStream(model, cache, speculator.observers), cache, speculator)
    reply = write_reply(writer, [1, 2, 3] * 9, Sampler(Sampling(0)), 100, (), reply_of_ids(), stats)
    steps, result = [], None
    while True:
        try:
            request = reply.send(result)
        except StopIteration:
            break
        result = None
        if isinstance(request, ReadRequest):
            result = replace(request.stream.run(request), seconds=float(len(steps) + 1))
            steps.append((len(request.ids), result.seconds))
    assert measured == steps[1:], "the prompt is none of them"
    assert len({rows for rows, _ in measured}) > 2
    assert stats.prompt_seconds == steps[0][1]
    assert stats.reply_seconds == sum(seconds for _, seconds in measured)
    assert stats.accepted_tokens > 50


# --- options that exclude each other ---


@pytest.mark.parametrize(
    ("options", "says"),
    [((True, None, 8), "`kv_bits`"), ((None, "draft", 8), "`draft`.*`kv_bits`"),
     ((False, "draft", None), "`speculate=False`")],
)  # fmt: skip
def test_options_that_exclude_each_other_are_refused(tiny_model, options, says):
    model = tiny_model()
    speculate, draft, bits = options
    with pytest.raises(ValueRefused, match=says):
        writer_factory(model, speculate, draft and model, bits)
