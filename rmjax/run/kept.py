"""What a run keeps in its workdir: its config, its parameters, and how another run takes them up.

config.json, vocabulary.json    what it computes, and what its data were found to be
data.json                       the description of its data, with which the model is opened without them
items.jsonl                     of items with ids from outside: {"index": 0, "id": 1, "count": 12}
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
import numpy as np
from absl import logging

from rmjax import config as configs
from rmjax.data import describe, make_source
from rmjax.data.source import Description, Source
from rmjax.io import atomic, text
from rmjax.io.checkpoint import Checkpoints
from rmjax.types import Params, Task

# What may change between a run and its continuation; everything else is part of what the run computes.
MAY_CHANGE = ("train.devices", "train.mapping", "train.model_devices", "train.split_layers", "train.microbatch",
              "train.log_every", "train.loggers", "logger.project", "train.keep_last",
              "train.keep_best", "train.start_from", "data.dir",
              "data.cache_dir", "data.ram_bytes", "data.workers", "data.prefetch", "data.vectors",
              "data.activitynet.features", "model.pretrained", "probe.steps", "probe.fragments",
              "probe.streams")  # fmt: skip

_DATA = "data.json"
_ANEW = "bring it back from a copy, or remove it and run --mode=eval, which writes it anew from the data"
_IDS = "ids "  # how the digest of ids from outside begins


def read_config(workdir: str | Path) -> tuple[Any, dict[str, Any]]:
    """The config of the run in `workdir`, and what its data were found to be.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it was damaged or changed, or has an impossible value; names the file and the cause.
    """
    path, config = Path(workdir) / "config.json", configs.base()
    values = read_values(path)
    data = values["data"].pop("found", {})
    try:
        config.update(values)
        configs.validate(config)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path}: {error}") from error
    return config, data


def read_values(path: Path) -> dict[str, Any]:
    """What a config.json holds, held against its digest.

    Raises:
      FileNotFoundError, ValueError: as `read_config`, without a check of the values.
    """
    cure = "restore it from a copy of the workdir, or use another --workdir"
    if not path.exists():
        if any(path.parent.glob("*/[0-9]*")):
            raise FileNotFoundError(
                f"{path} is not there, and the checkpoints beside it cannot be read without it: {cure}"
            )
        raise FileNotFoundError(f"{path} is not there: name a workdir that was trained")
    values = text.read_json(path, cure)
    if not isinstance(values, dict) or not isinstance(values.get("data"), dict):
        raise ValueError(
            f"{path} is not the config of a run: restore it from a copy of the workdir"
        )
    digest = values.pop("digest", None)  # older runs have none
    if digest not in (None, values_digest(values)):
        raise ValueError(
            f"{path} was changed after the run wrote it, so it may not fit the checkpoints beside it: "
            'put the values back, or remove the line "digest" if they are right'
        )
    return values


def values_digest(values: dict[str, Any]) -> str:
    """The digest of what a run computes: all values but those that may change. What the data were
    found to be is left out, since it is compared with the data.
    """
    free = lambda name: name in MAY_CHANGE or name.startswith("data.found.")
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
    data = {
        "source": type(source).__name__,
        "items": source.num_items,
        **sizes,
        **words_digest(source),
    }
    if not any(workdir.glob("*/[0-9]*")):
        now["data"]["found"] = data | numbering_digest(source)
        if source.vocabulary:  # what the checkpoints' rows stand for
            write_whole(workdir / "vocabulary.json", json.dumps(list(source.vocabulary), indent=0))
        if outside_ids(source) is not None:
            write_whole(workdir / "items.jsonl", item_lines(source))
        write_description(workdir, describe(config.data, source))
        write_whole(path, sealed(now))
        return
    then = read_values(path)
    before = then["data"].pop("found", {})
    refuse_other(workdir, then, now)
    refuse_other_items(workdir, source)
    now["data"]["found"] = data | {k: v for k, v in before.items() if k == "numbering"}
    refuse_other(workdir, then | {"data": then["data"] | {"found": before}}, now)
    if not any((workdir / "model").glob("[0-9]*")):
        write_whole(path, sealed(now))  # what the model is about to begin from may have changed
    if not (workdir / _DATA).exists():
        with contextlib.suppress(OSError):  # a workdir that cannot be written is read as it is
            write_description(workdir, describe(config.data, source))


def write_description(workdir: Path, description: Description) -> None:
    """Keeps what the data are, in data.json."""
    values = description.as_json()
    write_whole(workdir / _DATA, json.dumps(values | {"digest": _digest_of(values)}))


def read_description(workdir: Path) -> Description | None:
    """What the data of the run in `workdir` are; None if the run is older than data.json.

    Raises:
      ValueError: data.json was damaged or changed; names the file.
    """
    path = workdir / _DATA
    if not path.exists():
        return None
    values = text.read_json(path)
    if not isinstance(values, dict) or values.pop("digest", None) != _digest_of(values):
        raise ValueError(f"{path} was changed after the run wrote it: {_ANEW}")
    try:
        return Description.from_json(values)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is of another version ({error}): {_ANEW}") from error


def _digest_of(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def description_of(config: Any, workdir: Path) -> Description:
    """What the data of the run in `workdir` are. They are opened only if the run kept no description; then it is kept.

    Raises:
      FileNotFoundError: the run kept none, and its data cannot be opened.
      ValueError: data.json was changed, or the data are others than those of the run.
    """
    description = read_description(workdir)
    if description is not None:
        return description
    try:
        source = make_source(config.data, config.data.seed)
    except OSError as error:
        where = f"config.data.dir = {config.data.dir!r}"
        raise FileNotFoundError(
            f"{workdir / _DATA} is missing, as in runs of earlier versions: it is made of the data, which are needed "
            f"once. Put them where the run had them ({where}), or run --mode=eval with the right one. {error}"
        ) from error
    refuse_other_items(workdir, source)
    description = describe(config.data, source)
    with contextlib.suppress(OSError):
        write_description(workdir, description)
    return description


def refuse_other(workdir: Path, then: dict, now: dict) -> None:
    """Raises ValueError, naming the fields, if the config `then` is not one to go on with as `now`."""
    then, now = flat(then), flat(now)
    then = {
        name: field.default for name, field in configs.SCHEMA.items()
    } | then  # a key that came after that run
    differing = [k for k in sorted({*then, *now} - set(MAY_CHANGE)) if then.get(k) != now.get(k)]
    if differing:
        shown = "; ".join(
            f"config.{k} was {then.get(k)!r}, now {now.get(k)!r}" for k in differing[:5]
        )
        raise ValueError(
            f"{workdir} holds a run of another config ({shown}): use another --workdir, or set them back"
        )


def words_digest(source: Source) -> dict[str, str]:
    """Of the vocabulary and the answers of a source that has them: what ids and classes stand for."""
    if not source.vocabulary:
        return {}
    words = json.dumps([list(source.vocabulary), list(source.classes)])
    return {"words": hashlib.sha256(words.encode()).hexdigest()[:16]}


def numbering_digest(source: Source) -> dict[str, str]:
    """What item ids stand for, in short, where the source says it (see `Source`)."""
    if source.numbering is None:
        return {}
    ids = outside_ids(source)
    return {"numbering": str(source.numbering) if ids is None else _digest(ids)}


def outside_ids(source: Source) -> np.ndarray | None:
    """The ids from outside of a source's items [num_items]; None where they have none."""
    ids = source.numbering
    return None if ids is None or isinstance(ids, str) else np.asarray(ids)


