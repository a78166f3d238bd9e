"""The slow reference: sinks, window and distances by their definitions, in numpy.

Unrotated keys are kept in a list, and every step rotates all attended ones again by their places.
It shares no code with `mlx_stream` and imports no MLX, so that agreement means something.
Shapes: n tokens, L attended tokens, H query heads, K key/value heads, D head dimension.
"""

import math

import numpy as np

Weights = dict[str, np.ndarray]


# -- rotary embedding -----------------------------------------------------------------------------


def rope_inv_freq(config: dict) -> tuple[np.ndarray, float]:
    """Return the (D / 2,) float64 frequencies and the magnitude of a Hugging Face config.

    Follows transformers' `modeling_rope_utils.py`: the magnitude (its `attention_factor`)
    multiplies cosines and sines, of queries and of keys. Reads `rope_theta` with `rope_scaling`,
    and `rope_parameters`. Raises ValueError for a type whose frequencies are not static. There are
    fewer frequencies where only the first part of a head is rotated.
    """
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    head_dim = int(_head_dim(config) * config.get("partial_rotary_factor", 1.0))
    inv_freq = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if kind == "default":
        return inv_freq, 1.0
    if kind == "linear":
        return inv_freq / rope["factor"], 1.0
    original = (
        config.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings")
        or config["max_position_embeddings"]
    )
    if kind == "llama3":
        return _llama3(inv_freq, rope, original), 1.0
    if kind == "yarn":
        factor = rope["factor"] or config["max_position_embeddings"] / original
        ramp = _yarn_ramp(head_dim, theta, rope, original)
        return inv_freq * (1 - ramp) + inv_freq / factor * ramp, _yarn_magnitude(factor, rope)
    if kind == "longrope":
        growth = config["max_position_embeddings"] / original
        magnitude = math.sqrt(1 + math.log(growth) / math.log(original)) if growth > 1 else 1.0
        return inv_freq / np.array(rope["short_factor"]), magnitude
    raise ValueError(f"no static frequencies for RoPE type {kind!r}")


def _head_dim(config: dict) -> int:
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]


def _llama3(inv_freq: np.ndarray, rope: dict, original: float) -> np.ndarray:
    """Divide long wavelengths by the factor, keep short ones, and interpolate between them."""
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    turns = original * inv_freq / (2 * math.pi)  # full turns within the original context
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - smooth) * inv_freq / factor + smooth * inv_freq


def _yarn_ramp(head_dim: int, theta: float, rope: dict, original: float) -> np.ndarray:
    """Return, per frequency, 0 where it is kept and 1 where it is divided by the factor."""

    def dimension(turns: float) -> float:
        return head_dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(rope.get("beta_fast") or 32)
    high = dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)


