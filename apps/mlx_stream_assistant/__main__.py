"""`python -m mlx_stream_assistant`."""

from mlx_stream_assistant.cli import main

if __name__ == "__main__":
    main()
