"""The process that runs for days: sources -> journal -> listener, notes, and the socket."""

import os
import resource
import select
import signal
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Protocol

import mlx_stream
from mlx_stream.errors import ComputeError, MlxStreamError
from mlx_stream_assistant.battery import on_battery
from mlx_stream_assistant.feeder import Feeder
from mlx_stream_assistant.journal import Chunk, Journal
from mlx_stream_assistant.notes import NotesFile
from mlx_stream_assistant.notes_folder import NotesFolder
from mlx_stream_assistant.paths import AssistantError, AssistantPaths, assistant_paths, lock
from mlx_stream_assistant.requests import RequestHandler, stats_of
from mlx_stream_assistant.settings import Settings
from mlx_stream_assistant.socket_server import SocketServer
from mlx_stream_assistant.stdin import StandardInput
from mlx_stream_assistant.tail import TailedFile

# Seconds between two looks at the sources, when nothing arrives and when there is no room.
IDLE, FULL = 1.0, 0.05
# Characters the listener may be behind: a question waits until they are read.
BACKLOG = 10_000
# What was read is asked for, not made up; a penalty on repetition would keep it from being quoted.
SAMPLING = mlx_stream.Sampling(temperature=0.0)
# Seconds between two looks at the battery, and after which what the disk refused is tried again.
POWER, AGAIN = 30.0, 10.0
# Seconds after the start before a note is written that fell due meanwhile.
SETTLING = 60.0
# Seconds between two failures of the device, or the stream rests for so long.
BETWEEN_FAILURES = 600.0
# Seconds for what runs to end, of the one that stopping may take.
LAST_WORDS = 0.5


class TextSource(Protocol):
    """What the assistant reads along with."""

    name: str

    @property
    def state(self) -> dict[str, Any]: ...
    def poll(self) -> Chunk | None: ...
    def ack(self, arrival: Chunk) -> None: ...
    def close(self) -> None: ...


