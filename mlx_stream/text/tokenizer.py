"""Converts text to token ids and back, also id by id, per tokenizer.json; independent of models."""

import json
import re
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, TypeVar

import tokenizers
from tokenizers import decoders

from mlx_stream.checkpoint import Checkpoint
from mlx_stream.checkpoint.tokenizer_json import check_tokenizer
from mlx_stream.errors import TemplateError, TextError, TokenizerError, one_line
from mlx_stream.text.template.chat_template import ChatTemplate
from mlx_stream.text.valid_text import check_text

T = TypeVar("T")
# The special tokens that a chat template may refer to.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

# Text that follows other text is encoded after the first of these characters that the tokenizer
# does not merge with it; that character's ids are then dropped.
LEADS = ("\n", ".", "a")

REPLACEMENT = "\ufffd"
ORDINARY = re.compile(r"[\s▁]*|[ -~]")
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# How many ids a decoder's window keeps after returning their text. One is enough to be past the
# start of the text, where decoders drop a space. Four cover the three bytes of an unfinished
# character.
WINDOW = 4
# The maximum cost of patterns that rescan a run of whitespace or digits from each of its
# characters: the sum of the squares of the runs' lengths. A run of 10,000 characters takes up to
# 0.9 s.
MAX_SLOW_STEPS = 100_000_000
# The maximum number of bytes from byte tokens that are held back while their text is incomplete.
MAX_RUN = 32

# How byte-level vocabularies write bytes: printable Latin-1 ones as themselves, the others as
# characters from 256 on (GPT-2's encoder.py).
PRINTABLE = {*range(33, 127), *range(161, 173), *range(174, 256)}
UNPRINTABLE = [byte for byte in range(256) if byte not in PRINTABLE]
BYTES_OF_CHARACTERS = {chr(byte): byte for byte in PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(UNPRINTABLE)
}


def check_runs(backend: tokenizers.Tokenizer, text: str) -> None:
    """Refuse text with runs on which slow patterns, quadratic in run length, take too long.

    Raises:
        TextError: the text has such runs.
    """
    if backend.normalizer:
        normalize = backend.normalizer.normalize_str
        text = call_library("cannot encode this text", normalize, text)
    kinds = groupby(text, lambda char: char.isspace() or char.isnumeric())
    runs = [sum(1 for _ in run) for kind, run in kinds if kind]
    if sum(run**2 for run in runs) > MAX_SLOW_STEPS:
        raise TextError(
            f"text: this model's tokenizer would take too long on {max(runs):,} spaces or digits "
            "in a row; shorten the longest runs"
        )


