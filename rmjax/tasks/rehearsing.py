"""The rehearsal of a batch (RM section 3.3, CM section 3.3): the fragments and their losses."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from rmjax.layers.embeddings import num_items
from rmjax.rehearsal import fragments, objectives, sampler
from rmjax.rehearsal.decoder import Decoder
from rmjax.schedules import Schedule
from rmjax.types import (
    Array,
    Batch,
    Counts,
    Key,
    Limit,
    Memory,
    MemoryMachine,
    Params,
    Terms,
    Weight,
    at,
)

POOL = 4  # negatives='near' draws this many times the items that it uses

Segments = tuple[Array, Array]
"""The chosen segments of `fragments.select`: indices i32 [B, B'] and their mask bool [B, B']."""


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What is rehearsed, and the weights of the losses (RM Eq. 7).

    Attributes:
      decoder: reconstructs fragments from a memory.
      fragments: B', fragments of each stream.
      mask_ratio: share of a fragment's items that are masked.
      replace_ratio: share of the other items that are replaced in a negative fragment.
      sampled_items: J, other items that recollection compares with; 0: all items. For streams of
        features they are other features of the same stream.
      recollection: lambda_1, weight of the recollection loss.
      familiarity: lambda_2, weight of the familiarity loss.
      sampler: 'teacher' or 'uniform', how segments are chosen.
      negatives: which item ids recollection compares with, see `alternatives`.
      detach_items: recollection does not train the features that it compares with.
      sum_pairs: familiarity is the sum over a stream's pairs (CM Eq. 5), not the mean over pairs.
      span: masked items lie in runs of this length.
      schedule: factor of both weights by step; None: the weights are constant.
      labels: questions of a stream up to which both weights are whole. Where streams have more on
        average, the weights fall in proportion. 0: questions do not change the weights.
      balance: largest norm of the rehearsal's gradient, relative to that of the other losses, in
        the parameters that both train; 0: no limit.
    """

    decoder: Decoder
    fragments: int = 6
    mask_ratio: float = 0.5
    replace_ratio: float = 0.5
    sampled_items: int = 200
    recollection: float = 1.0
    familiarity: float = 0.5
    sampler: str = "teacher"
    negatives: str = "uniform"
    detach_items: bool = False
    sum_pairs: bool = False
    span: int = 1
    schedule: Schedule | None = None
    labels: float = 0.0
    balance: float = 0.0

    def weight(self, name: str) -> Weight:
        """The weight of the loss 'recollection' or 'familiarity'."""
        weight = getattr(self, name)
        if self.schedule is None and not self.labels:
            return weight
        return lambda step, counts: weight * self._factor(step, counts)

    def _factor(self, step: Array, counts: Counts) -> Array:
        """The factor of both weights.

        The loss of the answers is a mean over questions. With weights that fall as 1 / questions,
        a question counts as much beside a stream's rehearsal however many questions there are.
        """
        factor = jnp.ones(()) if self.schedule is None else self.schedule(step)
        if self.labels:
            factor = factor * jnp.minimum(1.0, self.labels * counts["streams"] / counts["reason"])
        return factor

    @property
    def limit(self) -> Limit | None:
        """See `rmjax.types.Task.limit`."""
        limited = self.active and 0 < self.balance < float("inf")
        return Limit(("recollection", "familiarity"), self.balance) if limited else None

    @property
    def pool(self) -> int:
        """Number of item ids that are drawn for the batch."""
        return self.sampled_items * (POOL if self.negatives == "near" else 1)

    @property
    def active(self) -> bool:
        """Whether a loss has a weight."""
        return bool(self.recollection or self.familiarity)


