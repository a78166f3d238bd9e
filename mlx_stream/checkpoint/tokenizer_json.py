"""Checks an untrusted tokenizer.json before the library reads it; encodes no text.

The library obeys the file: it would rewrite a text until memory runs out, run a regular expression
for years, or add a template's tokens a million times. Some faults abort the process in Rust, where
no `except` helps. Therefore only the steps that language models' tokenizers use are accepted,
within limits. Format: `tokenizers`' serialization.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from mlx_stream.checkpoint.patterns import MAX_COST, SLOW_COST, check_regex, is_slow
from mlx_stream.errors import TokenizerError

# Lists, objects and their items in a file. The largest vocabularies with their merges contain two
# million.
MAX_NODES = 4_000_000
MAX_STEPS = 32
MAX_DEPTH = 4
MAX_ADDED_TOKENS = 100_000
MAX_ADDED = 1_000_000  # characters of all added tokens: the library takes 100 bytes for each
MAX_TOKEN = 2_000  # characters
MAX_AFFIX = 64  # characters of a prefix, suffix or separator
MAX_TEMPLATE = 64
# The maximum factor by which normalization may multiply a text's length.
MAX_EXPANSION = 64

Step = Mapping[str, Any]


def check_tokenizer(text: str) -> bool:
    """Check the text of a tokenizer.json.

    Returns whether a pattern is slow on long runs of whitespace or digits.

    Raises:
        TokenizerError: the text is not JSON, or a step is unknown, malformed or unbounded.
    """
    # Count before parsing, which takes many times the memory of the text itself.
    if sum(map(text.count, "[{,")) > MAX_NODES:
        raise refusal(f"more than {MAX_NODES} lists, objects and items")
    try:
        value = json.loads(text, object_pairs_hook=unambiguous)
    except (RecursionError, ValueError) as error:
        raise refusal(f"not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise refusal("expected a JSON object")
    check_added_tokens(value.get("added_tokens"))
    factor, cost, slow = 1.0, 0, False
    for step in steps_of(value, "normalizer", "normalizers", NORMALIZERS):
        factor *= growth_of(step)
        cost += cost_of(step)
    if factor > MAX_EXPANSION:
        raise refusal(f"its normalizer can make a text {factor:.0f} times longer")
    for step in steps_of(value, "pre_tokenizer", "pretokenizers", PRE_TOKENIZERS):
        slow |= is_slow(step.get("pattern"))
        cost += SLOW_COST if is_slow(step.get("pattern")) else cost_of(step)
        check_affixes(step, "replacement", "delimiter")
    for step in steps_of(value, "decoder", "decoders", DECODERS):
        cost += cost_of(step)
        check_affixes(step, "content", "replacement", "prefix", "suffix", "start", "stop")
    for step in steps_of(value, "post_processor", "processors", POST_PROCESSORS):
        if step["type"] == "TemplateProcessing":
            check_template(step)
    if cost > MAX_COST:
        raise refusal(f"its patterns take up to {cost} steps per character, more than {MAX_COST}")
    check_model(value.get("model"))
    return slow


def refusal(what: str) -> TokenizerError:
    return TokenizerError(f"tokenizer.json cannot be read: {' '.join(what.split())[:300]}")


def unambiguous(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse an object with a duplicate key: two parsers may use different values."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is given twice")
    return found


# --- steps ---

NORMALIZERS = {
    *("NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip", "StripAccents", "Prepend"),
    *("Replace", "Precompiled", "BertNormalizer", "ByteLevel"),
}
PRE_TOKENIZERS = {
    *("ByteLevel", "Metaspace", "Split", "Digits", "Whitespace", "WhitespaceSplit", "Punctuation"),
    *("BertPreTokenizer", "CharDelimiterSplit", "UnicodeScripts"),
}
DECODERS = {
    *("ByteLevel", "ByteFallback", "Fuse", "Strip", "Replace", "Metaspace", "BPEDecoder"),
    *("WordPiece", "CTC"),
}
POST_PROCESSORS = {"ByteLevel", "TemplateProcessing", "BertProcessing", "RobertaProcessing"}


def steps_of(value: Step, key: str, parts: str, known: set[str]) -> list[Step]:
    """Return the steps of one stage, flattened, after checking that their types are known."""
    found: list[Step] = []

    def add(step: Any, depth: int) -> None:
        kind = step.get("type") if isinstance(step, Mapping) else None
        if kind == "Sequence" and isinstance(step.get(parts), list) and depth < MAX_DEPTH:
            for part in step[parts][: MAX_STEPS + 1]:
                add(part, depth + 1)
        elif kind in known:
            found.append(step)
        else:
            raise refusal(
                f"{key}: {kind!r} is not supported (supported: {', '.join(sorted(known))})"
            )
        if len(found) > MAX_STEPS:
            raise refusal(f"{key}: more than {MAX_STEPS} steps")

    if value.get(key) is not None:
        add(value[key], 0)
    return found


def growth_of(step: Step) -> float:
    """Return the largest factor by which a normalizer can multiply a text's length."""
    if step["type"] == "ByteLevel":
        return 2.0
    if step["type"] == "Precompiled":
        return longest_replacement(step.get("precompiled_charsmap")) / 3
    check_affixes(step, "prepend", "content")
    if step["type"] != "Replace":
        return 1.0
    pattern = step.get("pattern")
    plain = pattern.get("String") if isinstance(pattern, Mapping) else None
    # A regular expression may match a single byte.
    shortest = len(plain.encode(errors="replace")) if isinstance(plain, str) else 1
    if shortest == 0:
        raise refusal("normalizer: it replaces an empty string")
    return max(1.0, len(str(step.get("content")).encode(errors="replace")) / shortest)


