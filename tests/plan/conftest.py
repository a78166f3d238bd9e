"""What tests of plans gets: caches and a Hub of our own."""

from tests.fakes.loopback import home_fixture, model_fixture, served_fixture

__all__ = ["home_fixture", "model_fixture", "served_fixture"]
