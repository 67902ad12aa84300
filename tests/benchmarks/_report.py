"""What a benchmark leaves behind."""

from __future__ import annotations

import json
from pathlib import Path


def write(path: Path | None, results: dict | list) -> None:
    """Numbers as JSON, where a file is asked for; after every case, so that a run that is stopped keeps what it has."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1))
