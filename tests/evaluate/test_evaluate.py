"""Every cache that an experiment reads through agrees with a plain loop."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlx_stream.evaluate import latency, readers, sweeps
from mlx_stream.evaluate.corpus import Corpus
from mlx_stream.evaluate.perplexity import PEERS, SETTINGS, Setting, Spec, measure_perplexity
from mlx_stream.evaluate.report import Report, perplexity
from mlx_stream.generate.model import Model
from tests.fakes.peer import peer_of
from tests.fakes.tiny import tiny_config
from tests.fakes.tiny_models import all_logits, make, some_ids, tensors_of

Make = Callable[..., Model]
IDS = some_ids(121)
SINKS, WINDOW = 2, 14
CAPACITY = SINKS + WINDOW
CLOSE = 2e-4


def losses_of(logits: np.ndarray, targets: list[int]) -> list[float]:
    """Return -log p of each target given logits (n, V)."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    normal = np.log(np.exp(shifted).sum(axis=-1))
    return [float(normal[i] - shifted[i, target]) for i, target in enumerate(targets)]


def dense_losses(model: Model, ids: list[int]) -> list[float]:
    return losses_of(all_logits(model, model.new_dense_cache(), ids[:-1], 64), ids[1:])


def read_all(read: readers.Reader, pieces: tuple[int, ...] = (50, 90, 120)) -> list[float]:
    found, start = [], 0
    for stop in pieces:
        found += read(start, stop)
        start = stop
    return found


@pytest.mark.parametrize("chunk", [1, 7, 128])
def test_a_stream_is_read_piece_by_piece(tiny_model: Make, chunk: int) -> None:
    model = tiny_model()
    reader = readers.stream_reader(model, IDS, model.new_cache(SINKS, WINDOW), chunk)
    whole = all_logits(model, model.new_cache(SINKS, WINDOW), IDS[:-1], 5)
    assert read_all(reader) == pytest.approx(losses_of(whole, IDS[1:]), abs=CLOSE)


def test_a_fresh_stream_begins_on_the_window_before(tiny_model: Make) -> None:
    model = tiny_model()
    found = readers.fresh_reader(model, IDS, SINKS, WINDOW, 9)(70, 100)
    ids = IDS[70 - CAPACITY : 101]
    logits = all_logits(model, model.new_cache(SINKS, WINDOW), ids[:-1], 9)
    assert found == pytest.approx(losses_of(logits, ids[1:])[CAPACITY:], abs=CLOSE)
    first = readers.fresh_reader(model, IDS, SINKS, WINDOW, 9)(0, 30)
    logits = all_logits(model, model.new_cache(SINKS, WINDOW), IDS[:30], 9)
    assert first == pytest.approx(losses_of(logits, IDS[1:31]), abs=CLOSE)


def test_recompute_with_a_stride_of_1_reads_each_window_from_scratch(tiny_model: Make) -> None:
    model = tiny_model()
    found = read_all(readers.recompute_reader(model, IDS, CAPACITY, 1))
    expected = [dense_losses(model, IDS[max(0, t + 1 - CAPACITY) : t + 2])[-1] for t in range(120)]
    assert found == pytest.approx(expected, abs=CLOSE)


@pytest.mark.parametrize("sinks", [0, SINKS])
def test_recompute_with_a_stride_reads_up_to_its_end(tiny_model: Make, sinks: int) -> None:
    """Worked example: capacity 16, stride 5; for tokens 91 to 95 the reader reads 79 to 94."""
    model = tiny_model()
    found = readers.recompute_reader(model, IDS, CAPACITY, 5, sinks)(90, 97)
    first = IDS[:sinks] + IDS[79 + sinks : 96]
    second = IDS[:sinks] + IDS[81 + sinks : 98]
    expected = dense_losses(model, first)[-5:] + dense_losses(model, second)[-2:]
    assert found == pytest.approx(expected, abs=CLOSE)


def test_mlx_lm_one_at_a_time_without_kept_tokens_is_window_attention() -> None:
    raw = tiny_config()
    model, peer = make(raw, tensors_of(raw)), peer_of(raw, tensors_of(raw))
    theirs = readers.peer_reader(peer, IDS, CAPACITY, 0, 1)
    ours = readers.stream_reader(model, IDS, model.new_cache(0, CAPACITY), 1)
    assert read_all(theirs) == pytest.approx(read_all(ours), abs=CLOSE)


@pytest.mark.parametrize("tied", [False, True])
def test_mlx_lm_before_its_cache_is_full_is_dense(tied: bool) -> None:
    raw = tiny_config(tie_word_embeddings=tied)
    tensors = tensors_of(raw)
    if tied:
        tensors.pop("lm_head.weight", None)
    model, peer = make(raw, dict(tensors)), peer_of(raw, dict(tensors))
    found = read_all(readers.peer_reader(peer, IDS, 400, 4, 30))
    assert found == pytest.approx(dense_losses(model, IDS), abs=CLOSE)


# --- one text through several caches ---


