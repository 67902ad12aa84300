"""Files that are there in whole or not at all, also after a power cut."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def write_json(value: Any, path: Path) -> None:
    """Write a JSON file that is either there and complete or not there; processes do not meet on the way."""
    part = path.with_suffix(f".part{os.getpid()}")
    part.write_text(json.dumps(value), encoding="utf-8")
    os.replace(part, path)


def part_of(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f"{path.name}.part")


def write_part(path: Path, data: bytes) -> None:
    """Write ``data`` beside ``path``, down to the disk; nothing is left there if that fails.

    Raises:
        OSError: a full disk, a folder that cannot be written, ...
    """
    part = part_of(path)
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


def commit(*paths: Path) -> None:
    """Give the parts of these files of one folder their names, one after the other, down to the disk."""
    for path in paths:
        os.replace(part_of(path), path)
    sync_folder(paths[0].parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    with suppress(OSError):  # Windows opens no folders; some network file systems sync none
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
