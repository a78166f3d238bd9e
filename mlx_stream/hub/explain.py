"""Explains Hub client errors in one line each, and reports progress; touches no files."""

import errno
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from mlx_stream.errors import CheckpointError, SourceError, one_line
from mlx_stream.hub.catalog import similar_names
from mlx_stream.hub.hub_cache import MAIN, explain_cache
from mlx_stream.hub.repository import Bar
from mlx_stream.program.notices import Notify


@contextmanager
def explaining_hub_errors(repo: str, revision: str = MAIN) -> Iterator[None]:
    """Convert Hub client errors to errors with a one-line explanation."""
    try:
        yield
    except SourceError:
        raise
    except CheckpointError as error:
        if repo in str(error):
            raise
        raise type(error)(f"{repo}: {error}") from error
    # Exceptions from the HTTP library, which differs between versions, also end up here.
    except Exception as error:
        raise SourceError(explain_hub_error(repo, revision, error)) from error


def explain_hub_error(repo: str, revision: str, error: Exception) -> str:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.HFValidationError):
        return f"{repo}: not a valid Hub id; expected org/name"
    if errors.OfflineModeIsEnabled in (type(error), type(error.__cause__)):
        why = explain_cache(repo, revision)
        return f"{repo}: {why}, and HF_HUB_OFFLINE is set; unset it to fetch the model"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{repo}: gated; accept its terms at {hub}/{repo}, then run `hf auth login`, or set "
            "HF_TOKEN to a token with read access"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo}: no revision {revision!r}; expected one of its branches, tags or commits"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"{repo}: no such folder, and no such model at {hub}; {similar_names(repo)}for "
            "a private model run `hf auth login`, or set HF_TOKEN"
        )
    if isinstance(error, errors.HfHubHTTPError):
        return f"{repo}: {hub} answered: {one_line(error)[:200]}; try again later"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS):
        return f"{repo}: cannot be stored in {constants.HF_HUB_CACHE}: {error.strerror}"
    return (
        f"{repo}: {explain_cache(repo, revision)}, and {hub} cannot be reached "
        f"({type(error).__name__}); check the network, or give a folder or a .gguf file"
    )


def progress_in_tenths(progress: Notify) -> Bar:
    """Return a progress callback that, on a terminal, reports each tenth on its own line."""
    reported = 0

    def update(done: int, total: int) -> None:
        nonlocal reported
        tenths = 10 * done // max(total, 1)
        if reported < tenths < 10 and sys.stderr is not None and sys.stderr.isatty():
            progress(f"fetched {tenths}0%")
            reported = tenths

    return update
