"""Whatever is wrong with a model's files: one line that says what, status 1."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.fakes import gguf_files
from tests.fakes.configs import REQUIRED
from tests.fakes.refusals import ASK, one_line, refused, why
from tests.fakes.shell import GREEDY, SMALL, done, edit, run
from tests.fakes.tiny import tiny_config, tiny_weights, write_tiny

pytestmark = pytest.mark.usefixtures("elsewhere")

CONFIG = tiny_config(**SMALL)
WEIGHTS = tiny_weights(CONFIG)


# --- the files of a folder ---


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


# --- chat templates ---

TEMPLATES: list[tuple[str | None, str]] = [
    (None, "has no chat template: it is not a chat model; use generate"),
    ("{{ messages | length }}", "chat template: it does not write a reply's content"),
    ("{{ messages[-1].content }}", "chat template: it does not write a reply's content"),
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


def test_a_template_without_a_system_role_takes_the_prompt_as_an_opening(model: Path) -> None:
    path = model / "tokenizer_config.json"
    template = json.loads(path.read_text(encoding="utf-8"))["chat_template"]
    refusing = "{% if messages[0].role == 'system' %}{{ raise_exception('only users') }}{% endif %}"
    edit(path, chat_template=refusing + template)
    for more in ((), ("--system", ""), ("--system", "Be brief.")):
        assert done("chat", model, *more, *GREEDY, "--max-tokens", 3, stdin="Hello\n").err == ""
