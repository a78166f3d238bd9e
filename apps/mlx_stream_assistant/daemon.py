"""The process that runs for days: sources -> journal -> listener, notes, and the socket."""

import os
import resource
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import mlx_stream
from mlx_stream.errors import ComputeError, MlxStreamError
from mlx_stream.program.lock import Lock
from mlx_stream.program.notices import Notify
from mlx_stream_assistant.battery import Battery
from mlx_stream_assistant.feeder import Feeder
from mlx_stream_assistant.journal import Journal
from mlx_stream_assistant.notes import NoteSchedule, NotesFile
from mlx_stream_assistant.notes_folder import NotePlaces, NotesFolder
from mlx_stream_assistant.paths import assistant_paths
from mlx_stream_assistant.requests import RequestHandler
from mlx_stream_assistant.settings import SYSTEM, Settings
from mlx_stream_assistant.socket_server import SocketServer
from mlx_stream_assistant.stdin import StandardInput
from mlx_stream_assistant.tail import TailedFile, place_by_inode

RUNS = (
    "the assistant {name!r} is already running in {holder}: stop it first, "
    "or use another --name here"
)
# Seconds between checks of the sources: while nothing arrives, and while there is no room.
IDLE, FULL = 1.0, 0.05
# How many characters may be waiting to be read; a question has to wait for them.
BACKLOG = 10_000
# Answers should quote what was read; a repetition penalty would prevent that.
SAMPLING = mlx_stream.Sampling(temperature=0.0)
# Seconds between comparisons of how much text is unread.
BETWEEN_COUNTS = 60.0
# Seconds before a failed write to the journal is retried.
AGAIN = 10.0
# After a second device failure within this many seconds, the stream pauses for that long.
BETWEEN_FAILURES = 600.0
# Stopping may take one second; work in progress must end within this fraction of it.
LAST_WORDS = 0.5


