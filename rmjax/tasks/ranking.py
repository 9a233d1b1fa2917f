"""Answers that are items: what is asked, the loss, the rank of the target, and the best items."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.machines.live import LiveStream, last_item
from rmjax.reason import ranking as head
from rmjax.reason.ranking import EmbedItems
from rmjax.types import Array, Batch, Key, Params, Sum

# Negatives are drawn from fold_in(key, this). Keys of examples fold in an id below 2^31.
_NEGATIVES = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Ranking:
    """How items are asked for, trained and ranked.

    Attributes:
      num_items: V.
      last: the reader sees the last item before the question. False: the memory alone.
      bias: whether each item has a bias.
      own: whether the head has an item table of its own.
      negatives: S, items drawn in each step for the normaliser; 0: all items.
      cumulative: i32 [V], sums of the weights that draw negatives; None: uniform.
      exclude_seen: items of the stream before the question do not compete with the target.
      block: items scored at once; 0: see `head.block_size`.
    """

    num_items: int
    last: bool = False
    bias: bool = True
    own: bool = False
    negatives: int = 0
    cumulative: np.ndarray | None = dataclasses.field(default=None, compare=False, repr=False)
    exclude_seen: bool = False
    block: int = 0

    def item_arrays(self, head: str) -> tuple[tuple[str, ...], ...]:
        """Paths of the head's arrays with one row for each item, if `head` names the head."""
        chosen = {"embed": self.own, "bias": self.bias}
        return tuple((head, name) for name, exists in chosen.items() if exists)

    def asked(self, batch: Batch) -> Batch:
        """The batch as the reader sees it: with `last`, a question is the last item before it.

        Args:
          batch: B streams with Q questions.

        Returns:
          The batch, whose query is then i32 [B, Q]: the item, or -1 where no item is before.
        """
        if not self.last:
            return batch
        place = _before(batch) - 1
        items = batch.items.reshape(len(place), -1)
        last = jnp.take_along_axis(items, jnp.maximum(place, 0), 1)
        return dataclasses.replace(batch, query=jnp.where(place < 0, -1, last))

    def asked_live(self, stream: LiveStream, query: Array) -> Array:
        """What `asked` does, for live streams: the questions i32 [B, Q] that the reader sees."""
        if not self.last:
            return query
        return jnp.broadcast_to(last_item(stream)[:, None], query.shape)

    def item_ids(self, batch: Batch, key: Key) -> list[Array]:
        """The rows of the machine's item table that `loss` reads."""
        if self.own:
            return []
        if not self.negatives:
            return [jnp.arange(self.num_items)]
        return [batch.target, self._draw(key)[0]]

    def _draw(self, key: Key) -> tuple[Array, Array]:
        key = jax.random.fold_in(key, _NEGATIVES)
        weights = None if self.cumulative is None else jnp.asarray(self.cumulative)
        return head.draw(key, self.negatives, self.num_items, weights)

    def loss(
        self, params: Params, embed_items: EmbedItems, features: Array, batch: Batch, key: Key
    ) -> Sum:
        """The softmax cross-entropy of the asked questions over all items.

        Args:
          params: of `head.init`.
          embed_items: features of item ids.
          features: f32 [B, Q, m], read for the questions.
          batch: B streams with Q questions.
          key: one key for all rows, which share the drawn negatives.

        Returns:
          (sum, count). A question counts if its target is an item.
        """
        mask = batch.query_mask & (batch.target >= 0) & (batch.target < self.num_items)
        target = jnp.where(mask, batch.target, 0)
        own = head.score_one(params, embed_items, features, target)
        score = head.scorer(params, embed_items, features)
        if self.negatives:
            ids, log_probability = self._draw(key)
            loss = head.sampled_loss(own, target, score(ids), ids, log_probability)
        else:
            loss = head.log_normaliser(score, self.num_items, mask.size, self.block) - own
        return jnp.where(mask, loss, 0.0).sum(), mask.sum().astype(jnp.float32)

    def ranks(
        self, params: Params, embed_items: EmbedItems, features: Array, batch: Batch
    ) -> Array:
        """The rank of each target, f32 [B, Q]; see `head.ranks`."""
        score = head.scorer(params, embed_items, features)
        without: head.Without = head.nothing
        if self.exclude_seen:
            flat = lambda x: x.reshape(len(x), -1)
            without = head.seen_before(flat(batch.items), flat(batch.item_mask), _before(batch))
        return head.ranks(score, batch.target, self.num_items, without, self.block)

    def top_k(
        self,
        params: Params,
        embed_items: EmbedItems,
        features: Array,
        k: int,
        exclude: Array | None = None,
    ) -> tuple[Array, Array]:
        """The best items of each question, see `head.top_k`.

        Args:
          params: of `head.init`.
          embed_items: features of item ids.
          features: f32 [B, Q, m].
          k: how many items.
          exclude: i32 [B, E], items that are left out; entries below 0 are padding. None: none.

        Returns:
          Scores f32 [B, Q, k] and ids i32 [B, Q, k].
        """
        score = head.scorer(params, embed_items, features)
        without = head.nothing if exclude is None else head.listed(exclude, exclude >= 0)
        return head.top_k(score, k, self.num_items, without, self.block)


def cumulative_weights(popularity: np.ndarray) -> np.ndarray:
    """The sums of the weights that draw negatives: 1 + the count of each item.

    Args:
      popularity: i64 [V], counts.

    Returns:
      i32 [V]. Counts whose sum is too large for 32 bits are divided first.
    """
    popularity = np.asarray(popularity, np.int64)
    room = 2**31 - 1 - len(popularity)
    return np.cumsum(1 + popularity // (1 + popularity.sum() // room)).astype(np.int32)


def _before(batch: Batch) -> Array:
    """The number of places before each question.

    Raises:
      ValueError: the batch does not say it.
    """
    if batch.items_before is None:
        raise ValueError(
            "the last items before a question are needed, but the batch has no items_before: a "
            "source of streams that are already cut into segments must add it to `fetch`"
        )
    return batch.items_before
