"""A hostile checkpoint must cause a one-line error from the package, or load and run.

python -m tests.fuzz.checkpoints --count 3000 --seed 1
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_stream import ChatSession, load
from mlx_stream.checkpoint.folder import read_folder
from mlx_stream.errors import MlxStreamError
from mlx_stream.generate.completion import stream
from mlx_stream.quantize.convert import ConvertOptions, convert_model
from mlx_stream.quantize.recipes import uniform_recipe
from mlx_stream.sampling import Sampling
from tests.fuzz import driver
from tests.fuzz.checkpoint_mutations import OTHERS, mutate, write_originals

SECONDS = 2.0
GROWTH = 256 << 20
QUESTION = "The theory: in 1234 they'll see <|im_end|> Été 東京 🙂 " + "a" * 30 + "! e"


def load_and_talk(path: Path) -> None:
    """Load a model, complete a text and hold a conversation with it."""
    model = load(path, keep_quantized=path.stem.endswith("q"))
    "".join(piece.text for piece in stream(model, QUESTION, 3, Sampling(0.0), window=16))
    chat = ChatSession(model, "Be brief.", window=min(64, model.config.max_position_embeddings - 4))
    for question in ("Hi", QUESTION):
        "".join(piece.text for piece in chat.reply(question, max_tokens=2))


def read_truly(path: Path) -> None:
    """Read a folder's tensors, and compare them with a plain reading of the same bytes."""
    if not path.is_dir():
        return
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
    found = read_folder(path).tensors
    for shard in path.glob("*.safetensors"):
        content = shard.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        for name, entry in json.loads(content[8:begin]).items():
            if name != "__metadata__" and name in found:
                start, stop = (begin + offset for offset in entry["data_offsets"])
                array = found[name]
                bits = np.array(mx.view(array, unsigned[array.itemsize]))
                assert list(array.shape) == entry["shape"], name
                assert bits.tobytes() == content[start:stop], name


def convert_and_load(path: Path) -> None:
    """Convert a model and load the result; a conversion must be complete or leave nothing."""
    out = path.parent / "out" / "converted"
    shutil.rmtree(out.parent, ignore_errors=True)
    recipe = uniform_recipe(4, 32) if path.stem.endswith("q") else None
    try:
        convert_model(str(path), out, ConvertOptions(recipe, None if recipe else "float16"))
    except MlxStreamError:
        assert not out.parent.exists() or list(out.parent.iterdir()) == [], "something is left"
        raise
    load(out)


# Every way in which this package opens an untrusted checkpoint.
TRIES: list[Callable[[Path], None]] = [load_and_talk, read_truly, convert_and_load]


def attempt(path: Path) -> tuple[str, str]:
    """Return the outcome for a file, and the line that reports it."""
    outcome = ("ran", "")
    for way in TRIES:
        try:
            way(path)
        except MlxStreamError as error:
            line = str(error)
            # The command line folds line breaks that come from a file's own text.
            assert len(line) <= 1_000, f"{way.__name__}: {len(line)} characters: {line[:200]}"
            outcome = (type(error).__name__, line)
    return outcome


def prepare(place: Path) -> None:
    write_originals(place / "originals")


def start(place: Path) -> driver.Judge:
    results = place / "originals" / "out"  # also those of an earlier worker
    shutil.rmtree(results, ignore_errors=True)
    originals = sorted((place / "originals").iterdir())
    for original in originals:
        expected = "ConfigError" if original.name in OTHERS else "ran"
        assert attempt(original)[0] == expected, original
        convert_and_load(original)
    shutil.rmtree(results)

    def judge(draw: random.Random) -> tuple[str, driver.Open]:
        shutil.rmtree(place / "work", ignore_errors=True)
        (place / "work").mkdir()
        copy = place / "work" / draw.choice(("m", "mq"))
        done, path = mutate(draw.choice(originals), copy, draw)
        return done, lambda: attempt(path)

    return judge


if __name__ == "__main__":
    driver.main("checkpoints")