class Assistant:
    """One run of an assistant."""

    def __init__(self, settings: Settings, tell: Notify):
        settings.check()
        self.settings, self._tell = settings, tell
        self._where = assistant_paths(settings.name)
        self._started, self._try_again = time.monotonic(), 0.0
        self._failed_at, self._begin_at = float("-inf"), 0.0
        self._stopping, self._paused = False, False
        self._sources: list[TailedFile | NotesFolder | StandardInput] = []
        self._input: StandardInput | None = None
        self._engine: Any = None
        self._listener: Any = None
        self._battery, self._noting = Battery(), threading.Thread()
        self._noticed = 0  # how many of the engine's notices have been handled
        self._unread, self._falls_behind, self._count_at = 0, False, 0.0

    def run(self) -> None:
        """Run until stopped."""
        where, settings = self._where, self.settings
        with ExitStack() as stack:
            stack.enter_context(Lock.acquire(where.lock, RUNS))
            self._woken, self._wake = stack.enter_context(waking_signals(self._stop))
            self._journal = Journal(where.journal)
            stack.callback(self._journal.close)
            self._schedule = NoteSchedule(60 * settings.every, self._journal.last_note[1])
            self._open_sources()
            self.handler = RequestHandler(
                self._journal, self._open_diary(), self._status, self.stop
            )
            server = SocketServer(where.socket, self.handler.answer)
            stack.callback(server.close)
            self._engine = mlx_stream.Engine(settings.model)
            stack.callback(self._end)
            while not self._stopping:
                self._step(server)

    def stop(self) -> None:
        """Make `run` return within a second; may be called from any thread."""
        if not self._stopping:
            self._stop()
            os.write(self._wake, b"!")

    def _stop(self) -> None:
        self._stopping = True

    def _end(self) -> None:
        """End all threads; unfinished work resumes at the next start."""
        self._stopping = True
        self.handler.stopping.set()
        if self.handler.feeder:
            self.handler.feeder.stop(LAST_WORDS)
        self._engine.close(timeout=LAST_WORDS / 2)

    def _step(self, server: SocketServer) -> None:
        """Do the work that is pending, then wait for more."""
        feeder = self.handler.feeder
        rests = time.monotonic() < self._begin_at
        if feeder is None:
            if not rests:
                self._begin_when_loaded()
        elif failure := feeder.failure or self._listener.error:
            self._begin_again(feeder, failure)
        else:
            self._pause_on_battery()
            self._note_if_due()
            self._compare_unread()
        wait = FULL if not rests and (feeder is None or feeder.is_full) else IDLE
        can_read = feeder and not feeder.is_full and not self._paused
        if can_read and self._read():
            wait = 0.0
        steps: dict[Any, Callable[[], None]] = {server: server.admit}
        if can_read and self._input and self._input.wants:
            steps[self._input] = self._input.read
        ready, _, _ = select.select([self._woken, *steps], [], [], wait)
        for one in steps:
            if one in ready:
                steps[one]()

    # --- starting ---

    def _open_sources(self) -> None:
        settings, journal = self.settings, self._journal
        files, notes = journal.places("file"), NotePlaces(journal.places("note"))
        before = [place for name, place in files.items() if Path(name) not in settings.follow]
        for path in settings.follow:
            place = files.get(str(path)) or place_by_inode(path, before)
            begin = settings.from_end
            source = TailedFile(path, place, self._tell, begin, excluded=settings.notes)
            self._sources.append(source)
        others = [*settings.follow]
        if settings.notes:
            others.append(settings.notes)
        for path in settings.folder:
            self._sources.append(NotesFolder(path, notes, self._tell, others))
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

    def _begin_when_loaded(self) -> None:
        """Resume the stream, from its snapshot or from the text in the journal."""
        snapshot = self._where.snapshot
        try:
            self._engine.wait(timeout=FULL)
            if self._listener is None:
                self._listener = self._listen(snapshot)
            self._listener.wait(timeout=FULL)
        except TimeoutError:
            return
        finally:
            for notice in self._engine.notices[self._noticed :]:
                self._noticed += 1
                self._tell(notice)
        for notice in self._listener.stats.notices:
            self._tell(notice)
        journal, fed = self._journal, self._chunk_in_snapshot(snapshot)
        if fed is None:
            fed = journal.first - 1
            if count := journal.last - fed:
                pieces = "piece" if count == 1 else "pieces"
                self._tell(
                    f"the stream is being rebuilt from the latest {count:,} {pieces} of text"
                )
        every = 60 * self.settings.snapshot_every
        self.handler.listener = self._listener
        self.handler.feeder = Feeder(self._listener, journal, snapshot, fed, every, self._tell)
        attended = f", {self._listener.stats.attended:,} tokens attended" if journal.last else ""
        self._tell(f"{self.settings.name}: reading{attended}")

    def _chunk_in_snapshot(self, snapshot: Path) -> int | None:
        """Return the last chunk in the restored stream; None if the stream is new."""
        note, journal = self._listener.restored, self._journal
        if note is None:
            return None
        fed = note.get("chunk")
        ours = note.get("journal") == journal.id
        if ours and isinstance(fed, int) and journal.first - 1 <= fed <= journal.last:
            return fed
        self._tell(f"{snapshot}: belongs to another journal, or is older than this journal's text")
        self._listener.close()
        self._listener = self._listen(None)
        return None

    def _listen(self, snapshot: Path | None) -> Any:
        settings = self.settings
        return self._engine.listen(
            system=settings.system or SYSTEM,
            window=settings.window,
            sampling=SAMPLING,
            backlog=BACKLOG,
            restore=snapshot,
        )

    def _begin_again(self, feeder: Feeder, failure: Exception) -> None:
        """After a failed computation, resume the stream from its snapshot, as after a crash."""
        if not isinstance(failure, ComputeError):
            raise failure
        before, self._failed_at = self._failed_at, time.monotonic()
        again = self._failed_at < before + BETWEEN_FAILURES
        self._begin_at = self._failed_at + BETWEEN_FAILURES * again
        when = f" in {BETWEEN_FAILURES / 60:.0f} minutes" if again else ""
        self._tell(f"{failure}; the stream resumes from its latest snapshot{when}")
        feeder.stop(0)
        self._listener.close()
        self.handler.feeder = self.handler.listener = self._listener = None

    # --- reading and writing ---

    def _read(self) -> bool:
        """Write each source's new text to the journal; return whether there was any."""
        if time.monotonic() < self._try_again:
            return False
        any_new, failures = False, set()
        for source in self._sources:
            try:
                chunk = source.poll()
                if chunk is not None:
                    self._journal.append(chunk)
                    source.ack(chunk)
                    any_new = True
            except MlxStreamError as error:
                failures.add(str(error))
        for failure in sorted(failures):
            self._tell(f"{failure}; trying again every {AGAIN:.0f} seconds")
            self._try_again = time.monotonic() + AGAIN
        if any_new and self.handler.feeder:
            self.handler.feeder.wake()
        return any_new

    def _pause_on_battery(self) -> None:
        paused = self.settings.pause_on_battery and self._battery.in_use()
        if paused != self._paused:
            self._tell("paused: on battery" if paused else "reading: on mains power")
        self._paused = paused

    def _compare_unread(self) -> None:
        """Check once a minute whether text is arriving faster than it is read."""
        if time.monotonic() >= self._count_at:
            before, self._unread = self._unread, self._unread_bytes()
            self._count_at = time.monotonic() + BETWEEN_COUNTS
            self._falls_behind = self._unread > max(before, BACKLOG) and before > 0

    def _unread_bytes(self) -> int:
        states = (source.state for source in self._sources)
        return sum(state["size"] - state["offset"] for state in states if "size" in state)

    def _note_if_due(self) -> None:
        """Write a note in the background, if one is due and anything is new."""
        wanted = self.handler.notes and not self._paused and self._schedule.is_due()
        if wanted and not self._noting.is_alive():
            self._noting = threading.Thread(target=self._note, name="note", daemon=True)
            self._noting.start()

    def _note(self) -> None:
        try:
            self.handler.note()
        except MlxStreamError as error:
            if not self._stopping:
                self._tell(str(error))
        finally:
            self._schedule.restart()

    def _status(self) -> dict[str, Any]:
        """Return what `status` prints, except the stream's statistics."""
        settings, journal = self.settings, self._journal
        state = "paused" if self._paused else "reading"
        if self.handler.feeder is None:
            state = "waiting" if time.monotonic() < self._begin_at else "loading"
        sources = []
        for source in self._sources:
            known = journal.source(source.name)
            read = {"bytes_read": known.bytes, "crc": known.crc} if known else {}
            sources.append({"name": source.name, **source.state, **read})
        return {
            "name": settings.name,
            "state": "stopping" if self._stopping else state,
            "pid": os.getpid(),
            "uptime_seconds": round(time.monotonic() - self._started, 1),
            "model": settings.model,
            "resident_bytes": resident_bytes(),
            "memory": list(self._engine.memory) if self._engine else None,
            "bytes_read": journal.bytes,
            "bytes_unread": self._unread_bytes(),
            "falls_behind": self._falls_behind,
            "notes": str(settings.notes) if settings.notes else None,
            "last_note": round(journal.last_note[1]) or None,
            "sources": sources,
        }


@contextmanager
def waking_signals(stop: Callable[[], None]) -> Iterator[tuple[int, int]]:
    """Call `stop` on a termination signal; yield both ends of a pipe that each signal writes to."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = {
        number: signal.signal(number, lambda *_: stop())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN  # as under nohup
    }
    # Python runs handlers only between bytecodes; this byte ends a wait, so that they can run.
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    try:
        yield read, write
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(read)
        os.close(write)


def resident_bytes() -> int:
    """Return this process's resident memory; on macOS its peak."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
