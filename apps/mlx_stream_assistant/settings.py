"""What an assistant is told to do; knows not how it is done."""

import os
from dataclasses import dataclass
from pathlib import Path

from mlx_stream_assistant.paths import AssistantError

SYSTEM = (
    "You read along with notes, logs and other texts as they are written. "
    "Answer questions about them briefly, from what you have read."
)
# Minutes between two notes, or two snapshots, at most: a year.
LONGEST = 60 * 24 * 366


@dataclass(frozen=True)
class Settings:
    """What an assistant was told to do.

    Attributes:
        follow, folders, stdin: what it reads.
        from_end: of files that it did not follow before, read what is added from now on.
        notes: where it writes notes; None writes none.
        every: minutes between two notes.
        snapshot_every: minutes between two snapshots while text arrives.
    """

    name: str = "main"
    model: str = "starter"
    follow: tuple[Path, ...] = ()
    folders: tuple[Path, ...] = ()
    stdin: bool = False
    from_end: bool = False
    notes: Path | None = None
    every: float = 60.0
    window: int | None = None
    system: str = SYSTEM
    snapshot_every: float = 5.0
    pause_on_battery: bool = False

    def check(self) -> None:
        """See that it can be done.

        Raises:
            AssistantError: it cannot.
        """
        if not (self.follow or self.folders or self.stdin):
            raise AssistantError(
                "there is nothing to read: give --follow FILE, --folder FOLDER or --stdin"
            )
        for option, minutes in (("--every", self.every), ("--snapshot-every", self.snapshot_every)):
            if not 0 < minutes <= LONGEST:
                raise AssistantError(f"{option} takes minutes, above 0, not {minutes:g}")
        read = (*self.follow, *self.folders)
        for text in (*map(str, read), str(self.notes), self.model, self.system):
            if not text.isascii() and text != text.encode("utf-8", "replace").decode():
                raise AssistantError(f"{text!a}: is not valid UTF-8: rename it, or leave it out")
        for path in read:
            if self.notes is not None and os.path.realpath(path) == os.path.realpath(self.notes):
                raise AssistantError(f"{path}: cannot be both read and written")
        for folder in self.folders:
            for other in self.folders:
                if folder != other and folder.is_relative_to(other):
                    raise AssistantError(f"{folder}: is read as a part of {other}: leave it out")
