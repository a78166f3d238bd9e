"""What every test gets: OpenBLAS before MLX, no home directory, no Hub; and tiny models."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, settings
from tiny import tiny_config, tiny_weights

from mlx_stream.config import read_config
from mlx_stream.load import Model, load
from mlx_stream.rope import Rope
from mlx_stream.tokenizer import Tokenizer
from mlx_stream.weights import build, weight_bytes

# huggingface_hub reads the environment once, when it is imported: nothing listens on port 9.
NOWHERE = "http://127.0.0.1:9"
os.environ["HF_ENDPOINT"] = NOWHERE
os.environ["HF_HOME"] = str(Path(tempfile.gettempdir()) / "mlx_stream-tests-have-no-hub")
for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(name, None)

from huggingface_hub import constants  # noqa: E402

settings.register_profile(
    "default",
    deadline=None,
    max_examples=40,
    stateful_step_count=12,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("ci", settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def isolated(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Give each test a home of its own and a Hub that does not answer, unless marked `starter`."""
    if request.node.get_closest_marker("starter"):
        return
    assert "starter" not in request.fixturenames, "mark a test that uses the starter: `starter`"
    home = tmp_path_factory.mktemp("home", numbered=True)
    monkeypatch.setenv("MLX_STREAM_HOME", str(home / "mlx_stream"))
    monkeypatch.setenv("HF_HOME", str(home / "huggingface"))
    monkeypatch.setattr(constants, "HF_HOME", str(home / "huggingface"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "huggingface" / "hub"))


@pytest.fixture(scope="session")
def starter() -> Model:
    """Load the starter from the package's own cache: fetched once, kept between test runs.

    The cache is `MLX_STREAM_HOME` of whoever started the tests, else the default one.
    """
    return load("starter", dtype="float32", keep_quantized=False)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Model]:
    """Return a function from changes of `tiny_config` to a `Model` without a tokenizer."""

    def make(dtype: mx.Dtype = mx.float32, seed: int = 0, **changes) -> Model:
        raw = tiny_config(**changes)
        tensors = {name: mx.array(w) for name, w in tiny_weights(raw, seed).items()}
        config = read_config(raw)
        needed = weight_bytes(config, tensors, dtype, False)
        network = build(config, tensors, dtype, False)
        rope = Rope(config.rope, config.head_dim)
        nothing = cast(Tokenizer, None)
        return Model("tiny", config, network, nothing, rope, dtype, False, needed)

    return make
