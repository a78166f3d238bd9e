"""The blocks that all families share. Independent of cache logic, files and text.

A layer maps (T, hidden size) to the same shape. Attention passes unrotated queries, keys and values
to a cache's step, which owns order, positions and masks. Q, K and V are computed as one product,
and gate and up as another, if their weights can be joined. Names match those in checkpoints.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from mlx_stream.cache import Step
from mlx_stream.config import ModelConfig
from mlx_stream.rope import query_factors


@dataclass(frozen=True)
class Projection:
    """A linear map and its name in a checkpoint: `path.weight` is (outputs, inputs)."""

    path: str
    outputs: int
    inputs: int
    bias: bool = False


class Weights(Protocol):
    """The source of a model's modules, looked up by the names of their tensors."""

    def linear(self, *parts: Projection) -> Any:
        """Return a module that maps (T, inputs) to the parts' outputs, concatenated: (T, outputs).

        Its method `add_to(residual, x)` returns `residual` plus the mapped `x`, in a single
        operation where possible.
        """
        ...

    def embedding(
        self, path: str, count: int, size: int
    ) -> nn.Embedding | nn.QuantizedEmbedding: ...

    def norm(self, path: str, size: int, eps: float) -> nn.Module: ...


@dataclass(frozen=True)
class LayerSpec:
    """How a family's layers differ from those of a plain Llama.

    Attributes:
        qkv_bias, o_bias, mlp_bias: which projections add a bias.
        head_norms: whether each query and key head is normalized before it is rotated.
        fused: whether a checkpoint stores q, k and v as one matrix, and gate and up as another.
    """

    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_norms: bool = False
    fused: bool = False


def joined(
    path: str, parts: dict[str, int], fused: str | None, inputs: int, bias: bool
) -> list[Projection]:
    """Return the matrices whose outputs are concatenated: one per part, or one named `fused`.

    Args:
        parts: the number of outputs of each matrix, by name.
    """
    if fused:
        parts = {fused: sum(parts.values())}
    return [Projection(f"{path}.{name}", outputs, inputs, bias) for name, outputs in parts.items()]


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights, path: str, spec: LayerSpec):
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        query_heads, key_heads = config.num_attention_heads, config.num_key_value_heads
        heads, kv_heads = query_heads * self.head_dim, key_heads * self.head_dim
        parts = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}
        fused = "qkv_proj" if spec.fused else None
        self.qkv_proj = weights.linear(*joined(path, parts, fused, hidden, spec.qkv_bias))
        self.o_proj = weights.linear(Projection(f"{path}.o_proj", hidden, heads, spec.o_bias))
        self.head_norms = spec.head_norms
        factors = query_factors(config.rope, self.head_dim)
        self._factors = None
        if factors is not None:
            self._factors = mx.array([*factors.tolist() * query_heads, *[1.0] * (2 * kv_heads)])
        if self.head_norms:
            self.query_end, self.key_end = query_heads, query_heads + key_heads
            self.q_norm = weights.norm(f"{path}.q_norm", self.head_dim, config.rms_norm_eps)
            self.k_norm = weights.norm(f"{path}.k_norm", self.head_dim, config.rms_norm_eps)

    def __call__(
        self,
        residual: mx.array,
        x: mx.array,
        step: Step,
        layer: int,
        asked: mx.array | None = None,
    ) -> mx.array:
        rows, heads = x.shape[0], self.qkv_proj(x)
        if self._factors is not None:
            heads = (heads * self._factors).astype(x.dtype)
        if rows == 1:  # the same result without swapping axes twice
            heads = self._normalized(heads.reshape(1, -1, 1, self.head_dim), axis=1)
            return self.o_proj.add_to(residual, step.attend(layer, heads).reshape(1, -1))
        heads = self._normalized(heads.reshape(1, rows, -1, self.head_dim), axis=2)
        out = step.attend(layer, heads.swapaxes(1, 2)).swapaxes(1, 2).reshape(rows, -1)
        if asked is not None:
            residual, out = residual[asked], out[asked]
        return self.o_proj.add_to(residual, out)

    def _normalized(self, heads: mx.array, axis: int) -> mx.array:
        """Normalize the query and key heads, which come before the value heads along `axis`."""
        if not self.head_norms:
            return heads
        q, k, v = mx.split(heads, [self.query_end, self.key_end], axis=axis)
        return mx.concatenate([self.q_norm(q), self.k_norm(k), v], axis=axis)


