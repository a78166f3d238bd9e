"""Whether this machine runs on its battery; knows nothing else."""

import subprocess
import sys
from pathlib import Path

SUPPLIES = Path("/sys/class/power_supply")


def on_battery() -> bool:
    """Return whether this machine draws on a battery now; False where that cannot be told."""
    if sys.platform == "darwin":
        return battery_in(pmset())
    return discharging(SUPPLIES)


def pmset() -> str:
    command = ["/usr/bin/pmset", "-g", "batt"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def battery_in(report: str) -> bool:
    """Return what `pmset -g batt` says.

    >>> battery_in("Now drawing from 'Battery Power'\\n -InternalBattery-0 (id=1) 80%; discharging")
    True
    """
    return "drawing from 'Battery Power'" in report


def discharging(supplies: Path) -> bool:
    """Return whether one of the system's own batteries is discharging, as Linux's sysfs says.

    A mouse's battery, of scope "Device", is none of them.
    """
    for supply in sorted(supplies.glob("*")):
        kind, status, scope = (read(supply / name) for name in ("type", "status", "scope"))
        if (kind, status) == ("Battery", "Discharging") and scope != "Device":
            return True
    return False


def read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
