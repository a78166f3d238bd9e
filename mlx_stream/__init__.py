"""Run Llama and Mistral models on a stream without end, in memory that never grows."""

from mlx_stream import backend as backend  # before anything imports MLX