class MLP(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights, path: str, spec: LayerSpec):
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        parts, bias = {"gate_proj": inner, "up_proj": inner}, spec.mlp_bias
        fused = "gate_up_proj" if spec.fused else None
        self.gate_up_proj = weights.linear(*joined(path, parts, fused, hidden, bias))
        self.down_proj = weights.linear(Projection(f"{path}.down_proj", hidden, inner, bias))

    def __call__(self, residual: mx.array, x: mx.array) -> mx.array:
        gate, up = mx.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj.add_to(residual, nn.silu(gate) * up)


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, weights: Weights, path: str, spec: LayerSpec):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = weights.norm(f"{path}.input_layernorm", size, eps)
        self.self_attn = Attention(config, weights, f"{path}.self_attn", spec)
        self.post_attention_layernorm = weights.norm(f"{path}.post_attention_layernorm", size, eps)
        self.mlp = MLP(config, weights, f"{path}.mlp", spec)

    def __call__(
        self, x: mx.array, step: Step, layer: int, asked: mx.array | None = None
    ) -> mx.array:
        x = self.self_attn(x, self.input_layernorm(x), step, layer, asked)
        return self.mlp(x, self.post_attention_layernorm(x))


class CausalLM(nn.Module):
    """A decoder with its head: token ids in, hidden states and logits out.

    Attributes:
        named_tensors: yields its tensors with their checkpoint names; set by `weights.build`.
    """

    named_tensors: Callable[[], Iterator[tuple[str, mx.array]]]

    def __init__(self, config: ModelConfig, weights: Weights, spec: LayerSpec):
        super().__init__()
        vocabulary, size = config.vocab_size, config.hidden_size
        self.embed_tokens = weights.embedding("model.embed_tokens", vocabulary, size)
        self.layers = [
            DecoderLayer(config, weights, f"model.layers.{layer}", spec)
            for layer in range(config.num_hidden_layers)
        ]
        self.norm = weights.norm("model.norm", size, config.rms_norm_eps)
        self.tied = config.tie_word_embeddings
        if not self.tied:
            self.lm_head = weights.linear(Projection("lm_head", vocabulary, size))

    def __call__(self, tokens: mx.array, step: Step, asked: mx.array | None = None) -> mx.array:
        """Return the hidden states (1, T, hidden size) of a step's tokens (1, T), normalized.

        Args:
            asked: the rows to return, (A,) integers; the last layer's other rows are not computed.
                Requires T > 1.
        """
        return self.norm(self._through(tokens, step, asked)[1])[None]

    def prefill(self, tokens: mx.array, step: Step) -> mx.array:
        """Return the input of the last layer, (1, T, hidden size), for a step's tokens (1, T).

        Evaluating it and then the step's keys and values computes everything that later tokens
        attend to, and nothing else.
        """
        return self._through(tokens, step)[0][None]

    def _through(
        self, tokens: mx.array, step: Step, asked: mx.array | None = None
    ) -> tuple[mx.array, mx.array]:
        """Return the input and the output of the last layer, (T, hidden size) each."""
        # Drop the batch axis, which each product would otherwise remove and add again.
        before = x = self.embed_tokens(tokens.reshape(-1))
        for index, layer in enumerate(self.layers):
            is_last = index == len(self.layers) - 1
            before, x = x, layer(x, step, index, asked if is_last else None)
        return before, x

    def logits(self, hidden: mx.array) -> mx.array:
        """Return the logits (..., vocabulary) of hidden states (..., hidden size)."""
        return self.embed_tokens.as_linear(hidden) if self.tied else self.lm_head(hidden)
