"""Sources of data, one file each, and the pipeline that makes batches from them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from rmjax.data.source import Description, Source, cached
from rmjax.registry import SOURCES, fields_of

if TYPE_CHECKING:
    from rmjax.data.texts.streams import Texts

__all__ = ["cached", "describe", "make_source", "settings_of"]


def make_source(config: ConfigDict, seed: int) -> Any:
    """Opens the source that a config names. A source's module is imported only when it is named.

    Args:
      config: the section `data` of a config. Its `name` is a row of `registry.SOURCES`. The source
        reads its own section and those of the common keys that it needs.
      seed: seed of simulated users and drawn negatives.

    Returns:
      A `Source`; `Texts` if the task is language modelling. The type is `Any` because the name,
      which is known at run time only, decides between the two.

    Raises:
      ValueError: no source has this name, or a key is out of range.
      FileNotFoundError: config.dir does not hold the data; the message says where to get them.
    """
    if config.name not in SOURCES:
        names = ", ".join(SOURCES)
        raise ValueError(f"config.data.name={config.name!r}: no such source; there are {names}")
    return SOURCES[config.name].make(settings_of(config), config, seed)


def settings_of(config: ConfigDict) -> Any:
    """The settings of the source that a config names, an instance of its dataclass `Settings`.

    Args:
      config: the section `data` of a config.

    Returns:
      The settings.

    Raises:
      ValueError: a key is out of range.
    """
    kind, section = SOURCES[config.name], SOURCES.section_of(config.name)
    own = {key: config[section][key] for key in fields_of(kind.settings) if key in config[section]}
    return SOURCES.settings(config.name, own, f"config.data.{section}.")


def describe(config: ConfigDict, data: Source | Texts | Description) -> Description:
    """Describes the data to a task, including the word vectors that the config names.

    Args:
      config: the section `data` of a config.
      data: a source, texts, or a description, which is returned as it is.

    Returns:
      The description.

    Raises:
      ValueError: as `word_vectors`.
      FileNotFoundError: the file config.vectors does not exist.
    """
    if isinstance(data, Description):
        return data
    if not config.vectors:
        return data.describe()
    from rmjax.data.stories.vectors import word_vectors

    description = data.describe()
    vectors, _ = word_vectors(config, description)
    return dataclasses.replace(description, vector_width=vectors.shape[1])
