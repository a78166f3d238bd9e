"""What the command line refuses: one line that says what is wrong and what to do, status 1."""

import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_stream import backend
from tests.fakes import gguf_files
from tests.fakes.refusals import ASK, one_line, refused
from tests.fakes.shell import DEADLINE, GREEDY, SMALL, done, edit, program, run
from tests.fakes.tiny import tiny_config, tiny_weights, write_model, write_tiny

pytestmark = pytest.mark.usefixtures("elsewhere")

CONFIG = tiny_config(**SMALL)
WEIGHTS = tiny_weights(CONFIG)
PUBLISHED = Path(__file__).parents[1] / "fakes" / "published"
TEXT = "the man and the house of the river and the sea in the end " * 40
# Words in capitals, and the files that tests make for them.
COMMANDS = {
    "generate": "generate MODEL -p the",
    "chat": "chat MODEL",
    "score": "score MODEL TEXT",
    "bench": "bench MODEL --window 64",
    "convert": "convert WIDE out",
    "plan": "plan LLAMA",
    "tiny": "plan MODEL",
    "devices": "devices",
    "phone": "plan LLAMA --device iphone-16-pro",
}


@pytest.fixture(scope="module")
def given(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return the files for the words in capitals."""
    folder = tmp_path_factory.mktemp("given")
    (folder / "text.txt").write_text(TEXT)
    (folder / "short.txt").write_text(TEXT[:120])
    wide = write_model(folder / "wide", hidden_size=128, intermediate_size=256, head_dim=32)
    files = {"TEXT": folder / "text.txt", "SHORT": folder / "short.txt"}
    return {"MODEL": whole, "WIDE": wide, "LLAMA": PUBLISHED / "Llama-3.2-1B.json", **files}


def words(text: str, given: dict[str, Path]) -> list[object]:
    return [given.get(word, word) for word in shlex.split(text)]


# --- options ---

DTYPES = "--dtype must be one of float32, float16, bfloat16, not"
OPTIONS: list[tuple[str, str, str]] = [
    ("generate chat score", "--window 0", "--window must be at least 1, not 0"),
    ("generate chat score", "--sinks -1", "--sinks must be from 0 to 511, not -1"),
    ("generate", "--sinks 512", "--sinks must be from 0 to 511, not 512"),
    ("generate chat score", "--window 509", "sinks 4 + window 509 = 513 tokens exceed the model's"),
    ("generate", "--window 509", "trained context of 512: use a window of at most 508"),
    ("generate chat score bench convert phone", "--dtype int8", f"{DTYPES} 'int8'"),
    ("generate chat", "--temp 5.5", "--temp must be from 0 to 5, not 5.5"),
    ("generate chat", "--top-p 0", "--top-p must be above 0 and at most 1, not 0.0"),
    ("generate chat", "--min-p 2", "--min-p must be from 0 to 1, not 2.0"),
    ("generate chat", "--top-k -1", "--top-k must be 0 or more, not -1"),
    ("generate chat", "--repetition-penalty 0", "--repetition-penalty must be from 0.01 to 100"),
    ("generate chat", "--seed -1", "--seed must be from 0 to 2^64 - 1, not -1"),
    ("generate chat", "--max-tokens 0", "--max-tokens must be a whole number, at least 1, not 0"),
    ("generate chat", "--stop x --stop ''", "--stop must not be an empty string"),
    ("score", "--chunk 0", "--chunk must be at least 1, not 0"),
    ("score", "--max-tokens 1 --json", "--max-tokens must be at least 2, not 1"),
    ("score", "--dense --sinks 2", "--dense attends to everything: leave out --window, --sinks"),
    ("bench", "--pairs 2", "--pairs must be at least 3, not 2"),
    ("bench", "--chunk 1", "--chunk must be at least 2, not 1"),
    ("bench", "--prefill 1", "--prefill must be at least 2, not 1"),
    ("bench", "--prefill 9 --prefill-chunk 1", "--prefill-chunk must be at least 2, not 1"),
    ("bench", "--window 0", "--window must be at least 1, not 0"),
    ("bench", "--window 4096", "use a window of at most 508"),
    ("convert", "--bits 7", "--bits must be 2, 3, 4, 5, 6 or 8 in mode affine, not 7"),
    ("convert", "--bits 4 --group-size 48", "--group-size must be 32, 64 or 128 in mode affine"),
    ("convert", "--group-size 64", "--group-size and --mode affine need --bits"),
    ("convert", "--mode int4", "--mode must be one of affine, mxfp4, mxfp8, nvfp4, not 'int4'"),
    ("convert", "--mode mxfp4 --bits 8", "--bits must be 4 in mode mxfp4, not 8"),
    ("convert", "--mode mxfp4 --group-size 64", "--group-size must be 32 in mode mxfp4, not 64"),
    ("convert", "--recipe mixed_4_6 --bits 4", "leave out --bits"),
    ("convert", "--recipe best", "--recipe must be one of uniform_2, "),
    ("convert", "--recipe sensitive_4_6", "--recipe sensitive_4_6 is measured on a text: give one"),
    ("convert", "--bits 4 --calibration TEXT", "--calibration is for measured recipes"),
    ("convert", "--report none.txt", "none.txt: cannot be read: No such file or directory"),
    ("convert", "--report SHORT", "63 tokens: a report needs more than 200"),
    ("convert", "--recipe sensitive_4_6 --calibration SHORT", "the calibration text has 63 tokens"),
    ("convert", "--report TEXT --report-tokens 5", "--report-tokens must be above 200, not 5"),
    ("convert plan", "--device iphone-16-prp", "unknown; did you mean iphone-"),
    ("plan", "--device toaster", "'toaster': unknown; see `mlx_stream devices`"),
    ("plan", "--device macbook-air-m3", "choose one of macbook-air-m3-8gb, macbook-air-m3-16gb"),
    ("phone", "--window 200000", "exceed the model's trained context of 131,072"),
    ("phone", "--bits 7", "--bits must be one of 2, 3, 4, 5, 6, 8, 16"),
    ("phone", "--group-size 48", "--group-size must be one of 32, 64, 128"),
    ("phone", "--kv-bits 3", "--kv-bits must be 8 or 4, not 3"),
    ("tiny", "--kv-bits 8", "--kv-bits needs a head dimension that is a multiple of 64"),
    ("phone tiny", "--sinks -1", "--sinks must be from 0 to"),
    ("tiny", "--window 0", "--window must be at least 1, not 0"),
    ("phone", "--bits 4 --dequantize", "--bits keeps weights quantized"),
    ("plan", "--device macbook-neo --no-entitlement", "--no-entitlement is for phones"),
    ("plan", "--no-entitlement", "phones and tablets, but 'here' is neither: choose"),
    ("phone devices", "--devices none.toml", "none.toml: cannot be read: No such file"),
]


@pytest.mark.parametrize(("verbs", "options", "why"), OPTIONS)
def test_options_are_refused(given, verbs, options, why, monkeypatch):
    # mlx-lm itself is not needed to refuse, and is slow to import.
    monkeypatch.setattr("mlx_stream.evaluate.mlx_lm.load_peer", lambda folder, model: None)
    for verb in verbs.split():
        assert why in one_line(*words(f"{COMMANDS[verb]} {options}", given), stdin="the\n")


# --- names, texts and paths ---

OTHERS: list[tuple[str, bytes, str]] = [
    *(
        (f"{verb} {name} {more}", b"Hello\n", why)
        for verb, more in (("chat", ""), ("generate", "-p a"), ("score", "TEXT"), ("bench", ""))
        for name, why in (
            ("./nowhere", "./nowhere: no such folder or file"),
            ("nowhere.gguf", "nowhere.gguf: no such folder or file"),
            ("nowhere", "'nowhere' is not a model; expected a folder, a .gguf file, a Hub id"),
            ("org/name", "org/name: not in the cache, and "),
        )
    ),
    ("chat './no\n\nwhere'", b"", "./no where: no such folder or file"),
    ("generate TEXT -p a", b"", "not a model; expected a folder or a .gguf file"),
    ("plan none", b"", "'none"),
    ("plan org/none", b"", "org/none: "),
    ("convert none out", b"", "is not a model"),
    ("score MODEL none.txt", b"", "none.txt: cannot be read: No such file or directory"),
    ("score MODEL MODEL", b"", "is a folder: after the model, give the text file to score"),
    ("score MODEL", b"", "is a folder: after the model, give the text file to score"),
    ("score MODEL -", b"", "standard input: is empty: some text is required"),
    ("score MODEL -", b"a", "the text has 1 token: at least two are needed to predict one"),
    ("score MODEL -", b"good " * 1000 + b"\xe2\x82", "is not UTF-8 (byte 5000 is 0xe2): convert"),
    ("generate MODEL -p -", b"\xef\xbb\xbf", "standard input: is empty: some text is required"),
    ("generate MODEL -p -", b"the\n\xff", "standard input: is not UTF-8 (byte 4 is 0xff)"),
    ("generate MODEL -p ''", b"", "the prompt is empty: some text is required"),
    ("generate MODEL -p abc\udcff", b"", "character 3 is half of a surrogate pair"),
    ("chat MODEL", b"\xe9t\xe9\n", "standard input, line 1: is not UTF-8 (byte 0 is 0xe9): conv"),
    ("bench GGUF --window 64", b"", "mlx-lm: it reads folders: convert the model to one"),
]


@pytest.mark.parametrize(("command", "stdin", "why"), OTHERS)
def test_names_and_texts_are_refused(given, tmp_path, command, stdin, why):
    if "GGUF" in command:
        given = given | {"GGUF": tmp_path / "tiny.gguf"}
        gguf_files.write_tiny(given["GGUF"])
    began = time.monotonic()
    assert why in one_line(*words(command, given), stdin=stdin)
    assert time.monotonic() - began < DEADLINE / 2  # even with a Hub that does not answer


def test_a_line_of_chat_that_is_not_utf8_ends_it_where_it_is(whole):
    options = ("chat", whole, *GREEDY, "--max-tokens", 4)
    first = done(*options, stdin=b"Hello\n").out
    line = one_line(*options, stdin=b"Hello\n\nso \xff\nand\n", out=first)
    assert line.startswith("standard input, line 3: is not UTF-8 (byte 3 is 0xff): convert it")


def test_the_program_says_the_same_one_line():
    wrong = ("chat", "org/name")
    found = subprocess.run(program(*wrong), capture_output=True, text=True, timeout=DEADLINE)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == f"mlx_stream: {one_line(*wrong)}\n"


# --- what is wrong with a model ---


def changed(**changes: Any) -> Callable[[Path], None]:
    return lambda model: edit(model / "config.json", **changes)


def template(text: str | None) -> Callable[[Path], None]:
    return lambda model: edit(model / "tokenizer_config.json", chat_template=text)


def written(file: str, content: bytes) -> Callable[[Path], object]:
    return lambda model: (model / file).write_bytes(content)


def tensors(
    name: str, shape: tuple[int, ...] = (), dtype: str = "float32"
) -> Callable[[Path], object]:
    """Write the weights again, with one given a different shape or left out."""
    weights = {key: value for key, value in WEIGHTS.items() if key != name}
    weights |= {name: np.ones(shape, np.float32)} if shape else {}
    return lambda model: write_tiny(model, CONFIG, weights, dtype, tokenizer=False)


NORM, UP = "model.norm.weight", "model.layers.0.mlp.up_proj.weight"
NO_REPLY = "chat template: it does not write a reply's content"
MODELS: list[tuple[Callable[[Path], object], str]] = [
    (lambda model: (model / "config.json").unlink(), "no config.json; expected a folder with a"),
    (lambda model: (model / "model.safetensors").unlink(), "expected weights in the safetensors"),
    (
        lambda model: (model / "tokenizer.json").unlink(),
        "no tokenizer.json; write one with tran",
    ),
    *(
        (written(file, content), file)
        for file in ("config.json", "tokenizer.json", "tokenizer_config.json")
        for content in (b"", b"[]", b'{"a": \xff}', b"{} {}")
    ),
    (
        changed(model_type="gemma2"),
        "model_type 'gemma2' is not supported (supported: llama, mistral",
    ),
    (
        changed(hidden_size="32"),
        "hidden_size must be a whole number from 1 to 2147483647, not",
    ),
    (changed(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "'dynamic' changes its freq"),
    (changed(hidden_act="gelu"), "hidden_act = 'gelu' changes the computation"),
    (
        changed(quantization_config={"quant_method": "gptq"}),
        "models quantized with gptq can be read only by convert, and only without --device: run",
    ),
    (changed(eos_token_id=300), "eos_token_id 300 is not in the vocabulary"),
    (tensors(NORM), f"weights: tensor '{NORM}' is missing"),
    (tensors(UP, (34, 32)), f"'{UP}' has shape (34, 32), but config.json needs (32, 32)"),
    (tensors("x\ny", (3,)), "weights: unknown tensor 'x\\ny' (1 in all)"),
    (tensors(NORM, (32,), "int64"), "I64; expected one of F32, "),
    (tensors(NORM, (32,), "int32"), "weight' is mlx.core.int32, not mlx.core.float32 or"),
    (written("model.safetensors", b"\x10" * 40), "damaged or truncated; fetch it again ("),
    (template(None), "has no chat template: use generate"),
    (template("{{ messages[-1].content }}"), NO_REPLY),
    (template("{{ raise_exception('no\nthanks') }}"), "chat template: it failed: no thanks"),
]


@pytest.mark.parametrize(("spoil", "why"), MODELS, ids=[why for _, why in MODELS])
def test_a_model_is_refused_with_its_name_and_what_is_wrong(model, spoil, why):
    spoil(model)
    line = one_line("chat", model, stdin="Hello\n")
    assert why in line
    if "template" in line:
        assert done("generate", model, *ASK).err == ""
    else:
        assert line.startswith(str(model)) and why in refused(model)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"kinds": {"blk.1.ffn_up.weight": "MXFP4"}}, "has the type MXFP4, which is not supported"),
        (
            {"architecture": "bert"},
            "the architecture 'bert' is not supported (supported: llama, mi",
        ),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, "blk.1.ffn_up.weight is missing"),
        ({}, "truncated"),
    ],
)
def test_a_gguf_file_is_refused_with_its_name(tmp_path, changes, why):
    path = tmp_path / "tiny.gguf"
    gguf_files.write_tiny(path, **changes)
    if not changes:
        assert done("generate", path, *ASK).err == ""
        path.write_bytes(path.read_bytes()[:-1])
    line = refused(path)
    assert line.startswith("tiny.gguf: ") and why in line


# --- memory and the device ---

REFUSAL = (
    r"([\d,.]+) MB of weights and ([\d,.]+) MB of keys and values exceed this device's "
    r"budget of ([\d,.]+) MB: use a smaller window, a quantized model, or --force"
)


def test_what_exceeds_memory_is_refused_with_the_numbers_unless_forced(given, model, monkeypatch):
    monkeypatch.setattr(backend, "memory_budget", lambda: 1000)
    for verb in ("generate", "chat", "score", "bench"):
        more = ("--max-tokens", 4) if verb != "bench" else ()
        command = (*words(COMMANDS[verb], given), *more)
        assert re.fullmatch(REFUSAL, one_line(*command, stdin="Hello\n"))
        if verb != "bench":
            assert done(*command, "--force", stdin="Hello\n").out
    edit(model / "config.json", max_position_embeddings=10_000_000)
    monkeypatch.setattr(backend, "memory_budget", lambda: 2**29)
    for verb in ("generate", "chat", "score"):
        command = words(f"{COMMANDS[verb]} --window 9999996", given | {"MODEL": model})
        found = re.fullmatch(REFUSAL, one_line(*command, stdin="Hello\n"))
        # One layer with one head: 2 times 16 float32 numbers per token.
        assert found is not None and found.groups() == ("0.1", "1,280.0", "536.9")
    assert done("generate", model, *ASK, "--window", 1000).err == ""


def test_a_gpu_that_fails_late_is_one_line_and_our_own_mistakes_are_not(tiny, monkeypatch):
    said = ["[METAL] Command buffer execution failed:\nCaused GPU Timeout Error."]

    def late(*_: object, **__: object) -> int:
        raise RuntimeError(said[0])

    monkeypatch.setattr("mlx_stream.generate.token_stream.as_int", late)
    result = run("generate", tiny, *ASK, "--max-tokens", 5)
    assert result.code == 1 and len(result.err.splitlines()) == 1
    assert "Caused GPU Timeout Error.: start again, with a smaller --window" in result.err
    said[0] = "dictionary changed size during iteration"
    with pytest.raises(RuntimeError, match="changed size"):
        done("generate", tiny, *ASK, "--max-tokens", 5)
