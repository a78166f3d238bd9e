"""Applies chat templates, which are untrusted programs, to streams, within resource limits."""
