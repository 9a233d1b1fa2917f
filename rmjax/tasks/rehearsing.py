"""The rehearsal of a batch (RM section 3.3, CM section 3.3): its fragments, and the losses on them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from rmjax.layers.embeddings import num_items
from rmjax.rehearsal import fragments, objectives, sampler
from rmjax.rehearsal.decoder import Decoder
from rmjax.schedules import Schedule
from rmjax.types import Array, Batch, Key, Memory, MemoryMachine, Params, Terms, Weight, at

POOL = 4  # negatives='near' chooses among so many times the items that it takes


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
    negatives: str = "uniform"  # of item ids; see `alternatives`
    detach_items: bool = False  # recollection leaves the features that it compares with as they are
    sum_pairs: bool = (
        False  # familiarity is summed over a stream's pairs (CM Eq. 5), not their mean
    )
    span: int = 1  # masked items lie in runs of so many
    schedule: Schedule | None = None  # of both weights; None: they stay as they are

    def weight(self, name: str) -> Weight:
        """Of the loss 'recollection' or 'familiarity'."""
        weight, schedule = getattr(self, name), self.schedule
        return weight if schedule is None else lambda step: weight * schedule(step)

    @property
    def pool(self) -> int:
        """How many item ids are drawn for the whole batch."""
        return self.sampled_items * (POOL if self.negatives == "near" else 1)

    @property
    def active(self) -> bool:
        return bool(self.recollection or self.familiarity)


def cut_fragments(
    r: Rehearsal, key: Key, batch: Batch, found: tuple[Array, Array]
) -> fragments.Fragments:
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
        r.span,
    )


def recall(
    r: Rehearsal,
    machine: MemoryMachine,
    params: Params,
    cut: fragments.Fragments,
    memory: Memory,
    key: Key | None,
) -> tuple[Array, Array, Array]:
    """What the decoder makes of fragments, given a memory: -> logits that a positive and a negative fragment
    [B, B'] are familiar, features at the positive ones' masked items [B, B', M, d].
    """
    both = jnp.concatenate([cut.items, cut.negative], 1)
    twice = lambda x: jnp.concatenate([x, x], 1)
    slots = machine.slots(params["machine"], memory)
    x = machine.embed(params["machine"], both)
    recalled = r.decoder(
        params["rehearsal"], x, twice(cut.mask), twice(cut.hidden), *slots, key=key
    )
    weights = params["rehearsal"]["familiar"]
    logits = (recalled[:, :, 0] @ weights["kernel"] + weights["bias"])[..., 0]
    positive, negative = jnp.split(logits, 2, 1)
    masked = jnp.take_along_axis(
        recalled[:, : cut.hidden.shape[1], 1:], cut.hidden_at[..., None], 2
    )
    return positive, negative, masked


def alternatives(
    r: Rehearsal,
    machine: MemoryMachine,
    params: Params,
    cut: fragments.Fragments,
    batch: Batch,
    keys: tuple[Key, Key],
) -> tuple[Array, Array, Array | None]:
    """What masked items are told from, as `objectives.recollection` takes it: target, others, same.

    Of item ids `r.negatives` says which: 'uniform', J of all items; 'near', of 4 J such those J whose features are
    nearest to the truth's; 'stream', J items of the same stream; 'partner', the batch's items of another stream. Of
    features they are J of the same stream.

    Args:
      keys: one for the whole batch, which shares its sampled ids; [B], by which each stream draws its own.
    """
    machine_params = (
        jax.lax.stop_gradient(params["machine"]) if r.detach_items else params["machine"]
    )

    def unit(items: Array | None) -> Array:
        """Of about unit length; None: of all items."""
        features = machine.embed(machine_params, items)
        return features * features.shape[-1] ** -0.5

    if not jnp.issubdtype(batch.items.dtype, jnp.floating):
        assert machine.table is not None
        items = num_items(at(machine_params, machine.table))
        truth = jnp.clip(jnp.take_along_axis(cut.items, cut.hidden_at, 2), 0, items - 1)
        if r.negatives == "partner":
            ids, valid = batch.negative_items[:, None, None], batch.negative_mask[:, None, None]
            return unit(truth), unit(ids[:, 0]), (ids == truth[..., None]) | ~valid
        if r.negatives == "stream":
            place = draw_places(r, keys[1], batch)
            ids = jnp.take_along_axis(batch.items.reshape(len(place), -1), place, 1)[:, None, None]
            return unit(truth), unit(ids[:, 0]), ids == truth[..., None]
        if not r.sampled_items:
            table = unit(None)
            return table[truth], table, None
        sampled = sample_items(r, keys[0], items)
        target, others, same = unit(truth), unit(sampled), sampled == truth[..., None]
        if r.negatives == "near":
            near = jnp.where(same, -jnp.inf, target @ others.T)
            same |= near < jax.lax.top_k(near, r.sampled_items)[0][..., -1:]
        return target, others, same
    rows, _, length, width = batch.items.shape
    place = draw_places(r, keys[1], batch)
    others = jnp.take_along_axis(batch.items.reshape(rows, -1, width), place[..., None], 1)
    truth = jnp.take_along_axis(cut.items, cut.hidden_at[..., None], 2)
    same = place[:, None, None] == (cut.segment[..., None] * length + cut.hidden_at)[..., None]

    return unit(truth), unit(others)[:, None], same


def draw_places(r: Rehearsal, key: Key, batch: Batch) -> Array:
    """i32 [B, J], valid items of each stream by their place in it, drawn uniformly; key [B]."""
    draw = lambda key, valid: jax.random.categorical(
        key, jnp.where(valid, 0.0, -jnp.inf), shape=(r.sampled_items,)
    )
    return jax.vmap(draw)(key, batch.item_mask.reshape(len(batch.item_mask), -1))


def sample_items(r: Rehearsal, key: Key, items: int) -> Array:
    """i32 [`r.pool`], which of so many items masked ones are told from; `key` as `losses` has it for all rows."""
    return jax.random.randint(key, (r.pool,), 0, items)


def losses(
    r: Rehearsal,
    machine: MemoryMachine,
    params: Params,
    batch: Batch,
    memory: Memory,
    found: tuple[Array, Array],
    keys: Key,
    shared: Key,
) -> Terms:
    """The rehearsal losses of memories [B] on the chosen segments; keys [B], and one that all rows share."""
    fragment_key, decoder_key = jax.vmap(jax.random.split, out_axes=1)(keys)
    cut = cut_fragments(r, fragment_key, batch, found)
    each = fragment_losses(
        r, machine, params, batch, cut, memory, fragment_key, shared, decoder_key
    )
    combine = {
        "familiarity": objectives.over_streams if r.sum_pairs else objectives.over_fragments,
        "recollection": objectives.over_fragments,
    }
    return {name: (r.weight(name), combine[name](*loss)) for name, loss in each.items()}


def fragment_losses(
    r: Rehearsal,
    machine: MemoryMachine,
    params: Params,
    batch: Batch,
    cut: fragments.Fragments,
    memory: Memory,
    keys: Key,
    shared: Key,
    dropout: Key | None = None,
) -> dict[str, tuple[Array, Array]]:
    """The losses that have a weight, of each fragment: {name: (loss f32 [B, B'], counted bool [B, B'])}.

    Args:
      keys: [B], by which each stream draws what its items are told from.
      shared: draws the ids that all rows share.
      dropout: [B]; None: without dropout.
    """
    positive, negative, masked = recall(r, machine, params, cut, memory, dropout)
    each = {}
    if r.familiarity:
        each["familiarity"] = objectives.familiarity(positive, negative, cut.pair)
    if r.recollection:
        fold_in = jax.vmap(jax.random.fold_in, (0, None))
        others = alternatives(r, machine, params, cut, batch, (shared, fold_in(keys, 3)))
        each["recollection"] = objectives.recollection(masked, *others, cut.hidden_mask)
    return each


def choose_segments(r: Rehearsal, key: Key, frozen: Any, query: Any, batch: Batch, valid: Array):
    """Which segments are rehearsed -> indices, found [B, B']: by the teacher's scores, half of them from each half of
    the `valid` ones [B, T], or uniformly. query [B, 1, d] is the teacher's feature of the question.
    """
    if r.sampler == "uniform":
        return fragments.select(
            sampler.uniform_scores(key, valid.shape[1:]), valid, r.fragments, halves=False
        )
    features = sampler.fragment_features(frozen, batch.items, batch.item_mask)
    scores = sampler.attend(frozen, query, features, valid[:, None])[0][:, 0]
    return fragments.select(scores, valid, r.fragments)
