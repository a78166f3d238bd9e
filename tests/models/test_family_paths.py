"""Each family through every path of a stream: guesses, a quantized ring, snapshots, the engine."""

import mlx.core as mx
import numpy as np
import pytest

import mlx_stream
from mlx_stream.generate import snapshot
from mlx_stream.generate.stats import Stats
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.sampling import Sampler
from tests.fakes.engines import DEADLINE, GREEDY, engine_of, said, together
from tests.fakes.replies import write_ids, writer_of
from tests.fakes.tiny import FAMILIES, tiny_config, write_letters
from tests.fakes.tiny_models import all_logits, make, some_ids, tensors_of

IDS = some_ids(60, seed=3)
# Maximum change in the logits from 8-bit keys and values: root mean square, as a share of the
# logits' spread.
QUANTIZED = 0.05


@pytest.fixture(params=FAMILIES)
def raw(request):
    return tiny_config(**FAMILIES[request.param])


def test_verified_guesses_give_the_ids_of_plain_decoding(raw):
    model = make(raw, tensors_of(raw))
    prompt, found = [*IDS[:20], *IDS[:20], *IDS[:10]], []
    for guesses in (False, True):
        stats = Stats()
        writer = writer_of(model, guesses, window=40)
        found.append([*write_ids(writer, prompt, Sampler(GREEDY), 150, stats=stats)])
        assert bool(stats.drafted_tokens) == guesses
    assert found[0] == found[1]
    assert 0 < stats.accepted_tokens < stats.drafted_tokens  # some were taken back


def test_a_quantized_ring_is_near(raw):
    heads = {"short_factor": [1.0 + i / 24 for i in range(24)]}
    scaling = {**(raw.get("rope_scaling") or {})}
    changes = {"rope_scaling": scaling | heads} if "short_factor" in scaling else {}
    raw = raw | {"head_dim": 64} | changes
    model = make(raw, tensors_of(raw))
    for chunk in (1, 29):
        plain, near = (
            all_logits(model, model.new_cache(4, 24, kv_bits=bits), IDS, chunk)
            for bits in (None, 8)
        )
        off = np.sqrt(np.mean((plain - near) ** 2)) / plain.std()
        assert 0 < off < QUANTIZED


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_a_saved_stream_continues_to_the_bit(raw, dtype, tmp_path):
    model = make(raw, tensors_of(raw), dtype)
    stream, again = (TokenStream(model, model.new_cache(4, 24)) for _ in range(2))
    for _ in stream.steps(IDS):
        pass
    snapshot.save_snapshot(tmp_path / "stream", stream, "test", {})
    again.restore(snapshot.load_snapshot(tmp_path / "stream").state)
    for token in IDS[:20]:
        assert mx.array_equal(stream.read([token]), again.read([token])).item()


def test_two_at_once_say_what_each_says_alone(raw, tmp_path):
    folder = write_letters(tmp_path / "model", {**raw, "tie_word_embeddings": False})
    options = {"window": 100, "max_tokens": 30, "sampling": GREEDY}
    questions, found = ("Hello there.", "And the man of the house?"), {}
    with engine_of(folder) as engine:
        chats = [engine.session(**options) for _ in questions]

        def talk(n):
            found[n] = [said(chats[n].reply(question)) for question in questions[n:] * 4]

        together(lambda: talk(0), lambda: talk(1))
        assert engine.close(DEADLINE)
    model = mlx_stream.load(folder, dtype="float32", keep_quantized=False)
    for n in range(2):
        alone = mlx_stream.ChatSession(model, **options)
        assert found[n] == [said(alone.reply(question)) for question in questions[n:] * 4]
        assert alone.stats.evicted > 0
