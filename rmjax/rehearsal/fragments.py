"""History fragments (RM section 3.3.1): which segments are rehearsed, what is masked, what is replaced.

Everything here is drawn per example: keys are [B], and a row's draws depend on its key alone.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from rmjax.types import Array, Key


@flax.struct.dataclass
class Fragments:
    """B' = `fragments` rehearsed segments of each stream, masked and corrupted. M is the most items masked in one."""

    items: Array  # i32 [B, B', N] (or f32 [B, B', N, F]) the truth
    segment: Array  # i32 [B, B'] which segment of the stream each is
    mask: Array  # bool [B, B', N] valid items; all false: a missing fragment
    hidden: Array  # bool [B, B', N] the masked items, in positive and negative fragments alike
    hidden_at: Array  # i32 [B, B', M] where they are
    hidden_mask: Array  # bool [B, B', M] which of these M there are
    negative: (
        Array  # i32 [B, B', N] (f32 [B, B', N, F]) items with some of the unmasked ones replaced
    )
    pair: Array  # bool [B, B'] whether the negative fragment differs from the positive one


def select(scores: Array, valid: Array, count: int, halves: bool = True) -> tuple[Array, Array]:
    """The `count` segments of largest score, half of them from each half of the valid segments.

    scores f32 [B, T], valid bool [B, T] -> indices i32 [B, count], found bool [B, count]. Halves are by order among
    the valid segments; with `halves` False the whole stream is one pool.
    """
    rank = jnp.cumsum(valid, 1) - 1
    first = 2 * rank < valid.sum(1, keepdims=True)
    pools = (
        [(valid & first, count - count // 2), (valid & ~first, count // 2)]
        if halves
        else [(valid, count)]
    )
    best = [
        jax.lax.top_k(jnp.where(pool, scores, -jnp.inf), min(k, scores.shape[1]))
        for pool, k in pools
        if k
    ]
    values, indices = (jnp.concatenate(x, 1) for x in zip(*best, strict=True))
    missing = count - indices.shape[1]  # a stream of fewer segments than fragments asked for
    return jnp.pad(indices, ((0, 0), (0, missing))), jnp.pad(
        jnp.isfinite(values), ((0, 0), (0, missing))
    )


def _pick(key: Key, among: Array, count: Array, span: int = 1) -> Array:
    """`count` [...] of the true entries of `among` [..., N], uniformly without replacement -> bool [..., N].

    With a span runs of so many places are drawn, which begin at multiples of it; of the last run only a part may be.
    """
    drawn = jax.random.uniform(key, among.shape)
    if span > 1:
        place = jnp.arange(among.shape[-1])
        within = jax.random.uniform(jax.random.fold_in(key, 1), among.shape)
        drawn = (
            drawn[..., place - place % span] + 1e-5 * within
        )  # one draw for a run, and an order inside it
    draw = jnp.where(among, drawn, jnp.inf)
    return among & (jnp.argsort(jnp.argsort(draw, -1), -1) < count[..., None])


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
    """Masks `mask_ratio` of the valid items of each chosen segment (never none of them), then replaces
    `replace_ratio` of the unmasked ones (never none) by items of other streams.

    key [B]; items i32 [B, T, N] (or f32 [B, T, N, F]), mask bool [B, T, N]; chosen = `select(...)`; negative_items of
    their kind [B, P], negative_mask bool [B, P]. Masked items lie in runs of `span`, such as the clicks of one visit.
    """

    def one(key, items, mask, indices, found, others, others_mask):
        hide, swap, draw = jax.random.split(key, 3)
        items, mask = items[indices], mask[indices] & found[:, None]
        amount = lambda ratio, n: jnp.where(n > 0, jnp.maximum(jnp.round(ratio * n), 1), 0).astype(
            jnp.int32
        )
        hidden = _pick(hide, mask, amount(mask_ratio, mask.sum(-1)), span)
        shown = mask & ~hidden
        swapped = _pick(swap, shown, amount(replace_ratio, shown.sum(-1)))
        drawn = jax.random.categorical(
            draw, jnp.where(others_mask, 0.0, -jnp.inf), shape=mask.shape
        )
        each = (..., *[None] * (items.ndim - mask.ndim))
        negative = jnp.where((swapped & others_mask.any())[each], others[drawn], items)
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

    return jax.vmap(one)(key, items, mask, *chosen, negative_items, negative_mask)
