"""Checkpoints: the last N and the best M, written in the background, every file under a digest.

One directory a step:

    000000200/arrays/...      the leaves, written by Orbax
    000000200/manifest.json   step, score, and shape and dtype of every leaf
    000000200/SHA256SUMS      digests of all of the above; `sha256sum -c SHA256SUMS` checks them by hand

It is written under `000000200.tmp` and renamed when whole, so a killed write never counts.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from logging import WARNING, LogRecord
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.experimental import multihost_utils

from rmjax.io.atomic import explained, sync
from rmjax.io.paths import resolve, resolve_checkpoint
from rmjax.io.text import read_json

_SUMS = "SHA256SUMS"


class Checkpoints:
    """Checkpoints under `directory`; one writer at a time (`workdir.lock`).

    With several processes all of them call every method, process 0 alone writes, and `directory` is one that all see.
    Leaves come back as host arrays, so any number of devices or processes can go on from them.

    Args:
      directory: made if missing; what killed writes left in it is removed. Names that Orbax takes for
        patterns are refused with a ValueError.
      keep_last: how many of the latest checkpoints to keep, at least 1.
      keep_best: how many of those with the highest scores to keep besides.
      read_only: for a directory of somebody else: nothing is made, cleaned or saved there.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int = 1,
        keep_best: int = 0,
        read_only: bool = False,
    ):
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"{keep_last=}, {keep_best=}: need keep_last >= 1 and keep_best >= 0")
        self._directory = resolve_checkpoint(directory, "directory").absolute()
        self._keep_last, self._keep_best = keep_last, keep_best
        self._damaged: set[int] = set()
        self._pool = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future | None = None
        logging.get_absl_logger().addFilter(_is_not_orbax_chatter)
        if jax.process_index() == 0 and not read_only:
            self._directory.mkdir(parents=True, exist_ok=True)
            _clean(self._directory)

    def save(self, step: int, tree: Any, score: float | None = None) -> None:
        """Copies `tree` to the host and writes it in the background, replacing a checkpoint of the same step.

        Waits for the write before; raises what that one raised. The next train step may donate `tree`.
        """
        self.wait()
        self._damaged.discard(step)
        leaves = {name: _to_host(leaf) for name, leaf in _named_leaves(tree).items()}
        if jax.process_index() == 0:
            self._writing = self._pool.submit(self._commit, step, leaves, score)

    def wait(self) -> None:
        """Returns when nothing is being written; raises what the write raised."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, rising, without those found damaged."""
        found = {int(path.name) for path in self._directory.glob("*") if path.name.isdigit()}
        return sorted(found - self._damaged)

    def score(self, step: int) -> float | None:
        """The score saved with `step`; None where there is no such checkpoint or no score, or it was NaN."""
        if step in self._damaged:
            return None
        try:
            return json.loads((self._path(step) / "manifest.json").read_text())["score"]
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def best_step(self) -> int | None:
        """The step of the highest score (ties: the first), None where no checkpoint has one."""
        return next(iter(self._by_score(self.steps())), None)

    def restore(
        self, like: Any, step: int | None = None, part: bool = False, best: bool = False
    ) -> tuple[int, Any] | None:
        """The newest intact checkpoint (not after `step`, where given), None if there is none.

        Every damaged one on the way is named in the log with the file that is wrong; the next save clears it away.

        Args:
          like: the tree to restore: its structure, shapes and dtypes (`jax.eval_shape` will do).
          step: take this checkpoint, or the newest intact one before it.
          part: `like` is a part of what was saved; the rest is left out.
          best: take that of the highest score; if it is damaged, one before it, else the newest intact one.

        Returns:
          The checkpoint's step and the tree, of host arrays (Python numbers where `like` has them).

        Raises:
          ValueError: an intact checkpoint does not fit `like`; names the leaves, what was found and what expected.
        """
        self.wait()
        found = self._intact(step, best) if jax.process_index() == 0 else None
        if (
            jax.process_count() > 1
        ):  # what process 0 sees: the others may look before it has written
            said = [-1 if found is None else found, *sorted(self._damaged)][:64]
            known = multihost_utils.broadcast_one_to_all(
                np.array(said + [-1] * (64 - len(said)), np.int32)
            )
            found, *damaged = (None if number < 0 else int(number) for number in known)
            self._damaged = {number for number in damaged if number is not None}
        return None if found is None else (found, _read(self._path(found), like, part))

    def close(self) -> None:
        """Waits for the last write and ends the writing thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _intact(self, step: int | None, best: bool) -> int | None:
        """Of which step the checkpoint is that `restore` wants."""
        candidates = [s for s in reversed(self.steps()) if step is None or s <= step]
        if best and (highest := self.best_step()) is not None:
            candidates.sort(key=lambda s: (s > highest, -s))
        for candidate in candidates:
            damage = _damage(self._path(candidate))
            if damage is None:
                return candidate
            self._damaged.add(candidate)
            logging.error(
                "Checkpoint %s is damaged: %s. Trying the one before it.",
                self._path(candidate),
                damage,
            )
        return None

    def _path(self, step: int) -> Path:
        return self._directory / f"{step:09d}"

    def _commit(self, step: int, leaves: dict[str, np.ndarray], score: float | None) -> None:
        number = None if score is None or math.isnan(score) else float(score)
        path = self._path(step)
        about = {"step": step, "score": number}
        try:
            _replace(path, path.with_suffix(".tmp"), path.with_suffix(".old"), leaves, about)
        except Exception as error:  # Orbax has several for one cause
            if not _is_full(error):
                raise
            _clean(self._directory)
            kept = (
                f"the newest one kept is of step {self.steps()[-1]}"
                if self.steps()
                else "there is none before it"
            )
            raise OSError(
                f"the checkpoint of step {step} did not fit into {self._directory} ({str(error).rpartition(': ')[2]}); "
                f"{kept}. Free space, and run the same line again"
            ) from error
        self._rotate(step)

    def _rotate(self, newest: int) -> None:
        steps = self.steps()
        keep = {newest, *steps[-self._keep_last :], *self._by_score(steps)[: self._keep_best]}
        for path in [self._path(step) for step in {*steps, *self._damaged} - keep]:
            if path.exists():
                path.rename(path.with_suffix(".tmp"))
        _clean(self._directory)

    def _by_score(self, steps: list[int]) -> list[int]:
        scored = [(-score, step) for step in steps if (score := self.score(step)) is not None]
        return [step for _, step in sorted(scored)]


def save_tree(path: str | Path, tree: Any, about: dict[str, Any]) -> None:
    """Writes a tree of arrays and `about` (JSON) as the directory `path`, whole or not at all.

    The layout is that of one checkpoint: arrays, manifest.json with `about` in it, SHA256SUMS. With several processes
    all of them call it, and process 0 writes.

    Raises:
      ValueError: the path is an address, or has a character that Orbax takes for a pattern.
      FileExistsError: something is there that `save_tree` did not write; what it did write is replaced.
      OSError: the disk is full; names the directory, its size and what to do. What was there stays.
    """
    logging.get_absl_logger().addFilter(_is_not_orbax_chatter)
    path = _behind_links(path)
    leaves = {name: _to_host(leaf) for name, leaf in _named_leaves(tree).items()}
    if jax.process_index() == 0:
        if path.exists() and not (path / "manifest.json").is_file():
            raise FileExistsError(
                f"{path} is there, and was not saved by this library: take another name or move it"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary, old = _beside(path)
        try:
            _replace(path, temporary, old, leaves, about)
        except Exception as error:  # Orbax has several for one cause
            shutil.rmtree(temporary, ignore_errors=True)
            if not _is_full(error):
                raise
            size = sum(leaf.nbytes for leaf in leaves.values())
            raise explained(OSError(errno.ENOSPC, str(error)), path, size) from error
        shutil.rmtree(old, ignore_errors=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"saved {path}")


def load_tree(path: str | Path, like: Callable[[dict[str, Any]], Any]) -> Any:
    """The tree of host arrays that `save_tree` wrote.

    Args:
      like: manifest -> a tree of the same structure, shapes and dtypes (`jax.eval_shape` will do). The manifest is
        `about` and "leaves", {name: [dtype, shape]}. Called before any array is read.

    Raises:
      FileNotFoundError: nothing is there.
      ValueError: it is damaged, or does not fit `like`; names the file or the leaves. Or as
        `save_tree`.
    """
    logging.get_absl_logger().addFilter(_is_not_orbax_chatter)
    path = _behind_links(path)
    if not path.exists() and _beside(path)[1].exists():
        path = _beside(path)[1]  # a save was killed between its two renames
    if not (path / "manifest.json").is_file():
        raise FileNotFoundError(
            f"{path}: no manifest.json there, so nothing was saved under this name"
        )
    damage = _damage(path)
    if damage:
        raise ValueError(f"{path} is damaged: {damage}")
    manifest = read_json(path / "manifest.json")
    leaves = manifest.get("leaves") if isinstance(manifest, dict) else None
    if not isinstance(leaves, dict) or not all(map(_is_spec, leaves.values())):
        raise ValueError(
            f"{path / 'manifest.json'}: leaves must be {{name: [dtype, shape]}}: it was not written by a save"
        )
    return _read(path, like(manifest), part=False)


def _behind_links(path: str | Path) -> Path:
    """The directory that a user means; a link stays a link, and what it points to is replaced."""
    return resolve_checkpoint(resolve(path, "path").resolve(), "path")


def _is_full(error: Exception) -> bool:
    return any(
        cause in str(error) for cause in ("No space left", "quota exceeded", "File too large")
    )


def _is_spec(spec: Any) -> bool:
    """Whether it is what `_spec` makes, read from JSON."""
    if not isinstance(spec, list) or list(map(type, spec)) != [str, list]:
        return False
    return all(type(size) is int and size >= 0 for size in spec[1])


def _is_not_orbax_chatter(record: LogRecord) -> bool:
    again = "raised an exception" in str(
        record.msg
    )  # with a traceback, of an error that it raises besides
    return "/orbax/" not in record.pathname or record.levelno >= WARNING and not again


def _clean(directory: Path) -> None:
    for path in directory.glob("[0-9]*.old"):
        if not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))
    for path in [*directory.glob("[0-9]*.old"), *directory.glob("[0-9]*.tmp")]:
        shutil.rmtree(path)


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _to_host(leaf: Any) -> np.ndarray:
    """A copy: on CPU, `jax.device_get` may be a view of a buffer that the next step donates."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf, _dtype(leaf), copy=True)


