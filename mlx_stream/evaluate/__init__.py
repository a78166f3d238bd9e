"""Measurements of models on streams: what the README's figures come from."""
