"""What a run keeps in its workdir: its config, its parameters, and how another run takes them up.

config.json, vocabulary.json    what it computes, and what its data were found to be
model/, teacher/                checkpoints of the two stages
results.json                    once it has ended
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

import jax

from rmjax import config as configs
from rmjax.checkpoint import Checkpoints
from rmjax.data.source import Source
from rmjax.io import atomic, text
from rmjax.types import Params, StreamTask, Task

# What may change between a run and its continuation; everything else is part of what the run computes.
MAY_CHANGE = ("train.devices", "train.mapping", "train.model_devices", "train.split_layers", "train.microbatch",
              "train.log_every", "train.keep_last", "train.keep_best", "train.start_from", "data.dir",
              "data.cache_dir", "data.ram_bytes", "data.workers", "data.prefetch", "data.vectors",
              "data.activitynet.features", "model.pretrained", "probe.steps", "probe.fragments",
              "probe.streams")  # fmt: skip


def read_config(workdir: str | Path) -> tuple[Any, dict[str, Any]]:
    """The config of the run in `workdir`, and what its data were found to be.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it was damaged or changed, or has an impossible value; names the file and the cause.
    """
    path, config = Path(workdir) / "config.json", configs.base()
    values = read_values(path)
    found = values["data"].pop("found", {})
    try:
        config.update(values)
        configs.validate(config)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    return config, found


def read_values(path: Path) -> dict[str, Any]:
    """What a config.json holds, held against its digest.

    Raises:
      FileNotFoundError, ValueError: as `read_config`, without a check of the values.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: name a workdir that was trained")
    values = text.read_json(path)
    if not isinstance(values, dict) or not isinstance(values.get("data"), dict):
        raise ValueError(f"{path} is not the config of a run: restore it from a copy of the workdir")
    digest = values.pop("digest", None)  # older runs have none
    if digest not in (None, values_digest(values)):
        raise ValueError(
            f"{path} was changed after the run wrote it, so it may not fit the checkpoints beside it: "
            'put the values back, or remove the line "digest" if they are right'
        )
    return values


def values_digest(values: dict[str, Any]) -> str:
    """The digest of what a run computes: all values but those that may change. What the data were
    found to be is left out, since it is compared with the data."""
    free = lambda name: name in MAY_CHANGE or name.startswith("data.found.")  # noqa: E731
    computed = {name: value for name, value in flat(values).items() if not free(name)}
    return hashlib.sha256(json.dumps(computed, sort_keys=True).encode()).hexdigest()[:16]


def sealed(values: dict[str, Any]) -> str:
    """The text of a config.json: the values and their digest."""
    return json.dumps(values | {"digest": values_digest(values)}, indent=1)


def check_same_config(config: Any, workdir: Path, source: Source) -> None:
    """Writes config.json at the start of a run, and compares it when the run goes on.

    Raises:
      ValueError: a run with another config or other data saved something here; names the fields.
      FileNotFoundError: the checkpoints here have no config.json beside them.
    """
    path, now = workdir / "config.json", json.loads(config.to_json())
    sizes = {split: source.size(split) for split in ("train", "valid", "test")}
    now["data"]["found"] = {"source": type(source).__name__, "items": source.num_items, **sizes}
    now["data"]["found"] |= words_digest(source)
    if not any(workdir.glob("*/[0-9]*")):
        write_whole(path, sealed(now))
        if hasattr(source, "vocabulary"):  # what the checkpoints' rows stand for
            write_whole(workdir / "vocabulary.json", json.dumps(list(source.vocabulary), indent=0))
        return
    refuse_other(workdir, read_values(path), now)
    if not any((workdir / "model").glob("[0-9]*")):
        write_whole(path, sealed(now))  # what the model is about to begin from may have changed


