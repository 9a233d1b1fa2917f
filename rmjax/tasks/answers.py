"""From questions to features, and from features to logits: the parts that differ by source."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.data.source import Questions
from rmjax.layers.embeddings import embed, init_embed, look_up
from rmjax.reason import encoders, heads
from rmjax.types import Array, Batch, Key, Params, Sum

EmbedItems = Callable[[Array], Array]
"""Item ids [...] -> features [..., d]; questions of items or of their words use these too."""


@dataclasses.dataclass(frozen=True)
class Answers:
    """The query encoder and the final reasoning layer (CM Appendix A.1) for a source's questions.

    Attributes:
      questions: how the source asks.
      dim: width m of the features of questions and answers.
      item_dim: width of the features of items.
      hidden: width of the head's tanh layer; 0: no such layer.
    """

    questions: Questions
    dim: int
    item_dim: int
    hidden: int = 0

    def __post_init__(self) -> None:
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
            return {"kinds": init_embed(a, questions.kinds, self.dim)}
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
        return heads.init_click(key, self.dim, self.dim, self.hidden)

    def encode(self, encoder: Params, embed_items: EmbedItems, batch: Batch) -> Array:
        """The features of the questions.

        Args:
          encoder: of `init_encoder`.
          embed_items: features of item ids.
          batch: B examples with Q questions.

        Returns:
          f32 [B, Q, m].
        """
        if self.questions.query == "kind":
            return embed({"embed": encoder["kinds"]}, batch.query)
        if self.questions.query == "item":
            q = embed_items(batch.query)
            return q @ encoder["project"] if "project" in encoder else q
        assert batch.word_mask is not None
        words = self._words(encoder, embed_items)(batch.query)
        return encoders.encode_words(encoder["question"], words, batch.word_mask)

    def item_ids(self, batch: Batch) -> list[Array]:
        """The ids that `encode` and `logits` pass to `embed_items`."""
        questions = self.questions
        if questions.query == "item":
            return [batch.query]
        if questions.query == "kind" or questions.words:
            return []
        return [batch.query] + ([batch.candidates] if batch.candidates is not None else [])

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
          [B, Q] of clicks, or [B, Q, C] of classes or choices.
        """
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

    def loss(self, logits: Array, batch: Batch) -> Sum:
        """The cross-entropy of the asked questions, binary for clicks, as (sum, count)."""
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