class Tokenizer:
    """A model's tokenizer: text to ids and back.

    Attributes:
        eos_ids: every id that ends a reply according to config.json, generation_config.json or
            tokenizer_config.json.
    """

    def __init__(self, backend: tokenizers.Tokenizer, tokenizer_config: Mapping[str, Any]):
        # A tokenizer.json may contain length limits from training; here text may have any length.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._tokenizer_config = tokenizer_config
        self.eos_ids: frozenset[int] = frozenset()
        self._limits_runs = False

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "Tokenizer":
        """Build the tokenizer of a checkpoint.

        Raises:
            TokenizerError: tokenizer.json cannot be read, is not supported, is inconsistent, or
                lacks an end token.
        """
        slow = check_tokenizer(checkpoint.tokenizer)
        read = tokenizers.Tokenizer.from_str
        backend = call_library("cannot be read", read, checkpoint.tokenizer)
        call_library("cannot be used", repair_decoder, backend)
        tokenizer = cls(backend, checkpoint.tokenizer_config)
        tokenizer.eos_ids = find_eos_ids(backend, checkpoint)
        tokenizer._limits_runs = slow
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """The number of tokens, including added ones; a model's output may be wider."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def vocabulary(self) -> dict[str, int]:
        """Return every token's id, including those of added tokens."""
        return self._backend.get_vocab(with_added_tokens=True)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens, which represent no text and which `decode` skips."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(id for id, token in added.items() if token.special)

    @cached_property
    def added_texts(self) -> Mapping[int, str]:
        """The text of each added token, special or not, by id.

        Whitespace and single characters, which some vocabularies add as plain text, are left out.
        """
        added = self._backend.get_added_tokens_decoder().items()
        return {id: token.content for id, token in added if not ORDINARY.fullmatch(token.content)}

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template, or None if the model has none.

        It is compiled on first use, so a model whose template is refused can still complete text.

        Raises:
            TemplateError: the template is refused.
        """
        tokens = {name: special_token(self._tokenizer_config, name) for name in NAMED_TOKENS}
        named = {name: token for name, token in tokens.items() if token}
        source = template_source(self._tokenizer_config)
        return (
            None
            if source is None
            else ChatTemplate(source, named, tuple(self.added_texts.values()))
        )

    def encode(self, text: str, special: bool = True, behind_text: bool = False) -> list[int]:
        """Return the ids of `text`, which may have any length.

        Args:
            special: add the tokens that the tokenizer adds to plain text, such as BOS. Text from a
                chat template contains its own special tokens.
            behind_text: the text follows other text, so no space is added before its first word.

        Raises:
            TextError: the text has a lone surrogate.
        """
        check_text(text)
        for lead in LEADS if behind_text and self._puts_a_space_first else ():
            before, both = self._encode(lead), self._encode(lead + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._encode(text, special)

    @cached_property
    def _puts_a_space_first(self) -> bool:
        """Whether a space is added before a text's first word, as SentencePiece does."""
        lead, word, both = (self._encode(text) for text in (LEADS[0], "a", f"{LEADS[0]}a"))
        return both != lead + word

    def find(self, text: str, ids: Container[int]) -> list[tuple[int, int]]:
        """Return the spans of text that encode to one of these ids: start and end, in characters.

        Raises:
            TextError: the text has a lone surrogate.
        """
        check_text(text)
        found = self._encoding(text)
        return [span for id, span in zip(found.ids, found.offsets, strict=True) if id in ids]

    def text_of(self, id: int) -> str:
        """Return the token with this id as the vocabulary spells it, or "" if it is unknown."""
        return self._backend.id_to_token(id) or ""

    def bytes_of(self, id: int) -> bytes:
        """Return the bytes that a token stands for, which may be part of a character.

        A special token stands for the bytes of its name, an unknown id for none.
        """
        token = self.text_of(id)
        added = self._backend.get_added_tokens_decoder()
        kinds = step_kinds(self._backend.decoder)
        if id in added:
            return token.encode()
        if byte := BYTE_TOKEN.fullmatch(token):
            return bytes([int(byte[1], 16)])
        if "ByteLevel" in kinds:
            return bytes(BYTES_OF_CHARACTERS[char] for char in token)
        return token.replace("▁", " ").encode()

    def _encode(self, text: str, special: bool = False) -> list[int]:
        return self._encoding(text, special).ids

    def _encoding(self, text: str, special: bool = False) -> tokenizers.Encoding:
        if self._limits_runs:
            check_runs(self._backend, text)
        # Measured on 2.7 million characters: 3 s and 380 MB. `encode_batch_fast` takes 1.7 s and
        # 290 MB, but it starts a pool of threads, which does not survive a fork.
        encode = self._backend.encode
        return call_library("cannot encode this text", encode, text, add_special_tokens=special)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special tokens and unknown ids have none."""
        return decode(self._backend, ids)

    def decoder(self, shown: Collection[int] = ()) -> "StreamDecoder":
        """Return a decoder for a new stream of ids.

        Args:
            shown: special tokens whose names are included in the text.
        """
        return StreamDecoder(self._backend, shown)


class StreamDecoder:
    """Turns ids into text one at a time, in bounded memory and constant time per id.

    Joined together, the pieces are the text that `Tokenizer.decode` returns for all the ids. This
    does not require remembering the stream: the text of the next id depends only on whether any
    text precedes it, on the last three bytes (byte-level vocabularies), or on the bytes since the
    last token that is not a byte (byte-fallback vocabularies).

    Byte tokens are the exception. A run of them is decoded as a whole, and one invalid byte turns
    all of it into replacement characters, so nothing is final until the run ends. At most 32 bytes
    are held back; the characters before them are returned even if the run turns out to be invalid.
    Runs of any length are decoded exactly if they are valid or if their first 32 bytes are not.
    """

    def __init__(self, backend: tokenizers.Tokenizer, shown: Collection[int] = ()):
        self._backend, self._shown = backend, shown
        kinds = step_kinds(backend.decoder)
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        added = backend.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        self._restart()

    def _restart(self) -> None:
        # The last ids, and how many characters of their text have been returned.
        self._window: list[int] = []
        self._sent = 0
        # The bytes at the end of the window whose text is not final yet; `_broken` is set once they
        # are known to be invalid.
        self._run = bytearray()
        self._broken = False

    def add(self, id: int) -> str:
        """Return the text that `id` completes; "" while a character is incomplete."""
        token = self._backend.id_to_token(id)
        # Ids that decoding skips must not push others out of the window.
        if not token or (token in self._special and id not in self._shown):
            return ""
        byte = BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        if byte:
            return self._add_byte(id, int(byte[1], 16))
        self._run.clear()
        self._broken = False
        self._window.append(id)
        text = self._decode()
        # The last bytes may be an incomplete character: the text then ends in a replacement
        # character that the next id may change. A genuine one is held back as well.
        held = int(self._byte_level and text.endswith(REPLACEMENT))
        piece = text[self._sent : len(text) - held]
        self._shorten(held)
        return piece

    def flush(self) -> str:
        """Return the rest of the text, including incomplete characters, and start over."""
        rest = self._decode()[self._sent :]
        self._restart()
        return rest

    def _add_byte(self, id: int, byte: int) -> str:
        if self._broken:
            return REPLACEMENT
        self._window.append(id)
        self._run.append(byte)
        unfinished = unfinished_bytes(self._run)
        if unfinished is None:
            return self._break_run()
        if len(self._run) == MAX_RUN:
            return self._cut_run(unfinished)
        return ""

    def _break_run(self) -> str:
        """Return one replacement character for each byte of an invalid run."""
        piece = REPLACEMENT * len(self._run)
        self._broken = True
        self._run.clear()
        self._shorten()
        return piece

    def _cut_run(self, unfinished: int) -> str:
        """Return the complete characters of a long run and remove them from it."""
        whole = len(self._run) - unfinished
        before = self._window[: len(self._window) - len(self._run)]
        rest = self._window[len(self._window) - unfinished :]
        del self._window[len(self._window) - unfinished :]
        piece = self._decode()[self._sent :]
        # At the start of the text, one whole character is kept, so that what follows is not decoded
        # as if it began the text.
        first = self._run[:whole].decode()[0].encode()
        self._window = before or self._window[: len(first)]
        self._sent = len(self._decode())
        self._window += rest
        del self._run[:whole]
        return piece

    def _shorten(self, held: int = 0) -> None:
        """Keep only the last ids; all but `held` characters of their text have been returned."""
        del self._window[:-WINDOW]
        self._sent = len(self._decode()) - held

    def _decode(self) -> str:
        return decode(self._backend, self._window, skip_special=not self._shown)


def decode(backend: tokenizers.Tokenizer, ids: Sequence[int], skip_special: bool = True) -> str:
    return call_library(
        "cannot decode these ids", backend.decode, ids, skip_special_tokens=skip_special
    )


def call_library(what: str, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call the library; turn its errors about an untrusted tokenizer.json into TokenizerError."""
    try:
        return function(*arguments, **options)
    except BaseException as error:
        # It raises a plain Exception or, if its Rust code panics, a BaseException with this name.
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise TokenizerError(f"tokenizer.json {what}: {one_line(error)}") from error
        raise


