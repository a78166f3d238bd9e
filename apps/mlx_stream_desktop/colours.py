"""Colours of what is drawn by hand, for a light and a dark desktop."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Colours:
    """Text and grounds; `faded` is for what is no longer attended."""

    text: str
    faded: str
    accent: str
    alarm: str
    ground: str
    asked: str
    answered: str
    track: str
    pinned: str
    ring: str


LIGHT = Colours(
    text="#1d1d1f",
    faded="#8a8a90",
    accent="#0a5bd3",
    alarm="#b3261e",
    ground="#ffffff",
    asked="#dcebff",
    answered="#efeff2",
    track="#dcdce1",
    pinned="#7a4fd0",
    ring="#2f7de1",
)
DARK = Colours(
    text="#f2f2f4",
    faded="#85858c",
    accent="#7ab4ff",
    alarm="#ff8a80",
    ground="#1e1e20",
    asked="#1f3f6b",
    answered="#37373b",
    track="#48484d",
    pinned="#b18cff",
    ring="#5aa2ff",
)
