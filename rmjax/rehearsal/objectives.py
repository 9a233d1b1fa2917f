"""The two rehearsal losses of a fragment (RM Eqs. 3 and 4; CM Eqs. 4 and 5).

Two functions combine the losses of fragments: `over_fragments` and `over_streams`. They return
(sum, count), since devices must add both before they divide.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from rmjax.types import Array, Sum


def recollection(
    recalled: Array, target: Array, others: Array, same: Array | None, mask: Array
) -> tuple[Array, Array]:
    """Returns the recollection loss L_rec^b of each fragment (RM Eq. 3, CM Eq. 4).

    It is the mean over the masked items of -log softmax of the inner products. RM divides by N / 2,
    this code by the number of masked items.

    Args:
      recalled: f32 [..., M, d], decoder outputs at the masked items, r.
      target: f32 [..., M, d], features of the true items, y_i.
      others: f32 [..., J, d], features of the sampled items, y_j.
      same: bool [..., M, J], the sampled items that leave the denominator since they equal the
        true item. None: `others` are all items, the true one among them.
      mask: bool [..., M], false where there is no masked item.

    Returns:
      The loss f32 [...], and bool [...], whether the fragment has a masked item.
    """
    picked = jnp.einsum("...d,...d->...", recalled, target)
    logits = recalled @ others.swapaxes(-1, -2)
    if same is not None:
        logits = jnp.concatenate([picked[..., None], jnp.where(same, -jnp.inf, logits)], -1)
    loss = jax.nn.logsumexp(logits, -1) - picked
    items = mask.sum(-1)
    return jnp.where(mask, loss, 0.0).sum(-1) / jnp.maximum(items, 1), items > 0


def familiarity(positive: Array, negative: Array, pair: Array) -> tuple[Array, Array]:
    """Returns the familiarity loss L_fam^b of each pair: -log s+ - log(1 - s-) (RM Eq. 4).

    RM prints the second term with a plus sign. Both terms need the minus sign of the first.

    Args:
      positive: f32 [...], logits of s+.
      negative: f32 [...], logits of s-.
      pair: bool [...], whether the two fragments differ.

    Returns:
      The loss f32 [...], 0 where the fragments do not differ; and `pair`.
    """
    loss = jax.nn.softplus(-positive) + jax.nn.softplus(negative)
    return jnp.where(pair, loss, 0.0), pair


def over_fragments(loss: Array, counted: Array) -> Sum:
    """Combines fragments into their mean (RM Eq. 6).

    Args:
      loss: f32 [B, F]; 0 where `counted` is false.
      counted: bool [B, F].

    Returns:
      The sum of the losses, and the number of fragments that count.
    """
    return loss.sum(), counted.sum().astype(jnp.float32)


def over_streams(loss: Array, counted: Array) -> Sum:
    """Combines fragments into a sum for each stream (CM Eq. 5), and streams into their mean.

    Args:
      loss: f32 [B, F]; 0 where `counted` is false.
      counted: bool [B, F].

    Returns:
      The sum of the losses, and the number of streams with a fragment that counts.
    """
    return loss.sum(), counted.any(-1).sum().astype(jnp.float32)
