"""Paths that users give, and the files in their folders."""

from __future__ import annotations

import os
import re
from pathlib import Path

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:/")
_PACKED = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".7z", ".rar")
_GLOB = re.compile(r"[*?\[\]\\]")
_CURE = "mount it (gcsfuse, s3fs, NFS), or copy it, and give the path of that folder"


def resolve(path: str | Path, name: str, cure: str = _CURE) -> Path:
    """The path that a user means. Every path from a flag or an argument goes through this function.

    Args:
      path: as the user gave it; `~` stands for the home directory.
      name: the user's name for it, such as '--workdir', for errors.
      cure: what to do in place of an address.

    Returns:
      The path; it need not exist.

    Raises:
      ValueError: the path is an address such as gs://bucket/runs, or the home directory is unknown.
    """
    text = os.fspath(path)
    if _SCHEME.match(text):
        raise ValueError(
            f"{name}={text} is an address, and only folders of this machine are read and written: "
            f"{cure}"
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
    """As `resolve`, for a folder of checkpoints.

    Args:
      path: as the user gave it.
      name: the user's name for it, for errors.

    Returns:
      The path; it need not exist.

    Raises:
      ValueError: as `resolve`; or the path has a character that Orbax takes for a pattern, so a
        checkpoint could be written but never read.
    """
    resolved = resolve(path, name)
    odd = _GLOB.search(os.fspath(resolved.absolute()))
    if odd:
        cause = f"{name}={path} has {odd[0]!r} in its whole path, {resolved.absolute()}"
        cure = "use a name without * ? [ ] and backslashes"
        raise ValueError(f"{cause}: a checkpoint there could not be read again; {cure}")
    return resolved


def cache(folder: str) -> Path:
    """The folder for prepared data.

    Args:
      folder: config.data.cache_dir; '' stands for $XDG_CACHE_HOME/rmjax, or for ~/.cache/rmjax if
        that variable is not set.

    Returns:
      The path; it need not exist.

    Raises:
      ValueError: as `resolve`; names config.data.cache_dir.
    """
    if folder:
        return resolve(folder, "config.data.cache_dir")
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if base.is_absolute():  # the XDG standard says to ignore relative paths
        return base / "rmjax"
    try:
        return Path("~/.cache/rmjax").expanduser()
    except RuntimeError as error:
        cause = "no home directory is known, so prepared data have no place"
        raise ValueError(f"{cause}: set config.data.cache_dir to a folder") from error


def lacks(folder: str, name: str) -> str:
    """Why a folder lacks a file, as the end of a sentence: '<folder>, which does not exist'.

    Args:
      folder: config.data.dir, as the user gave it.
      name: the file's name, or a pattern.

    Returns:
      The folder, followed by the cause or the cure if one is known.
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
    """The entries of a folder that fit a pattern, sorted, without names that begin with a dot.

    macOS leaves a file `._book.txt` beside each `book.txt`, which is no book.
    """
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))
