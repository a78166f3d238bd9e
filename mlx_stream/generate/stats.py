"""The counts, speeds and notices of a stream; computes nothing."""

from collections.abc import Callable
from dataclasses import dataclass, field

MOST_NOTICES = 8


@dataclass
class Stats:
    """Counts for a stream. Times are in seconds, memory is in bytes."""

    prompt_tokens: int = 0
    reply_tokens: int = 0
    decoded_tokens: int = 0  # except each reply's first token, whose time counts as the prompt's
    prompt_seconds: float = 0.0
    reply_seconds: float = 0.0
    drafted_tokens: int = 0  # guesses that were verified
    accepted_tokens: int = 0  # guesses that were right
    settled: int = 0  # tokens read so that the stream matches the template's rendering
    attended: int = 0
    evicted: int = 0
    evicted_exchanges: int = 0
    recalled: int = 0  # exchanges quoted before the last question
    pinned: int = 0  # attended tokens of the system prompt, which are never evicted
    sinks: int = 0
    window: int = 0
    cache_bytes: int = 0
    seed: int = 0
    notices: list[str] = field(default_factory=list)  # the latest notices

    def add_notices(self, *lines: str) -> None:
        """Add lines for the user in a new list, so that copies of the old one do not change."""
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
    return f"the window of {window:,} tokens is full: the oldest tokens are now being evicted"


def cumulative(
    progress: Callable[[int, int], None] | None, total: int
) -> Callable[[int], None] | None:
    """Return a callback that takes each step's count and reports the running total."""
    if progress is None:
        return None
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return step
