"""Files that are never seen half-written, and where what can be made again is kept."""

import os
from pathlib import Path


def write_whole(path: Path, payload: bytes) -> None:
    """Writes a file so that a process killed at any time leaves the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(payload)
    os.replace(part, path)


def cache_folder() -> Path:
    """``METAOPT_CACHE_DIR``, or else ``metaopt`` in the user's cache folder."""
    if chosen := os.environ.get("METAOPT_CACHE_DIR"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metaopt"
