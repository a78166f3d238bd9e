"""Chat templates, which are untrusted programs: used on a stream, and run within limits."""
