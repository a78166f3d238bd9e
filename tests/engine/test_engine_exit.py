"""Programs with an engine exit on their own: during a reply, without close(), while loading."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.engines import DEADLINE

BEGIN = """
import sys, threading, os, signal, asyncio
import mlx_stream
from mlx_stream.sampling import Sampling
engine = mlx_stream.Engine(sys.argv[1], dtype="float32", keep_quantized=False)
chat = engine.session(sampling=Sampling(temperature=0), max_tokens=1_000_000, name="kept")
"""
ENDS = {
    "in a reply": "next(chat.reply('Hi'))\npieces = chat.reply('Hi')\nnext(pieces)\nprint('end')",
    "while others read": """
def read():
    try:
        for piece in chat.reply('Hi'): begun.set()
    except mlx_stream.errors.EngineClosed: pass
begun = threading.Event()
threading.Thread(target=read, daemon=True).start()
begun.wait()
print('end')
""",
    "with a listener": """
listener = engine.listen()
for _ in range(20): listener.feed('and the man of the house ' * 100, timeout=60)
print('end')
""",
    "in asyncio": """
async def main():
    async for piece in chat.areply('Hi'):
        break
    print('end')
asyncio.run(main())
""",
    "after close in a reply": "next(chat.reply('Hi'))\nengine.close()\nprint('end')",
    "by an exception": """
sys.excepthook = lambda *_: print('end')
try:
    next(chat.reply('Hi'))
    raise ValueError
finally:
    pass
""",
}


def environment(home: Path) -> dict[str, str]:
    return {
        **os.environ,
        "MLX_STREAM_HOME": str(home),
        "OPENBLAS_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "PYTHONWARNINGS": "error",
    }


def ran(program: str, letters: Path, home: Path) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", program, str(letters)],
        env=environment(home),
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )


@pytest.mark.parametrize("how", ENDS)
def test_a_program_ends(letters, tmp_path, how):
    program = BEGIN + ENDS[how]
    ended = ran(program, letters, tmp_path)
    assert ended.stdout == "end\n" and ended.stderr == ""
    assert ended.returncode == (1 if how == "by an exception" else 0)


def test_a_program_that_ends_without_close_loses_no_turn(letters, tmp_path):
    program = BEGIN + "list(chat.reply('One?', 5))\nnext(chat.reply('Two?'))\n"
    again = BEGIN + (
        "chat.wait(60)\n"
        "print([(e.question, e.finish) for e in chat.exchanges], chat.stats.notices)\n"
        "engine.close()"
    )
    outputs = [ran(text, letters, tmp_path).stdout for text in (program, again)]
    # Its stream was saved too: nothing is read again.
    assert outputs == ["", "[('One?', 'length'), ('Two?', 'interrupted')] []\n"]


# What is started before a fork, and how the child process waits for it.
IN_A_FORK = {
    "opening": ("", "chat.wait()"),
    "a session": ("list(chat.reply('One?', 5))", "engine.session()"),
    "reply": ("pieces = chat.reply('Hi')\nnext(pieces)", "list(pieces)"),
    "feed": ("listener = engine.listen(backlog=9)", "while True: listener.feed('x' * 9, 60)"),
}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("begun", IN_A_FORK)
def test_calls_begun_before_a_fork_are_refused_after_it(letters, tmp_path, begun):
    begin, wait = IN_A_FORK[begun]
    seconds = 0 if begun in ("reply", "a session") else 2  # so that it is still pending at the fork
    program = (
        "import time, warnings; warnings.simplefilter('ignore')\n"
        "from mlx_stream.engine.model_host import ModelHost; load = ModelHost.load\n"
        f"ModelHost.load = lambda host: (time.sleep({seconds}), load(host))\n"
        f"{BEGIN}\n{begin}\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    signal.alarm(20)\n"
        "    try:\n"
        f"        {wait}\n"
        "    except mlx_stream.errors.EngineClosed as error:\n"
        "        os._exit(7 if 'fork' in str(error) else 8)\n"
        "    os._exit(9)\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))\n"
    )
    ended = ran(program, letters, tmp_path)
    assert ended.stdout == "7\n", ended.stderr
