"""Files that are never seen half-written."""

import os
from pathlib import Path


def write_whole(path: Path, payload: bytes) -> None:
    """Writes a file so that a process killed at any time leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(payload)
    os.replace(part, path)
