"""All exceptions that a caller may catch, as one tree; independent of where they are raised.

    MlxStreamError
    ├── ValueRefused        an option or argument is out of range
    │   └── TypeRefused     an argument has the wrong type
    ├── SourceError         a model cannot be found or fetched
    ├── CheckpointError     a model's files are damaged, truncated or incomplete
    │   ├── ConfigError     config.json is incomplete, malformed or asks for something unsupported
    │   └── WeightsError    a tensor is missing, unknown or of the wrong shape
    ├── TokenizerError      tokenizer files cannot be used
    │   └── TemplateError   a chat template cannot be used on a stream
    ├── TextError           input text cannot be read
    ├── SnapshotError       a saved stream is damaged, or belongs to another model
    ├── SessionError        a saved conversation is damaged, in use, or cannot be written
    ├── DeviceError         a device is unknown, or a device file cannot be used
    ├── MemoryRefused       a model and its ring do not fit the device or an engine's budget
    ├── QueueFull           an engine's queue or a listener's backlog is full
    ├── EngineOpen          another engine is open in this process
    ├── EngineClosed        an engine or one of its sessions is closed
    └── ComputeError        MLX or the device failed

Each message is one line: what was given, what was expected, and what to do. It may quote untrusted
input of any length, so the middle of a long line is omitted.
"""

LONGEST_LINE = 1_000


def one_line(error: object, longest: int = LONGEST_LINE) -> str:
    """Return an error's message, or else its class name, as one line truncated to `longest`."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else f"{text[:longest]}..."


class MlxStreamError(Exception):
    """The base class of every error that this package raises on purpose."""

    def __init__(self, line: str = ""):
        half = LONGEST_LINE // 2 - 2
        super().__init__(line if len(line) <= LONGEST_LINE else f"{line[:half]}...{line[-half:]}")


class ValueRefused(MlxStreamError, ValueError):
    """An option or argument is out of range."""


class TypeRefused(ValueRefused, TypeError):
    """An argument has the wrong type."""


class SourceError(MlxStreamError):
    """A model could not be found or fetched."""


class CheckpointError(MlxStreamError):
    """A model's files are damaged, truncated or incomplete."""


class ConfigError(CheckpointError):
    """A model's configuration is malformed, or asks for something unsupported."""


class WeightsError(CheckpointError):
    """A tensor is missing, unknown or of the wrong shape."""


class TokenizerError(MlxStreamError):
    """A model's tokenizer files cannot be used."""


class TemplateError(TokenizerError):
    """A model's chat template cannot be used on a stream."""


class TextError(MlxStreamError):
    """Text cannot be read: it is not UTF-8, it is empty, or it is too short."""


class SnapshotError(MlxStreamError):
    """A saved stream cannot be written or read, or belongs to another model."""


class SessionError(MlxStreamError):
    """A saved conversation cannot be opened, read or written, or another process has it open."""


class DeviceError(MlxStreamError):
    """A device is unknown, or a file that describes devices cannot be used."""


class MemoryRefused(MlxStreamError):
    """A model and its ring do not fit the device, or an engine's budget."""


class QueueFull(MlxStreamError):
    """An engine's queue or a listener's backlog is full: try again later."""


class EngineOpen(MlxStreamError):
    """Another engine is open in this process: close it first."""


class EngineClosed(MlxStreamError):
    """An engine or one of its sessions is closed, or was left behind by a fork."""


class ComputeError(MlxStreamError):
    """MLX or the device failed to compute something."""
