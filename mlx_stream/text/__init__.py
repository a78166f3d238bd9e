"""Converts text to token ids and back, and renders chat templates; independent of models."""
