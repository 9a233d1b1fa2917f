"""Tasks from a config: what is trained first (the teacher, if one is needed) and what is trained on it."""

from __future__ import annotations

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np

from rmjax import machines, schedules
from rmjax.config import is_sequence
from rmjax.data.source import Questions, Source
from rmjax.data.texts import Texts
from rmjax.data.vectors import read_vectors
from rmjax.layers.transformer import Transformer
from rmjax.registry import MACHINES
from rmjax.rehearsal.decoder import Decoder
from rmjax.tasks.answers import Answers
from rmjax.tasks.reasoning import Reasoning, Teacher
from rmjax.tasks.rehearsing import Rehearsal
from rmjax.tasks.sequences import make_documents, make_language_model, make_sorting
from rmjax.types import Context, Task


def make_machine(config: Any, source: Source) -> machines.MemoryMachine:
    """The machine that config.machine describes, over the source's items."""
    context = Context(
        segment_length=config.data.segment_length,
        max_items=source.max_items,
        width=feature_width(config, source),
        hops=config.reason.hops,
        dtype=jnp.dtype(config.train.compute_dtype),
    )
    kind = config.machine.kind
    return machines.build(kind, source.num_items, MACHINES.settings(kind, config.machine, "config.machine."), context)


def feature_width(config: Any, source: Source) -> int:
    """Of items that are features, or of word vectors from a file; 0: items have a table of the machine's own width."""
    found = word_vectors(config, source)
    return getattr(source, "feature_width", 0) if found is None else found[0].shape[1]


def word_vectors(config: Any, source: Source) -> tuple[np.ndarray, np.ndarray] | None:
    """(rows of about unit length f32 [V, D], which are there [V]) of config.data.vectors; None if it is empty."""
    if not config.data.vectors:
        return None
    if not source.num_items or not hasattr(source, "vocabulary"):
        raise ValueError(f"config.data.vectors = {config.data.vectors!r}: the items of {config.data.name} are no words")
    return _word_vectors(config.data.vectors, tuple(source.vocabulary))


@functools.lru_cache(1)
def _word_vectors(path: str, vocabulary: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    vectors, found = read_vectors(path, vocabulary)
    length = np.sqrt(np.square(vectors).sum(1).mean(where=found)) if found.any() else 1.0
    return vectors / length, found


def questions(source: Source) -> Questions:
    return getattr(source, "questions", Questions())


def name_of(config: Any) -> str:
    """Of what is trained, in tables."""
    return config.model.kind if is_sequence(config) else config.machine.kind


def make_task(config: Any, source: Any) -> Task:
    """What config.data's streams are trained on."""
    if isinstance(source, Texts):
        return make_language_model(config, source)
    if config.data.name == "hyperpartisan":
        return make_documents(config, source)
    return make_sorting(config, source) if is_sequence(config) else make_reasoning(config, source)


def make_reasoning(config: Any, source: Source) -> Reasoning:
    """The machine with its query encoder, its head and its rehearsal."""
    m, r = config.machine, config.rehearsal
    decoder = Decoder(Transformer(r.layers, m.heads, m.dropout, jnp.dtype(config.train.compute_dtype)))
    item_dim = m.item_dim or m.dim if m.kind == "continual" else m.dim
    return Reasoning(
        machine=make_machine(config, source),
        answers=Answers(questions(source), m.dim, item_dim, m.dim if config.reason.head == "mlp" else 0),
        rehearsal=Rehearsal(
            decoder=decoder,
            fragments=r.fragments,
            mask_ratio=r.mask_ratio,
            replace_ratio=r.replace_ratio,
            sampled_items=r.sampled_items,
            recollection=r.recollection,
            familiarity=r.familiarity,
            sampler=r.sampler,
            negatives=r.negatives,
            detach_items=r.detach_items,
            sum_pairs=r.sum_pairs,
            span=r.span,
            schedule=schedules.build(r.schedule, config.train.steps, config),
        ),
        segment_length=config.data.segment_length,
        reason=config.reason.weight,
        machine_loss=config.machine.loss,
        items_fixed=config.teacher.share_items,
        block=m.block,
        remat=m.remat,
        gradient_segments=m.gradient_segments,
    )


def make_teacher(config: Any, source: Source) -> Teacher | None:
    """The history sampler, None where neither the rehearsal nor the machine's item table needs one."""
    r, t = config.rehearsal, config.teacher
    if is_sequence(config):
        return None
    if not t.share_items and (r.sampler != "teacher" or not (r.recollection or r.familiarity)):
        return None
    answers = Answers(questions(source), t.dim, t.dim, t.dim if config.reason.head == "mlp" else 0)
    return Teacher(source.num_items, answers, getattr(source, "feature_width", 0))
