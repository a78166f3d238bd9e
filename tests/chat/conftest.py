"""The model that the conversation tests share: two layers, and heads that can be quantized."""

import pytest

from mlx_stream.generate.model import Model
from mlx_stream.load import load
from tests.fakes.tiny import write_model


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("chat") / "model", head_dim=64)


@pytest.fixture(scope="session")
def model(folder) -> Model:
    return load(folder, dtype="float32", keep_quantized=False)
