"""Writes a model in other bits or another type, in bounded memory; recipes and their cost."""
