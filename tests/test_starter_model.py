"""The real starter: logits, tokens and chat equal mlx-lm's, streaming equals the slow reference."""

import subprocess
import sys
from pydoc_data.topics import topics

import mlx.core as mx
import numpy as np
import pytest

from mlx_stream.checkpoint.folder import read_folder
from mlx_stream.evaluate.mlx_lm import load_peer
from mlx_stream.evaluate.score import losses_of
from mlx_stream.generate.token_stream import TokenStream
from mlx_stream.hub.resolve import resolve
from tests.long.pinned_facts import compare, facts
from tests.reference import SlowLlama

pytestmark = pytest.mark.starter

TEXT = "\n".join(topics[name] for name in sorted(topics)[:6])
CONVERSATION = [
    {"role": "system", "content": "You are brief."},
    {"role": "user", "content": "Hello, wörld! 你好 🙂"},
    {"role": "assistant", "content": "Hi.\n\nWhat now?"},
    {"role": "user", "content": "  def f(x):\n\treturn x ** 2  "},
]


@pytest.fixture(scope="module")
def folder(starter):
    return resolve("starter", print)


@pytest.fixture(scope="module")
def peer_tokenizer(folder):
    from mlx_lm.tokenizer_utils import load

    return load(folder)


def test_tokens_text_and_template_equal_mlx_lms(starter, peer_tokenizer):
    tokenizer = starter.tokenizer
    ids = tokenizer.encode(TEXT)
    assert ids == peer_tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == peer_tokenizer.decode(ids) == TEXT
    assert tokenizer.eos_ids == set(peer_tokenizer.eos_token_ids)
    for start in (0, 1):
        messages = CONVERSATION[start:]
        text = tokenizer.template.render(messages, reply=True)
        assert text == peer_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False
        )
        assert tokenizer.encode(text, special=False) == peer_tokenizer.apply_chat_template(
            messages, add_generation_prompt=True
        )


def test_dense_logits_equal_mlx_lms(starter, folder):
    ids = starter.tokenizer.encode(TEXT)[:96]
    stream = TokenStream(starter, starter.new_dense_cache())
    ours = [starter.network.logits(hidden)[0] for hidden in stream.steps(ids, 64)]
    theirs = load_peer(folder, starter)(mx.array([ids]))[0]
    assert np.abs(np.array(mx.concatenate(ours) - theirs)).max() < 1e-3


@pytest.mark.parametrize(
    "sinks, window, chunks", [(4, 60, (7, 128)), (0, 60, (37,)), (32, 80, (1, 500))]
)
def test_streaming_equals_the_slow_reference(starter, folder, sinks, window, chunks):
    ids = starter.tokenizer.encode(TEXT)[:140]
    weights = {name: np.array(tensor) for name, tensor in starter.network.named_tensors()}
    logits = SlowLlama(read_folder(folder).config, weights, sinks, window).logits(ids[:-1])
    expected = np.log(np.exp(logits).sum(axis=-1)) - logits[np.arange(len(ids) - 1), ids[1:]]
    for chunk in chunks:
        stream = TokenStream(starter, starter.new_cache(sinks, window))
        assert np.abs(np.array(losses_of(stream, ids, chunk)) - expected).max() < 2e-3


def test_chat_from_the_shell_names_three_colours(starter):
    run = subprocess.run(
        [sys.executable, "-m", "mlx_stream", "chat", "--max-tokens", "40", "--temp", "0"],
        input="Hi!\nName three colours.\n",
        capture_output=True,
        text=True,
        check=True,
    )
    replies = run.stdout.splitlines()
    assert len(replies) >= 2
    colours = {"red", "blue", "green", "yellow", "orange", "purple", "black", "white"}
    assert sum(colour in replies[-1].lower() for colour in colours) >= 3


def test_the_weights_are_those_of_the_packed_file_without_loss(starter, folder):
    tensors = read_folder(folder).tensors
    path = "model.layers.3.mlp.down_proj"
    parts = [tensors[f"{path}.{name}"] for name in ("weight", "scales", "biases")]
    full = mx.dequantize(
        parts[0], parts[1].astype(mx.float32), parts[2].astype(mx.float32), group_size=32, bits=4
    )
    assert np.array_equal(np.array(full), np.array(starter.network.layers[3].mlp.down_proj.weight))


def test_a_pinned_fact_is_still_used_when_the_window_has_gone_by(starter):
    found = compare(starter, facts()[:4], tokens=300, window=128)
    assert found["pinned"]["evicted_exchanges"] == found["unpinned"]["evicted_exchanges"] > 2
    assert found["unpinned"]["pinned"] == 0 < found["pinned"]["pinned"]
    assert found["likelier"] == 4 and found["gain"] > 2, found
