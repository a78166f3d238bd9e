"""The model that tests of conversations share: two layers, and heads that can be quantized."""

import pytest

from mlx_stream.load import Model, load
from tests.fakes.tiny import tiny_config, tiny_weights, write_tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    config = tiny_config(head_dim=64)
    return write_tiny(tmp_path_factory.mktemp("chat") / "model", config, tiny_weights(config))


@pytest.fixture(scope="session")
def model(folder) -> Model:
    return load(folder, dtype="float32", keep_quantized=False)
