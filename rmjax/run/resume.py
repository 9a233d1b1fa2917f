"""The start of a run in a workdir: what it computes is written down, or compared with the files."""

from __future__ import annotations

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rmjax import config as configs
from rmjax.data.source import Source
from rmjax.data.texts.streams import Texts
from rmjax.run import items
from rmjax.run.description import FILE, write_description
from rmjax.run.kept import read_values, refuse_other, sealed, write_whole


def check_same_config(config: ConfigDict, workdir: Path, source: Source | Texts) -> None:
    """Writes config.json at the start of a run, and compares it when the run continues.

    Args:
      config: of the run.
      workdir: of the run.
      source: the data.

    Raises:
      ValueError: a run with another config or other data saved something in the workdir; names the
        keys.
      FileNotFoundError: the workdir has checkpoints and no config.json.
    """
    path, new = workdir / "config.json", json.loads(config.to_json())
    data = items.account(source)
    if not any(workdir.glob("*/[0-9]*")):
        new["data"]["found"] = data | items.numbering_digest(source)
        if source.vocabulary:  # the words that rows of the checkpoints stand for
            write_whole(workdir / "vocabulary.json", json.dumps(list(source.vocabulary), indent=0))
        if items.outside_ids(source) is not None:
            write_whole(workdir / items.FILE, items.item_lines(source))
        write_description(workdir, config.data, source)
        write_whole(path, sealed(_to_keep(new)))
        return
    old = read_values(path)
    before = old["data"].pop("found", {})
    refuse_other(workdir, old, new)
    items.refuse_other_items(workdir, source)
    new["data"]["found"] = data | {k: v for k, v in before.items() if k == "numbering"}
    refuse_other(workdir, old | {"data": old["data"] | {"found": before}}, new)
    # As long as the model has no checkpoint, the parameters that it begins with may change.
    if not any((workdir / "model").glob("[0-9]*")):
        write_whole(path, sealed(_to_keep(new)))
    if not (workdir / FILE).exists():
        with contextlib.suppress(OSError):  # a read-only workdir keeps none
            write_description(workdir, config.data, source)


def _to_keep(values: dict[str, Any]) -> dict[str, Any]:
    """Leaves out the defaults of kinds from outside that a run does not use.

    The run then opens without the modules of these kinds.
    """
    outside = configs.outside_keys()
    if not outside:
        return values
    made = copy.deepcopy(values)
    data = {key: value for key, value in values["data"].items() if key != "found"}
    config = ConfigDict(values | {"data": data})
    for name in outside:
        *sections, key = name.split(".")
        section = made
        for part in sections:
            section = section[part]
        if section[key] == configs.SCHEMA[name].default and not configs.reads(config, name):
            del section[key]
    return made
