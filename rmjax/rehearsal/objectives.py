"""The two rehearsal losses (RM Eqs. 3, 4, 6; CM Eqs. 4, 5), as (sum, count) so that devices add before they divide."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rmjax.types import Array, Sum


def recollection(recalled: Array, target: Array, others: Array, same: Array | None, mask: Array) -> Sum:
    """RM Eq. 3: contrastive loss of each masked item against others, a mean over a fragment's masked items, then over
    the fragments (Eq. 6).

    recalled f32 [..., M, d] decoder outputs at the masked items; target [..., M, d] features of the truth; others
    [..., J, d] of what it is told from; same bool [..., M, J] where one of those is the truth: it leaves the
    denominator (None: they are all items there are, the truth among them). mask bool [..., M].
    -> (sum of fragment losses, number of fragments that have a masked item).
    """
    picked = jnp.einsum("...d,...d->...", recalled, target)
    logits = recalled @ others.swapaxes(-1, -2)
    if same is not None:
        logits = jnp.concatenate([picked[..., None], jnp.where(same, -jnp.inf, logits)], -1)
    loss = jax.nn.logsumexp(logits, -1) - picked
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
