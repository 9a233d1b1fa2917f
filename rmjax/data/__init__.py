"""Data: sources, one file each, and the pipeline that makes batches of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from absl import logging

from rmjax.config import SOURCES
from rmjax.data.source import Description, Source, cached


def make_source(config: Any, seed: int) -> Any:
    """The source that `config`, a ConfigDict, names; each is imported only when asked for.

    Reads config.name and config.ram_bytes (0: cache nothing in RAM), and then
      simulated_clicks: config.simulated, the fields of `ClicksConfig`, and of train, valid and test the users;
      xlong: config.dir and config.cache_dir; an empty config.dir stands for simulated_clicks;
      movielens: config.dir, config.cache_dir and config.movielens, the keyword arguments of `movielens`;
      synthetic: config.synthetic, the fields of `SyntheticConfig`, and of train, valid and test the streams a chain;
      sorting: config.segment_length and config.sorting, the fields of `Sorting`;
      wikitext, pg19, enwik8, books: config.dir, config.cache_dir, config.segment_length, config.segments and
        config.text, the keyword arguments of `documents` and `Texts`: texts, for a language model;
      babi, narrativeqa, tvqa, activitynet, hyperpartisan: config.dir, config.cache_dir, config.segment_length and the
        section of that name; texts also config.buckets and config.min_count.

    Raises:
      ValueError: the name is none of these.
      FileNotFoundError: config.dir does not hold the data; says where it comes from.
    """
    name = config.name
    if name == "xlong" and not config.dir:
        logging.info("config.data.dir is empty: simulated clicks in place of XLong.")
        name = "simulated_clicks"
    source: Source
    if name == "simulated_clicks":
        from rmjax.data.simulated_clicks import SPLITS, ClicksConfig, SimulatedClicks

        world = dict(config.simulated)
        users = {split: world.pop(split) for split in SPLITS if split in world}
        source = SimulatedClicks(ClicksConfig(**world), seed, **users)
    elif name == "xlong":
        from rmjax.data.xlong import xlong

        source = xlong(config.dir, config.cache_dir, seed)
    elif name == "movielens":
        from rmjax.data.movielens import movielens

        source = movielens(config.dir, config.cache_dir, seed, **config.movielens)
    elif name == "synthetic":
        from rmjax.data.synthetic import Synthetic, SyntheticConfig

        world = dict(config.synthetic)
        samples = {split: world.pop(split) for split in ("train", "valid", "test")}
        return Synthetic(SyntheticConfig(**world), seed, **samples)  # faster made than kept
    elif name == "sorting":
        from rmjax.data.sorting import Sorting, fitting

        options = dict(config.sorting)
        segments = options.pop("segments")
        options["length"] = options["length"] or fitting(segments, config.segment_length, options["symbols"])
        return Sorting(seed=seed, segment_length=config.segment_length, **options)
    elif name in ("wikitext", "pg19", "enwik8", "books"):
        from rmjax.data.documents import documents
        from rmjax.data.texts import Texts

        options = dict(config.text)
        kept = {key: options.pop(key) for key in ("train_share", "held_out")}
        splits = documents(name, config.dir, config.cache_dir, options.pop("tokenizer"), **kept)
        return Texts(splits, config.segment_length, config.segments, **options)
    elif name in ("babi", "narrativeqa", "tvqa", "activitynet", "hyperpartisan"):
        return _text(name, config, seed)
    else:
        raise ValueError(f"config.data.name={name!r}: no such source; there are {', '.join(SOURCES)}")
    return cached(source, config.ram_bytes)


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
    from rmjax.data.vectors import word_vectors

    vectors, _ = word_vectors(config, data)
    return dataclasses.replace(data.describe(), vector_width=vectors.shape[1])


def _text(name: str, config: Any, seed: int) -> Source:
    """Texts and videos hold their own records in memory."""
    where, length = (config.dir, config.cache_dir), config.segment_length
    if name == "babi":
        from rmjax.data.babi import babi

        return babi(*where, segment_length=length, buckets=config.buckets, **config.babi)
    if name == "activitynet":
        from rmjax.data.activitynet import activitynet

        options = dict(config.activitynet)
        options |= dict(segment_length=length, ram_bytes=config.ram_bytes)
        return activitynet(config.dir, options.pop("features"), config.cache_dir, **options)
    if name == "hyperpartisan":
        from rmjax.data.hyperpartisan import hyperpartisan

        options = dict(segment_length=length, min_count=config.min_count, buckets=config.buckets)
        return hyperpartisan(*where, **options | dict(config.hyperpartisan))
    options = dict(segment_length=length, min_count=config.min_count, buckets=config.buckets, **config[name])
    if name == "narrativeqa":
        from rmjax.data.narrativeqa import narrativeqa

        return narrativeqa(*where, **options)
    from rmjax.data.tvqa import tvqa

    return tvqa(*where, seed, **options)