def _yarn_magnitude(factor: float, rope: dict) -> float:
    def grown(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return grown(rope["mscale"]) / grown(rope["mscale_all_dim"])
    return grown(1.0)


def rotate(
    x: np.ndarray, places: np.ndarray, inv_freq: np.ndarray, magnitude: float = 1.0
) -> np.ndarray:
    """Rotate x (L, heads, D) row by row to its places (L,).

    With n frequencies, the first 2n numbers of a head are rotated, d together with d + n.
    """
    angles = np.asarray(places, dtype=np.float64)[:, None, None] * inv_freq
    cos = (np.cos(angles) * magnitude).astype(x.dtype)
    sin = (np.sin(angles) * magnitude).astype(x.dtype)
    pairs = len(inv_freq)
    first, second, rest = np.split(x, [pairs, 2 * pairs], axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


# -- one layer's attention ------------------------------------------------------------------------


class SlowAttention:
    """Attend, token by token, to the sinks and the window in a list of unrotated keys and values.

    `window=None` attends to everything, each token at its place in the text (`sinks` and `spare`
    are then ignored). The store holds the sinks and the last `window + spare` other tokens; what it
    no longer holds is None in the list, so that using it fails.

    With 2 sinks and a window of 3, token 6 attends to tokens 0, 1, 4, 5, 6 at places 0, 1, 2, 3, 4:
    its distance to token 4 is 2, as in the text, and to sink 1 it is 3.
    """

    def __init__(
        self,
        sinks: int,
        window: int | None,
        inv_freq: np.ndarray,
        scale: float,
        spare: int = 0,
        magnitude: float = 1.0,
        dtype: type = np.float32,
    ):
        if sinks < 0 or spare < 0 or (window is not None and window < 1):
            raise ValueError(f"{sinks=}, {window=}, {spare=}")
        self.dense = window is None
        self.sinks = 0 if self.dense else sinks
        self.window = math.inf if window is None else window
        self.rows = self.window + spare
        self.inv_freq, self.scale, self.magnitude = inv_freq, scale, magnitude
        self.dtype = dtype
        self.store: list[tuple[np.ndarray, np.ndarray] | None] = []  # by token number
        self.floor = self.sinks  # the lowest token that is not a sink and still in the store

    @property
    def n(self) -> int:
        """The number of tokens read: the newest is n - 1."""
        return len(self.store)

    @property
    def oldest(self) -> int:
        """The oldest attended token that is not a sink (o in mlx_stream/cache); n if none."""
        return int(max(self.sinks, self.floor, self.n - self.window))

    def attended(self) -> list[int]:
        """The numbers of the tokens that the newest one attends to, in cache order."""
        return [*range(min(self.sinks, self.n)), *range(self.oldest, self.n)]

    def distances(self) -> list[int]:
        """The distance from the newest token to each attended one, in the same order."""
        t, o, s = self.n - 1, self.oldest, self.sinks
        return [t - o + s - j if j < s <= t else t - j for j in self.attended()]

    def step(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Read one token, q (H, D), k and v (K, D), all unrotated; return what it sees, (H, D)."""
        t = self.n
        self.store.append((np.array(k, self.dtype), np.array(v, self.dtype)))
        self._forget(t - self.rows + 1)

        held = [row for row in map(self.store.__getitem__, self.attended()) if row is not None]
        assert len(held) == len(self.attended()), "a token is attended that was overwritten"
        keys = np.stack([key for key, _ in held])
        values = np.stack([value for _, value in held])

        places = np.arange(len(held))  # distances count places in the cache; the query has the last
        assert (places[-1] - places).tolist() == self.distances()
        keys = rotate(keys, places, self.inv_freq, self.magnitude)
        query = rotate(np.array(q, self.dtype)[None], places[-1:], self.inv_freq, self.magnitude)[0]

        out = np.empty_like(query)
        group = query.shape[0] // keys.shape[1]
        for head in range(query.shape[0]):
            scores = keys[:, head // group] @ query[head] * self.scale
            weights = np.exp(scores - scores.max())
            out[head] = weights / weights.sum() @ values[:, head // group]
        return out

    def evict(self, count: int) -> None:
        """Drop the oldest `count` attended tokens that are not sinks: o moves forward for good."""
        if self.dense or not 0 <= count <= self.n - self.oldest:
            raise ValueError(f"cannot evict {count} of tokens {self.oldest} to {self.n - 1}")
        if count:
            self._forget(self.oldest + count)

    def rewind(self, count: int) -> None:
        """Take back the newest `count` tokens; o moves back as far as the spare rows allow."""
        kept = self.n - count
        complete = self.oldest == self.sinks  # no tokens were ever evicted, or they are all back
        if count < 0 or kept < (0 if complete else self.oldest):
            raise ValueError(f"cannot take back {count} of tokens {self.oldest} to {self.n - 1}")
        del self.store[kept:]

    def erase(self) -> None:
        """Forget all that the newest token does not attend to, as returning the state does."""
        self._forget(self.oldest)

    def _forget(self, floor: float) -> None:
        for token in range(self.floor, int(max(self.floor, floor))):
            self.store[token] = None
            self.floor = token + 1


# -- the model, for one token (hidden,) or many (n, hidden) ---------------------------------------


def _linear(weights: Weights, name: str, x: np.ndarray) -> np.ndarray:
    y = x @ weights[f"{name}.weight"].T
    return y + weights[f"{name}.bias"] if f"{name}.bias" in weights else y


def _rms_norm(weights: Weights, name: str, x: np.ndarray, config: dict) -> np.ndarray:
    mean = np.mean(x * x, axis=-1, keepdims=True)
    return x / np.sqrt(mean + x.dtype.type(config["rms_norm_eps"])) * weights[f"{name}.weight"]


def _qkv(
    config: dict, weights: Weights, layer: str, x: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the unrotated queries (..., H, D), keys and values (..., K, D) of a layer's input."""
    h = _rms_norm(weights, f"{layer}.input_layernorm", x, config)
    if config["model_type"] == "phi3":
        joined = _linear(weights, f"{layer}.self_attn.qkv_proj", h)
        queries = config["num_attention_heads"] * _head_dim(config)
        keys = (joined.shape[-1] - queries) // 2
        q, k, v = np.split(joined, [queries, queries + keys], axis=-1)
    else:
        q, k, v = (_linear(weights, f"{layer}.self_attn.{part}_proj", h) for part in "qkv")
    shape = (*x.shape[:-1], -1, _head_dim(config))
    q, k, v = q.reshape(shape), k.reshape(shape), v.reshape(shape)
    if config["model_type"] == "qwen3":  # each head is normalized, before rotation
        q = _rms_norm(weights, f"{layer}.self_attn.q_norm", q, config)
        k = _rms_norm(weights, f"{layer}.self_attn.k_norm", k, config)
    return q, k, v


def _rest_of_layer(
    config: dict, weights: Weights, layer: str, x: np.ndarray, seen: np.ndarray
) -> np.ndarray:
    """Return a layer's output from its input and what its heads saw (..., H, D)."""
    x = x + _linear(weights, f"{layer}.self_attn.o_proj", seen.reshape(*x.shape[:-1], -1))
    h = _rms_norm(weights, f"{layer}.post_attention_layernorm", x, config)
    if config["model_type"] == "phi3":
        gate, up = np.split(_linear(weights, f"{layer}.mlp.gate_up_proj", h), 2, axis=-1)
    else:
        gate, up = (_linear(weights, f"{layer}.mlp.{part}_proj", h) for part in ("gate", "up"))
    with np.errstate(over="ignore"):  # exp may be infinite, and the quotient is then rightly 0
        silu = gate / (1 + np.exp(-gate))
    return x + _linear(weights, f"{layer}.mlp.down_proj", silu * up)


def _logits(config: dict, weights: Weights, x: np.ndarray) -> np.ndarray:
    tied = config.get("tie_word_embeddings", False)
    head = "model.embed_tokens" if tied else "lm_head"
    return _linear(weights, head, _rms_norm(weights, "model.norm", x, config))


def _layers(config: dict) -> list[str]:
    return [f"model.layers.{i}" for i in range(config["num_hidden_layers"])]


def _rotations(config: dict) -> list[tuple[np.ndarray, float]]:
    """Return each layer's frequencies and magnitude; a SmolLM3 layer may have no frequencies."""
    layers = config["num_hidden_layers"]
    rotated = [1] * layers
    if config["model_type"] == "smollm3":
        rotated = config.get("no_rope_layers") or [int((i + 1) % 4 != 0) for i in range(layers)]
    return [rope_inv_freq(config) if flag else (np.zeros(0), 1.0) for flag in rotated]


def _bounded(config: dict, window: int | None) -> int | None:
    """In Mistral and Phi-3 models, a sliding window, if set, limits the window."""
    slides = config["model_type"] in ("mistral", "phi3")
    bound = config.get("sliding_window") if slides else None
    return min((w for w in (window, bound) if w is not None), default=None)


class SlowLlama:
    """Run a model token by token from weights with their Hugging Face names."""

    def __init__(
        self,
        config: dict,
        weights: Weights,
        sinks: int,
        window: int | None,
        spare: int = 0,
        dtype: type = np.float32,
    ):
        assert config.get("hidden_act", "silu") == "silu"
        self.config = config
        self.weights = {name: np.asarray(w, dtype) for name, w in weights.items()}
        window, scale = _bounded(config, window), _head_dim(config) ** -0.5
        self.attention = {
            layer: SlowAttention(sinks, window, inv_freq, scale, spare, magnitude, dtype)
            for layer, (inv_freq, magnitude) in zip(
                _layers(config), _rotations(config), strict=True
            )
        }

    def step(self, token: int) -> np.ndarray:
        """Read one token; return the logits (V,) of the next."""
        x = self.weights["model.embed_tokens.weight"][token]
        for layer, attention in self.attention.items():
            seen = attention.step(*_qkv(self.config, self.weights, layer, x))
            x = _rest_of_layer(self.config, self.weights, layer, x, seen)
        return _logits(self.config, self.weights, x)

    def logits(self, ids) -> np.ndarray:
        """Read more tokens, one by one; return the logits (n, V) after each."""
        return np.stack([self.step(int(token)) for token in ids])

    def evict(self, count: int) -> None:
        """Drop the oldest `count` attended tokens that are not sinks, in all layers."""
        for attention in self.attention.values():
            attention.evict(count)

    def rewind(self, count: int) -> None:
        """Take back the newest `count` tokens, in all layers."""
        for attention in self.attention.values():
            attention.rewind(count)

    def attended(self) -> list[int]:
        """The numbers of the tokens that the newest one attends to, in cache order."""
        return next(iter(self.attention.values())).attended()


# -- the same for a long text and a real model ----------------------------------------------------


def stream_nll(config: dict, weights: Weights, ids, sinks: int, window: int | None) -> np.ndarray:
    """Return the (n - 1,) negative log-likelihoods, natural log, of a streamed text's tokens.

    Goes layer by layer over the whole text: a token's keys and values depend on nothing but its own
    layer input. Attention still goes token by token and rotates the keys at every step.
    """
    ids = np.asarray(ids)
    weights = {name: np.asarray(w, np.float32) for name, w in weights.items()}
    x = weights["model.embed_tokens.weight"][ids]
    for layer in _layers(config):
        seen = _attend_text(config, *_qkv(config, weights, layer, x), sinks, window)
        x = _rest_of_layer(config, weights, layer, x, seen)
    return np.concatenate(
        [
            _nll(_logits(config, weights, x[start : start + 128]), ids[start + 1 : start + 129])
            for start in range(0, len(ids) - 1, 128)
        ]
    )


def _nll(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    logits = logits[: len(targets)]
    top = logits.max(axis=-1, keepdims=True)
    total = np.log(np.exp(logits - top).sum(axis=-1, dtype=np.float64)) + top[:, 0]
    return total - np.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]


def _attend_text(
    config: dict,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    sinks: int,
    window: int | None,
) -> np.ndarray:
    """Return what each token sees in one layer; q (n, H, D), k and v (n, K, D) are unrotated.

    A pair (d, d + D / 2) is one complex number here, and rotating it by place p is one product with
    exp(i p f_d): the cheapest way to rotate all keys again at every step.
    """
    n, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    window = _bounded(config, window)
    s, w = (0, n) if window is None else (sinks, window)
    places = min(n, s + w)
    inv_freq, magnitude = rope_inv_freq(config)
    turn = magnitude * np.exp(1j * np.arange(places)[:, None] * inv_freq)
    turn = turn.astype(np.complex64)

    q, k = _pairs(q), np.ascontiguousarray(_pairs(k).transpose(1, 0, 2))  # k: (K, n, D / 2)
    v = np.ascontiguousarray(v.transpose(1, 0, 2))
    rotated = np.empty((kv_heads, places, head_dim // 2), np.complex64)
    values = np.empty((kv_heads, places, head_dim), np.float32)
    seen = np.empty((n, heads, head_dim), np.float32)
    for t in range(n):
        o = max(s, t - w + 1)  # the oldest token of the window, in a plain stream
        first, ring = min(s, t + 1), max(0, t + 1 - o)
        length = first + ring
        np.multiply(k[:, :first], turn[:first], out=rotated[:, :first])
        np.multiply(k[:, o : t + 1], turn[first:length], out=rotated[:, first:length])
        values[:, :first], values[:, first:length] = v[:, :first], v[:, o : t + 1]
        query = (q[t] * turn[length - 1]).view(np.float32).reshape(kv_heads, -1, head_dim)
        keys = rotated[:, :length].view(np.float32)
        scores = query @ keys.transpose(0, 2, 1) * np.float32(head_dim**-0.5)
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        seen[t] = (scores @ values[:, :length]).reshape(heads, head_dim)
    return seen


def _pairs(x: np.ndarray) -> np.ndarray:
    first, second = np.split(x, 2, axis=-1)
    return (first + 1j * second).astype(np.complex64)
