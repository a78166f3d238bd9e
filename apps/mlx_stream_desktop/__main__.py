"""The desktop app as a program: `python -m mlx_stream_desktop`, and for Briefcase."""

from mlx_stream_desktop.app import main

main()
