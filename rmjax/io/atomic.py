"""Writes of files and folders that are complete or absent, and on the disk when a call returns."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

_FULL = {
    errno.ENOSPC: "no space is left",
    errno.EDQUOT: "the quota is used up",
    errno.EFBIG: "the file is too large",
}


def write(path: Path, content: str | bytes) -> None:
    """Writes a file, or replaces it; after a crash or power failure it is either old or new.

    The content is written to a second file beside the first, which is then renamed.

    Args:
      path: the file; for a link, the file that it points to.
      content: text is written as UTF-8.

    Raises:
      OSError: the write failed; names the file, its size and the cure. The old file stays.
    """
    data = content.encode() if isinstance(content, str) else content
    path = path.resolve()  # a link stays a link; its target is replaced
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
    """A temporary folder within `root`. The caller fills it and renames files out of it.

    A lock shows other processes that this process lives. Folders of killed processes in `root` are
    removed first. On file systems without locks no process can tell, so all left-overs stay.

    Args:
      root: made if it is missing.

    Yields:
      The folder, empty. It is removed at the end, with all files that are still in it.

    Raises:
      OSError: `root` cannot be written; says what to do.
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
            # Other processes sweep folders of this name. It is given after the lock is taken.
            scratch = scratch.rename(root / scratch.name.replace(".making", "incomplete"))
            yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def publish(made: Path, place: Path) -> None:
    """Moves prepared data out of the folder of `folder`, unless another process was first.

    Args:
      made: the data.
      place: where they go; its folder is made if it is missing.

    Raises:
      OSError: they cannot be moved.
    """
    place.parent.mkdir(exist_ok=True)
    try:
        made.rename(place)
    except OSError:
        if not place.exists():
            raise


def digest(files: Iterable[Path], parameters: object) -> str:
    """A name for prepared data: it changes if a file or a parameter does.

    Args:
      files: the raw files. The digest covers their names, sizes and times of change.
      parameters: values that JSON can hold.

    Returns:
      16 hexadecimal digits.
    """
    stats = [(file.name, file.stat()) for file in files]
    stamps = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    content = json.dumps([stamps, parameters], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def _sweep(root: Path) -> None:
    """Removes folders whose processes have ended."""
    for scratch in root.glob("incomplete.*"):
        with contextlib.suppress(OSError), (scratch / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(scratch, ignore_errors=True)


def explained(error: OSError, path: Path, size: int) -> OSError:
    """An error of a write, in words that name the cure.

    Args:
      error: the error of the operating system.
      path: the file or folder that was written.
      size: bytes that were to be written.

    Returns:
      The error to raise.
    """
    cause = _FULL.get(error.errno or 0)
    cure = "free space there, and do it again" if cause else "check that this user may write there"
    return OSError(
        f"{path}: {size:,} bytes could not be written ({cause or error.strerror}): {cure}"
    )


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, would survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
