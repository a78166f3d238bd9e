"""Summarizes a model from its config and its files' headers; reads no weights, allocates nothing.

For a model on the Hub, config.json is fetched, and range requests fetch the first bytes of each
safetensors file.
"""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mlx_stream.checkpoint.gguf import read_gguf
from mlx_stream.checkpoint.gguf_header import read_headers
from mlx_stream.checkpoint.json_files import exists_as_file, read_json
from mlx_stream.checkpoint.shards import (
    DTYPES,
    Declared,
    check_declared,
    check_shard,
    shard_names,
)
from mlx_stream.checkpoint.text_model import text_config, text_tensors
from mlx_stream.config import ModelConfig, read_config
from mlx_stream.errors import CheckpointError, SourceError, WeightsError
from mlx_stream.hub.explain import explaining_hub_errors
from mlx_stream.hub.hub_cache import MAIN, find_in_cache
from mlx_stream.hub.repository import PATIENCE, ask_hub
from mlx_stream.hub.resolve import hub_id, local_path, not_a_model
from mlx_stream.hub.starter import STARTER, STARTER_REPO, is_complete, starter_folder
from mlx_stream.load import explain_dequantized, naming
from mlx_stream.models.layout import layout_of
from mlx_stream.plan.planner import ITEMSIZES, ModelSummary
from mlx_stream.program.notices import Notify

FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
USUAL_FLOATS = "bfloat16"


def summarize_model(source: str, notify: Notify) -> ModelSummary:
    """Summarize a model from its config and headers.

    Args:
        source: any source that `resolve` accepts, or the path of a config.json file with any name.
        notify: called with one line before the network is used.

    Raises:
        SourceError: the model does not exist or cannot be reached.
        CheckpointError: the model's config or headers are damaged or not supported.
    """
    path = Path(source)
    if path.suffix.lower() == ".json" and exists_as_file(path):
        with naming(source, path):
            return of_config(path.stem, read_json(path))
    found, repo = local_model(source), STARTER_REPO if source == STARTER else hub_id(source)
    if found is not None:
        with naming(source, found):
            return of_folder(source, found) if found.is_dir() else of_gguf(source, found, notify)
    if repo is None:
        raise not_a_model(source, "a folder, a .gguf file, a config.json")
    with naming(source, Path(repo)):
        return of_hub(source, repo, notify)


def local_model(source: str) -> Path | None:
    """Return the folder or `.gguf` file of a model on this machine, or None if it is not here."""
    repo = STARTER_REPO if source == STARTER else hub_id(source)
    path = local_path(source) if source != STARTER else None
    if path is None and repo is not None:
        path = find_in_cache(repo)
    if path is None and source == STARTER and is_complete(starter_folder()):
        path = starter_folder()
    return path


def of_folder(source: str, path: Path) -> ModelSummary:
    raw = read_json(path / "config.json")
    try:
        shards = [path / name for name in shard_names(path)]
    except CheckpointError:
        shards = []
    if not shards or not all(exists_as_file(shard) for shard in shards):
        return of_config(source, raw)
    return of_headers(
        source, raw, {k: v for shard in shards for k, v in check_shard(shard).items()}
    )


def of_gguf(source: str, path: Path, notify: Notify) -> ModelSummary:
    checkpoint = read_gguf(path)  # its tensors stay in the file
    config, dtype = read_config(checkpoint.config), checkpoint.config["torch_dtype"]
    quantized = quantized_paths(checkpoint.tensors)
    if checkpoint.dequantized:
        notify(f"{explain_dequantized(checkpoint)} floats when loaded")
    stored = sum(tensor.size for tensor in read_headers(path).tensors.values())
    return ModelSummary(source, config, dtype, quantized, stored)


def of_hub(source: str, repo: str, notify: Notify) -> ModelSummary:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    with explaining_hub_errors(repo):
        try:
            # Read everything from one commit, in case the model changes in the meantime.
            commit = ask_hub(repo, MAIN, PATIENCE).commit
            notify(f"reading the headers of {repo} on the Hugging Face Hub")
            raw = read_json(Path(hf_hub_download(repo, "config.json", revision=commit)))
            files = HfApi().get_safetensors_metadata(repo, revision=commit).files_metadata
            declared = {
                name: (str(tensor.dtype), list(tensor.shape))
                for file in files.values()
                for name, tensor in file.tensors.items()
            }
        except NotASafetensorsRepoError as error:
            raise SourceError(f"{repo}: has no weights in the safetensors format") from error
        # The library does not check what a header says about a tensor.
        except (SafetensorsParsingError, AttributeError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{repo}: the header of one of its files is damaged ({type(error).__name__})"
            ) from error
    check_declared(declared, "weights")
    return of_headers(source, raw, declared)


def of_config(source: str, raw: dict[str, Any]) -> ModelSummary:
    """Summarize a model from its config alone; matrices are quantized where the config says so."""
    raw = text_config(raw)
    config, dtype = read_config(raw), str(raw.get("torch_dtype") or raw.get("dtype"))
    paths = [part.path for part in layout_of(config).matrices if config.quantized(part.path)]
    return ModelSummary(
        source, config, dtype if dtype in ITEMSIZES else USUAL_FLOATS, frozenset(paths)
    )


def of_headers(source: str, raw: dict[str, Any], declared: Declared) -> ModelSummary:
    if "text_config" in raw:
        raw, declared = text_config(raw), text_tensors(declared)
    config, quantized = read_config(raw), quantized_paths(declared)
    refuse_other_shapes(config, declared, quantized)
    table = "model.embed_tokens"
    dtype = declared[f"{table}.{'scales' if table in quantized else 'weight'}"][0]
    stored = sum(math.prod(shape) * DTYPES[kind].size for kind, shape in declared.values())
    return ModelSummary(source, config, FLOATS.get(dtype, USUAL_FLOATS), quantized, stored)


def refuse_other_shapes(config: ModelConfig, declared: Declared, quantized: frozenset[str]) -> None:
    for part in layout_of(config).matrices:
        how = config.quantized(part.path) if part.path in quantized else None
        columns = part.inputs if how is None else part.inputs * how.bits // 32
        name = f"{part.path}.weight"
        if name not in declared:
            raise WeightsError(f"weights: tensor {name!r} is missing")
        if declared[name][1] != [part.outputs, columns]:
            raise WeightsError(
                f"weights: tensor {name!r} has shape {tuple(declared[name][1])}, but the config "
                f"asks for {(part.outputs, columns)}"
            )


def quantized_paths(names: Iterable[str]) -> frozenset[str]:
    return frozenset(name.removesuffix(".scales") for name in names if name.endswith(".scales"))
