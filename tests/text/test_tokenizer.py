"""Tokenizer and StreamDecoder, on small real tokenizers of every kind of decoder."""

import json
import tracemalloc
from functools import cache
from pydoc_data.topics import topics
from typing import Any

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mlx_stream.checkpoint import Checkpoint
from mlx_stream.errors import TemplateError, TextError, TokenizerError
from mlx_stream.text.tokenizer import MAX_RUN, Tokenizer, unfinished_bytes

ENGLISH = "\n".join(topics.values())
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@cache
def byte_level() -> str:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([ENGLISH[:20_000]], trainer)
    add_bos(backend)
    # Two-byte pieces that end within a character, as large vocabularies have.
    model = json.loads(backend.to_str())
    byte_of = byte_characters()
    for pair in (b"\xc3\xf0", b"\xf0\x9f", b"\x9f\x98", b"\x80a", b"a\xe2"):
        model["model"]["vocab"]["".join(byte_of[b] for b in pair)] = len(model["model"]["vocab"])
    return json.dumps(model)


@cache
def byte_characters() -> dict[int, str]:
    """Return the character that byte-level vocabularies write each byte as."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


@cache
def byte_fallback(decoder: str = "llama") -> str:
    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=650, special_tokens=SPECIAL + BYTES, limit_alphabet=60, show_progress=False
    )
    backend.train_from_iterator(ENGLISH[:20_000].split("\n"), trainer)
    add_bos(backend)
    parsed = json.loads(backend.to_str())
    # The trainer marks all tokens in its list as special, but byte tokens are not.
    parsed["added_tokens"] = [t for t in parsed["added_tokens"] if t["content"] in SPECIAL]
    parsed["decoder"] = DECODERS[decoder]
    return json.dumps(parsed)


@cache
def unigram() -> str:
    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(ENGLISH[:20_000].split("\n"), trainer)
    add_bos(backend)
    return backend.to_str()


@cache
def words() -> str:
    backend = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    trainer = trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)
    backend.train_from_iterator([ENGLISH[:20_000]], trainer)
    add_bos(backend)
    return backend.to_str()


def add_bos(backend: tokenizers.Tokenizer) -> None:
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )


REPLACE = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
FALLBACK, FUSE = {"type": "ByteFallback"}, {"type": "Fuse"}
STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
DECODERS: dict[str, Any] = {
    "llama": {"type": "Sequence", "decoders": [REPLACE, FALLBACK, FUSE, STRIP]},
    "gemma": {"type": "Sequence", "decoders": [REPLACE, FALLBACK, FUSE]},
    "fallback, metaspace": {"type": "Sequence", "decoders": [FALLBACK, METASPACE]},
}
BYTE_LEVEL = {
    "type": "ByteLevel",
    "add_prefix_space": True,
    "trim_offsets": True,
    "use_regex": True,
}
KINDS = ["byte-level", "unigram", "words", *DECODERS]


@cache
def load(kind: str = "byte-level") -> Tokenizer:
    return Tokenizer.from_checkpoint(checkpoint(text_of(kind)))


def text_of(kind: str) -> str:
    kinds = {"byte-level": byte_level, "unigram": unigram, "words": words}
    return kinds.get(kind, lambda: byte_fallback(kind))()


def checkpoint(text: str | None = None, **parts: Any) -> Checkpoint:
    return Checkpoint(
        config=parts.get("config", {}),
        tensors={},
        tokenizer=byte_level() if text is None else text,
        tokenizer_config=parts.get("tokenizer_config", {}),
        generation_config=parts.get("generation_config", {}),
    )


@cache
def byte_ids(kind: str) -> list[int]:
    """Return the ids of the 256 single bytes, or none if the vocabulary has none."""
    vocab = json.loads(text_of(kind))["model"]["vocab"]
    if kind == "byte-level":
        return [vocab[byte_characters()[byte]] for byte in range(256)]
    return [] if kind in ("unigram", "words") else [vocab[token] for token in BYTES]


def spell(kind: str, run: bytes | str) -> list[int]:
    """Return the ids of single bytes that spell a run of bytes or the UTF-8 of a text."""
    return [byte_ids(kind)[byte] for byte in (run.encode() if isinstance(run, str) else run)]


@st.composite
def streams(draw: st.DrawFn, kind: str) -> list[int]:
    """Draw ids that a model might emit, or should not: text, bytes, specials, anything."""
    tokenizer = load(kind)
    texts = st.text(st.sampled_from("ab é€😀\ufffd▁\n"), max_size=12) | st.text(max_size=6)
    segments = [
        texts.map(lambda text: tokenizer.encode(text)),
        st.lists(st.integers(0, tokenizer.vocab_size + 20), max_size=8),
        st.lists(st.sampled_from([0, 1, 2, tokenizer.vocab_size + 7]), max_size=8),
    ]
    if byte_ids(kind):
        raw = st.binary(max_size=8) | texts.map(lambda text: (text * 8).encode())
        torn = st.lists(st.sampled_from(b"\x80\xbf\xc3\xe2\x82\xac\xf0\x9f\x98a \xff\xed\xa0"))
        segments.append((raw | torn.map(bytes)).map(lambda run: spell(kind, run)))
    return [id for part in draw(st.lists(st.one_of(segments), max_size=6)) for id in part]


def late_invalid_run(kind: str, ids: list[int]) -> bool:
    """Return whether a run of byte tokens turns invalid once its start can no longer be held."""
    if "ByteFallback" not in json.dumps(DECODERS.get(kind)):
        return False
    tokenizer = load(kind)
    values = {id: byte for byte, id in enumerate(byte_ids(kind))}
    runs = [bytearray()]
    for id in ids:
        if id in values:
            runs[-1].append(values[id])
        elif id > 2 and id < tokenizer.vocab_size:
            runs.append(bytearray())
    return any(
        len(run) >= MAX_RUN
        and unfinished_bytes(run) != 0
        and unfinished_bytes(run[:MAX_RUN]) is not None
        for run in runs
    )


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    decoder = tokenizer.decoder()
    return [*(decoder.add(id) for id in ids), decoder.flush()]


@pytest.mark.parametrize("kind", KINDS)
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_pieces_join_to_the_text(kind: str, data: st.DataObject):
    tokenizer = load(kind)
    ids = data.draw(streams(kind))
    pieces = "".join(stream(tokenizer, ids))
    if late_invalid_run(kind, ids):
        # Invalid bytes become replacement characters and nothing else, so this still holds.
        assert len(pieces) <= len(tokenizer.decode(ids))
    else:
        assert pieces == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "words"])
def test_real_text_streams_in_small_pieces(kind: str):
    tokenizer = load(kind)
    ids = tokenizer.encode(ENGLISH[5_000:9_000])
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert max(map(len, pieces)) < 25
    if kind in ("byte-level", "llama"):  # a long run of single bytes streams too
        pieces = stream(tokenizer, spell(kind, text := "x€😀é " * 100))
        assert "".join(pieces) == tokenizer.decode(spell(kind, text)) == text
        assert max(map(len, pieces)) <= MAX_RUN


@pytest.mark.parametrize("kind", ["byte-level", "llama", "unigram"])
def test_text_comes_back_as_it_was(kind: str):
    tokenizer = load(kind)
    texts = ("The first\nline.", "Is n't it ? Yes , it 's  so .", ENGLISH[:20_000])
    for text in ("The first line.",) if kind == "unigram" else texts:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("decoder", [None, BYTE_LEVEL, METASPACE, *DECODERS.values()])
@pytest.mark.parametrize("kind", ["byte-level", "llama", "gemma"])
def test_ids_are_decoded_by_the_kind_of_the_vocabulary(kind: str, decoder: Any):
    """The decoder that the file names is ignored, because conversions mix decoders up."""
    parsed = json.loads(text_of("byte-level" if kind == "byte-level" else "llama"))
    if kind == "gemma":
        parsed["normalizer"] = parsed["normalizer"]["normalizers"][1]  # no space at the beginning
    tokenizer = Tokenizer.from_checkpoint(checkpoint(json.dumps(parsed | {"decoder": decoder})))
    text = "the rest  on the sand\n and so on"
    ids = tokenizer.encode(text)
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)
    if decoder in (None, BYTE_LEVEL, METASPACE) or kind == "byte-level":
        assert tokenizer.decode(ids) == text
    else:  # a decoder for another scheme of the same kind may drop or keep a first space
        assert tokenizer.decode(ids).replace(" ", "") == text.replace(" ", "")


def test_a_byte_level_vocabulary_that_does_not_read_bytes_is_refused():
    for step in (METASPACE, {"type": "Whitespace"}, None):
        parsed = json.loads(byte_level()) | {"pre_tokenizer": step}
        with pytest.raises(TokenizerError, match=r"^tokenizer.json cannot be used: its vocab.*$"):
            Tokenizer.from_checkpoint(checkpoint(json.dumps(parsed)))


def test_a_character_comes_whole_and_at_once():
    assert stream(load(), spell("byte-level", "a€b")) == ["a", "", "", "€", "b", ""]


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
def test_flush_gives_what_is_incomplete_and_starts_anew(kind: str):
    decoder = load(kind).decoder()
    for _ in range(2):
        assert decoder.add(byte_ids(kind)[0xE2]) == ""
        assert decoder.flush() == "\ufffd"


def test_a_space_is_dropped_at_the_start_of_the_text_only():
    tokenizer = load("llama")
    (word,) = tokenizer.encode("the", special=False)
    for before in ([], [1, 2], [0]):
        assert stream(tokenizer, [*before, word, 2, word, word]) == [
            *("" for _ in before),
            *("the", "", " the", " the", ""),
        ]


def test_a_run_of_bytes_waits_for_its_end():
    decoder = load("llama").decoder()
    assert {decoder.add(id) for id in spell("llama", "€😀")} == {""}
    assert decoder.add(load("llama").encode("a", special=False)[-1]).startswith("€😀")


def test_a_long_run_that_turns_invalid_keeps_what_was_given_out():
    ids = spell("llama", "é".encode() * 20 + b"\xff" * 5)
    assert load("llama").decode(ids) == "\ufffd" * 45
    assert "".join(stream(load("llama"), ids)) == "é" * 16 + "\ufffd" * (8 + 5)


def test_a_run_known_to_be_invalid_is_exact_however_long():
    ids = [*spell("llama", b"A" * 10 + b"\x80" + b"A" * 500), 300, 301]
    pieces = stream(load("llama"), ids)
    assert "".join(pieces) == load("llama").decode(ids)
    assert set(pieces[11:-3]) == {"\ufffd"}, "nothing waits any more"


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
@pytest.mark.parametrize("run", [b"\x80", b"\xe2", b"\xf0\x9f", "€".encode(), b"a", b"\xff\xc3"])
def test_memory_does_not_grow_with_the_stream(kind: str, run: bytes):
    ids = spell(kind, run)
    decoder = load(kind).decoder()
    for id in ids * 200:
        decoder.add(id)
    tracemalloc.start()
    for _ in range(6_000 // len(ids)):
        for id in ids:
            decoder.add(id)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20_000


def test_special_tokens_are_added_to_plain_text_only():
    tokenizer = load()
    plain = tokenizer.encode("the", special=False)
    assert tokenizer.encode("the") == [1, *plain]
    assert tokenizer.encode("<s>the</s>", special=False) == [1, *plain, 2]
    assert tokenizer.decode([1, *plain, 2]) == "the"


def test_truncation_and_padding_are_ignored_and_added_tokens_counted():
    backend = tokenizers.Tokenizer.from_str(byte_level())
    backend.enable_truncation(5)
    backend.enable_padding(length=64)
    backend.add_special_tokens(["<|new|>"])
    tokenizer = Tokenizer.from_checkpoint(checkpoint(backend.to_str()))
    assert tokenizer.vocab_size == load().vocab_size + 1
    assert tokenizer.encode(ENGLISH[:300]) == load().encode(ENGLISH[:300])
    assert tokenizer.encode("the") == load().encode("the")


def test_a_lone_surrogate_is_refused():
    with pytest.raises(TextError, match="character 2 "):
        load().encode("ab\ud800")


def test_end_ids_are_those_of_all_files():
    tokenizer = Tokenizer.from_checkpoint(
        checkpoint(
            config={"eos_token_id": 7},
            generation_config={"eos_token_id": [8, 9]},
            tokenizer_config={"eos_token": {"content": "</s>"}},
        )
    )
    assert tokenizer.eos_ids == {7, 8, 9, 2}
    nothing: Any = {"config": {"eos_token_id": None}, "tokenizer_config": {"eos_token": None}}
    tokenizer = Tokenizer.from_checkpoint(checkpoint(**nothing))
    assert (tokenizer.eos_ids, tokenizer.template) == (frozenset(), None)


IDS_OF_NOTHING = (-1, 10**6, 2**40, "2", 2.0, True, [[2]], {"id": 2})
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(
        ({where: {"eos_token_id": id}}, f"{where}: eos_token_id ")
        for where in ("config", "generation_config")
        for id in IDS_OF_NOTHING
    ),
    *(
        ({"tokenizer_config": {"eos_token": token}}, "tokenizer_config: eos_token ")
        for token in ("<nowhere>", 2, {"text": "</s>"}, ["</s>"])
    ),
    *(
        ({"text": text}, r"tokenizer\.json cannot be read: ")
        for text in ("", "[]", "{}", '{"model": null}', '{"model": {}')
    ),
]


@pytest.mark.parametrize(("parts", "reason"), REFUSED)
def test_a_checkpoint_that_cannot_be_is_refused_in_one_line(parts: dict[str, Any], reason: str):
    with pytest.raises(TokenizerError, match=rf"^{reason}.*$"):
        Tokenizer.from_checkpoint(checkpoint(**parts))


def test_the_template_gets_the_special_tokens_and_a_bad_one_harms_nothing_else():
    config = {"chat_template": "{{ bos_token }}|{{ pad_token }}|", "bos_token": "<s>"}
    template = Tokenizer.from_checkpoint(checkpoint(tokenizer_config=config)).template
    assert template and template.render([], reply=False) == "<s>||"
    for bad in ("{% for", 3, [], [{"name": "rag", "template": ""}], {}):
        tokenizer = Tokenizer.from_checkpoint(checkpoint(tokenizer_config={"chat_template": bad}))
        assert tokenizer.decode(tokenizer.encode("the")) == "the"
        with pytest.raises(TemplateError, match=r"^chat template: .*$"):
            _ = tokenizer.template


@pytest.mark.parametrize("kind", ["byte-level", "llama"])
def test_the_bytes_of_tokens_join_to_the_text(kind: str):
    tokenizer = load(kind)
    text = "The naïve 猫 said: 🙂\n  two  spaces"
    ids = tokenizer.encode(text, special=False)
    found = b"".join(map(tokenizer.bytes_of, ids))
    assert found.decode().lstrip(" ") == text and tokenizer.bytes_of(10**6) == b""


def test_the_bytes_of_an_added_token_are_its_name():
    tokenizer = Tokenizer.from_checkpoint(checkpoint(text_of("byte-level")))
    tokenizer._backend.add_special_tokens(["<|né ▁|>"])
    (id,) = tokenizer.encode("<|né ▁|>", special=False)
    assert tokenizer.bytes_of(id).decode() == "<|né ▁|>"