def cut_fragments(r: Rehearsal, key: Key, batch: Batch, segments: Segments) -> fragments.Fragments:
    """Makes fragments of the chosen segments: masks items, and replaces some in negative ones.

    Args:
      r: the rehearsal.
      key: [B].
      batch: B streams.
      segments: of `choose_segments`.

    Returns:
      The fragments.
    """
    return fragments.build(
        key,
        batch.items,
        batch.item_mask,
        segments,
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
    """Decodes fragments from memories.

    Args:
      r: the rehearsal.
      machine: made the memories.
      params: of the task.
      cut: the fragments.
      memory: of B streams.
      key: [B], draws dropout; None: no dropout.

    Returns:
      The logits [B, B'] that positive fragments are familiar; the same of negative fragments; and
      the decoder's outputs at the masked items of positive fragments [B, B', M, d].
    """
    both = jnp.concatenate([cut.items, cut.negative], 1)
    twice = lambda x: jnp.concatenate([x, x], 1)
    slots = machine.slots(params["machine"], memory)
    x = machine.embed(params["machine"], both)
    masks = twice(cut.mask), twice(cut.hidden)
    recalled = r.decoder(params["rehearsal"], x, *masks, *slots, key=key)
    weights = params["rehearsal"]["familiar"]
    logits = (recalled[:, :, 0] @ weights["kernel"] + weights["bias"])[..., 0]
    positive, negative = jnp.split(logits, 2, 1)
    outputs = recalled[:, : cut.hidden.shape[1], 1:]
    return positive, negative, jnp.take_along_axis(outputs, cut.hidden_at[..., None], 2)


def alternatives(
    r: Rehearsal,
    machine: MemoryMachine,
    params: Params,
    cut: fragments.Fragments,
    batch: Batch,
    keys: tuple[Key, Key],
) -> tuple[Array, Array, Array | None]:
    """The features that recollection compares with.

    For items that are ids, `r.negatives` names the others:

    - 'uniform': J of all items;
    - 'near': the J of 4 J drawn items that are most similar to the truth;
    - 'stream': J items of the same stream;
    - 'partner': the batch's items of another stream.

    For items that are features the others are J items of the same stream.

    Args:
      r: the rehearsal.
      machine: embeds the items.
      params: of the task.
      cut: the fragments.
      batch: B streams.
      keys: one key for the batch, which shares its sampled ids; and [B], one for each stream.

    Returns:
      target, others and same, see `objectives.recollection`.
    """
    machine_params = params["machine"]
    if r.detach_items:
        machine_params = jax.lax.stop_gradient(machine_params)

    def unit(items: Array | None) -> Array:
        """Features of about unit length; None: of all items."""
        features = machine.embed(machine_params, items)
        return features * features.shape[-1] ** -0.5

    if jnp.issubdtype(batch.items.dtype, jnp.floating):
        rows, _, length, width = batch.items.shape
        place = draw_places(r, keys[1], batch)
        others = jnp.take_along_axis(batch.items.reshape(rows, -1, width), place[..., None], 1)
        truth = jnp.take_along_axis(cut.items, cut.hidden_at[..., None], 2)
        same = place[:, None, None] == (cut.segment[..., None] * length + cut.hidden_at)[..., None]
        return unit(truth), unit(others)[:, None], same
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


def draw_places(r: Rehearsal, key: Key, batch: Batch) -> Array:
    """Draws J valid items of each stream uniformly; key [B].

    Returns:
      i32 [B, J], their places in the flattened stream.
    """
    draw = lambda key, valid: jax.random.categorical(
        key, jnp.where(valid, 0.0, -jnp.inf), shape=(r.sampled_items,)
    )
    return jax.vmap(draw)(key, batch.item_mask.reshape(len(batch.item_mask), -1))


def sample_items(r: Rehearsal, key: Key, items: int) -> Array:
    """Draws the item ids that all rows compare with.

    Args:
      r: the rehearsal.
      key: the key `shared` of `losses`.
      items: number of items.

    Returns:
      i32 [`r.pool`].
    """
    return jax.random.randint(key, (r.pool,), 0, items)


def losses(
    r: Rehearsal,
    machine: MemoryMachine,
    params: Params,
    batch: Batch,
    memory: Memory,
    segments: Segments,
    keys: Key,
    shared: Key,
) -> Terms:
    """The rehearsal losses of memories on the chosen segments.

    Args:
      r: the rehearsal.
      machine: made the memories.
      params: of the task.
      batch: B streams.
      memory: of B streams.
      segments: of `choose_segments`.
      keys: [B], one for each stream.
      shared: one key for all rows.

    Returns:
      The terms of the losses that have a weight.
    """
    fragment_key, decoder_key = jax.vmap(jax.random.split, out_axes=1)(keys)
    cut = cut_fragments(r, fragment_key, batch, segments)
    by_name = fragment_losses(
        r, machine, params, batch, cut, memory, fragment_key, shared, decoder_key
    )
    combine = {
        "familiarity": objectives.over_streams if r.sum_pairs else objectives.over_fragments,
        "recollection": objectives.over_fragments,
    }
    return {name: (r.weight(name), combine[name](*loss)) for name, loss in by_name.items()}


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
    """The losses of single fragments.

    Args:
      r: the rehearsal.
      machine: made the memories.
      params: of the task.
      batch: B streams.
      cut: the fragments.
      memory: of B streams.
      keys: [B], one for each stream; they draw the items that recollection compares with.
      shared: draws the ids that all rows share.
      dropout: [B], draws dropout; None: no dropout.

    Returns:
      {name: (loss f32 [B, B'], counted bool [B, B'])} of the losses that have a weight.
    """
    positive, negative, masked = recall(r, machine, params, cut, memory, dropout)
    by_name = {}
    if r.familiarity:
        by_name["familiarity"] = objectives.familiarity(positive, negative, cut.pair)
    if r.recollection:
        fold_in = jax.vmap(jax.random.fold_in, (0, None))
        others = alternatives(r, machine, params, cut, batch, (shared, fold_in(keys, 3)))
        by_name["recollection"] = objectives.recollection(masked, *others, cut.hidden_mask)
    return by_name


def choose_segments(
    r: Rehearsal, key: Key, frozen: Params, query: Array | None, batch: Batch, valid: Array
) -> Segments:
    """Chooses the segments that are rehearsed.

    They are drawn uniformly, or they have the largest scores of the teacher, half of them from each
    half of the valid segments.

    Args:
      r: the rehearsal.
      key: [B].
      frozen: parameters of the teacher's sampler; unused by the uniform sampler.
      query: [B, 1, d], the teacher's feature of the question; unused by the uniform sampler.
      batch: B streams.
      valid: bool [B, T], the segments to choose from.

    Returns:
      The chosen segments and their mask.
    """
    if r.sampler == "uniform":
        scores = sampler.uniform_scores(key, valid.shape[1:])
        return fragments.select(scores, valid, r.fragments, halves=False)
    assert query is not None
    features = sampler.fragment_features(frozen, batch.items, batch.item_mask)
    scores = sampler.attend(frozen, query, features, valid[:, None])[0][:, 0]
    return fragments.select(scores, valid, r.fragments)
