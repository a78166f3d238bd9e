"""Fixtures for the Hub tests: caches, and a Hub on loopback."""

from tests.fakes.loopback import home_fixture, model_fixture, served_fixture

__all__ = ["home_fixture", "model_fixture", "served_fixture"]
