"""`python -m mlx_stream`; it only starts the command line."""

from mlx_stream.cli import main

main()
