"""Whatever is wrong with what a user gives: one line that says what and what to do, status 1."""

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
from test_cli import DEADLINE, GREEDY, SMALL, done, edit, program, run
from tiny import tiny_config, tiny_weights, write_tiny

from mlx_stream import backend

CONFIG = tiny_config(**SMALL)
WEIGHTS = tiny_weights(CONFIG)
ASK = ("-p", "the man", *GREEDY, "--max-tokens", 4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model with nothing wrong; not to be changed."""
    return write_tiny(tmp_path_factory.mktemp("bad") / "model", CONFIG, WEIGHTS)


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of the model, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("The man and the other one sat in the shade.\n", encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run each test in an empty folder, and see that nothing is left there or in the caches."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    yield
    places = (here, Path(os.environ["MLX_STREAM_HOME"]), Path(os.environ["HF_HOME"]))
    left = [path for place in places for path in place.rglob("*") if not path.is_dir()]
    assert left == []


def one_line(*args: object, stdin: str | bytes = b"", out: str = "") -> str:
    """Run what must be refused, and return the one line it is refused with."""
    result = run(*args, stdin=stdin)
    assert (result.code, result.out) == (1, out), result
    assert result.err.startswith("mlx_stream: ") and result.err.endswith("\n"), result.err
    assert len(result.err.splitlines()) == 1 and len(result.err) < 600
    return result.err.removeprefix("mlx_stream: ").removesuffix("\n")


def refused(model: object) -> str:
    return one_line("generate", model, *ASK)


def why(model: Path) -> str:
    """Return what is wrong with a model, of a line that names it first."""
    line = refused(model)
    assert line.startswith(f"{model}: ")
    return line.removeprefix(f"{model}: ")


# --- where a model comes from ---


@pytest.mark.parametrize("verb", ["chat", "generate", "score", "bench"])
def test_a_missing_model(verb: str, text: Path) -> None:
    more = {"generate": ASK, "score": (text,)}.get(verb, ())
    line = one_line(verb, "./nowhere", *more, stdin="Hello\n")
    assert line == "./nowhere: no such folder or file"
    line = one_line(verb, "nowhere.gguf", *more)
    assert line == "nowhere.gguf: no such folder or file"
    line = one_line(verb, "nowhere", *more)
    assert line.startswith("'nowhere' is not a model; expected a folder, a .gguf file, a Hub id")


def test_a_name_with_line_breaks_stays_on_one_line() -> None:
    assert one_line("chat", "./no\n\nwhere") == "./no where: no such folder or file"


def test_what_is_no_model(text: Path) -> None:
    assert refused(text) == f"{text}: not a model; expected a folder or a .gguf file"


@pytest.mark.parametrize("verb", ["chat", "generate", "score", "bench"])
def test_an_unreachable_hub_is_given_up_at_once(verb: str, text: Path) -> None:
    more = {"generate": ASK, "score": (text,)}.get(verb, ())
    started = time.monotonic()
    line = one_line(verb, "org/name", *more)
    assert time.monotonic() - started < 10
    assert re.fullmatch(
        r"org/name: not in the cache, and \S+ cannot be reached \(\w+\); check the network, or "
        r"give a folder or a \.gguf file",
        line,
    )


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("config.json", "no config.json; expected a folder with a model in it"),
        (
            "model.safetensors",
            "no model.safetensors .*; expected weights in the safetensors format",
        ),
        ("tokenizer.json", "no tokenizer.json; convert it with transformers: .*"),
    ],
)
def test_a_missing_file(model: Path, file: str, expected: str) -> None:
    (model / file).unlink()
    assert re.fullmatch(f"{re.escape(str(model))}: {expected}", refused(model))
    shutil.rmtree(model)
    model.mkdir()
    assert "no config.json" in refused(model)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"a": \xff}', b"null", b"{} {}"])
def test_files_that_are_not_the_json_expected(model: Path, file: str, content: bytes) -> None:
    (model / file).write_bytes(content)
    assert file in refused(model)


# --- config.json ---


@pytest.mark.parametrize("model_type", ["qwen2", "gpt2", "Llama", ""])
def test_an_unknown_architecture(model: Path, model_type: str) -> None:
    edit(model / "config.json", model_type=model_type)
    assert why(model) == (
        f"config: model_type {model_type!r} is not supported (supported: llama, mistral)"
    )


REQUIRED = (
    *("model_type", "hidden_size", "num_hidden_layers", "intermediate_size"),
    *("num_attention_heads", "vocab_size", "rms_norm_eps"),
)


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key(model: Path, key: str) -> None:
    edit(model / "config.json", **{key: None})
    assert why(model) == f"config: {key} is missing"


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("hidden_size", "32", "a whole number from 1 to 2147483647, not '32'"),
        ("hidden_size", 32.5, "a whole number from 1 to 2147483647, not 32.5"),
        ("num_hidden_layers", 0, "a whole number from 1 to 10000, not 0"),
        ("num_hidden_layers", 10**9, "a whole number from 1 to 10000, not 1000000000"),
        ("num_attention_heads", True, "a whole number from 1 to 2147483647, not True"),
        ("vocab_size", -1, "a whole number from 1 to 2147483647, not -1"),
        ("max_position_embeddings", [512], "a whole number from 1 to 2147483647, not [512]"),
        ("rms_norm_eps", "1e-5", "a positive number, not '1e-5'"),
        ("rms_norm_eps", 0, "a positive number, not 0"),
        ("rope_theta", float("nan"), "a positive number, not nan"),
        ("tie_word_embeddings", "no", "true or false, not 'no'"),
        ("model_type", 7, "text, not 7"),
        ("rope_scaling", "linear", "an object, not 'linear'"),
    ],
)
def test_a_key_of_the_wrong_type(model: Path, key: str, value: Any, expected: str) -> None:
    edit(model / "config.json", **{key: value})
    assert why(model) in {
        f"config: {key} must be {expected}",
        f"config: rope: {key} must be {expected}",
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic' changes its freq"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "cannot be used on a stream"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "supported: default, linear, llama3, yarn"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor is missing"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu' changes the computation"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 changes the computation"),
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "not a multiple"),
        ({"head_dim": 15}, "head_dim 15 must be even"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config of method 'gptq'"),
        ({"eos_token_id": 300}, "eos_token_id 300 is not in the vocabulary"),
    ],
)
def test_what_cannot_be_computed(model: Path, changes: dict[str, Any], expected: str) -> None:
    edit(model / "config.json", **changes)
    line = why(model)
    assert line.startswith("config: ") and expected in line


# --- weights ---


def rewrite(model: Path, changes: dict[str, np.ndarray | None], dtype: str = "float32") -> None:
    """Write the model again with other tensors; None leaves one out."""
    weights = {k: v for k, v in {**WEIGHTS, **changes}.items() if v is not None}
    write_tiny(model, CONFIG, weights, dtype, tokenizer=False)


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_a_missing_tensor_is_named(model: Path, name: str) -> None:
    rewrite(model, {name: None})
    assert why(model) == f"weights: tensor {name!r} is missing"


@pytest.mark.parametrize("name", sorted(WEIGHTS))
def test_a_tensor_of_the_wrong_shape_is_named_with_both_shapes(model: Path, name: str) -> None:
    shape = WEIGHTS[name].shape
    for wrong in ((shape[0] + 2, *shape[1:]), (*shape, 1)):
        rewrite(model, {name: np.ones(wrong, np.float32)})
        assert why(model) == (
            f"weights: tensor {name!r} has shape {wrong}, the config asks for {shape}"
        )


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias", "x\ny"]
)
def test_an_unknown_tensor_is_named(model: Path, name: str) -> None:
    rewrite(model, {name: np.ones((32, 32), np.float32)})
    assert why(model).startswith(f"weights: unknown tensor {name!r} (1 in all)")


@pytest.mark.parametrize("dtype", ["int32", "float64"])
def test_a_tensor_of_another_type_is_named(model: Path, dtype: str) -> None:
    rewrite(model, {}, dtype)
    assert re.search(rf"'[\w.]+' is {dtype[0].upper()}\d\d; expected one of F32, ", refused(model))


def test_old_buffers_and_the_copy_of_a_tied_embedding_are_dropped(
    whole: Path, model: Path, tmp_path: Path
) -> None:
    reply = ("--max-tokens", 24, "--seed", 1)
    noise = np.random.default_rng(5).standard_normal
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": noise(8).astype(np.float32)}
    rewrite(model, {**buffer})
    expected = done("generate", whole, *ASK, *reply).out
    assert done("generate", model, *ASK, *reply).out == expected

    tied = {**CONFIG, "tie_word_embeddings": True}
    own = {name: w for name, w in WEIGHTS.items() if name != "lm_head.weight"}
    copy = {**own, "lm_head.weight": noise(WEIGHTS["lm_head.weight"].shape).astype(np.float32)}
    expected, found = (
        done("generate", write_tiny(tmp_path / name, tied, weights), *ASK, *reply).out
        for name, weights in (("own", own), ("copy", copy))
    )
    assert found == expected != done("generate", whole, *ASK, *reply).out


def test_a_truncated_safetensors_file(model: Path) -> None:
    path = model / "model.safetensors"
    content = path.read_bytes()
    size, header = len(content), 8 + int.from_bytes(content[:8], "little")
    lengths = {*range(10), 100, *range(header - 2, header + 3), *range(header, size, size // 9)}
    for length in sorted(lengths | {size - 1024, size - 4, size - 1}):
        path.write_bytes(content[:length])
        line = refused(model)
        assert line.startswith(f"{path}: damaged or truncated, fetch it again ("), length
    path.write_bytes(content + b"\0")
    assert "damaged" in refused(model)


def test_a_damaged_safetensors_header(whole: Path, model: Path) -> None:
    path = model / "model.safetensors"
    content = path.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    expected = done("generate", whole, *ASK).out
    random = np.random.default_rng(2)
    refusals = 0
    for place in (*range(8), *random.integers(8, header, 40).tolist()):
        damaged = bytearray(content)
        damaged[place] ^= int(random.integers(1, 256))
        path.write_bytes(damaged)
        if run("generate", model, *ASK).code == 1:
            refusals += 1
            refused(model)
        else:  # a byte that says nothing, such as one of "format": "pt"
            assert done("generate", model, *ASK).out == expected
    assert refusals > 30


# --- GGUF ---


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return tmp_path / "tiny.gguf"


def test_a_truncated_gguf_file(gguf: Path) -> None:
    gguf_files.write_tiny(gguf)
    assert done("generate", gguf, *ASK).err == ""
    content = gguf.read_bytes()
    size = len(content)
    for length in (*range(0, 40, 3), *range(40, size, size // 20), size - 33, size - 1):
        gguf.write_bytes(content[:length])
        line = refused(gguf)
        assert "tiny.gguf: " in line, length
        assert re.search("truncated|damaged|too few|not a GGUF file", line), line


@pytest.mark.parametrize(
    ("offset", "content", "expected"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, b"\x09", "GGUF version 9 is not supported"),
        (8, b"\xff" * 8, "claims 18446744073709551615 tensors"),
        (16, b"\xff" * 8, "claims 18446744073709551615 keys"),
    ],
)
def test_a_damaged_gguf_header(gguf: Path, offset: int, content: bytes, expected: str) -> None:
    gguf_files.write_tiny(gguf)
    gguf_files.overwrite(gguf, offset, content)
    assert expected in refused(gguf)


def test_gguf_types_and_architectures_that_are_not_supported(gguf: Path) -> None:
    gguf_files.write_tiny(gguf, kinds={"blk.1.ffn_up.weight": "Q5_0"})
    assert refused(gguf) == (
        "tiny.gguf: the tensor 'blk.1.ffn_up.weight' has the type Q5_0, which is not supported "
        "(supported: F32, F16, Q4_0, Q4_1, Q8_0)"
    )
    gguf_files.write_tiny(gguf, architecture="qwen2")
    assert "the architecture 'qwen2' is not supported (supported: llama" in refused(gguf)
    gguf_files.write_tiny(gguf, tensors={"blk.1.ffn_up.weight": None})
    assert refused(gguf) == "tiny.gguf: the tensor blk.1.ffn_up.weight is missing"


def test_bench_needs_a_folder(gguf: Path) -> None:
    gguf_files.write_tiny(gguf)
    assert one_line("bench", gguf, "--window", 64, "--pairs", 3) == (
        f"{gguf}: mlx-lm reads folders; convert the model to one first"
    )


# --- options ---


STREAMED: list[tuple[list[object], str]] = [
    (["--window", 0], "--window must be at least 1, not 0"),
    (["--window", -5], "--window must be at least 1, not -5"),
    (["--sinks", -1], "--sinks must be from 0 to 511, not -1"),
    (["--sinks", 512], "--sinks must be from 0 to 511, not 512"),
    (
        ["--window", 509],
        "sinks 4 + window 509 = 513 tokens exceed the model's trained context of 512: use a window "
        "of at most 508",
    ),
    (
        ["--window", 500, "--sinks", 20],
        "sinks 20 + window 500 = 520 tokens exceed the model's trained context of 512: use a "
        "window of at most 492",
    ),
    (["--dtype", "int8"], "--dtype must be one of float32, float16, bfloat16, not 'int8'"),
    (["--dtype", ""], "--dtype must be one of float32, float16, bfloat16, not ''"),
]
SAMPLED: list[tuple[list[object], str]] = [
    (["--temp", -1], "--temp must be 0 or more, not -1.0"),
    (["--temp", "nan"], "--temp must be 0 or more, not nan"),
    (["--temp", "inf"], "--temp must be 0 or more, not inf"),
    (["--top-p", 0], "--top-p must be above 0 and at most 1, not 0.0"),
    (["--top-p", 1.01], "--top-p must be above 0 and at most 1, not 1.01"),
    (["--min-p", 2], "--min-p must be from 0 to 1, not 2.0"),
    (["--min-p", -0.1], "--min-p must be from 0 to 1, not -0.1"),
    (["--top-k", -1], "--top-k must be 0 or more, not -1"),
    (["--repetition-penalty", 0], "--repetition-penalty must be above 0, not 0.0"),
    (["--seed", -1], "--seed must be from 0 to 2^64 - 1, not -1"),
    (["--seed", 2**64], "--seed must be from 0 to 2^64 - 1, not 18446744073709551616"),
    (["--max-tokens", 0], "--max-tokens must be at least 1, not 0"),
    (["--max-tokens", -3], "--max-tokens must be at least 1, not -3"),
    (["--stop", ""], "--stop must not be an empty text"),
    (["--stop", "x", "--stop", ""], "--stop must not be an empty text"),
]


@pytest.mark.parametrize(("options", "expected"), [*STREAMED, *SAMPLED])
def test_options_out_of_range(whole: Path, options: list[object], expected: str) -> None:
    assert one_line("generate", whole, "-p", "the", *options) == expected
    assert one_line("chat", whole, *options, stdin="the\n") == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        *STREAMED,
        (["--chunk", 0], "--chunk must be at least 1, not 0"),
        (["--chunk", -1], "--chunk must be at least 1, not -1"),
        (["--max-tokens", 0], "--max-tokens must be at least 2, not 0"),
        (["--max-tokens", 1], "--max-tokens must be at least 2, not 1"),
        (
            ["--dense", "--sinks", 2],
            "--dense attends to everything: leave out --window and --sinks",
        ),
    ],
)
def test_options_of_score_out_of_range(
    whole: Path, text: Path, options: list[object], expected: str
) -> None:
    assert one_line("score", whole, text, *options) == expected
    assert one_line("score", whole, text, "--json", *options) == expected


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--pairs", 2], "--pairs must be at least 3, not 2"),
        (["--chunk", 1], "--chunk must be at least 2, not 1"),
        (["--window", 64, "--window", 0], "--window must be at least 1, not 0"),
        (["--window", 4096], "use a window of at most 508"),
        (["--against", "llama.cpp"], "--against must be one of mlx-lm, not 'llama.cpp'"),
        (["--dtype", "int8"], "--dtype must be one of float32, float16, bfloat16, not 'int8'"),
    ],
)
def test_options_of_bench_out_of_range(
    whole: Path, options: list[object], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # mlx-lm itself is not needed to refuse, and is slow to import.
    monkeypatch.setattr("mlx_stream.evaluate.bench.load_peer", lambda folder, model: None)
    more = () if "--window" in options else ("--window", 64)
    assert expected in one_line("bench", whole, *more, *options)


# --- texts ---


def test_texts_that_cannot_be_scored(whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "given.txt"

    def line() -> str:
        return one_line("score", whole, path)

    assert line() == f"{path}: cannot be read: No such file or directory"
    path.write_bytes(b"")
    assert line() == f"{path}: is empty: give a text of at least one character"
    path.write_bytes("Größe".encode("latin-1"))
    assert line() == (
        f"{path}: is not UTF-8 (byte 2 is 0xf6): convert it, for instance with iconv -t UTF-8"
    )
    path.write_bytes(b"good " * 1000 + b"\xe2\x82")
    assert "(byte 5000 is 0xe2)" in line()
    path.write_bytes(b"a")
    assert re.fullmatch(r"the text has 1 token: at least two are needed to predict one", line())
    path.unlink()
    path.mkdir()
    assert line() == f"{path}: is a folder: after the model, give the text file to score"


def test_score_of_a_model_alone_says_it_wants_a_text(whole: Path) -> None:
    assert one_line("score", whole) == (
        f"{whole}: is a folder: after the model, give the text file to score"
    )


@pytest.mark.parametrize("verb", ["generate", "score"])
def test_a_standard_input_that_is_no_text(whole: Path, verb: str) -> None:
    command = ("score", whole, "-") if verb == "score" else ("generate", whole, "-p", "-")
    assert one_line(*command, stdin=b"") == (
        "standard input: is empty: give a text of at least one character"
    )
    assert one_line(*command, stdin=b"the\n\xffman").startswith(
        "standard input: is not UTF-8 (byte 4 is 0xff): convert it"
    )


def test_a_prompt_that_is_no_text(whole: Path) -> None:
    assert one_line("generate", whole, "-p", "") == (
        "the prompt is empty: give at least one character"
    )
    # What an argument that is not UTF-8 becomes.
    assert "character 3 is half of a surrogate pair" in one_line(
        "generate", whole, "-p", "abc\udcff"
    )


def test_a_line_of_chat_that_is_not_utf8(whole: Path) -> None:
    options = ("chat", whole, *GREEDY, "--max-tokens", 4)
    assert one_line(*options, stdin=b"\xe9t\xe9\nHello\n").startswith(
        "standard input, line 1: is not UTF-8 (byte 0 is 0xe9): convert it"
    )
    first = done(*options, stdin=b"Hello\n").out
    line = one_line(*options, stdin=b"Hello\n\nso \xff\nand\n", out=first)
    assert line.startswith("standard input, line 3: is not UTF-8 (byte 3 is 0xff): convert it")


# --- chat templates ---

TEMPLATES: list[tuple[str | None, str]] = [
    (None, "has no chat template: it is not a chat model; use generate"),
    ("{{ messages | length }}", "chat template: it rewrites earlier turns"),
    ("{{ messages[-1].content }}", "chat template: it rewrites earlier turns"),
    ("{% for m in messages %}{{ m.content }", "chat template: it cannot be read: "),
    ("{{ raise_exception('no\nthanks') }}", "chat template: it failed: no thanks"),
    ("{{ ''.__class__ }}", "chat template: it failed: "),
]


@pytest.mark.parametrize(("template", "expected"), TEMPLATES)
def test_templates_that_no_stream_can_use(model: Path, template: str | None, expected: str) -> None:
    edit(model / "tokenizer_config.json", chat_template=template)
    line = one_line("chat", model, stdin="Hello\n")
    assert expected in line
    if template is None:
        assert line.startswith(str(model))
    assert done("generate", model, *ASK).err == ""


def test_a_template_without_a_system_role(model: Path) -> None:
    path = model / "tokenizer_config.json"
    template = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('only users') }}{% endif %}"
    edit(path, chat_template=refusing + template)
    line = one_line("chat", model, "--system", "Be brief.", stdin="Hello\n")
    assert "it has no system role; leave the system prompt out" in line and "only users" in line
    for more in ((), ("--system", "")):
        assert done("chat", model, *more, *GREEDY, "--max-tokens", 3, stdin="Hello\n").err == ""


# --- memory ---

REFUSAL = (
    r"([\d,.]+) MB of weights and ([\d,.]+) MB of keys and values exceed the ([\d,.]+) MB this "
    r"device recommends: use a smaller window, a quantized model, or --force"
)


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda amount: monkeypatch.setattr(backend, "memory_budget", lambda: amount)


def test_weights_beyond_memory_are_refused_unless_forced(
    whole: Path, text: Path, budget: Callable[[int], None]
) -> None:
    budget(1000)
    for command in (
        ("generate", whole, *ASK),
        ("chat", whole, *GREEDY, "--max-tokens", 4),
        ("score", whole, text),
        ("bench", whole),
    ):
        assert re.fullmatch(REFUSAL, one_line(*command, stdin="Hello\n"))
        if command[0] != "bench":
            assert done(*command, "--force", stdin="Hello\n").out


def test_a_ring_beyond_memory_is_refused_with_the_numbers(
    model: Path, text: Path, budget: Callable[[int], None]
) -> None:
    edit(model / "config.json", max_position_embeddings=10_000_000)
    budget(2**29)
    wide = ("--window", 9_999_996)
    for command in (
        ("generate", model, *ASK, *wide),
        ("chat", model, *wide),
        ("score", model, text, *wide),
    ):
        found = re.fullmatch(REFUSAL, one_line(*command, stdin="Hello\n"))
        # One layer of one head: 2 of 16 float32 a token.
        assert found is not None and found.groups() == ("0.1", "1,280.0", "536.9")
    assert done("generate", model, *ASK, "--window", 1000).err == ""


# --- the real program ---


@pytest.mark.parametrize("wrong", [["generate", "./nowhere", "-p", "x"], ["chat", "org/name"]])
def test_the_program_says_the_same_one_line(wrong: list[str]) -> None:
    found = subprocess.run(program(*wrong), capture_output=True, text=True, timeout=DEADLINE)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr == f"mlx_stream: {one_line(*wrong)}\n"