def _digest(ids: np.ndarray) -> str:
    return f"{_IDS}{hashlib.sha256(json.dumps(ids.tolist()).encode()).hexdigest()[:16]}"


def item_lines(source: Source) -> str:
    """items.jsonl of a source whose items have ids from outside."""
    ids = outside_ids(source)
    assert ids is not None
    columns = {"index": range(source.num_items), "id": ids.tolist()}
    if source.popularity is not None:
        columns["count"] = source.popularity.tolist()
    rows = zip(*columns.values(), strict=True)
    return "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows)


def read_ids(workdir: Path, digest: str) -> np.ndarray:
    """The ids from outside of a run's items [num_items], in its order.

    Raises:
      ValueError: items.jsonl is gone, or is not what the run wrote.
    """
    path = workdir / "items.jsonl"
    try:
        ids = np.array(
            [text.parse_json(line, f"{path}, line {n}")["id"] for n, line in text.read_lines(path)]
        )
    except (FileNotFoundError, KeyError, TypeError):
        ids = np.array([])
    if _digest(ids) != digest:
        raise ValueError(f"{path} is gone or was changed, so items cannot be compared: restore it")
    return ids


def match_items(workdir: Path, source: Source, name: str) -> np.ndarray | None:
    """Where the items of `source` are in the tables of the run in `workdir`, which errors call `name`.

    Returns:
      i64 [num_items], the run's row of each item; None if every row is in its place. Also None,
      with a warning, if the run kept no ids and has as many items.

    Raises:
      ValueError: words, answers or items are others; says how many items are missing or new, and names some.
    """
    if not (workdir / "config.json").exists():
        return None  # nothing was trained there; those who want its parameters say so
    trained_on = read_config(workdir)[1]
    cure = "use the data it was trained on"
    if words_digest(source).get("words") != trained_on.get("words"):
        raise ValueError(
            f"config.data has other words or answers than {name} was trained on: {cure}"
        )
    before, digest = trained_on.get("numbering"), numbering_digest(source).get("numbering")
    if before and before == digest:
        return None
    if all(str(numbering).startswith(_IDS) for numbering in (before, digest)):
        old, new = read_ids(workdir, str(before)), np.asarray(source.numbering)
        missing, fresh = np.setdiff1d(old, new), np.setdiff1d(new, old)
        if missing.size or fresh.size:
            raise ValueError(
                f"{name} was trained on other items: {_some(missing)} of its {len(old):,} ids are not "
                f"in config.data, and {_some(fresh)} ids there are new: {cure}"
            )
        order = np.argsort(old)
        return order[np.searchsorted(old, new, sorter=order)]
    if trained_on.get("items", source.num_items) != source.num_items:
        sizes = f"data of {trained_on['items']} items, config.data has {source.num_items}"
        raise ValueError(f"{name} was trained on {sizes}: {cure}")
    if before and digest:
        raise ValueError(
            f"{name} was trained on items of {before}; config.data has {digest}: {cure}"
        )
    if digest:
        logging.warning("%s kept no item ids: only the number of items could be compared.", name)
    return None


