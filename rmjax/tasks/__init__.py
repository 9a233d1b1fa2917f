"""Builds tasks from a config: the model's task, and the teacher's if one is needed first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
import numpy as np

from rmjax import machines, schedules
from rmjax.config import array_dtype, is_sequence
from rmjax.data import describe
from rmjax.data.source import Description, Source
from rmjax.layers.transformer import Transformer
from rmjax.machines import Costs
from rmjax.registry import MACHINES, SOURCES
from rmjax.rehearsal.decoder import Decoder
from rmjax.tasks.answers import Answers
from rmjax.tasks.ranking import Ranking, cumulative_weights
from rmjax.tasks.reasoning import Reasoning, Teacher
from rmjax.tasks.rehearsing import Rehearsal
from rmjax.tasks.sequences import make_documents, make_language_model, make_sorting
from rmjax.types import Context, MemoryMachine, Task

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from rmjax.data.texts.streams import Texts


def make_machine(config: ConfigDict, data: Description) -> MemoryMachine:
    """Builds the machine of config.machine for the items of the data.

    Args:
      config: of the run.
      data: what the streams look like.

    Returns:
      The machine.
    """
    context = Context(
        segment_length=config.data.segment_length,
        max_items=data.max_items,
        width=data.vector_width or data.feature_width,
        hops=config.reason.hops,
        norm_hops=config.reason.norm,
        mix_slots=config.reason.mix,
        dtype=jnp.dtype(array_dtype(config)),
    )
    kind = config.machine.kind
    settings = MACHINES.settings(kind, config.machine, "config.machine.")
    return machines.build(kind, data.num_items, settings, context)


def costs(config: ConfigDict, data: Description, machine: MemoryMachine | None = None) -> Costs:
    """The costs of a machine; the data themselves are not needed.

    Args:
      config: of the run.
      data: what the streams look like.
      machine: the machine; None: that of config.machine.

    Returns:
      The size of the state, the parameters, and the operations for each item.
    """
    width = 0 if data.num_items else data.feature_width
    machine = machine or make_machine(config, data)
    return machines.costs_of(machine, config.data.segment_length, width)


def name_of(config: ConfigDict) -> str:
    """The name of the trained machine or model in tables."""
    return config.model.kind if is_sequence(config) else config.machine.kind


def make_task(config: ConfigDict, data: Description | Source | Texts) -> Task:
    """Builds the task that is trained on the streams of config.data.

    Args:
      config: of the run.
      data: the data, or the description that a run keeps of them.

    Returns:
      The task; it holds no data.
    """
    data = describe(config.data, data)
    if data.endless:
        return make_language_model(config, data)
    if SOURCES.task_of(config.data.name) == "documents":
        return make_documents(config, data)
    return make_sorting(config, data) if is_sequence(config) else make_reasoning(config, data)


def make_reasoning(config: ConfigDict, data: Description) -> Reasoning:
    """Builds the task of a machine with a query encoder, a head and a rehearsal.

    Args:
      config: of the run.
      data: what the streams look like.

    Returns:
      The task.
    """
    m, r = config.machine, config.rehearsal
    dtype = jnp.dtype(array_dtype(config))
    item_dim = m.item_dim or m.dim if m.kind == "continual" else m.dim
    hidden = m.dim if config.reason.head == "mlp" else 0
    rehearsal = Rehearsal(
        decoder=Decoder(Transformer(r.layers, m.heads, m.dropout, dtype)),
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
        labels=r.labels,
        balance=r.balance,
    )
    return Reasoning(
        machine=make_machine(config, data),
        answers=Answers(data.questions, m.dim, item_dim, hidden, make_ranking(config, data)),
        rehearsal=rehearsal,
        segment_length=config.data.segment_length,
        reason=config.reason.weight,
        machine_loss=config.machine.loss,
        items_fixed=config.teacher.share_items and not config.teacher.train_items,
        block=m.block,
        remat=m.remat,
        gradient_segments=m.gradient_segments,
    )


def make_ranking(config: ConfigDict, data: Description) -> Ranking | None:
    """Builds the ranking of items, for questions whose answer is an item.

    Args:
      config: of the run.
      data: what the streams look like.

    Returns:
      The ranking; None for all other questions.

    Raises:
      ValueError: items are features; or negatives follow the popularity, which is unknown.
    """
    if data.questions.answer != "item":
        return None
    if not data.num_items:
        raise ValueError("answer = 'item': items must be ids, but those of this data are features")
    r, cumulative = config.ranking, None
    samples = data.num_items > r.full_softmax
    if samples and r.draw == "popularity":
        if not data.popularity:
            raise ValueError(
                "config.ranking.draw = 'popularity': this source counts no item; set 'uniform', or "
                "the attribute `popularity` of the source"
            )
        cumulative = cumulative_weights(np.asarray(data.popularity))
    return Ranking(
        num_items=data.num_items,
        last=r.question == "last",
        bias=r.bias,
        own=r.table == "own",
        negatives=r.negatives if samples else 0,
        cumulative=cumulative,
        exclude_seen=data.questions.exclude_seen,
    )


def make_teacher(config: ConfigDict, data: Description | Source | Texts) -> Teacher | None:
    """Builds the task of the teacher, which is the history sampler.

    Args:
      config: of the run.
      data: the data, or the description that a run keeps of them.

    Returns:
      The task; None where neither the rehearsal nor the machine's item table needs a teacher.
    """
    r, t = config.rehearsal, config.teacher
    if is_sequence(config):
        return None
    if not t.share_items and (r.sampler != "teacher" or not (r.recollection or r.familiarity)):
        return None
    data = describe(config.data, data)
    hidden = t.dim if config.reason.head == "mlp" else 0
    answers = Answers(data.questions, t.dim, t.dim, hidden, make_ranking(config, data))
    return Teacher(data.num_items, answers, data.feature_width)
