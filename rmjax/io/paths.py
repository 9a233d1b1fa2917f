"""The paths that users give, and the files that lie in their folders."""

from __future__ import annotations

import os
import re
from pathlib import Path

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_PACKED = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
_GLOB = re.compile(r"[*?\[\]\\]")


def resolve(path: str | Path, name: str) -> Path:
    """The path that a user means. Every path from a flag or an argument goes through here.

    Args:
      path: as the user gave it; `~` stands for the home directory.
      name: what the user calls it, such as '--workdir', for errors.

    Raises:
      ValueError: the path is an address such as gs://bucket/runs, or the home directory is not known.
    """
    text = os.fspath(path)
    if _SCHEME.match(text):
        raise ValueError(
            f"{name}={text} is an address, and only folders of this machine are read and written: "
            "mount it (gcsfuse, s3fs, NFS), or copy it, and give the path of that folder"
        )
    if "\0" in text:
        raise ValueError(f"{name}={text!r} holds a NUL character: no path has one")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{name}={text}: no home directory is known ({error}): write the whole path"
        ) from error


def resolve_checkpoint(path: str | Path, name: str) -> Path:
    """As `resolve`, for a folder in which checkpoints lie.

    Raises:
      ValueError: as `resolve`; or the path has a character that Orbax takes for a pattern, so that what is written
        there could never be read.
    """
    resolved = resolve(path, name)
    odd = _GLOB.search(os.fspath(resolved.absolute()))
    if odd:
        raise ValueError(
            f"{name}={path} has {odd[0]!r} in its whole path, {resolved.absolute()}: a checkpoint there could not be "
            "read again. Use a name without * ? [ ] and backslashes"
        )
    return resolved


def cache(folder: str) -> Path:
    """The folder for prepared data; '' is $XDG_CACHE_HOME/rmjax, or ~/.cache/rmjax where that is not set.

    Raises:
      ValueError: as `resolve`; names config.data.cache_dir.
    """
    if folder:
        return resolve(folder, "config.data.cache_dir")
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():  # the standard says to pass over others
        return base / "rmjax"
    try:
        return Path("~/.cache/rmjax").expanduser()
    except RuntimeError as error:
        raise ValueError(
            "no home directory is known, in which prepared data would be kept: set config.data.cache_dir to a folder"
        ) from error


def lacks(folder: str, name: str) -> str:
    """Why a folder may lack a file, as the end of a sentence: '<folder>, which does not exist'.

    Args:
      folder: config.data.dir, as the user gave it.
      name: the file, or a pattern.
    """
    if not folder:
        return "data.dir, which is empty"
    path = resolve(folder, "config.data.dir")
    packed = [file for file in [path, *visible(path)] if file.is_file() and file.suffix in _PACKED]
    below = sorted(path.glob(f"*/{name}")) if path.is_dir() else []
    if not path.exists():
        cause = ", which does not exist"
    elif below:
        cause = f", but in {below[0].parent}: give that folder"
    elif packed:
        cause = f": unpack {packed[0]}, and give the folder it makes"
    elif path.is_file():
        cause = ", which is a file: give its folder"
    else:
        cause = "" if any(path.iterdir()) else ", which has no files"
    return f"{folder}{cause}"


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """The entries of a folder that fit a pattern, by name, without those whose name begins with a dot.

    macOS leaves a `._book.txt` beside each `book.txt`: it is no book.
    """
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
