"""Tiny configs that are read or refused."""

import pytest

from mlx_stream.config import ModelConfig, read_config
from mlx_stream.errors import ConfigError
from tests.fakes.tiny import tiny_config


def refused(raw: dict) -> str:
    """Return the message with which a config is refused: one line, short enough to read."""
    with pytest.raises(ConfigError) as error:
        read_config(raw)
    message = str(error.value)
    assert message.startswith("config")
    assert len(message.splitlines()) == 1
    return message


def read(**changes) -> ModelConfig:
    return read_config(tiny_config(**changes))
