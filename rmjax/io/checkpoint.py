"""Checkpoints: the last N and the best M, written in the background, with a digest of every file.

Each step has a directory:

    000000200/arrays/...      the leaves, written by Orbax
    000000200/manifest.json   step, score, and shape and dtype of every leaf
    000000200/SHA256SUMS      digests of these files; check by hand: `sha256sum -c SHA256SUMS`

It is written as `000000200.tmp` and renamed when complete, so a killed write never counts.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
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
Tree = Any  # a pytree of arrays, of their shapes, or of Python numbers
Leaves = dict[str, np.ndarray]
Spec = list[Any]  # [name of the dtype, shape as a list]


class Checkpoints:
    """The checkpoints in a directory, which has one writer at a time (`workdir.lock`).

    With several processes all of them call every method, and process 0 alone writes. All processes
    must see the directory. Leaves are restored as host arrays, so a run can resume on any number of
    devices or processes.

    Args:
      directory: made if it is missing; left-overs of killed writes are removed.
      keep_last: how many of the latest checkpoints to keep, at least 1.
      keep_best: how many of the checkpoints with the highest scores to keep beside those.
      read_only: for a directory of another run: nothing is made, removed or saved.

    Raises:
      ValueError: keep_last or keep_best is too small, or Orbax would take a character of the
        directory's path for a pattern.
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
        self._writing: Future[None] | None = None
        logging.get_absl_logger().addFilter(_is_not_orbax_chatter)
        if jax.process_index() == 0 and not read_only:
            self._directory.mkdir(parents=True, exist_ok=True)
            _clean(self._directory)

    def save(self, step: int, tree: Tree, score: float | None = None) -> None:
        """Copies a tree to the host and writes it in the background.

        It first waits for the previous write, and raises the error of that write. The next train
        step may donate the tree's buffers.

        Args:
          step: names the checkpoint; a checkpoint of the same step is replaced.
          tree: of arrays and Python numbers.
          score: larger is better; None: the checkpoint is never one of the best.

        Raises:
          OSError: the previous write failed, for example on a full disk.
        """
        self.wait()
        self._damaged.discard(step)
        leaves = {name: _to_host(leaf) for name, leaf in _named_leaves(tree).items()}
        if jax.process_index() == 0:
            self._writing = self._pool.submit(self._commit, step, leaves, score)

    def wait(self) -> None:
        """Waits for the write in the background, and raises the error of that write."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, rising, without those known to be damaged."""
        steps = {int(path.name) for path in self._directory.glob("*") if path.name.isdigit()}
        return sorted(steps - self._damaged)

    def score(self, step: int) -> float | None:
        """The score saved with a step; None if there is none, or if it was NaN."""
        if step in self._damaged:
            return None
        try:
            return json.loads((self._path(step) / "manifest.json").read_text())["score"]
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def best_step(self) -> int | None:
        """The step with the highest score, the earliest of equal ones; None if no step has one."""
        return next(iter(self._by_score(self.steps())), None)

    def restore(
        self, like: Tree, step: int | None = None, part: bool = False, best: bool = False
    ) -> tuple[int, Tree] | None:
        """Restores the newest intact checkpoint.

        Damaged checkpoints are skipped. The log names each with its damaged file, and the next save
        removes it.

        Args:
          like: a tree with the structure, shapes and dtypes to restore, e.g. `jax.eval_shape`'s.
          step: restore this checkpoint, or the newest intact one before it.
          part: `like` is a part of the saved tree; the rest is left out.
          best: restore the checkpoint with the highest score; if it is damaged, the newest intact
            one before it, else the newest intact one.

        Returns:
          The checkpoint's step, and the tree of host arrays, with Python numbers where `like` has
          them. None if there is no intact checkpoint.

        Raises:
          ValueError: an intact checkpoint does not fit `like`; names the leaves.
        """
        intact = self._agreed(step, best)
        return None if intact is None else (intact, _read(self._path(intact), like, part))

    def fits(self, like: Tree, part: bool = False, best: bool = False) -> bool:
        """Checks what `restore` would restore, without its arrays.

        Args:
          like: as in `restore`.
          part: as in `restore`.
          best: as in `restore`.

        Returns:
          Whether there is an intact checkpoint.

        Raises:
          ValueError: as `restore`.
        """
        intact = self._agreed(None, best)
        if intact is not None:
            _saved(self._path(intact), like, part)
        return intact is not None

    def _agreed(self, step: int | None, best: bool) -> int | None:
        """The step of the checkpoint that all processes restore."""
        self.wait()
        intact = self._intact(step, best) if jax.process_index() == 0 else None
        if jax.process_count() > 1:
            # All use what process 0 sees: other processes may look before it has written.
            numbers = [-1 if intact is None else intact, *sorted(self._damaged)][:64]
            padded = np.array(numbers + [-1] * (64 - len(numbers)), np.int32)
            shared = multihost_utils.broadcast_one_to_all(padded)
            intact, *damaged = (None if number < 0 else int(number) for number in shared)
            self._damaged = {number for number in damaged if number is not None}
        return intact

    def close(self) -> None:
        """Waits for the last write and ends the writing thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def _intact(self, step: int | None, best: bool) -> int | None:
        """The step of the checkpoint that `restore` returns."""
        candidates = [s for s in reversed(self.steps()) if step is None or s <= step]
        if best and (highest := self.best_step()) is not None:
            candidates.sort(key=lambda s: (s > highest, -s))
        for candidate in candidates:
            damage = _damage(self._path(candidate))
            if damage is None:
                return candidate
            self._damaged.add(candidate)
            message = "Checkpoint %s is damaged: %s. Trying the one before it."
            logging.error(message, self._path(candidate), damage)
        return None

    def _path(self, step: int) -> Path:
        return self._directory / f"{step:09d}"

    def _commit(self, step: int, leaves: Leaves, score: float | None) -> None:
        """Writes a checkpoint, then removes those that are no longer kept."""
        number = None if score is None or math.isnan(score) else float(score)
        path = self._path(step)
        about = {"step": step, "score": number}
        try:
            _replace(path, path.with_suffix(".tmp"), path.with_suffix(".old"), leaves, about)
        except Exception as error:  # Orbax has several for one cause
            if not _is_full(error):
                raise
            _clean(self._directory)
            steps, cause = self.steps(), str(error).rpartition(": ")[2]
            kept = f"the newest one kept is of step {steps[-1]}" if steps else "none is kept"
            raise OSError(
                f"the checkpoint of step {step} did not fit into {self._directory} ({cause}); "
                f"{kept}. Free space, and run the same line again"
            ) from error
        self._rotate(step)

    def _rotate(self, newest: int) -> None:
        """Removes all checkpoints but the newest, the last and the best."""
        steps = self.steps()
        keep = {newest, *steps[-self._keep_last :], *self._by_score(steps)[: self._keep_best]}
        for path in [self._path(step) for step in {*steps, *self._damaged} - keep]:
            if path.exists():
                path.rename(path.with_suffix(".tmp"))
        _clean(self._directory)

    def _by_score(self, steps: list[int]) -> list[int]:
        """Steps with a score, the highest first."""
        scored = [(-score, step) for step in steps if (score := self.score(step)) is not None]
        return [step for _, step in sorted(scored)]


def save_tree(path: str | Path, tree: Tree, about: dict[str, Any]) -> None:
    """Writes a tree of arrays as a directory, which is complete or absent.

    The layout is that of a checkpoint. With several processes all of them call this function, and
    process 0 writes.

    Args:
      path: the directory. A tree saved there before is replaced.
      tree: of arrays.
      about: JSON values, stored in manifest.json.

    Raises:
      ValueError: the path is an address, or has a character that Orbax takes for a pattern.
      FileExistsError: the path holds something else than a saved tree.
      OSError: the disk is full; names the directory, its size and the cure. The old tree stays.
    """
    logging.get_absl_logger().addFilter(_is_not_orbax_chatter)
    path = _behind_links(path)
    leaves = {name: _to_host(leaf) for name, leaf in _named_leaves(tree).items()}
    if jax.process_index() == 0:
        if path.exists() and not (path / "manifest.json").is_file():
            cause = "exists, and was not saved by this library"
            raise FileExistsError(f"{path} {cause}: take another name, or move it")
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


def load_tree(path: str | Path, like: Callable[[dict[str, Any]], Tree]) -> Tree:
    """Reads a tree that `save_tree` wrote.

    Args:
      path: the directory.
      like: manifest -> a tree with the structure, shapes and dtypes to restore. The manifest is
        `about` and "leaves", {name: [dtype, shape]}. It is called before any array is read.

    Returns:
      The tree, of host arrays.

    Raises:
      FileNotFoundError: nothing was saved as `path`.
      ValueError: the directory is damaged or does not fit `like`; names the file or the leaves. Or
        as `save_tree`.
    """
    logging.get_absl_logger().addFilter(_is_not_orbax_chatter)
    path = _behind_links(path)
    if not path.exists() and _beside(path)[1].exists():
        path = _beside(path)[1]  # a save was killed between its two renames
    if not (path / "manifest.json").is_file():
        cause = "it has no manifest.json, so nothing was saved under this name"
        raise FileNotFoundError(f"{path}: {cause}")
    damage = _damage(path)
    if damage:
        raise ValueError(f"{path} is damaged: {damage}")
    manifest = read_json(path / "manifest.json")
    leaves = manifest.get("leaves") if isinstance(manifest, dict) else None
    if not isinstance(leaves, dict) or not all(map(_is_spec, leaves.values())):
        must = "leaves must be {name: [dtype, shape]}"
        raise ValueError(f"{path / 'manifest.json'}: {must}: it was not written by a save")
    return _read(path, like(manifest), part=False)


def _behind_links(path: str | Path) -> Path:
    """The directory that a user means; a link stays a link, and its target is replaced."""
    return resolve_checkpoint(resolve(path, "path").resolve(), "path")


def _is_full(error: Exception) -> bool:
    causes = ("No space left", "quota exceeded", "File too large")
    return any(cause in str(error) for cause in causes)


def _is_spec(spec: object) -> bool:
    """Whether a value from JSON is one that `_spec` makes."""
    if not isinstance(spec, list) or list(map(type, spec)) != [str, list]:
        return False
    return all(type(size) is int and size >= 0 for size in spec[1])


def _is_not_orbax_chatter(record: LogRecord) -> bool:
    """A filter for Orbax's log: infos, and tracebacks of errors that it raises too."""
    again = "raised an exception" in str(record.msg)
    return "/orbax/" not in record.pathname or record.levelno >= WARNING and not again


