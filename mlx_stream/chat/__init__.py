"""Conversations on one stream, and how they are saved; knows no thread and no terminal."""