def refuse_other(workdir: Path, then: dict, now: dict) -> None:
    """Raises ValueError, naming the fields, if the config `then` is not one to go on with as `now`."""
    then, now = flat(then), flat(now)
    then = {name: field.default for name, field in configs.SCHEMA.items()} | then  # a key that came after that run
    differing = [k for k in sorted({*then, *now} - set(MAY_CHANGE)) if then.get(k) != now.get(k)]
    if differing:
        shown = "; ".join(f"config.{k} was {then.get(k)!r}, now {now.get(k)!r}" for k in differing[:5])
        raise ValueError(f"{workdir} holds a run of another config ({shown}): use another --workdir, or set them back")


def words_digest(source: Source) -> dict[str, str]:
    """Of the vocabulary and the answers of a source that has them: what ids and classes stand for."""
    if not hasattr(source, "vocabulary"):
        return {}
    words = json.dumps([list(source.vocabulary), list(getattr(source, "classes", ()))])
    return {"words": hashlib.sha256(words.encode()).hexdigest()[:16]}


def refuse_other_words(found: dict, source: Source, here: str, there: str) -> None:
    """Raises ValueError if ids or classes stand for other words than in the run whose config.json says data.found."""
    if words_digest(source).get("words") != found.get("words"):
        raise ValueError(f"{here} other words or answers than {there}")


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    items = ((f"{prefix}{k}", v) for k, v in tree.items())
    return {
        name: value for k, v in items for name, value in (flat(v, f"{k}.") if isinstance(v, dict) else {k: v}).items()
    }


def write_whole(path: Path, content: str) -> None:
    """Writes a file that is there wholly or not at all; process 0 only."""
    if jax.process_index() == 0:
        atomic.write(path, content)


def read_model(workdir: str | Path, task: Task | StreamTask) -> Params:
    """The best parameters of the model in `workdir`; raises FileNotFoundError where there are none."""
    params = read_best(Path(workdir) / "model", jax.eval_shape(task.init, jax.random.key(0)))
    if params is None:
        raise FileNotFoundError(f"{workdir} has no checkpoint of the model: train first, with --mode=train")
    return params


def read_teacher(workdir: Path, like: Params) -> Params:
    """The best teacher of another run, which must have ended its training. -> sampler parameters."""
    ended = any((workdir / "model").glob("[0-9]*"))  # the model comes after the teacher
    params = read_best(workdir / "teacher", {"sampler": like}) if ended else None
    if params is None:
        raise FileNotFoundError(
            f"config.teacher.dir = {str(workdir)!r} holds no whole teacher: name a workdir with one"
        )
    return params["sampler"]


def read_start(workdir: Path, source: Source, like: Params) -> Params:
    """The best parameters of another run, of the same sizes and data: its words must mean the same here. (Whether ids
    of clicked items do is not checked.)

    Raises:
      FileNotFoundError: nothing was trained there.
      ValueError: it was trained on other data, or has other parameters.
    """
    workdir = workdir.expanduser()
    said, kept = f"config.train.start_from = {str(workdir)!r}", workdir / "config.json"
    if kept.exists():
        found = read_config(workdir)[1]
        refuse_other_words(found, source, "config.data has", f"{said} was trained on: use the same data")
        items, here = found.get("items", source.num_items), source.num_items
        if items != here:
            raise ValueError(f"{said} was trained on data of {items} items, config.data has {here}: use the same data")
    try:
        params = read_best(workdir / "model", like)
    except ValueError as error:
        cure = "give both runs the same machine, reason and rehearsal"
        raise ValueError(f"{said} has other parameters than this config's: {cure} ({error})") from error
    if params is None:
        raise FileNotFoundError(f"{said} has no checkpoint of the model: name a workdir that was trained")
    return params


def read_best(folder: Path, like: Params) -> Params | None:
    """The best parameters that a stage saved in `folder`, or a part of them; nothing there is changed."""
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        return restore_best(checkpoints, like)


def restore_best(checkpoints: Checkpoints, like: Params) -> Params | None:
    """Parameters of the best checkpoint; if that is damaged, of one before it, else of the newest intact one."""
    found = checkpoints.restore({"params": like}, best=True, part=True)
    return None if found is None else found[1]["params"]
