"""A saved conversation of a few hundred turns; conversation.py holds one of ten thousand."""

import mlx_stream  # isort: skip  # first: it loads OpenBLAS ahead of MLX

from tests.fakes.tiny import write_model
from tests.long.conversation import HOW_OFTEN, converse, flat


def test_a_long_conversation_is_well_formed_after_every_turn_and_nothing_grows(tmp_path):
    folder = write_model(tmp_path)
    found = converse(mlx_stream.load(folder, dtype="float32", keep_quantized=False), 300)
    assert flat(found), found
    assert found["evicted_exchanges"] > 200 and all(found[act] for act in HOW_OFTEN)
