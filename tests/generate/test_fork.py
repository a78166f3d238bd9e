"""A model in a forked process, where MLX has no threads, is refused promptly instead of hanging."""

import subprocess
import sys

import pytest

from tests.fakes.tiny import tiny_config, tiny_weights, write_tiny

CODE = """
import os, signal, sys
import mlx_stream
folder, what = sys.argv[1:]
model = mlx_stream.load(folder)
chat = mlx_stream.ChatSession(model)
for _ in chat.reply("a", max_tokens=2): pass
if os.fork() == 0:
    signal.alarm(20)
    try:
        if what == "reply": list(chat.reply("b", max_tokens=2))
        if what == "new": list(mlx_stream.ChatSession(model).reply("b", max_tokens=2))
        if what == "stream": list(mlx_stream.stream(model, "b", max_tokens=2))
        if what == "load": mlx_stream.load(folder)
        print("not refused")
    except mlx_stream.errors.ValueRefused as error:
        print(error)
    os._exit(0)
_, status = os.wait()
print("signal", os.WTERMSIG(status), flush=True)
list(chat.reply("c", max_tokens=2))  # the parent is as it was
"""


@pytest.mark.parametrize("what", ["reply", "new", "stream", "load"])
def test_a_forked_process_is_refused_at_once(tmp_path, what):
    config = tiny_config(max_position_embeddings=4096)
    folder = write_tiny(tmp_path / "tiny", config, tiny_weights(config))
    command = [sys.executable, "-c", CODE, str(folder), what]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60)
    line, ended = found.stdout.splitlines()
    assert "forked after a model was loaded: start" in line and ended == "signal 0", found.stderr
    assert found.returncode == 0, found.stderr
