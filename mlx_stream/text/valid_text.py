"""Refuses text that cannot be encoded."""

from mlx_stream.errors import TextError


def check_text(text: object) -> None:
    """Refuse text that cannot be encoded.

    Raises:
        TextError: `text` is not a str, or it contains a lone surrogate.
    """
    if not isinstance(text, str):
        raise TextError(f"text must be a str, not {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TextError(
            f"text: character {error.start} is half of a surrogate pair and not valid Unicode"
        ) from error
