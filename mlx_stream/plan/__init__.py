"""Calculates what a model needs on a device, before it is loaded."""
