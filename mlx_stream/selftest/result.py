"""What a check found, and what the whole is; knows no check."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CheckOutcome:
    """Whether something holds, None if that cannot be asked here, and what was seen."""

    holds: bool | None
    what: str


@dataclass(frozen=True)
class CheckResult:
    """What a check found, under its name, with what to do where it does not hold."""

    check: str
    holds: bool | None
    found: str
    advice: str


def within(worst: float, allowed: float) -> CheckOutcome:
    """Return whether a difference is small enough; one that is not a number is not."""
    return CheckOutcome(worst <= allowed, f"off by {worst:.1e} at most, {allowed:.0e} allowed")