def repair_decoder(backend: tokenizers.Tokenizer) -> None:
    """Set the decoder that matches the vocabulary: some conversions mix up the two common kinds.

    Raises:
        ValueError: the vocabulary is byte-level, but the pre-tokenizer is not.
    """
    if "ByteLevel" in step_kinds(backend.normalizer) | step_kinds(backend.pre_tokenizer):
        if "ByteLevel" not in step_kinds(backend.decoder):
            backend.decoder = decoders.ByteLevel()
        return
    if is_byte_level(backend.get_vocab(with_added_tokens=False)):
        raise ValueError(
            "its vocabulary is byte-level but its pre_tokenizer is not: convert it again"
        )
    # A space, and a character that is encoded as bytes if the vocabulary has byte tokens.
    found = decode(backend, backend.encode("a a\ufdd1", add_special_tokens=False).ids)
    if "▁" in found or "<0xEF>" in found:
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        backend.decoder = decoders.Sequence(steps)
        if decode(backend, backend.encode("a", add_special_tokens=False).ids).startswith(" "):
            backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])


def is_byte_level(vocabulary: Mapping[str, int]) -> bool:
    """Return whether many tokens begin with a space in its byte-level form, "Ġ"."""
    return 20 * sum(token.startswith("Ġ") for token in vocabulary) > len(vocabulary)