def _dtype(leaf: Any) -> np.dtype:
    return np.dtype(leaf.dtype if hasattr(leaf, "dtype") else jax.dtypes.result_type(leaf))


def _spec(leaf: Any) -> list:
    return [_dtype(leaf).name, list(np.shape(leaf))]


def _checkpointer() -> ocp.Checkpointer:
    """Of this process alone: Orbax's barriers would wait for processes that write nothing."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _beside(path: Path) -> tuple[Path, Path]:
    """Where `save_tree` writes first, and where it keeps what it replaces until the new one is in place."""
    return path.with_name(f".{path.name}.rmjax-new"), path.with_name(f".{path.name}.rmjax-old")


def _replace(
    path: Path, temporary: Path, old: Path, leaves: dict[str, np.ndarray], about: dict[str, Any]
) -> None:
    _write(temporary, leaves, about)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)  # killed before the next line, it is taken back
    temporary.rename(path)
    sync(path.parent)


def _write(path: Path, leaves: dict[str, np.ndarray], about: dict[str, Any]) -> None:
    shutil.rmtree(path, ignore_errors=True)  # of a write that failed
    path.mkdir()
    arrays = {
        name: leaf for name, leaf in leaves.items() if leaf.size
    }  # Orbax refuses arrays of size 0
    if arrays:
        _checkpointer().save(path / "arrays", ocp.args.PyTreeSave(arrays))
    specs = {name: _spec(leaf) for name, leaf in leaves.items()}
    (path / "manifest.json").write_text(json.dumps(about | {"leaves": specs}, indent=1))
    (path / _SUMS).write_text(_sums(path))
    for each in [*path.rglob("*"), path]:
        sync(each)


def _read(path: Path, like: Any, part: bool) -> Any:
    found = json.loads((path / "manifest.json").read_text())["leaves"]
    wanted = {name: _spec(leaf) for name, leaf in _named_leaves(like).items()}
    _check_fit(
        path, {name: spec for name, spec in found.items() if name in wanted or not part}, wanted
    )
    full = {
        name: ocp.RestoreArgs(restore_type=np.ndarray)
        for name, (_, shape) in found.items()
        if 0 not in shape
    }
    arrays = (
        _checkpointer().restore(path / "arrays", ocp.args.PyTreeRestore(restore_args=full))
        if full
        else {}
    )

    def leaf(name: str, like_leaf: Any) -> Any:
        array = arrays[name] if name in full else np.zeros(found[name][1], _dtype(like_leaf))
        if _spec(array) != found[name]:
            raise ValueError(
                f"{path}: {name} is {_spec(array)} in arrays, but {found[name]} in manifest.json"
            )
        return array if hasattr(like_leaf, "dtype") else array.item()

    return jax.tree.unflatten(
        jax.tree.structure(like), [leaf(*pair) for pair in _named_leaves(like).items()]
    )


def _check_fit(path: Path, found: dict[str, list], wanted: dict[str, list]) -> None:
    def show(spec: list | None) -> str:
        return "nothing" if spec is None else f"{spec[0]}{spec[1]}"

    names = [
        name for name in [*wanted, *(found.keys() - wanted)] if found.get(name) != wanted.get(name)
    ]
    wrong = [
        f"{name}: found {show(found.get(name))}, expected {show(wanted.get(name))}"
        for name in names
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"Checkpoint {path} does not fit: {'; '.join(wrong[:5])}{more}")


def _sums(path: Path) -> str:
    """The text of SHA256SUMS as it should be."""
    lines = []
    for file in sorted(f for f in path.rglob("*") if f.is_file() and f != path / _SUMS):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        lines.append(f"{digest}  {file.relative_to(path).as_posix()}\n")
    return "".join(lines)


def _damage(path: Path) -> str | None:
    """What is wrong with the checkpoint, None where nothing is."""
    try:
        stored = (path / _SUMS).read_bytes().decode(errors="replace")
        actual = _sums(path)
    except OSError as error:
        return f"{error.filename or path}: {error.strerror or error}"
    if stored == actual:
        return None
    digests = {line[66:]: line[:64] for line in stored.splitlines()}
    for line in actual.splitlines():
        if digests.pop(line[66:], None) not in (None, line[:64]):
            return f"{line[66:]}: its SHA-256 is not the one in {_SUMS} (truncated or changed)"
    missing = [
        name[:60] for name in digests if name and name != _SUMS
    ]  # any text, where that file is damaged
    return (
        f"{missing[0]}: missing, though {_SUMS} lists it"
        if missing
        else f"{_SUMS}: does not list the files here"
    )
