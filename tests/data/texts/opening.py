"""Opens the documents of a corpus from settings alone, however short the texts are."""

from __future__ import annotations

import functools
import importlib

from rmjax.data.texts.documents import open_documents
from rmjax.registry import SOURCES

KINDS = ("wikitext", "pg19", "enwik8", "books")


def module_of(kind):
    return importlib.import_module(f"rmjax.data.texts.{kind}")


def advice(kind):
    return module_of(kind).ADVICE


def documents(kind, directory, cache_dir, tokenizer="bytes", **shares):
    settings = SOURCES.settings(kind, {"tokenizer": tokenizer, **shares}, "config.data.text.")
    names = [name for name in ("train_share", "held_out") if hasattr(settings, name)]
    options = {name: getattr(settings, name) for name in names}
    if kind == "enwik8":
        options["verbatim"] = tokenizer == "bytes"
    corpus = functools.partial(module_of(kind).corpus, **options)
    return open_documents(kind, corpus, advice(kind), directory, cache_dir, tokenizer)
