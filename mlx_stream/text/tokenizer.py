"""Text to token ids and back, also one id at a time; knows tokenizer.json's words, no model."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import tokenizers

from mlx_stream.checkpoint import Checkpoint
from mlx_stream.checkpoint.tokenizer_json import check_tokenizer
from mlx_stream.errors import TemplateError, TextError, TokenizerError, one_line
from mlx_stream.text.template import ChatTemplate

# The special tokens that a chat template may name.
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")

# A text that follows another one is encoded behind one of these, whose ids are then left out: the
# first that the tokenizer does not join with it.
LEADS = ("\n", ".", "a")

REPLACEMENT = "\ufffd"
BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Ids that stay in a decoder's window once their text is out. One is enough to no longer be at the
# start of the text, where decoders drop a space. Four cover the three bytes that an unfinished
# character can have.
WINDOW = 4
# Bytes that byte tokens may be ahead of their text.
MAX_RUN = 32


def check_text(text: object) -> None:
    """Refuse what has no ids.

    Raises:
        TextError: it is no str, or has a lone surrogate, which no encoding can carry.
    """
    if not isinstance(text, str):
        raise TextError(f"text is a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"text: character {error.start} is half of a surrogate pair and not valid Unicode"
        ) from error


class Tokenizer:
    """A model's tokenizer: text to ids and back.

    Attributes:
        eos_ids: every id that ends a reply, whoever says so: the configuration, the generation
            configuration or the tokenizer.
        bos_token, eos_token: their texts, "" where the tokenizer names none.
    """

    def __init__(self, backend: tokenizers.Tokenizer, tokenizer_config: Mapping[str, Any]):
        # A tokenizer.json may carry the settings it was trained with; here texts have any length.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._tokenizer_config = tokenizer_config
        self.bos_token = special_token(tokenizer_config, "bos_token")
        self.eos_token = special_token(tokenizer_config, "eos_token")
        self.eos_ids: frozenset[int] = frozenset()

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> "Tokenizer":
        """Build the tokenizer of a checkpoint.

        Raises:
            TokenizerError: tokenizer.json cannot be read, or an end token is not in it; or it asks
                for what has no bounds.
        """
        check_tokenizer(checkpoint.tokenizer)
        with library_errors("cannot be read"):
            backend = tokenizers.Tokenizer.from_str(checkpoint.tokenizer)
        tokenizer = cls(backend, checkpoint.tokenizer_config)
        tokenizer.eos_ids = find_eos_ids(backend, checkpoint, tokenizer.eos_token)
        return tokenizer

    @property
    def vocab_size(self) -> int:
        """The number of tokens, added ones included; a model's output may be wider."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    def vocabulary(self) -> dict[str, int]:
        """Return every token's id, added ones included."""
        return self._backend.get_vocab(with_added_tokens=True)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """The ids of special tokens: those that are no text, and that `decode` leaves out."""
        added = self._backend.get_added_tokens_decoder()
        return frozenset(id for id, token in added.items() if token.special)

    @cached_property
    def special_texts(self) -> tuple[str, ...]:
        """What special tokens are called in a text, those of one character left out."""
        added = self._backend.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special and len(token.content) > 1)

    @cached_property
    def template(self) -> ChatTemplate | None:
        """The chat template, or None if the model has none.

        It is built when first asked for: a model whose template will not do still completes text.

        Raises:
            TemplateError: it cannot be compiled.
        """
        tokens = {name: special_token(self._tokenizer_config, name) for name in NAMED_TOKENS}
        named = {name: token for name, token in tokens.items() if token}
        source = template_source(self._tokenizer_config)
        return None if source is None else ChatTemplate(source, named, self.special_texts)

    def encode(self, text: str, special: bool = True, behind_text: bool = False) -> list[int]:
        """Return the ids of a text of any length.

        Args:
            special: add what the tokenizer adds to plain text, a BOS for instance. The text of a
                chat template has its own and is encoded without.
            behind_text: the text follows another one, so no space is put before its first word.

        Raises:
            TextError: the text has a lone surrogate, which no encoding can carry.
        """
        check_text(text)
        # Measured on 2.7 million characters: 3 s and 380 MB. `encode_batch_fast` takes 1.7 s and
        # 290 MB, but starts a pool of threads, which programs that fork then carry along.
        with library_errors("cannot encode this text"):
            if behind_text and self._puts_a_space_first:
                return self._encode_behind(text)
            return self._backend.encode(text, add_special_tokens=special).ids

    @cached_property
    def _puts_a_space_first(self) -> bool:
        """Whether a text's first word gets a space that no later word gets (SentencePiece)."""
        lead, word, both = (self._plain(text) for text in (LEADS[0], "a", f"{LEADS[0]}a"))
        return both != lead + word

    def _encode_behind(self, text: str) -> list[int]:
        for lead in LEADS:
            before, both = self._plain(lead), self._plain(lead + text)
            if both[: len(before)] == before:
                return both[len(before) :]
        return self._plain(text)

    def _plain(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids; special tokens and ids without a token have none."""
        with library_errors("cannot decode these ids"):
            return self._backend.decode(ids, skip_special_tokens=True)

    def decoder(self) -> "StreamDecoder":
        """Return a decoder for one stream of ids, at its start."""
        return StreamDecoder(self._backend)


class StreamDecoder:
    """Turns ids into text one at a time, in bounded memory and constant time per id.

    The pieces join to what `Tokenizer.decode` gives for all the ids together. This needs no
    memory of the stream because a decoder's text for one more id depends only on whether a text
    has begun, on the last three bytes (byte-level vocabularies), or on the bytes since the last
    token that is not a byte (byte-fallback vocabularies).

    The exception are byte tokens: a run of them is one text, and one invalid byte makes
    replacement characters of it all, so nothing is certain before its end. Here at most 32 bytes
    wait; characters before that are given out as they are, also if the run later turns out
    invalid. Runs that are valid, or whose first 32 bytes are not, are exact whatever their length.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        self._backend = backend
        kinds = decoder_kinds(backend)
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        added = backend.get_added_tokens_decoder().values()
        self._special = frozenset(token.content for token in added if token.special)
        self._restart()

    def _restart(self) -> None:
        # The last ids, and how many characters of their text are out.
        self._window: list[int] = []
        self._sent = 0
        # The byte tokens at the end of the window whose text is not out; `broken` once they are
        # known to be no text.
        self._run = bytearray()
        self._broken = False

    def add(self, id: int) -> str:
        """Return the text that `id` makes certain; "" while a character is incomplete."""
        token = self._backend.id_to_token(id)
        # What decoding skips must not enter the window, or it would push out what matters.
        if not token or token in self._special:
            return ""
        byte = BYTE_TOKEN.fullmatch(token) if self._byte_fallback else None
        if byte:
            return self._add_byte(id, int(byte[1], 16))
        self._run.clear()
        self._broken = False
        self._window.append(id)
        text = self._decode()
        # The last bytes may begin a character: the end of the text is then a replacement
        # character that the next id can change. One of those that is meant waits for it too.
        held = int(self._byte_level and text.endswith(REPLACEMENT))
        piece = text[self._sent : len(text) - held]
        self._shorten(held)
        return piece

    def flush(self) -> str:
        """Return the rest of the text, incomplete characters included, and start anew."""
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
        """Give out the run as what it has become: one replacement character for each byte."""
        piece = REPLACEMENT * len(self._run)
        self._broken = True
        self._run.clear()
        self._shorten()
        return piece

    def _cut_run(self, unfinished: int) -> str:
        """Give out the complete characters of a long run, and go on as if it began after them."""
        whole = len(self._run) - unfinished
        before = self._window[: len(self._window) - len(self._run)]
        rest = self._window[len(self._window) - unfinished :]
        del self._window[len(self._window) - unfinished :]
        piece = self._decode()[self._sent :]
        # At the start of the text, one whole character of the run shows that it has begun.
        first = self._run[:whole].decode()[0].encode()
        self._window = before or self._window[: len(first)]
        self._sent = len(self._decode())
        self._window += rest
        del self._run[:whole]
        return piece

    def _shorten(self, held: int = 0) -> None:
        """Keep the last ids, whose text is out but for the last `held` characters."""
        del self._window[:-WINDOW]
        self._sent = len(self._decode()) - held

    def _decode(self) -> str:
        try:  # for every token: a context manager would be a tenth of a step's calls
            return self._backend.decode(self._window, skip_special_tokens=True)
        except BaseException as error:
            if ours := as_tokenizer_error(error, "cannot decode these ids"):
                raise ours from error
            raise


@contextmanager
def library_errors(what: str) -> Iterator[None]:
    """Turn what the library raises about a stranger's tokenizer.json into our own error."""
    try:
        yield
    except BaseException as error:
        if ours := as_tokenizer_error(error, what):
            raise ours from error
        raise


def as_tokenizer_error(error: BaseException, what: str) -> TokenizerError | None:
    """Return our own error for what the library raised; None for an interrupt and the like."""
    # It raises plain Exception, and where its Rust code gives up, a BaseException by this name.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        return None
    return TokenizerError(f"tokenizer.json {what}: {one_line(error)}")


def decoder_kinds(backend: tokenizers.Tokenizer) -> set[str]:
    """Return the types of the decoder's steps, as tokenizer.json names them."""
    if backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {step["type"] for step in [state, *state.get("decoders", [])]}


def unfinished_bytes(run: bytearray) -> int | None:
    """Return how many bytes at the end begin a character, or None if the run is no UTF-8."""
    try:
        run.decode()
    except UnicodeDecodeError as error:
        return len(run) - error.start if error.reason == "unexpected end of data" else None
    return 0


def special_token(tokenizer_config: Mapping[str, Any], name: str) -> str:
    """Return the text of a special token in either spelling, "" if there is none."""
    found = tokenizer_config.get(name)
    token = found.get("content") if isinstance(found, Mapping) else found
    if found is None:
        return ""
    if not isinstance(token, str):
        raise TokenizerError(f"tokenizer_config: {name} must be text, not {found!r}")
    return token


def template_source(tokenizer_config: Mapping[str, Any]) -> str | None:
    """Return the chat template, or of several the one named "default"; None if there is none."""
    found = tokenizer_config.get("chat_template")
    for entry in found if isinstance(found, list) else ():
        if isinstance(entry, Mapping) and entry.get("name") == "default":
            found = entry.get("template")
    if found is not None and not isinstance(found, str):
        raise TemplateError("chat template: neither text nor a list with one named 'default'")
    return found


def find_eos_ids(
    backend: tokenizers.Tokenizer, checkpoint: Checkpoint, eos_token: str
) -> frozenset[int]:
    """Return the ids of all end tokens, each checked to be in the vocabulary."""
    ids = set()
    for where, config in (
        ("config", checkpoint.config),
        ("generation_config", checkpoint.generation_config),
    ):
        found = config.get("eos_token_id")
        for id in found if isinstance(found, list) else [found]:
            if id is not None:
                ids.add(check_id(backend, id, f"{where}: eos_token_id"))
    if eos_token:
        id = backend.token_to_id(eos_token)
        if id is None:
            raise TokenizerError(
                f"tokenizer_config: eos_token {eos_token!r} is not in the vocabulary"
            )
        ids.add(id)
    return frozenset(ids)


def check_id(backend: tokenizers.Tokenizer, id: Any, where: str) -> int:
    if not isinstance(id, int) or isinstance(id, bool):
        raise TokenizerError(f"{where} must be a whole number or a list of them, not {id!r}")
    if not 0 <= id < 2**32 or backend.id_to_token(id) is None:
        raise TokenizerError(f"{where} {id} is not in the vocabulary of the tokenizer")
    return id
