"""Hostile tokenizer.json files are refused before the library, which may abort, sees them."""

import base64
import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from mlx_stream.checkpoint import Checkpoint
from mlx_stream.checkpoint.gguf_tokenizer import PIPELINES
from mlx_stream.checkpoint.patterns import MAX_COST, check_regex, is_slow
from mlx_stream.checkpoint.tokenizer_json import check_tokenizer
from mlx_stream.errors import TextError, TokenizerError
from mlx_stream.text.tokenizer import Tokenizer
from tests.fakes.tiny import tiny_tokenizer

SOUND = tiny_tokenizer().to_str()
DOUBLE = {"type": "Replace", "pattern": {"String": "e"}, "content": "ee"}
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
A, B = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
X = {"SpecialToken": {"id": "x", "type_id": 0}}
DECLARED = {"x": {"id": "x", "ids": [1], "tokens": ["x"]}}


def written(**changes: Any) -> str:
    return json.dumps({**json.loads(SOUND), **changes})


def model(**changes: Any) -> str:
    return written(model={**json.loads(SOUND)["model"], **changes})


def normalizers(*steps: Any) -> str:
    return written(normalizer={"type": "Sequence", "normalizers": list(steps)})


def template(single: Any, pair: Any = (A, B), tokens: Any = DECLARED) -> str:
    step = {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": tokens}
    return written(post_processor=step)


def regex(pattern: Any) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def charsmap(trie: int, texts: bytes) -> dict[str, Any]:
    table = trie.to_bytes(4, "little") + bytes(1_024) + texts
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(table).decode()}