class Assistant:
    """One run of an assistant.

    Args:
        tell: told in one line what the user should know.

    Attributes:
        has_ended: after `run`, whether all of its threads have; if not, they need not be awaited.
    """

    def __init__(self, settings: Settings, tell: Callable[[str], None]):
        settings.check()
        self.settings, self._tell = settings, tell
        self._started, self._next_power, self._try_again = time.monotonic(), 0.0, 0.0
        self._failed_at, self._begin_at = float("-inf"), 0.0
        self._stopping, self._paused, self.has_ended = False, False, True
        self._sources: list[TextSource] = []
        self._input: StandardInput | None = None
        self._engine: Any = None
        self._listener: Any = None
        self._noting: threading.Thread | None = None
        self._next_note = 0.0, 0.0
        self._noticed = 0  # of the engine's notices

    def run(self) -> None:
        """Run until it is stopped.

        Raises:
            MlxStreamError: it cannot begin, or go on.
        """
        where = assistant_paths(self.settings.name)
        with ExitStack() as stack:
            stack.callback(os.close, lock(where.lock))
            self._wake = stack.enter_context(Wake(self._stop))
            self._journal = Journal(where.journal)
            stack.callback(self._journal.close)
            self._note_in(self._until_the_next_note())
            self._open_sources()
            self.desk = RequestHandler(self._journal, self._open_diary(), self._status, self.stop)
            door = SocketServer(where.socket, self.desk.answer)
            stack.callback(door.close)
            self._engine = mlx_stream.Engine(self.settings.model)
            stack.callback(self._end)
            while not self._stopping:
                self._step(door, where)

    def stop(self) -> None:
        """Have `run` return within a second; from any thread."""
        self._stop()
        self._wake.wake()

    def _stop(self) -> None:
        self._stopping = True

    def _end(self) -> None:
        """Have everything end that runs; what is not done by then is done at the next start."""
        self._stopping = True
        self.desk.stopping.set()
        if self.desk.feeder:
            self.desk.feeder.stop(LAST_WORDS)
        self.has_ended = self._engine.close(timeout=LAST_WORDS / 2)

    def _step(self, door: SocketServer, where: AssistantPaths) -> None:
        """Do what there is to do, then wait until there may be something again."""
        feeder = self.desk.feeder
        rests = time.monotonic() < self._begin_at
        if feeder is None:
            if not rests:
                self._begin_when_loaded(where)
        elif failure := feeder.failure or self._listener.error:
            self._begin_again(feeder, failure)
        else:
            self._look_at_the_battery()
            self._note_if_due()
        wait = FULL if not rests and (feeder is None or feeder.is_full) else IDLE
        can_read = feeder and not feeder.is_full and not self._paused
        if can_read and self._read():
            wait = 0.0
        steps = {self._wake: self._wake.clear, door: door.admit}
        if can_read and self._input and self._input.wants:
            steps[self._input] = self._input.read
        ready, _, _ = select.select([*steps], [], [], wait)
        for one in ready:
            steps[one]()

    # --- beginning ---

    def _open_sources(self) -> None:
        settings, journal = self.settings, self._journal
        for path in settings.follow:
            known = journal.source(str(path))
            place = known.place if known and known.kind == "file" else None
            self._sources.append(TailedFile(path, place, self._tell, settings.from_end))
        notes = {source.name: source.place for source in journal.sources("note")}
        others = {os.path.realpath(path) for path in settings.follow}
        if settings.notes:
            others.add(os.path.realpath(settings.notes))
        for path in settings.folders:
            inside = {name: p for name, p in notes.items() if Path(name).is_relative_to(path)}
            excluded = lambda note: os.path.realpath(note) in others  # noqa: E731
            self._sources.append(NotesFolder(path, inside, self._tell, excluded))
        if settings.stdin:
            self._input = StandardInput(self._tell)
            self._sources.append(self._input)

    def _open_diary(self) -> NotesFile | None:
        if self.settings.notes is None:
            return None
        diary = NotesFile(self.settings.notes, self._journal)
        diary.finish()
        diary.check()
        return diary

    def _begin_when_loaded(self, where: AssistantPaths) -> None:
        """Go on with the stream, from its snapshot or from what the journal keeps."""
        try:
            self._engine.wait(timeout=FULL)
            if self._listener is None:
                self._listener = self._listen(where.snapshot)
            self._listener.wait(timeout=FULL)
        except TimeoutError:
            return
        finally:
            for notice in self._engine.notices[self._noticed :]:
                self._noticed += 1
                self._tell(notice)
        for notice in self._listener.stats.notices:
            self._tell(notice)
        journal, fed = self._journal, self._apply_note(where.snapshot)
        if fed is None:
            fed = journal.first - 1
            if fed < journal.last:
                kept = journal.last - fed
                self._tell(f"the stream is built again from the latest {pieces(kept)}")
        every = 60 * self.settings.snapshot_every
        self.desk.listener = self._listener
        self.desk.feeder = Feeder(self._listener, journal, where.snapshot, fed, every, self._tell)
        attended = f", {self._listener.stats.attended:,} tokens attended" if journal.last else ""
        self._tell(f"{self.settings.name}: reading{attended}")

    def _apply_note(self, snapshot: Path) -> int | None:
        """Return the last chunk in the stream; None if there is none in it."""
        note, journal = self._listener.restored, self._journal
        if note is None:
            return None
        fed = note.get("chunk")
        ours = note.get("journal") == journal.id
        if ours and isinstance(fed, int) and journal.first - 1 <= fed <= journal.last:
            return fed
        self._tell(f"{snapshot}: is not of this journal, or older than what it keeps")
        self._listener.close()
        self._listener = self._listen(None)
        return None

    def _listen(self, snapshot: Path | None) -> Any:
        settings = self.settings
        return self._engine.listen(
            system=settings.system,
            window=settings.window,
            sampling=SAMPLING,
            backlog=BACKLOG,
            restore=snapshot,
        )

    def _begin_again(self, feeder: Feeder, failure: Exception) -> None:
        """Drop a stream that could not be computed and go on from its snapshot, as after a crash.

        Raises:
            Exception: it was something else.
        """
        if not isinstance(failure, ComputeError):
            raise failure
        before, self._failed_at = self._failed_at, time.monotonic()
        again = self._failed_at < before + BETWEEN_FAILURES
        self._begin_at = self._failed_at + BETWEEN_FAILURES * again
        when = f" in {BETWEEN_FAILURES / 60:.0f} minutes" if again else ""
        self._tell(f"{failure}; the stream goes on from its latest snapshot{when}")
        feeder.stop(0)
        self._listener.close()
        self.desk.feeder = self.desk.listener = self._listener = None

    # --- going on ---

    def _read(self) -> bool:
        """Write to the journal what each source has, once; return whether one had anything."""
        if time.monotonic() < self._try_again:
            return False
        any_new, failures = False, set()
        for source in self._sources:
            try:
                arrival = source.poll()
                if arrival is not None:
                    self._journal.append(arrival)
                    source.ack(arrival)
                    any_new = True
            except AssistantError as error:
                failures.add(str(error))
        for failure in sorted(failures):
            self._tell(f"{failure}; tried again every {AGAIN:.0f} seconds")
            self._try_again = time.monotonic() + AGAIN
        if any_new and self.desk.feeder:
            self.desk.feeder.wake()
        return any_new

    def _look_at_the_battery(self) -> None:
        if not self.settings.pause_on_battery or time.monotonic() < self._next_power:
            return
        self._next_power = time.monotonic() + POWER
        paused = on_battery()
        if paused != self._paused:
            self._tell("paused: on battery" if paused else "reading: on mains power")
        self._paused = paused

    def _note_if_due(self) -> None:
        """Write a note in the background, if one is due and anything is new."""
        if self.desk.notes is None or self._paused or not self._note_is_due():
            return
        if self._noting is None or not self._noting.is_alive():
            self._noting = threading.Thread(target=self._note, name="note", daemon=True)
            self._noting.start()

    def _note_in(self, seconds: float) -> None:
        # By two clocks: one stands still while a Mac sleeps, the other may be set back.
        self._next_note = time.monotonic() + seconds, time.time() + seconds

    def _note_is_due(self) -> bool:
        clock, date = self._next_note
        return time.monotonic() >= clock or time.time() >= date

    def _until_the_next_note(self) -> float:
        """Return in how many seconds the first note of this run is due."""
        every = 60 * self.settings.every
        _, noted_at = self._journal.last_note_chunk
        # The system's clock may have been set back since: then that note was just written.
        left = every - max(0.0, time.time() - noted_at)
        return max(left, min(every, SETTLING)) if noted_at else every

    def _note(self) -> None:
        try:
            self.desk.note()
        except MlxStreamError as error:
            if not self._stopping:
                self._tell(str(error))
        finally:
            self._note_in(60 * self.settings.every)

    # --- how it stands ---

    def _status(self) -> dict[str, Any]:
        """Return what `status` says."""
        desk, settings = self.desk, self.settings
        state = "paused" if self._paused else "reading"
        if desk.feeder is None:
            state = "waiting" if time.monotonic() < self._begin_at else "loading"
        _, noted_at = self._journal.last_note_chunk
        sources = {source.name: self._journal.source(source.name) for source in self._sources}
        return {
            "name": settings.name,
            "state": "stopping" if self._stopping else state,
            "pid": os.getpid(),
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "model": settings.model,
            "resident_bytes": resident_bytes(),
            "memory": list(self._engine.memory) if self._engine else None,
            **stats_of(desk),
            "bytes_read": self._journal.bytes,
            "notes": str(settings.notes) if settings.notes else None,
            "last_note": round(noted_at) or None,
            "sources": [
                {"name": source.name, **source.state, **source_state(sources[source.name])}
                for source in self._sources
            ],
        }


class Wake:
    """A pipe that ends a wait: for other threads, and when a signal asks to stop."""

    def __init__(self, stop: Callable[[], None]):
        self._stop = stop

    def __enter__(self) -> "Wake":
        self._read, self._write = os.pipe()
        for file in (self._read, self._write):
            os.set_blocking(file, False)
        self._before = {
            number: signal.signal(number, lambda *_: self._stop())
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
            if signal.getsignal(number) != signal.SIG_IGN  # as nohup has it
        }
        # The handler runs between two bytecodes; this byte ends the wait so that there are some.
        signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(-1)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        os.close(self._read)
        os.close(self._write)

    def fileno(self) -> int:
        return self._read

    def wake(self) -> None:
        with suppress(BlockingIOError):
            os.write(self._write, b"!")

    def clear(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._read, 4096)


def pieces(count: int) -> str:
    return f"{count:,} {'piece' if count == 1 else 'pieces'} of text"


def source_state(source: Any) -> dict[str, Any]:
    return {"bytes_read": source.bytes, "crc": source.crc} if source else {}


def resident_bytes() -> int:
    """Return this process's resident memory; on macOS the most there ever was."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
