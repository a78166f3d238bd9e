"""What a question finds: by its words, in any script, and nothing if no exchange answers it."""

import math
import sqlite3
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_stream.recall.find import LEAST_SHARE, MOST_HITS, MOST_WORDS, find_hits
from mlx_stream.recall.index import WordIndex
from mlx_stream.recall.words import LONGEST_TEXT, content_words, indexed_text
from tests.fakes.recalling import FACTS, HOSTILE


def index_of(path, texts, owner="me") -> WordIndex:
    index = WordIndex.open(path / "x.recall", owner)
    index.add(enumerate(texts, 1), len(texts), "sum")
    return index


def found(index: WordIndex, question: str, previous: str = "") -> list[int]:
    return [hit.number for hit in find_hits(index, question, previous, 1, index.last + 1)]


@pytest.mark.parametrize("language", FACTS)
def test_facts_are_found_in_other_words_of_any_script(tmp_path, language):
    facts = FACTS[language]
    index = index_of(tmp_path, [fact for fact, _ in facts])
    right = 0
    for number, (_, question) in enumerate(facts, 1):
        hits = find_hits(index, question, "", 1, 9, gate=False)
        right += [hit.number for hit in hits[:1]] == [number]
    assert right >= 5


def test_what_says_nothing_finds_nothing(tmp_path):
    index = index_of(tmp_path, ["Hi! Hello!", "My dog is Rufus.", "Thanks, that is good."])
    for question in ("Hi!", "Thanks!", "", "?!", "What is it?", "What is the capital of Peru?"):
        assert found(index, question) == []


def test_a_search_without_the_gate_finds_words_that_say_nothing(tmp_path):
    index = index_of(tmp_path, ["Hi! Hello!", "My dog is Rufus.", "Hi again."])
    for question, numbers in (("Hi", [3, 1]), ("what", []), ("", []), ("?!", []), ("my is", [2])):
        hits = find_hits(index, question, "", 1, 4, gate=False)
        assert [hit.number for hit in hits] == numbers, question


def test_a_single_shared_word_is_enough_only_if_there_is_no_other(tmp_path):
    index = index_of(tmp_path, ["My dog is Rufus."] + ["Nothing else."] * 9)
    assert found(index, "What about my dog?") == [1]
    assert found(index, "Is my dog here in winter?") == []
    common = index_of(tmp_path / "common", ["My dog is Rufus."] * 9 + ["Nothing else."] * 9)
    assert found(common, "What about my dog?") == []


def test_a_question_without_words_of_its_own_uses_the_one_before(tmp_path):
    index = index_of(tmp_path, ["Anna's brother lives in Oslo."] + ["Nothing else."] * 9)
    assert found(index, "And where?", "Where is Anna's brother?") == [1]
    assert found(index, "And where?") == found(index, "Thank you!", "Anna's brother?") == []


def test_of_equals_the_newest_is_first_and_ranges_are_kept(tmp_path):
    index = index_of(tmp_path, ["My car is red.", "Other.", "Other.", "My car is blue now."])
    assert found(index, "Which colour is my red or blue car?")[:1] == [4]
    assert [hit.number for hit in find_hits(index, "my car", "", 1, 4)] == [1]
    assert [hit.number for hit in find_hits(index, "my car", "", 2, 5)] == [4]


def test_the_exchange_beside_counts_half(tmp_path):
    texts = ["Let us talk of Anna.", "She plays the cello.", *["Nothing else."] * 9]
    hits = find_hits(index_of(tmp_path, texts), "Does Anna play the cello?", "", 1, 12)
    assert [hit.number for hit in hits] == [2, 1] and hits[0].share > hits[1].share > 0.4