REFUSED: dict[str, tuple[str, str]] = {
    "26 doublings": (normalizers(*[DOUBLE] * 26), "can make a text 67108864 times longer"),
    "one large replacement": (normalizers(DOUBLE | {"content": "e" * 65}), "content is longer"),
    "of nothing": (normalizers(DOUBLE | {"pattern": {"String": ""}}), "replaces an empty string"),
    "prepended": (normalizers({"type": "Prepend", "prepend": "e" * 10**6}), "prepend is longer"),
    "2,000 steps": (normalizers(*[{"type": "NFKD"}] * 2_000), "more than 32 steps"),
    "seven bytes": (normalizers(*[{"type": "ByteLevel"}] * 7), "can make a text 128 times longer"),
    "a table of long texts": (normalizers(charsmap(1_024, b"e" * 999)), "times longer"),
    "a table cut short": (normalizers(charsmap(4_096, b"")), "precompiled_charsmap is damaged"),
    "a table of no bytes": (normalizers({"type": "Precompiled"}), "precompiled_charsmap is dam"),
    "an unknown step": (normalizers({"type": "NoSuch"}), "normalizer: 'NoSuch' is not supported"),
    "a step without type": (normalizers({"pattern": {"String": "e"}}), "None is not supported"),
    "a nested step": (normalizers(*[[{}]]), "is not supported"),
    "a regular expression": (
        written(pre_tokenizer=regex("(a|aa)+$")),
        "could backtrack endlessly in",
    ),
    "one to replace by": (
        normalizers({"type": "Replace", "pattern": {"Regex": "(e*)*z"}, "content": "e"}),
        "could backtrack endlessly in",
    ),
    "one in a decoder": (
        written(decoder={"type": "Replace", "pattern": {"Regex": "(e*)*z"}, "content": "e"}),
        "could backtrack endlessly in",
    ),
    "a decoder's count": (
        written(decoder={"type": "Strip", "content": "e", "start": 2**40, "stop": 0}),
        "start is longer",
    ),
    "a second text": (template([B]), "single names 'B'"),
    "no text": (template([X]), "single must contain each text exactly once"),
    "the text 500 times": (template([A] * 500), "not a list of at most 64"),
    "the text twice": (template([A, A]), "single must contain each text exactly once"),
    "an undeclared token": (template([A, X], tokens={}), "single names 'x'"),
    "a token of 50,000 ids": (
        template([A, X], tokens={"x": {"id": "x", "ids": [1] * 50_000, "tokens": ["x"] * 50_000}}),
        "single names 'x'",
    ),
    "ids without texts": (
        template([A, X], tokens={"x": {"id": "x", "ids": [1, 2], "tokens": ["x"]}}),
        "single names 'x'",
    ),
    "a template of text": (template("$A"), "not a list"),
    "many added tokens": (
        written(added_tokens=[{"id": 1, "content": "a", "special": True, **FLAGS}] * 100_001),
        "at most 100000 added_tokens",
    ),
    "long added tokens": (
        written(added_tokens=[{"id": 1, "content": "a" * 2_000, "special": True, **FLAGS}] * 501),
        "added tokens have more than 1000000 characters",
    ),
    "an empty added token": (
        written(added_tokens=[{"id": 1, "content": "", "special": True, **FLAGS}]),
        "an added token has no text",
    ),
    "dropout": (model(dropout=0.1), "it makes encoding random"),
    "a long prefix": (model(continuing_subword_prefix="e" * 100_000), "is longer than 64"),
    "a prefix no merge has": (model(continuing_subword_prefix="##"), "a merge does not begin"),
    "a long token": (model(vocab={"e" * 100_000: 0}), "a token is not a string, or is too long"),
    "another model": (model(type="WordPiece"), "model: 'WordPiece' is not supported"),
    "no model": (written(model=None), "model: None is not supported"),
    "a key twice": (SOUND.replace('"normalizer"', '"model"', 1), "a key is given twice"),
    "deep": (written()[:-1] + ',"x":' + "[" * 200_000, "not valid JSON"),
    "digits": (written()[:-1] + ',"x":' + "9" * 10_000 + "}", "not valid JSON"),
    "many lists": (written()[:-1] + ',"x":[' + "[]," * 2_000_001 + "[]]}", "more than 4000000"),
    "a list": ("[]", "expected a JSON object"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_step_is_refused_in_a_line(name: str) -> None:
    text, expected = REFUSED[name]
    began = time.thread_time()
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_checkpoint(Checkpoint({}, {}, text))
    assert time.thread_time() - began < 2
    assert expected in str(caught.value), str(caught.value)
    assert str(caught.value).startswith("tokenizer.json ") and "\n" not in str(caught.value)


PUBLISHED = [
    *(
        step["pattern"]["Regex"]
        for pipeline in PIPELINES.values()
        for step in pipeline.steps
        if "pattern" in step
    ),
    # Qwen 2, GPT-2, o200k, DeepSeek and Bloom, and patterns from normalizers.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    *("[\r\n]", r"\s?[A-Za-zµÀ-ÖØ-öø-ƺ]+", r"\s?[!-/:-~]+", "[一-龥ࠀ-一가-퟿]+"),
    *(" ?[^(\\s|[.,!?…])]+", " {2,}", "[0-9][0-9][0-9]", r"\d{1,3}", "▁+", "``"),
    # DeepSeek V3 and R1, whose classes hold the characters CR and LF.
    *(r"\p{N}{1,3}", "[一-龥\u3040-ゟ\u30a0-ヿ]+", "[^\n]+|[\n]+"),
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    # With possessive quantifiers: tiktoken's pattern for GPT-4, and Ling's.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]"
    r"|\s+(?!\S)|\s+",
    # EXAONE 4 and K-EXAONE, and Kimi.
    r"(?:\r?\n)+(?!\r?\n)",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+",
    r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
    r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
]
# DeepSeek LLM; Command A, SuperBPE.
PUBLISHED_SLOW = [r"\s+$", r"\d{1,3}(?=(?:\d{3})*\b)", r"(?=(\d{3})+(?!\d))"]


@pytest.mark.parametrize("pattern", [*PUBLISHED, *PUBLISHED_SLOW])
def test_published_patterns_are_accepted(pattern: str) -> None:
    assert is_slow({"Regex": pattern}) == (pattern in PUBLISHED_SLOW)
    assert is_slow({"Regex": pattern}) or check_regex(pattern) <= 100
    assert check_tokenizer(written(pre_tokenizer=regex(pattern))) == (pattern in PUBLISHED_SLOW)


@pytest.mark.parametrize(
    "pattern",
    [
        *("(a|aa)+$", "(a*)*b", "a*b", "a*a+b", r"(?=(\w+))\1:", "(x+x+)+y", "(.|e)*x", r".+\x01"),
        *("(?<=a)", "a{1000}", "a{1,1000}", "a{999999999999}", "a{5,}b", "a+a{}", "a+?b", "a++b"),
        *(
            "(?:a*b)*",
            "a{2}+b",
            "a+{2}",
            r"\1",
            r"(a)\1",
            r"(?:\1)",
            "(?(1)a|b)",
            r"\g<0>",
            "(?x)a",
        ),
        *(r"\c(a", "[", "[[a]+", "a{", "a**", "a+$", "x|a+b", "(", "(a", "a)", "", "a" * 5_000),
        *(r"\s+(?!\S)x", r"\R+", None, 7, ["a"], "(?=a*)", "(?!a+)", "a+(?=b)", "(?:ab*){2}"),
        *("(?:a?)+(?!a?)", "(?=a)*", "(((((a)))))", "(?:a*)b", "(?:a|b*)c", r"a+\b", "a*^"),
        # The next branch must directly follow the failed one and match, in one go, what it read.
        *(r"\s+$|x", r"\s*\n|\s", r"\s*\n| |\s+", r"\s*\n|\s{1,9}", r"\s*\n|x?\s+", "a*b|[ab]+"),
        *(r"x?\s*\n|y\s+", "a{1,3}+b|a{1,3}+", "a{1,3}+b|a+"),
        *("x?a*b|a+", "a*b*c|a+", "(?:ab)*c|(?:ab)+", r"\s*\n+(?=x)|\s+", r"\s+|\s*\n"),
    ],
)
def test_patterns_that_may_be_tried_again_and_again_are_refused(pattern: Any) -> None:
    with pytest.raises(ValueError, match=r"^(the|a) pattern .*$"):
        check_regex(pattern)


@pytest.mark.parametrize("pattern", ["a{1,100}b", "a?" * 20 + "b", "|".join(["a" * 90 + "b"] * 20)])
def test_patterns_of_many_steps_are_refused(pattern: str) -> None:
    assert check_regex(pattern) > MAX_COST
    with pytest.raises(TokenizerError, match="steps per character, more than 1000"):
        check_tokenizer(written(pre_tokenizer=regex(pattern)))


PARTS = ["a", "[ab]", "b", " ", r"\s", r"\S", "(?:a|b)", "(?:ab?)", "(?!b)", "(?=a)", "$", "(?:a+)"]
TIMES = ["", "", "", "?", "*", "+", "++", "*+", "?+", "{2}", "{1,3}", "{1,3}+"]
BRANCHES = st.lists(
    st.tuples(st.sampled_from(PARTS), st.sampled_from(TIMES)).map("".join), min_size=1, max_size=4
).map("".join)


@settings(deadline=None, max_examples=300)
@given(st.lists(BRANCHES | BRANCHES.map("(?:{})*".format), min_size=1, max_size=4).map("|".join))
def test_what_is_accepted_reads_a_text_in_time_proportional_to_its_length(pattern: str) -> None:
    try:
        check_regex(pattern)
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
    except Exception:  # the library's own type: it cannot be compiled
        return
    for run in ("a", "b", "ab", " ", "a "):
        began = time.thread_time()
        split.pre_tokenize_str(run * 40_000 + "c")
        assert time.thread_time() - began < 2, (pattern, run)  # quadratic: 4 s


def test_a_run_that_a_slow_pattern_would_read_for_long_is_refused() -> None:
    """This includes a run that only the normalizer makes."""
    for pattern, run in zip(PUBLISHED_SLOW, " 1\u0661", strict=True):
        doubled = {"type": "Replace", "pattern": {"String": "q"}, "content": run * 2}
        steps = [regex(pattern), json.loads(SOUND)["pre_tokenizer"]]
        text = written(
            pre_tokenizer={"type": "Sequence", "pretokenizers": steps}, normalizer=doubled
        )
        tokenizer = Tokenizer.from_checkpoint(Checkpoint({}, {}, text))
        tokenizer.encode(("x" + run * 4_000) * 3 + "x" + "q" * 2_500)
        for long in (run * 12_000, "q" * 6_000, ("x" + run * 6_000) * 3):
            with pytest.raises(TextError, match=r"(12|6),000 spaces or digits in a row"):
                tokenizer.encode(long)


def test_what_tokenizers_of_language_models_do_is_accepted() -> None:
    llama = (
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    )
    quotes = {"type": "Replace", "pattern": {"String": "``"}, "content": '"'}
    spaces = {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "}
    for text in (
        SOUND,
        normalizers(*llama),
        normalizers(charsmap(1_024, "\0".join(["a", "صلى الله عليه وسلم"]).encode()), *llama[1:]),
        normalizers(quotes, {"type": "NFKD"}, {"type": "StripAccents"}, spaces),
        normalizers(),
        template([X, A], [X, A, X, B]),
        model(type="Unigram", unk_id=0, vocab=[["<unk>", 0.0], ["a", -1.5]]),
    ):
        check_tokenizer(text)
