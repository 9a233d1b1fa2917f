"""Tasks from a config: what is trained first (the teacher, if one is needed) and what is trained on it."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from rmjax import machines
from rmjax.data.source import Source
from rmjax.layers.transformer import Transformer
from rmjax.rehearsal.decoder import Decoder
from rmjax.tasks.recommendation import Recommendation, Rehearsal, Teacher


def make_machine(config: Any, source: Source) -> machines.MemoryMachine:
    """The machine that config.machine describes, over the source's items."""
    m = config.machine
    if m.kind == "rehearsal":
        settings = dict(
            slots=m.slots,
            layers=m.layers,
            heads=m.heads,
            encoder=m.encoder,
            dropout=m.dropout,
            normalize=m.normalize,
            hops=config.reason.hops,
            segment_length=config.data.segment_length,
            timescale=m.timescale,
            dtype=jnp.dtype(config.train.compute_dtype),
        )
    elif m.kind == "gru":
        settings = dict(history_sum=m.history_sum, timescale=m.timescale * config.data.segment_length)
    else:
        length = m.buffer_length or source.max_items
        settings = dict(buffer_length=length, recent=m.recent, pooled=m.pooled, hops=config.reason.hops)
    return machines.make(m.kind, source.num_items, dim=m.dim, **settings)


def make_task(config: Any, source: Source) -> Recommendation:
    """The machine with its reason head and its rehearsal."""
    m, r = config.machine, config.rehearsal
    decoder = Decoder(Transformer(r.layers, m.heads, m.dropout, jnp.dtype(config.train.compute_dtype)))
    return Recommendation(
        machine=make_machine(config, source),
        rehearsal=Rehearsal(
            decoder=decoder,
            fragments=r.fragments,
            mask_ratio=r.mask_ratio,
            replace_ratio=r.replace_ratio,
            sampled_items=r.sampled_items,
            recollection=r.recollection,
            familiarity=r.familiarity,
            sampler=r.sampler,
        ),
        num_items=source.num_items,
        dim=m.dim,
        segment_length=config.data.segment_length,
        head_width=m.dim if config.reason.head == "mlp" else 0,
        reason=config.reason.weight,
        items_fixed=config.teacher.share_items,
        block=m.block,
        remat=m.remat,
    )


def make_teacher(config: Any, source: Source) -> Teacher | None:
    """The history sampler, None where neither the rehearsal nor the machine's item table needs one."""
    r, t = config.rehearsal, config.teacher
    if not t.share_items and (r.sampler != "teacher" or not (r.recollection or r.familiarity)):
        return None
    return Teacher(source.num_items, t.dim, t.dim if config.reason.head == "mlp" else 0)
