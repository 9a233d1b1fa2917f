"""Files and folders that are there wholly or not at all, and on the disk when a call returns."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_FULL = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file is too large",
}


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


@contextlib.contextmanager
def folder(root: Path) -> Iterator[Path]:
    """An empty folder within `root`: fill it, then rename from it. What stays in it is removed.

    A lock on it tells other processes that this one lives. What killed processes left in `root` is
    removed first. On file systems without locks nobody knows who lives, and all left-overs stay.

    Raises:
      OSError: nothing can be written in `root`; says what to do.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        scratch = Path(tempfile.mkdtemp(prefix=".making.", dir=root))
    except OSError as error:
        cure = "set config.data.cache_dir to a folder that can be written"
        cause = f"prepared data cannot be kept there ({error.strerror or error})"
        raise OSError(f"{root}: {cause}: {cure}") from error
    try:
        with (scratch / "lock").open("w") as lock:
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Others sweep by name. It gets that name once it is locked, so they never see it unlocked.
            scratch = scratch.rename(root / scratch.name.replace(".making", "incomplete"))
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Removes the folders of `folder` whose processes are gone."""
    for scratch in root.glob("incomplete.*"):
        with contextlib.suppress(OSError), (scratch / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(scratch, ignore_errors=True)


def explained(error: OSError, path: Path, size: int) -> OSError:
    """`error`, of writing `size` bytes to `path`, in words that say what to do."""
    cause = _FULL.get(error.errno or 0)
    cure = "free space there, and do it again" if cause else "check that this user may write there"
    return OSError(
        f"{path}: {size:,} bytes could not be written ({cause or error.strerror}): {cure}"
    )


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, would outlast a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