def _clean(directory: Path) -> None:
    """Restores what a killed write was replacing, and removes what killed writes left."""
    for path in directory.glob("[0-9]*.old"):
        if not path.with_suffix("").exists():
            path.rename(path.with_suffix(""))
    for path in [*directory.glob("[0-9]*.old"), *directory.glob("[0-9]*.tmp")]:
        shutil.rmtree(path)


def _named_leaves(tree: Tree) -> dict[str, Any]:
    """The leaves of a tree by their paths, such as 'params/encoder/kernel'."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _to_host(leaf: Any) -> np.ndarray:
    """A copy: on a CPU `jax.device_get` may be a view of a buffer that the next step donates."""
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        leaf = multihost_utils.process_allgather(leaf, tiled=True)
    return np.array(leaf, _dtype(leaf), copy=True)


def _dtype(leaf: Any) -> np.dtype:
    return np.dtype(leaf.dtype if hasattr(leaf, "dtype") else jax.dtypes.result_type(leaf))


def _spec(leaf: Any) -> Spec:
    """The dtype and shape of a leaf, as the manifest has them."""
    return [_dtype(leaf).name, list(np.shape(leaf))]


def _checkpointer() -> ocp.Checkpointer:
    """Orbax for this process alone; its barriers would wait for processes that write nothing."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def _beside(path: Path) -> tuple[Path, Path]:
    """Where `save_tree` writes first, and where it keeps the old tree until the new one is done."""
    return path.with_name(f".{path.name}.rmjax-new"), path.with_name(f".{path.name}.rmjax-old")


