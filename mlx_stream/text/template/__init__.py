"""Chat templates, which are programs of strangers: used on a stream, and run within limits."""
