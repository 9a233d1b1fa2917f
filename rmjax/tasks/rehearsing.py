"""The rehearsal of a batch (RM section 3.3, CM section 3.3): its fragments, and the losses on them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rmjax.layers.embeddings import num_items, unit_rows
from rmjax.rehearsal import fragments, objectives, sampler
from rmjax.rehearsal.decoder import Decoder
from rmjax.types import Array, Batch, Key, Memory, MemoryMachine, Params, Sum


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What is rehearsed, and how much each loss weighs (RM Eq. 7)."""

    decoder: Decoder
    fragments: int = 6  # B
    mask_ratio: float = 0.5
    replace_ratio: float = 0.5
    sampled_items: int = 200  # J; 0: all items. Of streams of features J others of the same stream
    recollection: float = 1.0  # lambda_1
    familiarity: float = 0.5  # lambda_2
    sampler: str = "teacher"  # or "uniform"

    @property
    def active(self) -> bool:
        return bool(self.recollection or self.familiarity)


def cut_fragments(r: Rehearsal, key: Key, batch: Batch, found: tuple[Array, Array]) -> fragments.Fragments:
    """The chosen segments (`fragments.select`), masked and corrupted; key [B]."""
    return fragments.build(
        key,
        batch.items,
        batch.item_mask,
        found,
        batch.negative_items,
        batch.negative_mask,
        r.mask_ratio,
        r.replace_ratio,
    )


def recall(
    r: Rehearsal, machine: MemoryMachine, params: Params, cut: fragments.Fragments, memory: Memory, key: Key | None
) -> tuple[Array, Array, Array]:
    """What the decoder makes of fragments, given a memory: -> logits that a positive and a negative fragment
    [B, B'] are familiar, features at the positive ones' masked items [B, B', M, d]."""
    both = jnp.concatenate([cut.items, cut.negative], 1)
    twice = lambda x: jnp.concatenate([x, x], 1)  # noqa: E731
    slots = machine.slots(params["machine"], memory)
    x = machine.embed(params["machine"], both)
    recalled = r.decoder(params["rehearsal"], x, twice(cut.mask), twice(cut.hidden), *slots, key=key)
    weights = params["rehearsal"]["familiar"]
    logits = (recalled[:, :, 0] @ weights["kernel"] + weights["bias"])[..., 0]
    positive, negative = jnp.split(logits, 2, 1)
    masked = jnp.take_along_axis(recalled[:, : cut.hidden.shape[1], 1:], cut.hidden_at[..., None], 2)
    return positive, negative, masked


def alternatives(
    r: Rehearsal, machine: MemoryMachine, params: Params, cut: fragments.Fragments, batch: Batch, keys: tuple[Key, Key]
) -> tuple[Array, Array, Array | None]:
    """What masked items are told from, as `objectives.recollection` takes it: target, others, same.

    keys: one for the whole batch, which shares its sampled ids; [B], by which each stream of features draws its own.
    """
    if not jnp.issubdtype(batch.items.dtype, jnp.floating):
        its, items = params["machine"], num_items(params["machine"]["embed"])
        truth = jnp.clip(jnp.take_along_axis(cut.items, cut.hidden_at, 2), 0, items - 1)
        if not r.sampled_items:
            table = unit_rows(its)
            return table[truth], table, None
        sampled = sample_items(r, keys[0], items)
        return unit_rows(its, truth), unit_rows(its, sampled), sampled == truth[..., None]
    rows, _, length, width = batch.items.shape
    draw = lambda key, valid: jax.random.categorical(key, jnp.where(valid, 0.0, -jnp.inf), shape=(r.sampled_items,))  # noqa: E731
    place = jax.vmap(draw)(keys[1], batch.item_mask.reshape(rows, -1))
    others = jnp.take_along_axis(batch.items.reshape(rows, -1, width), place[..., None], 1)
    truth = jnp.take_along_axis(cut.items, cut.hidden_at[..., None], 2)
    same = place[:, None, None] == (cut.segment[..., None] * length + cut.hidden_at)[..., None]

    def unit(x: Array) -> Array:
        features = machine.embed(params["machine"], x)
        return features * features.shape[-1] ** -0.5

    return unit(truth), unit(others)[:, None], same


def sample_items(r: Rehearsal, key: Key, items: int) -> Array:
    """i32 [J] of so many items, which masked ones are told from; `key` as `losses` has it for all rows."""
    return jax.random.randint(key, (r.sampled_items,), 0, items)


def losses(
    r: Rehearsal,
    machine: MemoryMachine,
    params: Params,
    batch: Batch,
    memory: Memory,
    found: tuple[Array, Array],
    keys: Key,
    shared: Key,
) -> dict[str, tuple[float, Sum]]:
    """The rehearsal losses of memories [B] on the chosen segments; keys [B], and one that all rows share."""
    fragment_key, decoder_key = jax.vmap(jax.random.split, out_axes=1)(keys)
    cut = cut_fragments(r, fragment_key, batch, found)
    positive, negative, masked = recall(r, machine, params, cut, memory, decoder_key)
    terms = {}
    if r.familiarity:
        terms["familiarity"] = (r.familiarity, objectives.familiarity(positive, negative, cut.pair))
    if r.recollection:
        fold_in = jax.vmap(jax.random.fold_in, (0, None))
        told = alternatives(r, machine, params, cut, batch, (shared, fold_in(fragment_key, 3)))
        terms["recollection"] = (r.recollection, objectives.recollection(masked, *told, cut.hidden_mask))
    return terms


def choose_segments(r: Rehearsal, key: Key, frozen: Any, query: Any, batch: Batch, valid: Array):
    """Which segments are rehearsed -> indices, found [B, B']: by the teacher's scores, half of them from each half of
    the `valid` ones [B, T], or uniformly. query [B, 1, d] is the teacher's feature of the question."""
    if r.sampler == "uniform":
        return fragments.select(sampler.uniform_scores(key, valid.shape[1:]), valid, r.fragments, halves=False)
    features = sampler.fragment_features(frozen, batch.items, batch.item_mask)
    scores = sampler.attend(frozen, query, features, valid[:, None])[0][:, 0]
    return fragments.select(scores, valid, r.fragments)
