"""Opens the documents of a corpus by its keys alone, however short they are."""

from __future__ import annotations

import functools
import importlib

from rmjax.data.texts import documents as made
from rmjax.registry import SOURCES

KINDS = ("wikitext", "pg19", "enwik8", "books")


def advice(kind):
    return importlib.import_module(f"rmjax.data.texts.{kind}").ADVICE


def documents(kind, directory, cache_dir, tokenizer="bytes", **shares):
    settings = SOURCES.settings(kind, {"tokenizer": tokenizer, **shares}, "config.data.text.")
    options = {
        name: getattr(settings, name)
        for name in ("train_share", "held_out")
        if hasattr(settings, name)
    }
    if kind == "enwik8":
        options["verbatim"] = tokenizer == "bytes"
    corpus = functools.partial(
        importlib.import_module(f"rmjax.data.texts.{kind}").corpus, **options
    )
    return made.open_documents(kind, corpus, advice(kind), directory, cache_dir, tokenizer)
