"""Checks whether this machine is running on battery power."""

import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SUPPLIES = Path("/sys/class/power_supply")
# Seconds between checks.
BETWEEN = 30.0


class Battery:
    """This machine's battery, checked periodically."""

    def __init__(self) -> None:
        self._next_look, self._in_use = 0.0, False

    def in_use(self) -> bool:
        """Return whether the machine was on battery power at the last check; False if unknown."""
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + BETWEEN
            mac = sys.platform == "darwin"
            self._in_use = is_battery_power(pmset()) if mac else is_discharging(SUPPLIES)
        return self._in_use


def pmset() -> str:
    command = ["/usr/bin/pmset", "-g", "batt"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def is_battery_power(report: str) -> bool:
    """Return whether `pmset -g batt` reports battery power."""
    return "drawing from 'Battery Power'" in report


def is_discharging(supplies: Path) -> bool:
    """Return whether a battery is discharging, according to Linux's sysfs; ignores peripherals."""
    for supply in supplies.glob("*"):
        found = {}
        for name in ("type", "status", "scope"):
            with suppress(OSError):
                found[name] = (supply / name).read_text("utf-8", "replace").strip()
        ours = found.get("type") == "Battery" and found.get("scope") != "Device"
        if ours and found.get("status") == "Discharging":
            return True
    return False