def refuse_other_items(workdir: Path, source: Source) -> None:
    """Raises ValueError if `source` has other items than the run in `workdir`, or has them in another order."""
    if match_items(workdir, source, str(workdir)) is not None:
        cure = "use another --workdir, and this one as config.train.start_from"
        raise ValueError(f"{workdir} holds a run on the same items in another order: {cure}")


def _some(ids: np.ndarray) -> str:
    """How many there are, and the first three."""
    return f"{len(ids):,} (such as {', '.join(map(str, ids[:3].tolist()))})" if ids.size else "0"


def move_rows(params: Params, table: tuple[str, ...], rows: np.ndarray) -> Params:
    """`params` with those rows of the item table, which is at `table` (see `ItemTask`)."""
    if not table:
        return params[rows]
    return params | {table[0]: move_rows(params[table[0]], table[1:], rows)}


def flat(tree: dict, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    items = ((f"{prefix}{k}", v) for k, v in tree.items())
    return {
        name: value
        for k, v in items
        for name, value in (flat(v, f"{k}.") if isinstance(v, dict) else {k: v}).items()
    }


def write_whole(path: Path, content: str) -> None:
    """Writes a file that is there wholly or not at all; process 0 only."""
    if jax.process_index() == 0:
        atomic.write(path, content)


def read_model(workdir: str | Path, task: Task) -> Params:
    """The best parameters of the model in `workdir`; raises FileNotFoundError where there are none."""
    params = read_best(Path(workdir) / "model", jax.eval_shape(task.init, jax.random.key(0)))
    if params is None:
        if any((Path(workdir) / "model").glob("[0-9]*")):
            cure = "restore it from a copy, or train in another --workdir"
            raise FileNotFoundError(
                f"{workdir} has no intact checkpoint of the model, see above: {cure}"
            )
        raise FileNotFoundError(
            f"{workdir} has no checkpoint of the model: train first, with --mode=train"
        )
    return params


def read_teacher(workdir: Path, source: Source, task: Task) -> Params:
    """The best teacher of another run, which must have ended its training. -> sampler parameters.

    Raises:
      FileNotFoundError: no whole teacher is there.
      ValueError: as `match_items`.
    """
    name = f"config.teacher.dir = {str(workdir)!r}"
    rows = match_items(workdir, source, name)
    ended = any((workdir / "model").glob("[0-9]*"))  # the model comes after the teacher
    like = {"sampler": jax.eval_shape(task.init, jax.random.key(0))["sampler"]}
    params = read_best(workdir / "teacher", like) if ended else None
    if params is None:
        raise FileNotFoundError(f"{name} holds no whole teacher: name a workdir with one")
    return _moved(params, task, rows, name)["sampler"]


def read_start(workdir: Path, source: Source, task: Task) -> Params:
    """The best parameters of another run, its rows of items in this run's order.

    Raises:
      FileNotFoundError: nothing was trained there.
      ValueError: it was trained on other data (as `match_items`), or has other parameters.
    """
    name = f"config.train.start_from = {str(workdir)!r}"
    rows = match_items(workdir, source, name)
    try:
        params = read_best(workdir / "model", jax.eval_shape(task.init, jax.random.key(0)))
    except ValueError as error:
        cure = "give both runs the same machine, reason and rehearsal"
        raise ValueError(
            f"{name} has other parameters than this config's: {cure} ({error})"
        ) from error
    if params is None:
        raise FileNotFoundError(
            f"{name} has no checkpoint of the model: name a workdir that was trained"
        )
    return _moved(params, task, rows, name)


def _moved(params: Params, task: Any, rows: np.ndarray | None, name: str) -> Params:
    if rows is None:
        return params
    moved = int((rows != np.arange(len(rows))).sum())
    logging.info("%s: %d of %d rows move, each to the place of its id.", name, moved, len(rows))
    return move_rows(params, task.table, rows)


def read_best(folder: Path, like: Params) -> Params | None:
    """The best parameters that a stage saved in `folder`, or a part of them; nothing there is changed."""
    with contextlib.closing(Checkpoints(folder, read_only=True)) as checkpoints:
        return restore_best(checkpoints, like)


def restore_best(checkpoints: Checkpoints, like: Params) -> Params | None:
    """Parameters of the best checkpoint; if that is damaged, of one before it, else of the newest intact one."""
    found = checkpoints.restore({"params": like}, best=True, part=True)
    return None if found is None else found[1]["params"]
