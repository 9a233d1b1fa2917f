"""From a question to its feature, and from what was read for it to logits: the parts that differ between tasks."""

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


@dataclasses.dataclass(frozen=True)
class Answers:
    """Query encoder and final reasoning layer (CM Appendix A.1) for the questions of a source.

    `embed_items` below gives features of item ids: questions of items, or of their words, share them.
    """

    questions: Questions
    dim: int  # m
    item_dim: int
    hidden: int = 0  # width of the head's tanh layer; 0: none

    def __post_init__(self) -> None:
        if self.questions.answer == "choice" and not self.hidden:
            raise ValueError(
                "one linear layer on [q; a] gives every candidate the same share of the question, which the softmax "
                "then does not see: set config.reason.head='mlp'"
            )

    def init_encoder(self, key: Key) -> Params:
        a, b, c = jax.random.split(key, 3)
        asked = self.questions
        if asked.query == "kind":
            return {"kinds": init_embed(a, asked.kinds, self.dim)}
        if asked.query == "item":
            return (
                {}
                if self.item_dim == self.dim
                else {"project": lecun_normal()(a, (self.item_dim, self.dim))}
            )
        params = {"question": encoders.init_words(a, self.item_dim, self.dim)}
        if asked.answer == "choice":
            params["candidate"] = encoders.init_words(b, self.item_dim, self.dim)
        if asked.words:
            params["words"] = {"embed": init_embed(c, asked.words, self.item_dim)}
        return params

    def init_head(self, key: Key) -> Params:
        if self.questions.answer == "class":
            return heads.init_classes(key, self.dim, self.questions.classes, self.hidden)
        return heads.init_click(key, self.dim, self.dim, self.hidden)

    def encode(self, encoder: Params, embed_items: Callable[[Array], Array], batch: Batch) -> Array:
        """The questions' features q [B, Q, m]."""
        if self.questions.query == "kind":
            return embed({"embed": encoder["kinds"]}, batch.query)
        if self.questions.query == "item":
            q = embed_items(batch.query)
            return q @ encoder["project"] if "project" in encoder else q
        assert batch.word_mask is not None
        words = self._words(encoder, embed_items)(batch.query)
        return encoders.encode_words(encoder["question"], words, batch.word_mask)

    def item_ids(self, batch: Batch) -> list[Array]:
        """What `encode` and `logits` ask `embed_items` for."""
        asked = self.questions
        if asked.query == "item":
            return [batch.query]
        if asked.query == "kind" or asked.words:
            return []
        return [batch.query] + ([batch.candidates] if batch.candidates is not None else [])

    def _words(
        self, encoder: Params, embed_items: Callable[[Array], Array]
    ) -> Callable[[Array], Array]:
        return functools.partial(embed, encoder["words"]) if "words" in encoder else embed_items

    def logits(
        self,
        encoder: Params,
        head: Params,
        embed_items: Callable[[Array], Array],
        features: Array,
        query: Array,
        batch: Batch,
    ) -> Array:
        """Features and queries [B, Q, m] -> logits [B, Q] of a click, or [B, Q, C] of classes or choices."""
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
        """Of the asked questions: binary or plain cross-entropy."""
        if self.questions.answer == "click":
            return heads.click_loss(logits, batch.target, batch.query_mask)
        return heads.cross_entropy(logits, batch.target, batch.query_mask)


def questions_only(query: Array, query_mask: Array, **asked: Array) -> Batch:
    """A batch of questions without streams, as `Answers` takes it; `asked`: word_mask, candidates, ..."""
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
        **asked,
    )