@given(st.integers(0, 2**32), st.booleans())
def test_it_finds_what_a_slow_search_finds(seed, gate):
    random, words = Random(seed), [f"w{letter}" for letter in "bcdfghjklm"]
    texts = [random.choices(words, k=random.randrange(4)) for _ in range(random.randrange(1, 40))]
    asked = random.sample(words, random.randrange(2, 10))
    first, end = random.randrange(1, 9), random.randrange(1, 50)
    index = WordIndex.in_memory()
    index.add(enumerate(map(" ".join, texts), 1), len(texts), "")
    hits = find_hits(index, " ".join(asked), "", first, end, gate)
    assert [(hit.number, hit.share, hit.words) for hit in hits] == slow_hits(
        texts, asked, first, end, LEAST_SHARE if gate else 0, 2 if gate else 1
    )


def slow_hits(texts, asked, first, end, least, fewest) -> list[tuple]:
    """Search every text for every word."""
    having = {
        word: {n for n, text in enumerate(texts, 1) if word in text and first <= n < end}
        for word in asked
    }
    weights = {word: math.log(1 + len(texts) / (len(having[word]) + 3)) for word in asked}
    total = math.fsum(weights.values())
    found = sorted(filter(having.get, asked), key=lambda word: len(having[word]))[:MOST_WORDS]
    hits = []
    for number in range(first, end):
        share, words, own = 0.0, [], False
        for word in found:
            if number in having[word]:
                share, words, own = share + weights[word] / total, [*words, word], True
            elif {number - 1, number + 1} & having[word]:
                share, words = share + weights[word] / total * 0.5, [*words, word]
        if own and share >= least and len(words) >= fewest:
            hits.append((number, share, tuple(words)))
    return sorted(hits, key=lambda hit: (-round(hit[1], 2), -hit[0]))[:MOST_HITS]


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_an_error_or_a_query(tmp_path, text):
    index = index_of(tmp_path, [text, "plain words"])
    found(index, text)
    found(index, "Hm?", text)
    assert found(index, "Plain words?")[:1] == [2]


def test_no_character_splits_a_word_of_a_question(tmp_path):
    """The index does not store the positions of words, so it cannot search for two in a row."""
    index = index_of(tmp_path, ["x"])
    others = (*range(128, 0xD800), *range(0xE000, 0x20000))
    letters = map(chr, others)
    words = {word for letter in letters for word in content_words(f"ab{letter}cd")}
    for word in words:
        index.numbers(word, 1, 2)


def test_a_long_text_is_indexed_up_to_a_limit():
    assert len(indexed_text("a" * 10**7)) == LONGEST_TEXT


def test_an_index_is_used_again_or_made_again(tmp_path):
    path = tmp_path / "x.recall"
    index_of(tmp_path, ["My dog is Rufus."]).close()
    assert path.stat().st_mode & 0o077 == 0
    again = WordIndex.open(path, "me")
    assert (again.last, again.count, again.checksum) == (1, 1, "sum")
    again.close()
    assert WordIndex.open(path, "another").last == 0


def damage_tables(path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TRIGGER t AFTER UPDATE ON state BEGIN DELETE FROM state; END")


@pytest.mark.parametrize(
    "damage",
    [
        damage_tables,
        lambda path: path.write_bytes(b"no database"),
        lambda path: path.write_bytes(path.read_bytes()[:5000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.unlink(),
    ],
    ids=["tables", "bytes", "cut", "empty", "missing"],
)
def test_an_odd_file_is_made_again(tmp_path, damage):
    path = tmp_path / "x.recall"
    index_of(tmp_path, ["My dog is Rufus."] * 99).close()
    damage(path)
    index = WordIndex.open(path, "me")
    assert index.last == 0
    index.add([(1, "My dog")], 1, "sum")
    assert found(index, "my dog") == [1]


def test_a_failed_addition_adds_nothing(tmp_path):
    index = index_of(tmp_path, ["My dog is Rufus."])

    def texts():
        yield 2, "My cat is Tom."
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index.add(texts(), 2, "other")
    assert index.numbers("cat", 1, 9) == [] and index.checksum == "sum"
    index.add([(2, "My cat is Tom.")], 2, "other")
    assert found(index, "my cat") == [2]
