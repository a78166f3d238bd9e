"""`python -m mlx_stream`; knows only where the command line is."""

from mlx_stream.cli import main

main()