def _replace(path: Path, temporary: Path, old: Path, leaves: Leaves, about: dict[str, Any]) -> None:
    """Writes a directory beside `path`, then puts it in place of `path`, which becomes `old`."""
    _write(temporary, leaves, about)
    if path.exists():
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)  # if killed before the next line, `_clean` takes it back
    temporary.rename(path)
    sync(path.parent)


def _write(path: Path, leaves: Leaves, about: dict[str, Any]) -> None:
    """Writes arrays, manifest and digests, and waits until the disk has them."""
    shutil.rmtree(path, ignore_errors=True)  # left by a write that failed
    path.mkdir()
    arrays = {name: leaf for name, leaf in leaves.items() if leaf.size}  # Orbax refuses size 0
    if arrays:
        _checkpointer().save(path / "arrays", ocp.args.PyTreeSave(arrays))
    specs = {name: _spec(leaf) for name, leaf in leaves.items()}
    (path / "manifest.json").write_text(json.dumps(about | {"leaves": specs}, indent=1))
    (path / _SUMS).write_text(_sums(path))
    for entry in [*path.rglob("*"), path]:
        sync(entry)


def _read(path: Path, like: Tree, part: bool) -> Tree:
    """The tree of an intact directory; `part`: `like` may lack some of the saved leaves."""
    saved = _saved(path, like, part)
    full = {name for name, (_, shape) in saved.items() if 0 not in shape}
    arrays = {}
    if full:
        args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in full}
        restore = ocp.args.PyTreeRestore(restore_args=args)
        arrays = _checkpointer().restore(path / "arrays", restore)

    def leaf(name: str, like_leaf: Any) -> Any:
        array = arrays[name] if name in full else np.zeros(saved[name][1], _dtype(like_leaf))
        if _spec(array) != saved[name]:
            both = f"{_spec(array)} in arrays, but {saved[name]} in manifest.json"
            raise ValueError(f"{path}: {name} is {both}")
        return array if hasattr(like_leaf, "dtype") else array.item()

    leaves = [leaf(*pair) for pair in _named_leaves(like).items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _saved(path: Path, like: Tree, part: bool) -> dict[str, Spec]:
    """The saved leaves of an intact directory, which must fit `like`."""
    saved = json.loads((path / "manifest.json").read_text())["leaves"]
    wanted = {name: _spec(leaf) for name, leaf in _named_leaves(like).items()}
    fitting = {name: spec for name, spec in saved.items() if name in wanted or not part}
    _check_fit(path, fitting, wanted)
    return saved


def _check_fit(path: Path, saved: Mapping[str, Spec], wanted: Mapping[str, Spec]) -> None:
    """Raises ValueError if the saved leaves are not the wanted ones; names the first five."""

    def show(spec: Spec | None) -> str:
        return "nothing" if spec is None else f"{spec[0]}{spec[1]}"

    names = [*wanted, *(name for name in saved if name not in wanted)]
    wrong = [
        f"{name}: found {show(saved.get(name))}, expected {show(wanted.get(name))}"
        for name in names
        if saved.get(name) != wanted.get(name)
    ]
    if wrong:
        more = f"; and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"Checkpoint {path} does not fit: {'; '.join(wrong[:5])}{more}")


def _sums(path: Path) -> str:
    """The right text of SHA256SUMS for the files of a directory."""
    lines = []
    for file in sorted(f for f in path.rglob("*") if f.is_file() and f != path / _SUMS):
        with file.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        lines.append(f"{digest}  {file.relative_to(path).as_posix()}\n")
    return "".join(lines)


def _damage(path: Path) -> str | None:
    """The damage of a checkpoint in words; None if it is intact."""
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
    # Any text may stand in a damaged list, so names are cut.
    missing = [name[:60] for name in digests if name and name != _SUMS]
    if missing:
        return f"{missing[0]}: missing, though {_SUMS} lists it"
    return f"{_SUMS}: does not list the files here"
