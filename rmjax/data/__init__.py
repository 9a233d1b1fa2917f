"""Data: sources, one file each, and the pipeline that makes batches of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from rmjax.data.source import Description, cached
from rmjax.registry import SOURCES, fields_of

__all__ = ["cached", "describe", "make_source"]


def make_source(config: Any, seed: int) -> Any:
    """Opens the source that a config names; each is imported only when it is asked for.

    Args:
      config: the section `data` of a config. Its `name` is a row of `registry.SOURCES`; the source reads its own
        section, and of the common keys those that it needs.
      seed: of simulated users and drawn negatives.

    Returns:
      A `Source`; of texts for a language model `Texts`.

    Raises:
      ValueError: the name is none of these; or a key is out of range.
      FileNotFoundError: config.dir does not hold the data; says where they come from.
    """
    if config.name not in SOURCES:
        raise ValueError(
            f"config.data.name={config.name!r}: no such source; there are {', '.join(SOURCES)}"
        )
    kind, section = SOURCES[config.name], SOURCES.section_of(config.name)
    own = {key: config[section][key] for key in fields_of(kind.settings) if key in config[section]}
    return kind.make(SOURCES.settings(config.name, own, f"config.data.{section}."), config, seed)


def describe(config: Any, data: Any) -> Description:
    """What a task needs to know of data, word vectors included.

    Args:
      config: the section `data` of a config.
      data: a `Source`, `Texts`, or a description, which is given back.

    Raises:
      ValueError: as `word_vectors`.
      FileNotFoundError: there is no file config.vectors.
    """
    if isinstance(data, Description):
        return data
    if not config.vectors:
        return data.describe()
    from rmjax.data.stories.vectors import word_vectors

    vectors, _ = word_vectors(config, data)
    return dataclasses.replace(data.describe(), vector_width=vectors.shape[1])
