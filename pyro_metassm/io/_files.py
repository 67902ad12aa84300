"""What every reader asks of a file: it is there, it claims no more than it can hold, and what is wrong names it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LARGEST = 16 * 2**30  # bytes
SMALL = 32 * 2**20  # bytes that any file may claim
# Bytes that one byte of a larger file may claim: sparse counts are packed 20 to 200 times smaller.
EXPANSION = 512


@contextmanager
def reading(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Whatever goes wrong with the content of a file is a ``ValueError`` that names it.

    Args:
        path: the file.
        what: that was to be read from it, for the message.

    Raises:
        FileNotFoundError: no such file.
        ValueError: any error within.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    with naming(path, what):
        yield


@contextmanager
def naming(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """As `reading`, of what may be a folder or an address."""
    try:
        yield
    except ImportError:  # a library that is not installed
        raise
    except Exception as error:  # of the libraries that read: damaged files bring out every kind
        raise ValueError(f"{path}: no {what}: {said(error)}") from error


def said(error: BaseException) -> str:
    """The text of an error, with its kind where that is no ``ValueError`` and so may not be in words for a user."""
    return printable(str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}")


def printable(text: str) -> str:
    """A text that a file holds, for a message: no NUL, no colours of a terminal."""
    return "".join(letter if letter.isprintable() or letter == "\n" else "?" for letter in text)


def refuse_claims(claimed: int, size: int, largest: int = LARGEST) -> None:
    """Refuse a file that claims more bytes than may be, or than packed data of its size hold.

    A few bytes can claim any size, packed or as a fill value, and are to be refused before memory is asked for.

    Args:
        claimed: bytes of all arrays, unpacked, as the file has it.
        size: bytes of the file.
        largest: bytes that no file may exceed.

    Raises:
        ValueError: too much.
    """
    if claimed > largest:
        raise ValueError(f"needed at most {largest} bytes, got {claimed}; split the recording")
    if claimed > max(SMALL, EXPANSION * size):
        raise ValueError(
            f"needed at most {EXPANSION} bytes for each byte of the file, got {claimed} for {size}; if this is no "
            "mistake, write it again without compression"
        )
