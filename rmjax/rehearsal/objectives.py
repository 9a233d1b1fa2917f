"""The two rehearsal losses (RM Eqs. 3, 4, 6), as (sum, count) so that devices can add before they divide."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rmjax.types import Array, Sum


def recollection(recalled: Array, truth: Array, mask: Array, table: Array, sampled: Array | None) -> Sum:
    """RM Eq. 3: contrastive loss of each masked item against sampled ones, a mean over a fragment's masked items,
    then over the fragments (Eq. 6).

    recalled f32 [..., M, d] decoder outputs at the masked items, truth i32 [..., M], mask bool [..., M]; table
    [V, d] item features; sampled i32 [J] ids, or None for all V items. A sampled id equal to the truth leaves the
    denominator. -> (sum of fragment losses, number of fragments that have a masked item).
    """
    picked = jnp.einsum("...d,...d->...", recalled, table.at[truth].get(mode="clip"))
    if sampled is None:
        loss = jax.nn.logsumexp(recalled @ table.T, -1) - picked
    else:
        others = recalled @ table[sampled].T
        others = jnp.where(sampled == truth[..., None], -jnp.inf, others)
        loss = jax.nn.logsumexp(jnp.concatenate([picked[..., None], others], -1), -1) - picked
    items = mask.sum(-1)
    mean = jnp.where(mask, loss, 0.0).sum(-1) / jnp.maximum(items, 1)
    return mean.sum(), (items > 0).sum().astype(jnp.float32)


def familiarity(positive: Array, negative: Array, pair: Array) -> Sum:
    """RM Eq. 4 with the sign of its first term kept for both: -log s+ - log(1 - s-).

    positive, negative f32 [...] logits of s+ and s-; pair bool [...] whether the two fragments differ.
    -> (sum over pairs, number of pairs).
    """
    loss = jax.nn.softplus(-positive) + jax.nn.softplus(negative)
    return jnp.where(pair, loss, 0.0).sum(), pair.sum().astype(jnp.float32)
