"""A model known by its config and its files' headers alone; reads no weights, and makes nothing.

What is on this machine is read here. Of a model on the Hub, config.json is fetched, and of each
safetensors file the first bytes, by range requests.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_stream.checkpoint.folder import (
    DTYPES,
    LARGEST_DIMENSION,
    check_shard,
    exists_as_file,
    read_json,
    shard_names,
)
from mlx_stream.checkpoint.gguf import read_gguf
from mlx_stream.checkpoint.gguf_header import read_header
from mlx_stream.config import ModelConfig, read_config
from mlx_stream.errors import CheckpointError, ConfigError, SourceError, WeightsError
from mlx_stream.hub.explain import explain_hub_error
from mlx_stream.hub.repository import HUB_ID, MAIN, PATIENCE, ask_hub, find_in_cache
from mlx_stream.hub.resolve import local_path
from mlx_stream.hub.starter import STARTER, STARTER_REPO, is_complete, starter_folder
from mlx_stream.models.layout import layout_of
from mlx_stream.plan.planner import ITEMSIZES, ModelSummary
from mlx_stream.program.notices import Notify

# What files declare of each tensor: dtype by its safetensors name, and shape.
Declared = Mapping[str, tuple[str, list[int]]]
FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
USUAL_FLOATS = "bfloat16"


def summarize_model(source: str, notify: Notify) -> ModelSummary:
    """Return what a model's config and headers say of it.

    Args:
        source: as of `resolve`, or the path of a config.json, whatever its name.
        notify: told in one line what is being asked of the network.

    Raises:
        SourceError: there is no such model, or it cannot be reached.
        CheckpointError: its config or headers are damaged, or not those of a model we run.
    """
    if Path(source).suffix.lower() == ".json" and exists_as_file(Path(source)):
        return named_errors(source, lambda: of_config(Path(source).stem, read_json(Path(source))))
    path = local_path(source) if source != STARTER else None
    repo = STARTER_REPO if source == STARTER else source
    if path is None and HUB_ID.fullmatch(repo):
        path = find_in_cache(repo)
    if path is None and source == STARTER and is_complete(starter_folder()):
        path = starter_folder()
    if path is not None:
        of_path = of_folder if path.is_dir() else of_gguf
        return named_errors(source, lambda: of_path(source, path))
    if not HUB_ID.fullmatch(repo):
        raise SourceError(
            f"{source!r} is not a model; expected a folder, a .gguf file, a config.json, a Hub id "
            "org/name, or starter"
        )
    return named_errors(source, lambda: of_hub(source, repo, notify))


def named_errors(source: str, read: Callable[[], ModelSummary]) -> ModelSummary:
    """Return what `read` does; an error about the config or weights says whose they are."""
    try:
        return read()
    except (ConfigError, WeightsError) as error:
        if source in str(error):
            raise
        raise type(error)(f"{source}: {error}") from error


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


def of_gguf(source: str, path: Path) -> ModelSummary:
    checkpoint = read_gguf(path)  # its tensors stay in the file
    table = read_header(path).tensors["token_embd.weight"]
    return ModelSummary(
        source,
        read_config(checkpoint.config),
        "float32" if table.kind == "F32" else "float16",
        frozenset(name.removesuffix(".scales") for name in scales(checkpoint.tensors)),
        path.stat().st_size,
    )


def of_hub(source: str, repo: str, notify: Notify) -> ModelSummary:
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import NotASafetensorsRepoError, SafetensorsParsingError

    try:
        # One commit for all that is read, should the model change meanwhile.
        commit = ask_hub(repo, MAIN, PATIENCE).commit
        notify(f"reading the headers of {repo} on the Hugging Face Hub")
        raw = read_json(Path(hf_hub_download(repo, "config.json", revision=commit)))
        files = HfApi().get_safetensors_metadata(repo, revision=commit).files_metadata
        declared = {
            name: (str(tensor.dtype), list(tensor.shape))
            for file in files.values()
            for name, tensor in file.tensors.items()
        }
    except (CheckpointError, SourceError):
        raise
    except NotASafetensorsRepoError as error:
        raise SourceError(f"{repo}: has no weights in the safetensors format") from error
    # The library takes what a header says of a tensor as it comes.
    except (SafetensorsParsingError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{repo}: the header of one of its files is damaged ({type(error).__name__})"
        ) from error
    # The HTTP client's own exceptions come through, and its name changes between versions.
    except Exception as error:
        raise SourceError(explain_hub_error(repo, MAIN, error)) from error
    return of_headers(source, raw, declared)


def of_config(source: str, raw: dict[str, Any]) -> ModelSummary:
    """Describe a model by its config alone: all it says is quantized is taken to be."""
    config = read_config(raw)
    dtype = str(raw.get("torch_dtype") or raw.get("dtype"))
    paths = [part.path for part in layout_of(config).matrices if config.quantized(part.path)]
    return ModelSummary(
        source, config, dtype if dtype in ITEMSIZES else USUAL_FLOATS, frozenset(paths)
    )


def of_headers(source: str, raw: dict[str, Any], declared: Declared) -> ModelSummary:
    config = read_config(raw)
    quantized = frozenset(name.removesuffix(".scales") for name in scales(declared))
    check_headers(config, declared, quantized)
    table = "model.embed_tokens"
    dtype = declared[f"{table}.{'scales' if table in quantized else 'weight'}"][0]
    stored = sum(math.prod(shape) * DTYPES[kind].size for kind, shape in declared.values())
    return ModelSummary(source, config, FLOATS.get(dtype, USUAL_FLOATS), quantized, stored)


def check_headers(config: ModelConfig, declared: Declared, quantized: frozenset[str]) -> None:
    """Refuse headers that are not those of the model the config describes."""
    for name, (dtype, shape) in declared.items():
        if dtype not in DTYPES:
            raise WeightsError(f"weights: {name!r} is {dtype}; expected one of {', '.join(DTYPES)}")
        if not all(isinstance(size, int) and 1 <= size <= LARGEST_DIMENSION for size in shape):
            raise WeightsError(f"weights: {name!r} has the impossible shape {shape!r:.80}")
    for part in layout_of(config).matrices:
        how = config.quantized(part.path) if part.path in quantized else None
        columns = part.inputs if how is None else part.inputs * how.bits // 32
        name = f"{part.path}.weight"
        if name not in declared:
            raise WeightsError(f"weights: tensor {name!r} is missing")
        if declared[name][1] != [part.outputs, columns]:
            raise WeightsError(
                f"weights: tensor {name!r} has shape {tuple(declared[name][1])}, the config asks "
                f"for {(part.outputs, columns)}"
            )


def scales(names: Mapping[str, Any]) -> Iterator[str]:
    return (name for name in names if name.endswith(".scales"))
