"""What a stream has done, in numbers, and what its user should know; computes nothing."""

from collections.abc import Callable
from dataclasses import dataclass, field

MOST_NOTICES = 8


@dataclass
class Stats:
    """What a stream has done; times in seconds, memory in bytes."""

    prompt_tokens: int = 0
    reply_tokens: int = 0
    decoded_tokens: int = 0  # of replies, without each one's first, which the prompt's time holds
    prompt_seconds: float = 0.0
    reply_seconds: float = 0.0
    drafted_tokens: int = 0  # guessed and verified...
    accepted_tokens: int = 0  # ...and right
    settled: int = 0  # read so that the stream holds what the template renders
    attended: int = 0
    evicted: int = 0
    evicted_exchanges: int = 0
    pinned: int = 0  # of the attended: a system prompt's, which never leave
    sinks: int = 0
    window: int = 0
    cache_bytes: int = 0
    seed: int = 0
    notices: list[str] = field(default_factory=list)  # the latest

    def add_notices(self, *lines: str) -> None:
        """Keep what the user should know, in a list of its own: copies stay as they are."""
        self.notices = [*self.notices, *lines][-MOST_NOTICES:]

    @property
    def prompt_tokens_per_second(self) -> float:
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.decoded_tokens / self.reply_seconds if self.reply_seconds else 0.0

    def __str__(self) -> str:
        count = self.evicted_exchanges
        guessed = f"{self.accepted_tokens:,} of {self.drafted_tokens:,} guesses right; "
        guessed = guessed if self.drafted_tokens else ""
        exchanges = f" ({count:,} {'exchange' if count == 1 else 'exchanges'})" if count else ""
        return (
            f"{self.attended:,} of {self.sinks + self.window:,} tokens attended, "
            f"{self.evicted:,} evicted{exchanges}; {self.tokens_per_second:.1f} tok/s, reading "
            f"{self.prompt_tokens_per_second:.0f} tok/s; {guessed}cache "
            f"{self.cache_bytes / 1e6:.1f} MB; seed {self.seed}"
        )


def eviction_notice(window: int) -> str:
    return f"the window of {window:,} tokens is full: the oldest have begun to leave attention"


def cumulative(
    progress: Callable[[int, int], None] | None, total: int
) -> Callable[[int], None] | None:
    """Turn steps' token counts into a running total."""
    if progress is None:
        return None
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return step
