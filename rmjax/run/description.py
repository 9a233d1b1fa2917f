"""data.json: the description of a run's data, with which its model opens without the data."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from ml_collections import ConfigDict

from rmjax.data import describe, make_source
from rmjax.data.source import Description
from rmjax.io import text
from rmjax.run.items import refuse_other_items
from rmjax.run.kept import digest_of, write_whole

FILE = "data.json"
_ANEW = (
    "restore it from a copy, or remove it and run --mode=eval, which writes it again from the data"
)


def write_description(workdir: Path, description: Description) -> None:
    """Writes data.json.

    Args:
      workdir: of the run.
      description: of its data.
    """
    values = description.as_json()
    write_whole(workdir / FILE, json.dumps(values | {"digest": digest_of(values)}))


def read_description(workdir: Path) -> Description | None:
    """Reads data.json.

    Args:
      workdir: of the run.

    Returns:
      The description of its data; None if the run is older than data.json.

    Raises:
      ValueError: data.json is damaged, was changed, or is of another version; names the file.
    """
    path = workdir / FILE
    if not path.exists():
        return None
    values = text.read_json(path)
    if not isinstance(values, dict) or values.pop("digest", None) != digest_of(values):
        raise ValueError(f"{path} was changed after the run wrote it: {_ANEW}")
    try:
        return Description.from_json(values)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is of another version ({error}): {_ANEW}") from error


def description_of(config: ConfigDict, workdir: Path) -> Description:
    """The description of a run's data.

    The data are opened only if the run kept no description; the new one is then kept.

    Args:
      config: of the run.
      workdir: of the run.

    Returns:
      The description.

    Raises:
      FileNotFoundError: the run kept no description, and its data cannot be opened.
      ValueError: data.json was changed, or the data are not those of the run.
    """
    description = read_description(workdir)
    if description is not None:
        return description
    try:
        source = make_source(config.data, config.data.seed)
    except OSError as error:
        place = f"config.data.dir = {config.data.dir!r}"
        raise FileNotFoundError(
            f"{workdir / FILE} is missing, as in runs of earlier versions. It is made from the "
            f"data, which are needed once: put them where the run had them ({place}), or run "
            f"--mode=eval with the right place. {error}"
        ) from error
    refuse_other_items(workdir, source)
    description = describe(config.data, source)
    with contextlib.suppress(OSError):  # a read-only workdir keeps none
        write_description(workdir, description)
    return description
