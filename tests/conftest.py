"""What every test gets: OpenBLAS before MLX, no home directory, no Hub, and shared models."""

import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# A script's background job ignores Ctrl-C, and so would every program started by a test.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# On Linux MLX compiles kernels into the temporary folder, and a second process would load a file
# that is still being written.
if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ["TMPDIR"] = str(Path(tempfile.gettempdir()) / f"mlx_stream-tests-{worker}")
    Path(os.environ["TMPDIR"]).mkdir(exist_ok=True)
    tempfile.tempdir = None

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # otherwise M5 computes float32 with less precision

import mlx_stream  # noqa: F401  # isort: skip  # first: it loads OpenBLAS ahead of MLX

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, settings

from mlx_stream.generate.model import Model
from mlx_stream.load import load
from tests.fakes import tiny_models
from tests.fakes.shell import SMALL
from tests.fakes.tiny import tiny_config, write_letters, write_model

# huggingface_hub reads the environment once, when it is imported. Nothing listens on port 9.
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

    The cache is in the `MLX_STREAM_HOME` that was set when the tests began, or else the default.
    """
    return load("starter", dtype="float32", keep_quantized=False)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Model]:
    """Return a function that makes a `Model` without a tokenizer from changes to `tiny_config`."""

    def make(dtype: mx.Dtype = mx.float32, seed: int = 0, **changes) -> Model:
        raw = tiny_config(**changes)
        return tiny_models.make(raw, tiny_models.tensors_of(raw, seed), dtype)

    return make


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model that writes random text."""
    return write_model(tmp_path_factory.mktemp("cli") / "tiny")


@pytest.fixture(scope="session")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model that, when greedy, writes letters forever and nothing else."""
    return write_letters(tmp_path_factory.mktemp("cli") / "letters", tiny_config(**SMALL))


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a valid model, which tests must not change."""
    return write_model(tmp_path_factory.mktemp("bad") / "model", **SMALL)


@pytest.fixture
def model(whole: Path, tmp_path: Path) -> Path:
    """Return a copy of `whole` for a test to damage."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run each test in an empty folder, and check that nothing is left there or in the caches."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    yield
    places = (here, Path(os.environ["MLX_STREAM_HOME"]), Path(os.environ["HF_HOME"]))
    left = [path for place in places for path in place.rglob("*") if not path.is_dir()]
    assert left == []
