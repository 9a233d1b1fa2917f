"""Files that are there wholly or not at all, and on the disk when a call returns."""

from __future__ import annotations

import errno
import os
from pathlib import Path

_FULL = {errno.ENOSPC: "no space is left", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file is too large"}


def write(path: Path, content: str | bytes) -> None:
    """Writes a file in the place of what was there: beside it first, then by a rename that a power failure survives.

    Raises:
      OSError: it could not be written; names the file, its size and, of a full disk, what to do. What was there stays.
    """
    data = content.encode() if isinstance(content, str) else content
    path = path.resolve()  # a link stays a link, and what it points to is replaced
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise explained(error, path, len(data)) from error


def explained(error: OSError, path: Path, size: int) -> OSError:
    """`error`, of writing `size` bytes to `path`, in words that say what to do."""
    cause = _FULL.get(error.errno or 0)
    cure = "free space there, and do it again" if cause else "check that this user may write there"
    return OSError(f"{path}: {size:,} bytes could not be written ({cause or error.strerror}): {cure}")


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, would outlast a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
