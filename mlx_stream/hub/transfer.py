"""One file of a model on the Hub into the shared cache: whole and as listed, or not there.

What is half fetched stays beside its place and is gone on with, also by another process; a file has
its name once it has the size and the hash that the Hub listed. Knows no model. The Hub's client,
whose session and cache this uses, begins a file anew in each process and checks no hash.
"""

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from mlx_stream.errors import SourceError

BLOCK = 1 << 20
# Attempts in a row that bring not one byte, and seconds between them.
ATTEMPTS = 5
PAUSE = 1.0


@dataclass(frozen=True)
class File:
    """A file as the Hub lists it; `digest` is a SHA-256, or Git's SHA-1 of a small file."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Repository:
    """A model at one commit: the files of it that we read, and the names of all others."""

    name: str
    revision: str
    commit: str
    files: tuple[File, ...]
    others: tuple[str, ...] = ()

    @property
    def storage(self) -> Path:
        return storage_of(self.name)

    @property
    def snapshot(self) -> Path:
        return self.storage / "snapshots" / self.commit


def storage_of(name: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def blob_of(repository: Repository, file: File) -> Path:
    return repository.storage / "blobs" / file.digest


def place_blob(repository: Repository, file: File, here: Callable[[int], None]) -> None:
    """Have the content of a file in the cache, under its hash."""
    blob = blob_of(repository, file)
    blob.parent.mkdir(parents=True, exist_ok=True)
    partial = blob.with_name(f"{file.digest}.incomplete")
    with file_lock(partial) as opened:
        if blob.exists() and blob.stat().st_size == file.size:
            partial.unlink(missing_ok=True)
            return
        resumed = 0 < opened.seek(0, os.SEEK_END) <= file.size
        if not resumed:
            opened.truncate(0)
        download(repository, file, opened, here)
        if resumed and digest_of(opened, file) != file.digest:
            # What was left here before may have been at fault: once more from the start.
            opened.truncate(0)
            download(repository, file, opened, here)
        if digest_of(opened, file) != file.digest:
            partial.unlink()
            raise SourceError(
                f"{repository.name}: {file.name} is not what the Hub says it is (its hash is "
                "another): altered or damaged on the way, and not kept; try again"
            )
        opened.flush()
        os.fsync(opened.fileno())
        partial.replace(blob)


@contextmanager
def file_lock(path: Path) -> Iterator[BinaryIO]:
    """Open a file to go on with, alone: of two processes the second waits for the first."""
    while True:
        with path.open("a+b") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            # While this one waited, the other may have moved it into place.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(opened.fileno())):
                yield opened
                return


def download(
    repository: Repository, file: File, opened: BinaryIO, here: Callable[[int], None]
) -> None:
    """Append to an open file what it lacks, through connections that break."""
    attempts = 0
    while (before := opened.seek(0, os.SEEK_END)) < file.size:
        try:
            receive_bytes(repository, file, opened, here)
            broken: Exception | None = None
        except Exception as error:
            if is_final(error):
                raise
            broken = error
        opened.flush()
        attempts = attempts + 1 if opened.seek(0, os.SEEK_END) == before else 0
        if attempts >= ATTEMPTS:
            raise SourceError(
                f"{repository.name}: {file.name} ends at {before:,} of {file.size:,} bytes, again "
                "and again; what is here is kept, try again later"
            ) from broken
        if broken is not None or attempts:
            time.sleep(PAUSE)


def is_final(error: Exception) -> bool:
    """Say whether asking again would not help; the HTTP client's errors have no fixed names."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", 0)
        return status not in (408, 429, 500, 502, 503, 504)
    return isinstance(error, SourceError | OfflineModeIsEnabled) or (
        isinstance(error, OSError) and error.errno is not None and not is_network(error)
    )


def is_network(error: OSError) -> bool:
    return isinstance(error, ConnectionError | TimeoutError)


def receive_bytes(
    repository: Repository, file: File, opened: BinaryIO, here: Callable[[int], None]
) -> None:
    """Ask for the rest of a file once, and append what comes, never more than was listed."""
    from huggingface_hub import constants as hub
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    size = opened.seek(0, os.SEEK_END)
    url = hf_hub_url(repository.name, file.name, revision=repository.commit)
    # Compressed, a range would be one of other bytes.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if size:
        headers["Range"] = f"bytes={size}-"
    with get_session().stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=hub.HF_HUB_DOWNLOAD_TIMEOUT
    ) as response:
        hf_raise_for_status(response)
        if size and response.status_code != 206:  # it sends the whole file
            opened.truncate(0)
            size = 0
        # As it comes: of a block of a fixed size, a broken connection would lose the beginning.
        for block in response.iter_bytes():
            size += len(block)
            if size > file.size:
                opened.truncate(0)
                raise SourceError(
                    f"{repository.name}: the Hub sends more of {file.name} than the "
                    f"{file.size:,} bytes it lists; not kept"
                )
            opened.write(block)
            here(size)


def digest_of(opened: BinaryIO, file: File) -> str:
    """Return the hash of what was fetched, of the kind that was listed."""
    opened.flush()
    size = opened.seek(0, os.SEEK_END)
    digest = hashlib.sha256() if len(file.digest) == 64 else hashlib.sha1(usedforsecurity=False)
    if len(file.digest) == 40:
        digest.update(b"blob %d\0" % size)  # Git's
    opened.seek(0)
    while block := opened.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()


def link(repository: Repository, file: File) -> None:
    """Give a blob its name in the snapshot, in one step."""
    blob, name = blob_of(repository, file), repository.snapshot / file.name
    name.parent.mkdir(parents=True, exist_ok=True)
    target = os.path.relpath(blob, name.parent)
    if name.is_symlink() and os.readlink(name) == target:  # noqa: PTH115
        return
    aside = name.with_name(f".{file.name}.{os.getpid()}")
    aside.unlink(missing_ok=True)
    try:
        aside.symlink_to(target)
    except OSError:  # a file system without links
        shutil.copyfile(blob, aside)
    aside.replace(name)
