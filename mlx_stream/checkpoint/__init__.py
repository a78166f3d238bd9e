"""A model on disk; handles file formats, not modules.

Every source is read into one `Checkpoint`, with the names and layout of a Hugging Face folder and
mlx-lm's quantization.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class Checkpoint:
    """One model as found on disk.

    Attributes:
        config: the content of `config.json`. If tensors are quantized, it has mlx-lm's
            `quantization` entry: `{"group_size": g, "bits": b, "mode": m}`, and overrides by module
            path.
        tensors: lazy arrays by Hugging Face name. A quantized weight `X.weight` (uint32, packed
            along its input dimension) comes with `X.scales` and, in affine mode, `X.biases`.
        tokenizer: the text of `tokenizer.json`.
        tokenizer_config: the content of `tokenizer_config.json`, with the `chat_template`.
        generation_config: the content of `generation_config.json`, or an empty dict.
        images: whether the model also reads images; its image components are left out.
        dtype: the dtype of its floats, if scales may be wider; None if it can be inferred from the
            tensors.
        dequantized: by module path, the original type of each matrix whose type MLX does not
            support; its tensor holds floats.
    """

    config: dict[str, Any]
    tensors: Mapping[str, mx.array]
    tokenizer: str
    tokenizer_config: dict[str, Any] = field(default_factory=dict)
    generation_config: dict[str, Any] = field(default_factory=dict)
    images: bool = False
    dtype: str | None = None
    dequantized: Mapping[str, str] = field(default_factory=dict)
