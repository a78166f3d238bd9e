"""The error that this program adds to those of `mlx_stream`."""

from mlx_stream.errors import MlxStreamError


class AssistantError(MlxStreamError):
    """A problem with the assistant that its user can fix."""
