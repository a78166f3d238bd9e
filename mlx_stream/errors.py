"""Every exception a caller may catch, as one tree; knows nothing of what raises them.

    MlxStreamError
    ├── ValueRefused        an option or argument out of range
    ├── SourceError         where a model comes from: a path, a Hub id, a download
    ├── CheckpointError     what is on disk: a damaged, truncated or incomplete file
    │   ├── ConfigError     config.json says something missing, malformed or unsupported
    │   └── WeightsError    a tensor missing, unknown or of the wrong shape
    ├── TokenizerError      tokenizer files
    │   └── TemplateError   a chat template that cannot be used on a stream
    ├── TextError           input text that cannot be read
    ├── SnapshotError       a saved stream that is damaged, or another model's
    ├── SessionError        a saved conversation: damaged, in use, or not to be written
    ├── DeviceError         a device that is not known, or a file of devices
    ├── MemoryRefused       the model and its ring do not fit the device, or an engine's budget
    ├── QueueFull           an engine has as much to do as it accepts
    ├── EngineClosed        an engine or one of its sessions is closed
    └── ComputeError        MLX failed, or a device did

The message of each is one line: what was given, what was expected, what to do. What was given may
be a stranger's, and of any length: the middle of a long line is left out.
"""

LONGEST_LINE = 1_000


def one_line(error: object, longest: int = LONGEST_LINE) -> str:
    """Return a message on one line, cut at `longest` characters; an empty error's class name."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[:longest]}..."


class MlxStreamError(Exception):
    """Base of every error this package raises on purpose."""

    def __init__(self, line: str = ""):
        half = LONGEST_LINE // 2 - 2
        super().__init__(line if len(line) <= LONGEST_LINE else f"{line[:half]}...{line[-half:]}")


class ValueRefused(MlxStreamError, ValueError):
    """An option or argument is out of its range."""


class SourceError(MlxStreamError):
    """A model could not be found or fetched."""


class CheckpointError(MlxStreamError):
    """A model's files are damaged, truncated or incomplete."""


class ConfigError(CheckpointError):
    """A model's configuration is malformed or asks for what is not supported."""


class WeightsError(CheckpointError):
    """A tensor is missing, unknown or of the wrong shape."""


class TokenizerError(MlxStreamError):
    """A model's tokenizer files cannot be used."""


class TemplateError(TokenizerError):
    """A model's chat template cannot be used on a stream."""


class TextError(MlxStreamError):
    """A text cannot be read: not UTF-8, empty, or too short."""


class SnapshotError(MlxStreamError):
    """A saved stream cannot be written or read, or is not one of this model."""


class SessionError(MlxStreamError):
    """A saved conversation cannot be opened, read or written, or another process has it open."""


class DeviceError(MlxStreamError):
    """A device is not known, or a file that describes devices cannot be used."""


class MemoryRefused(MlxStreamError):
    """A model and its ring exceed what the device can hold."""


class QueueFull(MlxStreamError):
    """An engine, or a listener's backlog, holds as much as it accepts: try again later."""


class EngineClosed(MlxStreamError):
    """An engine or one of its sessions is closed, or may not be opened here."""


class ComputeError(MlxStreamError):
    """What was asked for could not be computed: MLX or the device failed."""
