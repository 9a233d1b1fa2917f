"""History fragments (RM section 3.3.1): chosen segments, with items masked and items replaced.

Everything is drawn for one example at a time: keys are [B], and a row depends on its own key alone.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from rmjax.types import Array, Key


@flax.struct.dataclass
class Fragments:
    """F rehearsed segments of each stream, masked and corrupted.

    F is B in RM and CM. M is the most items masked in one fragment.
    """

    items: Array  # i32 [B, F, N] ids or f32 [B, F, N, d_in] features, before any change
    segment: Array  # i32 [B, F] index of the segment in the stream
    mask: Array  # bool [B, F, N] valid items; all false: the fragment is missing
    hidden: Array  # bool [B, F, N] masked items, in positive and negative fragments alike
    hidden_at: Array  # i32 [B, F, M] places of the masked items
    hidden_mask: Array  # bool [B, F, M] which of these M places are masked items
    negative: Array  # as `items`, with some of the unmasked items replaced
    pair: Array  # bool [B, F] whether the negative fragment differs from the positive one


def select(scores: Array, valid: Array, count: int, halves: bool = True) -> tuple[Array, Array]:
    """Selects the segments with the largest scores (RM section 3.3.2).

    Args:
      scores: f32 [B, T].
      valid: bool [B, T], the segments that may be selected.
      count: how many to select, F.
      halves: selects half of them from each half of the valid segments, as RM does. False: the
        entire stream is one pool.

    Returns:
      Indices i32 [B, F], and their mask bool [B, F]: false where a stream has too few segments.
    """
    rank = jnp.cumsum(valid, 1) - 1
    first = 2 * rank < valid.sum(1, keepdims=True)
    pools = [(valid, count)]
    if halves:
        pools = [(valid & first, count - count // 2), (valid & ~first, count // 2)]
    best = [
        jax.lax.top_k(jnp.where(pool, scores, -jnp.inf), min(k, scores.shape[1]))
        for pool, k in pools
        if k
    ]
    values, indices = (jnp.concatenate(x, 1) for x in zip(*best, strict=True))
    missing = ((0, 0), (0, count - indices.shape[1]))  # a stream may have fewer segments than F
    return jnp.pad(indices, missing), jnp.pad(jnp.isfinite(values), missing)


def build(
    key: Key,
    items: Array,
    mask: Array,
    chosen: tuple[Array, Array],
    negative_items: Array,
    negative_mask: Array,
    mask_ratio: float,
    replace_ratio: float,
    span: int = 1,
) -> Fragments:
    """Cuts positive and negative fragments out of streams (RM section 3.3.1, CM section 3.3).

    Args:
      key: [B].
      items: i32 [B, T, N] ids, or f32 [B, T, N, d_in] features.
      mask: bool [B, T, N].
      chosen: the indices and the mask that `select` returned.
      negative_items: [B, P] or [B, P, d_in], items of other streams.
      negative_mask: bool [B, P].
      mask_ratio: share of a fragment's valid items that is masked, but at least one item.
      replace_ratio: share of the unmasked items that negative items replace, but at least one item.
      span: masked items lie in runs of so many, such as the clicks of one visit.

    Returns:
      The fragments of all streams.
    """

    def build_row(
        key: Key,
        items: Array,
        mask: Array,
        indices: Array,
        exists: Array,
        others: Array,
        others_mask: Array,
    ) -> Fragments:
        hide, swap, draw = jax.random.split(key, 3)
        items, mask = items[indices], mask[indices] & exists[:, None]
        hidden = _pick(hide, mask, _share(mask_ratio, mask.sum(-1)), span)
        shown = mask & ~hidden
        swapped = _pick(swap, shown, _share(replace_ratio, shown.sum(-1)))
        logits = jnp.where(others_mask, 0.0, -jnp.inf)
        drawn = jax.random.categorical(draw, logits, shape=mask.shape)
        item_axes = (..., *[None] * (items.ndim - mask.ndim))
        negative = jnp.where((swapped & others_mask.any())[item_axes], others[drawn], items)
        differs = (negative != items).reshape(*mask.shape, -1).any(-1)
        most = max(1, round(mask_ratio * mask.shape[-1]))
        hidden_at = jnp.argsort(~hidden, -1, stable=True)[:, :most]
        return Fragments(
            items=items,
            segment=indices,
            mask=mask,
            hidden=hidden,
            hidden_at=hidden_at,
            hidden_mask=jnp.take_along_axis(hidden, hidden_at, -1),
            negative=negative,
            pair=(swapped & differs).any(-1),
        )

    return jax.vmap(build_row)(key, items, mask, *chosen, negative_items, negative_mask)


def _share(ratio: float, number: Array) -> Array:
    """Returns ratio * number, rounded; at least 1 where there is any item."""
    return jnp.where(number > 0, jnp.maximum(jnp.round(ratio * number), 1), 0).astype(jnp.int32)


def _pick(key: Key, among: Array, count: Array, span: int = 1) -> Array:
    """Picks `count` [...] true entries of `among` [..., N], uniformly without replacement.

    With a span it picks runs of so many places, which begin at multiples of the span. It may pick
    only a part of the last run. The result is bool [..., N].
    """
    drawn = jax.random.uniform(key, among.shape)
    if span > 1:  # one draw for a run, and a much smaller one for the order inside the run
        place = jnp.arange(among.shape[-1])
        within = jax.random.uniform(jax.random.fold_in(key, 1), among.shape)
        drawn = drawn[..., place - place % span] + 1e-5 * within
    draw = jnp.where(among, drawn, jnp.inf)
    return among & (jnp.argsort(jnp.argsort(draw, -1), -1) < count[..., None])
