"""Downloads one file of a model on the Hub into the shared cache; independent of models.

A partial download is kept, and any process can resume it. A file gets its final name once it has
the size and the hash that the Hub lists. The Hub's client, whose session and cache are used here,
restarts the download in each process and does not check hashes.
"""

import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from mlx_stream.errors import SourceError
from mlx_stream.hub.hub_cache import File, Repository, blob_of

BLOCK = 1 << 20
# Give up after this many attempts in a row that receive nothing, and pause this many seconds
# between attempts.
ATTEMPTS = 5
PAUSE = 1.0


def place_blob(repository: Repository, file: File, here: Callable[[int], None]) -> None:
    """Download a file's content into the cache, under its hash, unless it is already there."""
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
            # The partial file may have been damaged: download it again from the start.
            opened.truncate(0)
            download(repository, file, opened, here)
        if digest_of(opened, file) != file.digest:
            partial.unlink()
            raise SourceError(
                f"{repository.name}: {file.name} does not have the hash that the Hub lists: it was "
                "altered or damaged, and has been removed; try again"
            )
        opened.flush()
        os.fsync(opened.fileno())
        partial.replace(blob)


@contextmanager
def file_lock(path: Path) -> Iterator[BinaryIO]:
    """Open a file to append to, under a lock: a second process waits for the first."""
    while True:
        with path.open("a+b") as opened:
            fcntl.flock(opened, fcntl.LOCK_EX)
            # While this process waited, the other may have moved the file into place.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(opened.fileno())):
                yield opened
                return


def download(
    repository: Repository, file: File, opened: BinaryIO, here: Callable[[int], None]
) -> None:
    """Append the missing bytes to an open file, over connections that may break."""
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
                f"{repository.name}: {file.name} keeps stopping at {before:,} of {file.size:,} "
                "bytes; try again later: the download will resume"
            ) from broken
        if broken is not None or attempts:
            time.sleep(PAUSE)


def is_final(error: Exception) -> bool:
    """Return whether retrying is pointless; the HTTP client's errors have no fixed names."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    if isinstance(error, HfHubHTTPError):
        status = getattr(error.response, "status_code", 0)
        return status not in (408, 429, 500, 502, 503, 504)
    if isinstance(error, ConnectionError | TimeoutError):
        return False
    on_disk = isinstance(error, OSError) and error.errno is not None
    return on_disk or isinstance(error, SourceError | OfflineModeIsEnabled)


def receive_bytes(
    repository: Repository, file: File, opened: BinaryIO, here: Callable[[int], None]
) -> None:
    """Request the rest of a file once, and append it, up to the listed size."""
    from huggingface_hub import constants as hub
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    size = opened.seek(0, os.SEEK_END)
    url = hf_hub_url(repository.name, file.name, revision=repository.commit)
    # A range of a compressed response would not be a range of the file.
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if size:
        headers["Range"] = f"bytes={size}-"
    with get_session().stream(
        "GET", url, headers=headers, follow_redirects=True, timeout=hub.HF_HUB_DOWNLOAD_TIMEOUT
    ) as response:
        hf_raise_for_status(response)
        if size and response.status_code != 206:  # the server is sending the whole file
            opened.truncate(0)
            size = 0
        # Blocks are written as they arrive: fixed-size ones would be lost if cut off midway.
        for block in response.iter_bytes():
            size += len(block)
            if size > file.size:
                opened.truncate(0)
                raise SourceError(
                    f"{repository.name}: the Hub sent more of {file.name} than the {file.size:,} "
                    "bytes it lists; the file was discarded; try again later"
                )
            opened.write(block)
            here(size)


def digest_of(opened: BinaryIO, file: File) -> str:
    """Return the hash of a downloaded file, of the kind that the Hub lists."""
    opened.flush()
    size = opened.seek(0, os.SEEK_END)
    digest = hashlib.sha256() if len(file.digest) == 64 else hashlib.sha1(usedforsecurity=False)
    if len(file.digest) == 40:
        digest.update(b"blob %d\0" % size)  # Git's blob header
    opened.seek(0)
    while block := opened.read(BLOCK):
        digest.update(block)
    return digest.hexdigest()
