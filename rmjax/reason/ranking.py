"""The head that ranks a catalogue: scores of all items, block by block, and softmax losses.

Scores of every question for every item would need [B, Q, V] numbers. The functions here hold the
scores of one block of items, and keep only what they need: a rank, the best items, a normaliser.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.layers.embeddings import embed, init_embed
from rmjax.types import Array, Key, Params

SCORES_AT_ONCE = 2**22  # scores that a block holds, over all questions
EmbedItems = Callable[[Array], Array]
"""Item ids [...] -> features [..., d], entries of about unit variance."""
Score = Callable[[Array], Array]
"""Item ids i32 [C] -> scores f32 [B, Q, C]."""
Without = Callable[[Array], Array]
"""Neighbouring item ids i32 [C] -> bool [B, Q, C], which of them take no part."""
S = TypeVar("S")


def init(
    key: Key, width: int, item_width: int, num_items: int, bias: bool = True, own: bool = False
) -> Params:
    """Draws the head.

    Args:
      key: of the draws.
      width: of the features, m.
      item_width: of the machine's items, d. If it is m, the untrained features are compared with
        the items as they are.
      num_items: V.
      bias: whether every item has a bias, which starts at 0.
      own: whether the head compares features with a table of its own, not the machine's items.

    Returns:
      {embed: [V, m]} with a table of its own, else {project: [m, d]}; and {bias: [V]} if there is
      one.
    """
    biases = {"bias": jnp.zeros(num_items)} if bias else {}
    if own:
        return {"embed": init_embed(key, num_items, width)} | biases
    same = width == item_width
    return biases | {
        "project": jnp.eye(width) if same else lecun_normal()(key, (width, item_width))
    }


def scorer(head: Params, embed_items: EmbedItems, features: Array) -> Score:
    """The scores that features give to items: their product with the item, plus its bias.

    Args:
      head: of `init`.
      embed_items: features of item ids; unused by a head with a table of its own.
      features: f32 [B, Q, m].

    Returns:
      The scores.
    """
    asked, embed_items = _sides(head, embed_items, features)

    def score(ids: Array) -> Array:
        scores = asked @ embed_items(ids).T
        return scores + head["bias"][ids] if "bias" in head else scores

    return score


def score_one(head: Params, embed_items: EmbedItems, features: Array, items: Array) -> Array:
    """The scores f32 [B, Q] of one item for each question, i32 [B, Q]; see `scorer`."""
    asked, embed_items = _sides(head, embed_items, features)
    scores = (asked * embed_items(items)).sum(-1)
    return scores + head["bias"].at[items].get(mode="clip") if "bias" in head else scores


def _sides(head: Params, embed_items: EmbedItems, features: Array) -> tuple[Array, EmbedItems]:
    """The two factors of the scores. Items count as vectors of unit length."""
    if "embed" in head:
        embed_items = functools.partial(embed, head)
    else:
        features = features @ head["project"]
    return features * features.shape[-1] ** -0.5, embed_items


def block_size(num_items: int, questions: int) -> int:
    """The number of items in a block, if it is to hold about `SCORES_AT_ONCE` scores."""
    return min(num_items, max(128, SCORES_AT_ONCE // max(questions, 1)))


def _fold(
    step: Callable[[S, Array, Array], S], first: S, num_items: int, block: int, remat: bool = False
) -> S:
    """Folds step(carry, ids i32 [C], new bool [C]) over all items.

    The last block begins early, so that it is as long as the others. `new` is false for the ids
    that the block before it had.
    """

    def body(carry: S, number: Array) -> tuple[S, None]:
        ids = jnp.minimum(number * block, num_items - block) + jnp.arange(block)
        return step(carry, ids, ids >= number * block), None

    if block >= num_items:
        return step(first, jnp.arange(num_items), jnp.ones(num_items, bool))
    body = jax.checkpoint(body, prevent_cse=False) if remat else body
    return jax.lax.scan(body, first, jnp.arange(-(-num_items // block)))[0]


def nothing(ids: Array) -> Array:
    """A `Without` that leaves no item out."""
    return jnp.zeros(ids.shape, bool)


def seen_before(items: Array, mask: Array, before: Array) -> Without:
    """The items of a stream that come before each question.

    Args:
      items: i32 [B, L] ids.
      mask: bool [B, L], true where an item is.
      before: i32 [B, Q], number of items before each question, counted with padding.

    Returns:
      Whether an item occurs in the first `before` places of its row.
    """
    rows, length = items.shape

    def seen(ids: Array) -> Array:
        place = jnp.where(mask & (items >= ids[0]), items - ids[0], len(ids))
        first = jnp.full((rows, len(ids)), length, jnp.int32)
        first = first.at[jnp.arange(rows)[:, None], place].min(jnp.arange(length), mode="drop")
        return first[:, None] < before[..., None]

    return seen


def listed(ids: Array, mask: Array) -> Without:
    """The items of a list.

    Args:
      ids: i32 [B, E].
      mask: bool [B, E], which entries count.

    Returns:
      Whether an item is in its row's list.
    """
    return seen_before(ids, mask, jnp.full((len(ids), 1), ids.shape[1], jnp.int32))


def ranks(
    score: Score, target: Array, num_items: int, without: Without = nothing, block: int = 0
) -> Array:
    """The rank of each target among all items.

    Args:
      score: the scores.
      target: i32 [B, Q].
      num_items: V.
      without: items that do not compete; a target always takes part.
      block: items of a block; 0: see `block_size`.

    Returns:
      f32 [B, Q]. 1 is the best, and equal scores share the mean of their ranks. It is infinite for
      a target that is no item, and NaN where a score is NaN.
    """
    block = min(block or block_size(num_items, target.size), num_items)
    is_target = lambda ids: ids == target[..., None]

    # The target's score comes from the same product as its competitors' scores, since an inner
    # product of its own may round otherwise and break a tie.
    def find(own: Array, ids: Array, new: Array) -> Array:
        return own + jnp.where(is_target(ids) & new, score(ids), 0.0).sum(-1)

    own = _fold(find, jnp.zeros(target.shape), num_items, block)[..., None]

    def count(sums: tuple[Array, Array, Array], ids: Array, new: Array) -> tuple:
        better, equal, wrong = sums
        scores = score(ids)
        other = new & ~is_target(ids) & ~without(ids)
        better += (other & (scores > own)).sum(-1)
        equal += (other & (scores == own)).sum(-1)
        return better, equal, wrong | jnp.isnan(scores).any(-1)

    zeros = jnp.zeros(target.shape, jnp.int32)
    better, equal, wrong = _fold(count, (zeros, zeros, zeros > 0), num_items, block)
    rank = jnp.where((target >= 0) & (target < num_items), 1 + better + equal / 2, jnp.inf)
    return jnp.where(wrong, jnp.nan, rank)


def top_k(
    score: Score, k: int, num_items: int, without: Without = nothing, block: int = 0
) -> tuple[Array, Array]:
    """The best items. If scores are equal, the lower id comes first.

    Args:
      score: the scores.
      k: how many items.
      num_items: V.
      without: items that are left out.
      block: items of a block; 0: see `block_size`.

    Returns:
      Scores f32 [B, Q, k], falling, and ids i32 [B, Q, k]. Where fewer than k items are left,
      the scores end with -inf and the ids with -1.
    """
    shape = jax.eval_shape(score, jax.ShapeDtypeStruct((1,), jnp.int32)).shape[:-1]
    questions = shape[0] * shape[1]
    block = min(block or block_size(num_items, questions), num_items)

    def merge(best: tuple[Array, Array], ids: Array, new: Array) -> tuple[Array, Array]:
        scores = jnp.where(new & ~without(ids), score(ids), -jnp.inf)
        scores = jnp.concatenate([best[0], scores], -1)
        both = jnp.concatenate([best[1], jnp.broadcast_to(ids, (*shape, len(ids)))], -1)
        value, place = jax.lax.top_k(scores, k)
        return value, jnp.take_along_axis(both, place, -1)

    none = jnp.full((*shape, k), -jnp.inf), jnp.full((*shape, k), -1, jnp.int32)
    return _fold(merge, none, num_items, block)


def log_normaliser(score: Score, num_items: int, questions: int, block: int = 0) -> Array:
    """The logarithm of sum_v exp(score_v) over all items, f32 [B, Q].

    The backward pass computes the scores of a block again, if there are several blocks.

    Args:
      score: the scores.
      num_items: V.
      questions: B Q.
      block: items of a block; 0: see `block_size`.

    Returns:
      The logarithm.
    """
    block = min(block or block_size(num_items, questions), num_items)
    shape = jax.eval_shape(score, jax.ShapeDtypeStruct((1,), jnp.int32)).shape[:-1]

    def add(total: Array, ids: Array, new: Array) -> Array:
        scores = jnp.where(new, score(ids), -jnp.inf)
        return jnp.logaddexp(total, jax.nn.logsumexp(scores, -1))

    return _fold(add, jnp.full(shape, -jnp.inf), num_items, block, remat=True)


def draw(key: Key, number: int, num_items: int, cumulative: Array | None) -> tuple[Array, Array]:
    """Draws items with replacement.

    Args:
      key: draws them.
      number: S.
      num_items: V.
      cumulative: i32 [V], the sums of positive whole weights; None: all items are equally likely.

    Returns:
      Ids i32 [S], and log q f32 [S], the logarithm of the probability of each.
    """
    if cumulative is None:
        ids = jax.random.randint(key, (number,), 0, num_items)
        return ids, jnp.full(number, -jnp.log(num_items))
    # Whole numbers: sums of f32 probabilities would lose the rare items of a large catalogue.
    place = jax.random.randint(key, (number,), 0, cumulative[-1])
    ids = jnp.searchsorted(cumulative, place, side="right").astype(jnp.int32)
    below = jnp.where(ids > 0, cumulative[ids - 1], 0)
    return ids, jnp.log(cumulative[ids] - below) - jnp.log(cumulative[-1])


def sampled_loss(
    own: Array, target: Array, others: Array, ids: Array, log_probability: Array
) -> Array:
    """The softmax cross-entropy with a sampled normaliser (Bengio and Senecal 2008).

    The normaliser is exp(own) + 1/S sum_s exp(f_s) / q_s over the drawn items that are not the
    target. Its expectation is the sum of exp over all items. Dividing by q_s is the logQ correction
    of the drawn items; the target is not drawn, so it needs none.

    Args:
      own: f32 [B, Q], scores of the targets.
      target: i32 [B, Q].
      others: f32 [B, Q, S], scores of the drawn items.
      ids: i32 [S], the drawn items.
      log_probability: f32 [S], log q.

    Returns:
      f32 [B, Q].
    """
    corrected = others - log_probability - jnp.log(len(ids))
    corrected = jnp.where(ids == target[..., None], -jnp.inf, corrected)
    return jax.nn.logsumexp(jnp.concatenate([own[..., None], corrected], -1), -1) - own
