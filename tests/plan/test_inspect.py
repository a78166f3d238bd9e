"""Summaries from config and headers: folders, GGUF files, a config, and a Hub on loopback."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_stream.cache.steps.verify import SPARE
from mlx_stream.checkpoint import Checkpoint
from mlx_stream.checkpoint.gguf_header import read_header
from mlx_stream.checkpoint.write import write_folder
from mlx_stream.errors import CheckpointError, ConfigError, SourceError, WeightsError
from mlx_stream.load import load
from mlx_stream.plan import devices
from mlx_stream.plan.inspect import summarize_model
from mlx_stream.plan.planner import PlanRequest, make_plan
from mlx_stream.program.notices import discard
from tests.fakes import gguf_files
from tests.fakes.gguf_families import WIDE, write_family
from tests.fakes.loopback import CONFIG, REPO, WEIGHTS, Hub, never, silent
from tests.fakes.shell import edit
from tests.fakes.tiny import tiny_config, tiny_tokenizer, tiny_weights, write_tiny
from tests.models.test_weights import FOUR_BITS, MIXED, QUANTIZABLE, quantize

pytestmark = pytest.mark.usefixtures("home")


def planned(source: Path, **asked) -> int:
    """Return how many bytes the weights take in a plan for this machine, stored as in the files."""
    outline = summarize_model(str(source), never)
    return make_plan(outline, devices.here(), PlanRequest(window=100, **asked)).weights


def quantized_folder(folder: Path, recipe: dict) -> Path:
    raw, tensors, _ = quantize(tiny_config(**QUANTIZABLE), recipe)
    assert write_folder(Checkpoint(raw, tensors, tiny_tokenizer().to_str()), folder)
    return folder


# --- on this machine ---


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "dequantized"])
@pytest.mark.parametrize("recipe", [FOUR_BITS, MIXED], ids=["4 bits", "mixed"])
def test_a_plan_says_what_loading_takes(tmp_path, recipe, keep):
    folder = quantized_folder(tmp_path / "model", recipe)
    model = load(folder, keep_quantized=keep)
    chosen = make_plan(
        summarize_model(str(folder), never), devices.here(), PlanRequest(keep=keep, window=100)
    )
    assert (chosen.weights, chosen.dtype) == (model.weight_bytes, "float32")
    assert chosen.ring == model.new_cache(window=100, spare=SPARE).nbytes
    assert chosen.recipe.bits == (None if keep else 16)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_folder_says_its_dtype_and_its_size(tmp_path, dtype):
    raw = tiny_config()
    folder = write_tiny(tmp_path / "model", raw, tiny_weights(raw), dtype=dtype, shards=3)
    outline = summarize_model(str(folder), never)
    sizes = sum(weight.size for weight in tiny_weights(raw).values())
    assert outline.dtype == dtype and not outline.quantized
    assert outline.stored == sizes * (4 if dtype == "float32" else 2)


def test_nothing_is_read_but_headers(tmp_path):
    raw = tiny_config(vocab_size=300)
    folder = write_tiny(tmp_path / "model", raw, tiny_weights(raw))
    shard = folder / "model.safetensors"
    content = bytearray(shard.read_bytes())
    length = 8 + int.from_bytes(content[:8], "little")
    content[length:] = b"\xff" * (len(content) - length)  # NaN, everywhere
    shard.write_bytes(content)
    before = mx.get_active_memory()
    assert summarize_model(str(folder), never).stored == len(content) - length
    assert mx.get_active_memory() == before


def test_a_gguf_file_says_what_loading_takes(tmp_path):
    path = tmp_path / "model.gguf"
    gguf_files.write_tiny(path, "Q4_0", kinds={"blk.0.attn_v.weight": "Q8_0"})
    outline = summarize_model(str(path), never)
    tensors = read_header(path).tensors.values()
    assert outline.dtype == "float16" and outline.stored == sum(t.size for t in tensors)
    model = load(path, dtype="float16", keep_quantized=True)
    assert planned(path, dtype="float16", keep=True) == model.weight_bytes
    plain = tmp_path / "plain.gguf"
    gguf_files.write_tiny(plain, "F32")
    assert summarize_model(str(plain), never).dtype == "float32"


def test_a_gguf_file_with_other_types_says_what_loading_takes(tmp_path):
    path, raw = tmp_path / "model.gguf", tiny_config(**WIDE, tie_word_embeddings=True)
    write_family(path, raw, tiny_weights(raw), "Q4_K", {"model.embed_tokens.weight": "Q6_K"})
    notices: list[str] = []
    assert summarize_model(str(path), notices.append).dtype == "float16"
    line = "1 matrix of a type MLX does not support (Q6_K) becomes floats"
    assert notices == [f"{line} when loaded"]
    del notices[:]
    model = load(path, dtype="float16", keep_quantized=True, notify=notices.append)
    summary = summarize_model(str(path), discard)
    plan = make_plan(summary, devices.here(), PlanRequest("float16", keep=True))
    assert plan.weights == model.weight_bytes
    assert notices == [
        f"{path}: 1 matrix of a type MLX does not support (Q6_K) becomes floats: the weights "
        f"take {model.weight_bytes / 1e6:,.1f} MB"
    ]


def test_a_config_alone_says_as_much_as_its_folder(tmp_path):
    folder = quantized_folder(tmp_path / "model", MIXED)
    whole = planned(folder, keep=True)
    alone = tmp_path / "other.json"
    alone.write_text((folder / "config.json").read_text())
    assert planned(alone, keep=True) == whole
    assert summarize_model(str(alone), never).stored is None
    assert summarize_model(str(alone), never).name == "other"
    (folder / "model.safetensors").unlink()
    assert planned(folder, keep=True) == whole


def test_a_config_alone_says_its_dtype(tmp_path):
    path = tmp_path / "config.json"
    for raw, dtype in (
        ({"torch_dtype": "float16"}, "float16"),
        ({"dtype": "float32"}, "float32"),
        ({"torch_dtype": "float8"}, "bfloat16"),
        ({"torch_dtype": ["float16"]}, "bfloat16"),
        ({}, "bfloat16"),
    ):
        path.write_text(json.dumps(tiny_config() | raw))
        assert summarize_model(str(path), never).dtype == dtype


# --- refused ---


@pytest.mark.parametrize(
    ("changes", "kind", "why"),
    [
        ({"intermediate_size": 128}, WeightsError, r"gate_proj.weight' has.*\(96, .*\(128, 64\)"),
        ({"num_hidden_layers": 3}, WeightsError, r"/model: .*layers\.2.*q_proj.weight' is missing"),
        ({"model_type": "gemma"}, ConfigError, r"/model: .*'gemma' is not supported"),
        ({}, CheckpointError, "damaged or truncated"),
    ],
)
def test_headers_that_are_not_the_configs_are_refused(tmp_path, changes, kind, why):
    raw = tiny_config()
    folder = write_tiny(tmp_path / "model", raw, tiny_weights(raw))
    edit(folder / "config.json", **changes)
    if not changes:
        (folder / "model.safetensors").write_bytes(b"\x10" * 40)
    with pytest.raises(kind, match=why):
        summarize_model(str(folder), never)


@pytest.mark.parametrize("source", ["none", "a/b/c", "none.json", ""])
def test_a_refused_source_names_the_accepted_forms(source):
    with pytest.raises(SourceError, match=r"expected a folder, a \.gguf file, a config\.json"):
        summarize_model(source, never)


# --- the Hub ---


def test_of_a_model_on_the_hub_only_headers_are_fetched(served: Hub, home: Path, tmp_path):
    told = []
    outline = summarize_model(REPO, told.append)
    assert outline.config.num_hidden_layers == 1 and outline.dtype == "float32"
    assert outline.stored == sum(weight.nbytes for weight in WEIGHTS.values())
    assert told == [f"reading the headers of {REPO} on the Hugging Face Hub"]
    kept = (tmp_path / "HF_HOME" / "hub").rglob("snapshots/*/*")
    assert [path.name for path in kept] == ["config.json"]
    assert max(path.stat().st_size for path in tmp_path.rglob("blobs/*")) < 2_000
    assert "tokenizer.json" not in served.fetched()
    served.repos["org/shards"] = write_tiny(tmp_path / "shards", CONFIG, WEIGHTS, shards=3)
    assert summarize_model("org/shards", silent).stored == outline.stored


def test_a_cached_model_is_read_without_the_network(served: Hub):
    from mlx_stream.hub.resolve import resolve

    resolve(REPO, silent)
    served.asked.clear()
    assert summarize_model(REPO, never).stored
    assert served.asked == []


def test_a_model_the_hub_has_not_or_has_no_safetensors_of_is_one_line(served: Hub):
    with pytest.raises(SourceError, match=r"no such folder, and no such model at"):
        summarize_model("org/none", silent)
    (served.repos[REPO] / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"has no weights in the safetensors format"):
        summarize_model(REPO, silent)


def odd(dtype: str = "F32", shape: str = "[4]") -> str:
    return f'{{"a": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [0, 4]}}}}'


DAMAGED = "the header of one of its files is"
HEADERS = [("\0", DAMAGED), ("[]", DAMAGED), ('{"a": 1}', DAMAGED), (odd(shape="7"), DAMAGED)]
HEADERS += [(odd("F64"), "'a' is F64"), (odd(shape="[-4]"), "impossible shape|damaged")]


@pytest.mark.parametrize(("header", "why"), [*HEADERS, (odd(shape='["4"]'), "shape|damaged")])
def test_an_unsupported_header_on_the_hub_is_one_line(served: Hub, header: str, why: str):
    content = len(header).to_bytes(8, "little") + header.encode()
    (served.repos[REPO] / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"^{REPO}: .*({why})"):
        summarize_model(REPO, silent)


def test_the_starter_is_not_fetched_for_a_plan():
    with pytest.raises(SourceError, match="not in the cache"):
        summarize_model("starter", silent)
