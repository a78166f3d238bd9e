"""Converts models to other bit widths or types in bounded memory; recipes and their cost."""
