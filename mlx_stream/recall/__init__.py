"""Finds earlier exchanges by their words and quotes them; independent of models and streams."""
