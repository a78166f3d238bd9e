"""`python -m mlx_stream_desktop`, and what Briefcase starts."""

from mlx_stream_desktop.app import main

main()
