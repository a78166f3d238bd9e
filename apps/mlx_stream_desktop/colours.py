"""The colours of everything that this app draws itself, for light and dark desktops."""

from dataclasses import dataclass

PAIRS = {
    "text": ("#1d1d1f", "#f2f2f4"),
    "faded": ("#8a8a90", "#85858c"),  # no longer attended
    "accent": ("#0a5bd3", "#7ab4ff"),
    "alarm": ("#b3261e", "#ff8a80"),
    "ground": ("#ffffff", "#1e1e20"),
    "asked": ("#dcebff", "#1f3f6b"),
    "answered": ("#efeff2", "#37373b"),
    "track": ("#dcdce1", "#48484d"),
    "pinned": ("#7a4fd0", "#b18cff"),
    "ring": ("#2f7de1", "#5aa2ff"),
}


@dataclass(frozen=True)
class Colours:
    """A colour for each use."""

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


LIGHT, DARK = (Colours(**{use: pair[dark] for use, pair in PAIRS.items()}) for dark in (0, 1))
