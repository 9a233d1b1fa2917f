"""From questions to features, and from features to logits: the parts that differ by source."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.data.source import Questions
from rmjax.layers.embeddings import embed, init_embed, look_up
from rmjax.machines.live import LiveStream
from rmjax.reason import encoders, heads
from rmjax.reason import ranking as items_head
from rmjax.reason.ranking import EmbedItems
from rmjax.tasks.ranking import Ranking
from rmjax.types import Array, Batch, Key, Params, Sum


@dataclasses.dataclass(frozen=True)
class Answers:
    """The query encoder and the final reasoning layer (CM Appendix A.1) for a source's questions.

    Attributes:
      questions: how the source asks.
      dim: width m of the features of questions and answers.
      item_dim: width of the features of items.
      hidden: width of the head's tanh layer; 0: no such layer.
      ranking: how items are ranked, if an item is the answer.
    """

    questions: Questions
    dim: int
    item_dim: int
    hidden: int = 0
    ranking: Ranking | None = None

    def __post_init__(self) -> None:
        if self.questions.answer == "item":
            if self.ranking is None:
                raise ValueError("answer = 'item': Answers needs a Ranking")
            if self.ranking.last and self.questions.query != "kind":
                raise ValueError(
                    "config.ranking.question = 'last' puts the last item in the place of the "
                    f"question, but the questions of this data are {self.questions.query}: set "
                    "'next'"
                )
        if self.questions.answer == "choice" and not self.hidden:
            raise ValueError(
                "one linear layer on [q; a] adds the same number to every candidate of a question, "
                "so the softmax ignores the question: set config.reason.head='mlp'"
            )

    def init_encoder(self, key: Key) -> Params:
        """Draws the parameters of the query encoder."""
        a, b, c = jax.random.split(key, 3)
        questions = self.questions
        if questions.query == "kind":
            kinds: Params = {"kinds": init_embed(a, questions.kinds, self.dim)}
            if self.ranking and self.ranking.last and self.item_dim != self.dim:
                kinds["project"] = lecun_normal()(b, (self.item_dim, self.dim))
            return kinds
        if questions.query == "item":
            if self.item_dim == self.dim:
                return {}
            return {"project": lecun_normal()(a, (self.item_dim, self.dim))}
        params = {"question": encoders.init_words(a, self.item_dim, self.dim)}
        if questions.answer == "choice":
            params["candidate"] = encoders.init_words(b, self.item_dim, self.dim)
        if questions.words:
            params["words"] = {"embed": init_embed(c, questions.words, self.item_dim)}
        return params

    def init_head(self, key: Key) -> Params:
        """Draws the parameters of the head."""
        if self.questions.answer == "class":
            return heads.init_classes(key, self.dim, self.questions.classes, self.hidden)
        if self.ranking:
            sizes = self.dim, self.item_dim, self.ranking.num_items
            return items_head.init(key, *sizes, self.ranking.bias, self.ranking.own)
        return heads.init_click(key, self.dim, self.dim, self.hidden)

    def encode(self, encoder: Params, embed_items: EmbedItems, batch: Batch) -> Array:
        """The features of the questions.

        Args:
          encoder: of `init_encoder`.
          embed_items: features of item ids.
          batch: B examples with Q questions, see `asked`.

        Returns:
          f32 [B, Q, m].
        """
        if self.questions.query == "kind":
            kind = embed({"embed": encoder["kinds"]}, batch.query)
            if not self.ranking or not self.ranking.last:
                return kind
            last = self._project(encoder, embed_items(batch.query))
            return kind + jnp.where(batch.query[..., None] < 0, 0.0, last)
        if self.questions.query == "item":
            return self._project(encoder, embed_items(batch.query))
        assert batch.word_mask is not None
        words = self._words(encoder, embed_items)(batch.query)
        return encoders.encode_words(encoder["question"], words, batch.word_mask)

    @staticmethod
    def _project(encoder: Params, items: Array) -> Array:
        return items @ encoder["project"] if "project" in encoder else items

    def asked(self, batch: Batch) -> Batch:
        """The batch with the questions that the reader sees, see `Ranking.asked`."""
        return self.ranking.asked(batch) if self.ranking else batch

    def asked_live(self, stream: LiveStream, query: Array) -> Array:
        """The questions of live streams that the reader sees, see `Ranking.asked_live`."""
        return self.ranking.asked_live(stream, query) if self.ranking else query

    def item_ids(self, batch: Batch, key: Key) -> list[Array]:
        """The ids that `encode` and `loss` pass to `embed_items`; the last items are in streams."""
        questions = self.questions
        ids = self.ranking.item_ids(batch, key) if self.ranking else []
        if questions.query == "item":
            return [batch.query, *ids]
        if questions.query == "kind" or questions.words:
            return ids
        candidates = [] if batch.candidates is None else [batch.candidates]
        return [batch.query, *candidates, *ids]

    def _words(self, encoder: Params, embed_items: EmbedItems) -> EmbedItems:
        """The embedding of words: of their own vocabulary if there is one, else that of items."""
        return functools.partial(embed, encoder["words"]) if "words" in encoder else embed_items

    def logits(
        self,
        encoder: Params,
        head: Params,
        embed_items: EmbedItems,
        features: Array,
        query: Array,
        batch: Batch,
    ) -> Array:
        """The logits of the answers.

        Args:
          encoder: of `init_encoder`.
          head: of `init_head`.
          embed_items: features of item ids.
          features: [B, Q, m], read from a memory.
          query: [B, Q, m], of `encode`.
          batch: B examples with Q questions.

        Returns:
          [B, Q] of clicks; [B, Q, C] of classes or choices; [B, Q, V] of all items.
        """
        if self.ranking:
            score = items_head.scorer(head, embed_items, features)
            return score(jnp.arange(self.ranking.num_items))
        if self.questions.answer == "click":
            return heads.click(head, features, query)
        if self.questions.answer == "class":
            return heads.classify(head, features)
        assert batch.candidates is not None and batch.candidate_mask is not None
        assert batch.choices is not None and batch.choice_mask is not None
        words = self._words(encoder, embed_items)(batch.candidates)
        pool = encoders.encode_words(encoder["candidate"], words, batch.candidate_mask)
        chosen = jax.vmap(look_up)(pool, batch.choices)
        return heads.choose(head, features, chosen, batch.choice_mask)

    def scores(
        self,
        encoder: Params,
        head: Params,
        embed_items: EmbedItems,
        features: Array,
        query: Array,
        batch: Batch,
    ) -> Array:
        """What evaluation needs: the logits, or the ranks of targets that are items.

        The arguments are those of `logits`.
        """
        if self.ranking:
            return self.ranking.ranks(head, embed_items, features, batch)
        return self.logits(encoder, head, embed_items, features, query, batch)

    def loss(
        self,
        encoder: Params,
        head: Params,
        embed_items: EmbedItems,
        features: Array,
        query: Array,
        batch: Batch,
        key: Key,
    ) -> Sum:
        """The cross-entropy of the asked questions, binary for clicks, as (sum, count).

        The arguments are those of `logits`, and one key for all rows.
        """
        if self.ranking:
            return self.ranking.loss(head, embed_items, features, batch, key)
        logits = self.logits(encoder, head, embed_items, features, query, batch)
        if self.questions.answer == "click":
            return heads.click_loss(logits, batch.target, batch.query_mask)
        return heads.cross_entropy(logits, batch.target, batch.query_mask)


def questions_only(query: Array, query_mask: Array, **fields: Array) -> Batch:
    """A batch of questions without streams, for `Answers`.

    Args:
      query: as in `Batch`.
      query_mask: as in `Batch`.
      **fields: further fields of `Batch` for words and candidates.

    Returns:
      The batch.
    """
    rows = query.shape[0]
    none = jnp.zeros((rows, 0, 0), jnp.int32)
    return Batch(
        items=none,
        item_mask=none.astype(bool),
        query=query,
        query_mask=query_mask,
        target=jnp.zeros(query_mask.shape, jnp.int32),
        negative_items=jnp.zeros((rows, 0), jnp.int32),
        negative_mask=jnp.zeros((rows, 0), bool),
        example_id=jnp.zeros(rows, jnp.int32),
        **fields,
    )
