"""Load a Q4_K_M GGUF file of Llama-3.2-1B's shape, and compare its memory use with `plan`.

    python -m tests.measure.gguf_memory

The file takes 0.8 GB in a temporary folder; its blocks are random. It is loaded as on Metal, in
float16 with quantized weights kept. Prints one line of JSON. Exits with 1 if loading takes more
memory than the weights and one tensor, or if the plan is off by more than 5 %. Linux only; not
collected by pytest.
"""

import json
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import gguf
import mlx.core as mx
import numpy as np

from mlx_stream.config import read_config
from mlx_stream.load import load
from mlx_stream.models.layers import Projection
from mlx_stream.models.layout import layout_of, part_bytes
from mlx_stream.plan import devices
from mlx_stream.plan.inspect import summarize_model
from mlx_stream.plan.planner import PlanRequest, make_plan
from tests.fakes.gguf_families import encode, factor_tensors, write_keys
from tests.fuzz.driver import memory, reset_peak
from tests.long.big_checkpoint import SHAPE

ALLOWED = 0.05


def kind_of(path: str, layers: int) -> str:
    """Return the type that llama.cpp's Q4_K_M gives a matrix."""
    if path == "model.embed_tokens":
        return "Q6_K"
    layer, eighth = int(path.split(".")[2]), layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return "Q6_K" if more and path.endswith(("v_proj", "down_proj")) else "Q4_K"


def write_q4_k_m(path: Path) -> None:
    parts = list(layout_of(read_config(SHAPE)).parts)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SHAPE["num_hidden_layers"])
    values = np.random.default_rng(0).standard_normal((64, 2048)).astype(np.float32) / 45
    samples = {kind: encode(values, kind).reshape(-1) for kind in ("Q4_K", "Q6_K")}
    factors = factor_tensors(SHAPE)["rope_freqs.weight"]
    with closing(gguf.GGUFWriter(path, "llama")) as writer:
        write_keys(writer, SHAPE | {"vocab_size": 300})
        arrays = []
        for part in parts:
            name = names.get_name(f"{part.path}.weight", try_suffixes=(".weight",)) or ""
            if isinstance(part, Projection):
                kind = kind_of(part.path, SHAPE["num_hidden_layers"])
                number = gguf.GGMLQuantizationType[kind]
                elements, size = gguf.GGML_QUANT_SIZES[number]
                shape = (part.outputs, part.inputs // elements * size)
                array = np.resize(samples[kind], shape)
                writer.add_tensor_info(name, shape, array.dtype, array.nbytes, number)
            else:
                array = np.ones(part.size, np.float32)
                writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
            arrays.append(array)
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for array in [*arrays, factors]:
            writer.write_tensor_data(array)


def measure(path: Path) -> dict[str, float]:
    asked = PlanRequest("float16", keep=True, window=1_020)
    plan = make_plan(summarize_model(str(path), print), devices.here(), asked)
    load(path, "float16", keep_quantized=True)  # what a first load leaves behind is not counted
    mx.clear_cache()
    mx.reset_peak_memory()
    before, active = reset_peak(), mx.get_active_memory()
    model = load(path, "float16", keep_quantized=True)
    resident, own = memory("VmHWM") - before, mx.get_peak_memory() - active
    table = next(layout_of(model.config).matrices)
    largest = part_bytes(table, None, 2)
    return {
        "file": path.stat().st_size,
        "weights": model.weight_bytes,
        "planned_weights": plan.weights,
        "largest_tensor": largest,
        "bound": model.weight_bytes + largest,
        "measured_resident": resident,
        "measured_mlx": own,
        "planned_loading": plan.loading,
    }


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "model.gguf"
        write_q4_k_m(path)
        found = measure(path)
    off = found["planned_loading"] / found["measured_mlx"] - 1
    print(json.dumps(found | {"off_by": round(off, 4)}))
    sys.exit(found["measured_resident"] > found["bound"] or abs(off) > ALLOWED)


if __name__ == "__main__":
    main()