def longest_replacement(charsmap: Any) -> int:
    """Return the length in bytes of the longest text in SentencePiece's table.

    The table holds the size of the trie, the trie, and texts separated by NUL. In Unicode's table,
    the longest text replaces a three-byte character.
    """
    try:
        table = base64.b64decode(charsmap or "", validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        raise refusal("normalizer: its precompiled_charsmap is not base64") from error
    trie = int.from_bytes(table[:4], "little")
    if len(table) < 4 or trie % 4 or not 1_024 <= trie <= len(table) - 4:
        raise refusal("normalizer: its precompiled_charsmap is damaged")
    return max(3, *map(len, table[4 + trie :].split(b"\0")))


def check_affixes(step: Step, *keys: str) -> None:
    for key in keys:
        value = step.get(key)
        size = len(value) if isinstance(value, str) else value if isinstance(value, int) else 0
        if not 0 <= size <= MAX_AFFIX:
            raise refusal(f"{step['type']}: {key} is longer than {MAX_AFFIX}")


def cost_of(step: Step) -> int:
    """Return the maximum number of steps that a pattern takes per character of text."""
    pattern = step.get("pattern")
    if not isinstance(pattern, Mapping) or "Regex" not in pattern:
        return 0
    try:
        return check_regex(pattern["Regex"])
    except ValueError as error:
        raise refusal(str(error)) from error


def check_added_tokens(tokens: Any) -> None:
    if not isinstance(tokens or [], list) or len(tokens or ()) > MAX_ADDED_TOKENS:
        raise refusal(f"expected a list of at most {MAX_ADDED_TOKENS} added_tokens")
    characters = 0
    for token in tokens or ():
        content = token.get("content") if isinstance(token, Mapping) else None
        if not isinstance(content, str) or not 1 <= len(content) <= MAX_TOKEN:
            raise refusal("an added token has no text, or its text is too long")
        characters += len(content)
    if characters > MAX_ADDED:
        raise refusal(f"its added tokens have more than {MAX_ADDED} characters")


def check_template(step: Step) -> None:
    """Check that a template contains each text once and adds only a few tokens, all declared.

    The library does not check that the tokens and the second text of a pair exist.
    """
    tokens = step.get("special_tokens")
    tokens = tokens if isinstance(tokens, Mapping) else {}
    for key, texts in (("single", {"A": 1}), ("pair", {"A": 1, "B": 1})):
        pieces = step.get(key)
        if not isinstance(pieces, list) or len(pieces) > MAX_TEMPLATE:
            raise refusal(
                f"TemplateProcessing: {key} is not a list of at most {MAX_TEMPLATE} items"
            )
        seen: dict[str, int] = {}
        for piece in pieces:
            one = isinstance(piece, Mapping) and len(piece) == 1
            kind, what = next(iter(piece.items())) if one else (None, None)
            name = what.get("id") if isinstance(what, Mapping) else None
            if kind == "Sequence" and name in texts:
                seen[name] = seen.get(name, 0) + 1
            elif kind != "SpecialToken" or not added_by(tokens.get(name)):
                raise refusal(f"TemplateProcessing: {key} names {name!r}, which is not declared")
        if seen != texts:
            raise refusal(f"TemplateProcessing: {key} must contain each text exactly once")


def added_by(token: Any) -> bool:
    """Return whether a template's special token is well-formed: a few ids, each with its text."""
    ids, texts = (token.get(k) if isinstance(token, Mapping) else None for k in ("ids", "tokens"))
    if not isinstance(ids, list) or not isinstance(texts, list):
        return False
    return len(ids) == len(texts) <= MAX_AFFIX


# --- the model ---


def check_model(model: Any) -> None:
    kind = model.get("type") if isinstance(model, Mapping) else None
    if kind not in ("BPE", "Unigram", "WordLevel"):
        raise refusal(f"model: {kind!r} is not supported (supported: BPE, Unigram, WordLevel)")
    if model.get("dropout"):
        raise refusal("model: dropout is not supported: it makes encoding random")
    for key in ("continuing_subword_prefix", "end_of_word_suffix"):
        if len(str(model.get(key) or "")) > MAX_AFFIX:
            raise refusal(f"model: {key} is longer than {MAX_AFFIX} characters")
    check_merges(model)
    vocabulary = model.get("vocab")
    if kind == "Unigram" and isinstance(vocabulary, list):
        vocabulary = [entry[0] for entry in vocabulary if isinstance(entry, list) and entry]
    if not isinstance(vocabulary, dict | list):
        raise refusal("model: it has no vocabulary")
    if any(not isinstance(token, str) or len(token) > MAX_TOKEN for token in vocabulary):
        raise refusal("model: a token is not a string, or is too long")


def check_merges(model: Step) -> None:
    """Check that a merge's second part has the prefix, which the library removes unchecked."""
    prefix = model.get("continuing_subword_prefix")
    for merge in (model.get("merges") or ()) if prefix else ():
        parts = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(parts, list) or not str((parts or [""])[-1]).startswith(str(prefix)):
            raise refusal("model: a merge does not begin with the continuing_subword_prefix")
