"""The two rehearsal losses of each fragment (RM Eqs. 3, 4; CM Eqs. 4, 5), and two ways to combine fragments.

Combined losses are (sum, count), so that devices add before they divide.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rmjax.types import Array, Sum


def recollection(
    recalled: Array, target: Array, others: Array, same: Array | None, mask: Array
) -> tuple[Array, Array]:
    """The contrastive loss of a fragment's masked items against others, their mean (RM Eqs. 3, 6).

    Args:
      recalled: f32 [..., M, d], decoder outputs at the masked items.
      target: f32 [..., M, d], features of the true items.
      others: f32 [..., J, d], features of the items that the truth is told from.
      same: bool [..., M, J], which of these leave the denominator, as the truth does. None: the
        others are all items, the truth among them.
      mask: bool [..., M], which masked items there are.

    Returns:
      The loss f32 [...] of each fragment, and bool [...], whether it has a masked item.
    """
    picked = jnp.einsum("...d,...d->...", recalled, target)
    logits = recalled @ others.swapaxes(-1, -2)
    if same is not None:
        logits = jnp.concatenate([picked[..., None], jnp.where(same, -jnp.inf, logits)], -1)
    loss = jax.nn.logsumexp(logits, -1) - picked
    items = mask.sum(-1)
    return jnp.where(mask, loss, 0.0).sum(-1) / jnp.maximum(items, 1), items > 0


def familiarity(positive: Array, negative: Array, pair: Array) -> tuple[Array, Array]:
    """RM Eq. 4 with the sign of its first term kept for both: -log s+ - log(1 - s-).

    Args:
      positive: f32 [...], logits of s+.
      negative: f32 [...], logits of s-.
      pair: bool [...], whether the two fragments differ.

    Returns:
      The loss f32 [...] of each pair, 0 where the fragments do not differ, and `pair`.
    """
    loss = jax.nn.softplus(-positive) + jax.nn.softplus(negative)
    return jnp.where(pair, loss, 0.0), pair


def over_fragments(loss: Array, counted: Array) -> Sum:
    """The mean over all fragments (RM Eq. 6): their sum, and how many are counted."""
    return loss.sum(), counted.sum().astype(jnp.float32)


def over_streams(loss: Array, counted: Array) -> Sum:
    """The sum over a stream's fragments (CM Eq. 5), its mean over the streams that have any; both [B, F]."""
    return loss.sum(), counted.any(-1).sum().astype(jnp.float32)
