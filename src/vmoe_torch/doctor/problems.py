"""What is not well, and what to do about it."""

import traceback
from dataclasses import dataclass

REFERENCE = (
    'set impl="reference" (timm.create_model(..., impl="reference"), vmoe train ... model.kwargs.impl=reference), '
    "plain PyTorch without our kernels; then report it with the JSON"
)
UPDATE = "update PyTorch, and with it Triton; " + REFERENCE


@dataclass(frozen=True)
class Problem:
    """One thing that is not well."""

    what: str
    """Which part."""
    why: str
    """What was found, in a line."""
    advice: str
    """What to do."""
    traceback: str | None = None
    """Of the error, where there was one."""


def of_error(what: str, error: Exception, advice: str) -> Problem:
    """From an error."""
    return Problem(what, one_line(error), advice, "".join(traceback.format_exception(error)))


def one_line(error: Exception, length: int = 300) -> str:
    """An error's type and text, on one line of bounded length."""
    text = " ".join(str(error).split())
    text = text if len(text) <= length else text[:length].rstrip() + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
