"""What `bench` counts: bytes, nodes and tokens read, but not its times."""

from typing import Any

import mlx.core as mx
import pytest

from mlx_stream.evaluate.bench import (
    bandwidth_limit,
    fill,
    our_build,
    step_of,
    summary,
    their_build,
)
from mlx_stream.evaluate.costs import graph_nodes, weight_bytes_read
from mlx_stream.evaluate.prefill_speed import (
    best_of,
    our_reading,
    prefills,
    their_reading,
)
from tests.fakes.peer import peer_of
from tests.fakes.tiny import tiny_config
from tests.fakes.tiny_models import make, tensors_of

LAYERS, HIDDEN, INNER, VOCABULARY, HEADS, KV_HEADS, HEAD_DIM = 2, 64, 96, 300, 4, 2, 16
ATTENTION = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS)
BODY = LAYERS * (ATTENTION + 3 * HIDDEN * INNER + 2 * HIDDEN) + HIDDEN


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_reads_all_weights_but_of_an_untied_embedding_a_row(tiny_model, tied):
    network = tiny_model(tie_word_embeddings=tied).network
    head = VOCABULARY * HIDDEN
    assert weight_bytes_read(network) == 4 * (BODY + head + (0 if tied else HIDDEN))


def test_quantized_weights_are_counted_as_they_lie():
    raw = tiny_config(tie_word_embeddings=True)
    raw["quantization"] = {"group_size": 32, "bits": 4}
    tensors = tensors_of(raw)
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        path = name.removesuffix(".weight")
        parts = mx.quantize(tensors.pop(name), group_size=32, bits=4)
        tensors |= zip((f"{path}.weight", f"{path}.scales", f"{path}.biases"), parts, strict=True)
    model = make(raw, tensors, keep_quantized=True)
    matrices = LAYERS * (ATTENTION + 3 * HIDDEN * INNER)
    whole = 4 * (BODY - matrices + VOCABULARY * HIDDEN)
    assert weight_bytes_read(model.network) == whole + matrices // 2 + matrices // 32 * 8


def test_the_cache_is_read_whole_and_the_limit_is_bytes_over_speed(tiny_model):
    model = tiny_model()
    cache = model.new_cache(4, 20)
    rows = LAYERS * KV_HEADS * HEAD_DIM * 4
    assert cache.nbytes == rows * (2 * 24 + 4)
    found = bandwidth_limit(model, cache, 1e6, seconds=2.0)
    assert found["least_ms"] == pytest.approx((found["weights"] + found["cache"]) / 1e3)
    assert found["share_of_limit"] == pytest.approx(found["least_ms"] / 2e3)


def test_nodes_are_those_not_evaluated_yet():
    one, two = mx.array([1.0]), mx.array([2.0])
    total = one + two
    assert graph_nodes(total) == 1
    assert graph_nodes(total * total, mx.exp(total)) == 3
    mx.eval(total)
    assert graph_nodes(total * total) == 1


def test_a_step_is_decoding_and_its_graph_is_one_step(tiny_model):
    model = tiny_model()
    cache = model.new_cache(4, 20)
    fill(cache)
    step, before = step_of(model, cache), cache.length
    for _ in range(3):
        step()
    assert before + 2 <= cache.length <= before + 3  # the last one may not have been read yet
    fill(cache := model.new_cache(4, 20))
    build = our_build(model, cache)
    nodes = []
    for _ in range(3):
        token = build()
        nodes.append(graph_nodes(token))
        mx.eval(token)
    assert max(nodes) < 2 * min(nodes)


def test_mlx_lm_builds_the_same_step():
    raw = tiny_config()
    tensors = tensors_of(raw)
    peer = peer_of(raw, tensors)
    model = make(raw, tensors_of(raw))
    fill(cache := model.new_cache(4, 20))
    ours, theirs = our_build(model, cache), their_build(model, peer, 20)
    assert 0.2 < graph_nodes(ours()) / graph_nodes(theirs()) < 0.8  # the goal, see BENCHMARKS.md


def test_a_long_text_is_read_once_by_both():
    raw = tiny_config()
    tensors = tensors_of(raw)
    peer = peer_of(raw, tensors)
    model = make(raw, tensors_of(raw))
    ids = [*range(90)]
    assert sum(our_reading(model, 20, ids, 16)) == 90
    assert [*their_reading(peer, 20, ids, 16)] == [16] * 5 + [10]
    found = prefills(model, peer, [20, 30], 90, [16, 32])
    shapes = [(20, 16, 90), (20, 32, 90), (30, 16, 90), (30, 32, 90)]
    assert [(one["window"], one["chunk"], one["tokens"]) for one in found] == shapes
    for one in found:
        speeds = one["ours_tokens_per_second"], one["mlx_lm_tokens_per_second"]
        assert one["ratio"] == pytest.approx(speeds[0] / speeds[1])


def result(window, chunk, ours, theirs) -> dict[str, Any]:
    speeds = {"ours_tokens_per_second": ours, "mlx_lm_tokens_per_second": theirs}
    return {"window": window, "chunk": chunk, "mlx_lm_chunk": chunk, **speeds}


def test_the_best_chunk_of_each_is_compared():
    best = best_of([result(20, 64, 100, 90), result(20, 128, 80, 200), result(30, 64, 5, 5)])
    assert [(one["window"], one["chunk"], one["mlx_lm_chunk"]) for one in best] == [
        (20, 64, 128),
        (30, 64, 64),
    ]
    assert [one["ratio"] for one in best] == [0.5, 1.0]


def test_a_ratio_is_theirs_over_ours_pair_by_pair():
    assert summary([1.0, 2.0, 4.0], [3.0, 2.0, 4.0])["ratio_quartiles"] == [1.0, 1.0, 2.0]