@pytest.fixture
def setting(tiny_model: Make, tmp_path: Path) -> Setting:
    text = Corpus(["a.txt"], np.array(IDS, np.int32))
    return Setting(tiny_model(), tmp_path, text, SINKS, WINDOW, 120, 40)


def test_each_cache_is_measured_segment_by_segment(setting: Setting) -> None:
    model = setting.model
    caches = {
        "stream": lambda: model.new_cache(SINKS, WINDOW),
        "window": lambda: model.new_cache(0, CAPACITY),
        "dense": model.new_dense_cache,
    }
    told: list[tuple[int, int]] = []
    specs = [*(Spec(name) for name in caches), Spec("dense", {"tokens": 80, "chunk": 3})]
    rows = list(measure_perplexity(setting, specs, lambda done, total: told.append((done, total))))
    assert [row["cache"] for row in rows] == [
        *(label for label in caches for _ in range(3)),
        *["dense, chunk 3"] * 2,
    ]
    assert told == [(done, 440) for done in range(0, 441, 40)]
    for row in rows:
        new = caches[row["cache"].split(",")[0]]
        expected = losses_of(all_logits(model, new(), IDS[:-1], 11), IDS[1:])
        segment = expected[row["tokens"] - 40 : row["tokens"]]
        assert row["nll"] == pytest.approx(sum(segment) / 40, abs=CLOSE)
        assert row["perplexity"] == pytest.approx(math.exp(row["nll"]))
        assert row["tokens_per_second"] > 0 and row["resident_bytes"] > 10**6


def test_memory_is_of_the_weights_and_one_cache(setting: Setting) -> None:
    rows = list(
        measure_perplexity(setting, [Spec("stream"), Spec("dense"), Spec("stream", {"chunk": 1})])
    )
    weights = setting.model.weight_bytes
    stream = setting.model.new_cache(SINKS, WINDOW).nbytes
    for row in rows:
        assert weights < row["active_bytes"] <= row["peak_bytes"]
        if row["cache"] != "dense":
            assert row["active_bytes"] - weights - stream < 50_000


def test_every_cache_of_ours_can_be_read(setting: Setting) -> None:
    """mlx-lm and llama.cpp need files; the command line's tests cover mlx-lm."""
    names = [name for name in SETTINGS if name not in PEERS]
    settings = {"recompute": {"stride": 8, "sinks": 2}}
    rows = measure_perplexity(
        setting, [Spec(name, settings.get(name, {}) | {"tokens": 40}) for name in names]
    )
    labels = ["stream", "fresh", "window", "dense", "recompute, stride 8, sinks 2"]
    assert [row["cache"] for row in rows] == labels


# --- shapes ---


def test_a_sweep_reads_the_same_tokens_through_each_shape(tiny_model: Make) -> None:
    model, text = tiny_model(), Corpus(["a"], np.array(IDS, np.int32))
    shapes = [(0, 16), (2, 14)]
    rows = list(sweeps.sweep(model, text, shapes, 110, 13))
    for (sinks, window), row in zip(shapes, rows, strict=True):
        logits = all_logits(model, model.new_cache(sinks, window), IDS[:110], 5)
        assert row["perplexity"] == pytest.approx(
            perplexity(losses_of(logits, IDS[1:111])), rel=2e-4
        )
        assert row["cache_bytes"] == model.new_cache(sinks, window).nbytes


# --- time ---


def test_latency_has_every_method_and_crosses_a_re_anchoring(
    tiny_model: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    turned = []
    from mlx_stream.cache import StreamCache

    reanchor = StreamCache._reanchor
    monkeypatch.setattr(
        StreamCache, "_reanchor", lambda self: (turned.append(1), reanchor(self))[1]
    )
    rows = list(latency.measure_latency(model, None, {64: 30}))
    methods = ["stream", "stream, plain", "stream, re-anchoring", "recompute"]
    assert [row["method"] for row in rows] == methods
    assert [row["steps"] for row in rows] == [30, latency.FORCED, latency.FORCED, 5]
    assert len(turned) == 1 + latency.FORCED
    for row in rows:
        assert 0 < row["p50_ms"] <= row["p95_ms"] <= row["p99_ms"] <= row["max_ms"]
    (line,) = latency.findings(rows)
    assert "times faster than recompute" in line and "mlx-lm" not in line


def test_percentiles_are_of_the_steps() -> None:
    row = latency.latency_row(256, "stream", [x / 1e3 for x in range(101)])
    assert [row[k] for k in ("p50_ms", "p95_ms", "p99_ms", "max_ms")] == pytest.approx(
        [50, 95, 99, 100]
    )


def test_a_report_is_json_and_csv_of_the_same_rows() -> None:
    report = Report("x", {"a": math.nan}, [{"p": math.inf, "n": 1}, {"p": 2.5, "q": "a,b"}], ["n"])
    assert report.as_json() == {
        "experiment": "x",
        "about": {"a": None},
        "rows": [{"p": None, "n": 1}, {"p": 2.5, "q": "a,b"}],
        "notes": ["n"],
    }
    assert report.as_csv() == 'p,n,q\ninf,1,\n2.5,,"a,b"\n'
