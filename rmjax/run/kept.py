"""The config that a run keeps in its workdir, and the check that a run continues with the same one.

A workdir has these files:

config.json             the config, and a short account of the data (`data.found`)
vocabulary.json         the word of each id, if the data has words
items.jsonl             `rmjax.run.items`: {"index": 0, "id": 1, "count": 12}
data.json               `rmjax.run.description`: the model can be opened without the data
model/, teacher/        checkpoints of the two stages, see `rmjax.run.parameters`
results.json            the final table, once the run has ended
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rmjax import config as configs
from rmjax.io import atomic, text

# These keys may change when a run continues. All others determine what the run computes.
MAY_CHANGE = (
    "train.devices", "train.mapping", "train.model_devices", "train.split_layers",
    "train.microbatch", "train.log_every", "train.loggers", "train.keep_last",
    "train.keep_best", "train.start_from", "train.new_items", "data.dir", "data.cache_dir",
    "data.ram_bytes", "data.workers", "data.prefetch", "data.vectors",
    "data.activitynet.features", "data.table.path", "machine.fused", "model.pretrained",
    "probe.steps", "probe.fragments", "probe.streams",
)  # fmt: skip


def may_change(name: str) -> bool:
    """Whether a key of the config, or its old name, may change when a run continues."""
    name = configs.RENAMED.get(name, name)
    return name in MAY_CHANGE or name.startswith("logger.")


def read_config(workdir: str | Path) -> tuple[ConfigDict, dict[str, Any]]:
    """Reads the config of a run.

    Args:
      workdir: of the run.

    Returns:
      The config, and the account of its data (the value of `data.found`).

    Raises:
      FileNotFoundError: config.json is missing.
      ValueError: config.json is damaged, was changed, or has an impossible value; names the file
        and the cause.
    """
    path, config = Path(workdir) / "config.json", configs.base()
    values = read_values(path)
    data = values["data"].pop("found", {})
    try:
        known = configs.of_today(flat(values), may_change)
        refuse_unknown(known)
        config.update(configs.nested(known))
        configs.validate(config)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error
    return config, data


def read_values(path: Path) -> dict[str, Any]:
    """Reads a config.json and compares it with its digest. The values are not checked.

    Args:
      path: of the file.

    Returns:
      The values by section, without the digest.

    Raises:
      FileNotFoundError, ValueError: as `read_config`.
    """
    cure = "restore it from a copy of the workdir, or use another --workdir"
    if not path.exists():
        if any(path.parent.glob("*/[0-9]*")):
            raise FileNotFoundError(
                f"{path} is missing, and without it the checkpoints cannot be read: {cure}"
            )
        raise FileNotFoundError(f"{path} is missing: name a workdir that was trained")
    values = text.read_json(path, cure)
    if not isinstance(values, dict) or not isinstance(values.get("data"), dict):
        cure = "restore it from a copy of the workdir"
        raise ValueError(f"{path} is not the config of a run: {cure}")
    digest = values.pop("digest", None)  # older runs have none
    if digest not in (None, values_digest(values)):
        raise ValueError(
            f"{path} was changed after the run wrote it, so it may not fit the checkpoints beside "
            'it: put the values back, or write null as the value of "digest" if they are right'
        )
    return values


def values_digest(values: Mapping[str, object]) -> str:
    """The digest of all values that determine what a run computes.

    The account of the data is left out, since it is compared with the data.

    Args:
      values: of a config, by section.

    Returns:
      16 hexadecimal digits.
    """
    free = lambda name: may_change(name) or name.startswith("data.found.")
    return digest_of({name: value for name, value in flat(values).items() if not free(name)})


def digest_of(values: object) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of JSON values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def sealed(values: dict[str, object]) -> str:
    """The text of a config.json: the digest of the values, and the values."""
    return json.dumps({"digest": values_digest(values)} | values, indent=1)


def refuse_unknown(names: Iterable[str]) -> None:
    """Checks that this version knows the keys of a run.

    Args:
      names: dotted names of `configs.of_today`.

    Raises:
      ValueError: a key is unknown; names it.
    """
    for name in names:
        if name in configs.SCHEMA or name.startswith("data.found."):
            continue
        if name in configs.REMOVED:
            cause = f"it was removed, and runs compute with {configs.REMOVED[name]!r} today"
            raise ValueError(f"config.{name}: {cause}: use the version that wrote the run")
        cure = "if it is of a kind of your own, import its module first (--import=MODULE)"
        raise ValueError(f"config.{name}: no such key in this version: {cure}")


def refuse_other(
    workdir: Path,
    old: Mapping[str, object],
    new: Mapping[str, object],
    free: Callable[[str], bool] = may_change,
) -> None:
    """Checks that a run may continue with a config.

    Args:
      workdir: of the run, for the error.
      old: the config that the run began with, by section. A missing key has its default, since it
        may be newer than the run.
      new: the config to continue with.
      free: says of a key's name whether the configs may differ in it.

    Raises:
      ValueError: the configs differ in a key that may not change, or the old one has a key that
        this version does not know; names the keys.
    """
    defaults = {name: field.default for name, field in configs.SCHEMA.items()}
    before, after = defaults | configs.of_today(flat(old), free), flat(new)
    try:
        refuse_unknown(name for name in before if not free(name))
    except ValueError as error:
        raise ValueError(f"{workdir} holds a run of another version: {error}") from error
    keys = sorted(key for key in {*before, *after} if not free(key))
    differing = [key for key in keys if before.get(key) != after.get(key)]
    if differing:
        show = lambda key: f"config.{key} was {before.get(key)!r}, now {after.get(key)!r}"
        raise ValueError(
            f"{workdir} holds a run of another config ({'; '.join(map(show, differing[:5]))}): "
            "use another --workdir, or set them back"
        )


def flat(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Flattens a config: {"a": {"b": 1}} -> {"a.b": 1}."""
    values: dict[str, object] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        values |= flat(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return values


def write_whole(path: Path, content: str) -> None:
    """Writes a file completely or not at all. Only process 0 writes.

    Args:
      path: of the file.
      content: its text.

    Raises:
      OSError: as `atomic.write`.
    """
    if jax.process_index() == 0:
        atomic.write(path, content)