def step_kinds(stage: Any) -> set[str]:
    """Return the types of a stage's steps, as named in tokenizer.json."""
    waiting = [json.loads(stage.__getstate__())] if stage is not None else []
    for step in waiting:  # grows during the loop
        for parts in ("normalizers", "pretokenizers", "decoders"):
            waiting += step.get(parts, [])
    return {step["type"] for step in waiting}


def unfinished_bytes(run: bytearray) -> int | None:
    """Return how many trailing bytes form an incomplete character; None if the run is not UTF-8."""
    try:
        run.decode()
    except UnicodeDecodeError as error:
        return len(run) - error.start if error.reason == "unexpected end of data" else None
    return 0


def special_token(tokenizer_config: Mapping[str, Any], name: str) -> str:
    """Return the text of a special token, given as a string or a mapping; "" if it is not set."""
    found = tokenizer_config.get(name)
    token = found.get("content") if isinstance(found, Mapping) else found
    if found is None:
        return ""
    if not isinstance(token, str):
        raise TokenizerError(f"tokenizer_config: {name} must be text, not {found!r}")
    return token


def template_source(tokenizer_config: Mapping[str, Any]) -> str | None:
    """Return the chat template (if there are several, the one named "default"), or None."""
    found = tokenizer_config.get("chat_template")
    if isinstance(found, Mapping):  # by name, as transformers stores them
        found = [{"name": name, "template": template} for name, template in found.items()]
    for entry in found if isinstance(found, list) else ():
        if isinstance(entry, Mapping) and entry.get("name") == "default":
            found = entry.get("template")
    if found is not None and not isinstance(found, str):
        raise TemplateError("chat template: not text, nor a list with a template named 'default'")
    return found


def find_eos_ids(backend: tokenizers.Tokenizer, checkpoint: Checkpoint) -> frozenset[int]:
    """Return the ids of all end tokens, after checking that each is in the vocabulary."""
    ids = set()
    configs = {"config": checkpoint.config, "generation_config": checkpoint.generation_config}
    for where, config in configs.items():
        found = config.get("eos_token_id")
        for id in found if isinstance(found, list) else [found]:
            if id is None:
                continue
            if not isinstance(id, int) or isinstance(id, bool):
                raise TokenizerError(
                    f"{where}: eos_token_id must be a whole number or a list of them, not {id!r}"
                )
            if not 0 <= id < 2**32 or backend.id_to_token(id) is None:
                raise TokenizerError(f"{where}: eos_token_id {id} is not in the vocabulary")
            ids.add(id)
    if token := special_token(checkpoint.tokenizer_config, "eos_token"):
        id = backend.token_to_id(token)
        if id is None:
            raise TokenizerError(f"tokenizer_config: eos_token {token!r} is not in the vocabulary")
        ids.add(id)
    return frozenset(ids)
