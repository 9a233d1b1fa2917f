"""Tasks of sequence models: a stream is read segment by segment, and its tokens themselves ask."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from rmjax import memoria
from rmjax.data.source import Description
from rmjax.io import paths
from rmjax.models import bert, huggingface, roberta, unroll
from rmjax.models.memoria_gpt2 import Engrams
from rmjax.reason.heads import cross_entropy
from rmjax.registry import CLASSIFIERS, LANGUAGE_MODELS, Registry
from rmjax.types import (
    Array,
    Batch,
    Key,
    ModelContext,
    Params,
    SequenceModel,
    Sum,
    Task,
    Terms,
    example_keys,
)


@dataclasses.dataclass(frozen=True)
class LastTokens(Task):
    """Each of a stream's last Q tokens asks for what comes after it: sorting.

    silent: first segments, in which nothing is asked in any stream, that run without gradients.
    gradient_segments: see `unroll`.
    """

    model: SequenceModel
    silent: int
    gradient_segments: int = 1

    def init(self, key: Key) -> Params:
        return self.model.init(key)

    def memory(self, params: Params, batch_size: int) -> Any:
        """What is carried from segment to segment."""
        return self.model.init_state(params, batch_size)

    def losses(
        self, params: Params, frozen: Params, carry: Any, batch: Batch, key: Key
    ) -> tuple[Terms, Any]:
        logits, aux = self._logits(params, batch, example_keys(key, batch.example_id))
        return {
            "reason": (1.0, cross_entropy(logits, batch.target, batch.query_mask)),
            "model": (1.0, aux),
        }, carry

    def scores(self, params: Params, batch: Batch) -> Array:
        return self._logits(params, batch, None)[0]

    def _logits(self, params: Params, batch: Batch, key: Key | None) -> tuple[Array, Sum]:
        """[B, Q, V]"""
        rows, asked = batch.target.shape
        _, hidden, aux = unroll(
            self.model,
            params,
            self.memory(params, rows),
            batch.items,
            batch.item_mask,
            lambda hidden, given: hidden,
            key=key,
            gradient_segments=self.gradient_segments,
            silent=self.silent,
        )
        tail = hidden.swapaxes(0, 1).reshape(rows, -1, hidden.shape[-1])
        before = self.silent * batch.items.shape[2]
        place = batch.item_mask.sum((1, 2))[:, None] - asked - before + jnp.arange(asked)
        found = jnp.take_along_axis(tail, jnp.maximum(place, 0)[..., None], 1)
        return self.model.logits(params, found), aux


@dataclasses.dataclass(frozen=True)
class LanguageModel(Task):
    """Every token asks for the next one; what is remembered is carried from batch to batch."""

    model: SequenceModel
    gradient_segments: int = 1

    @property
    def carries(self) -> bool:
        return True

    def init(self, key: Key) -> Params:
        return self.model.init(key)

    def memory(self, params: Params, batch_size: int) -> Any:
        """What is carried from segment to segment."""
        return self.model.init_state(params, batch_size)

    def losses(
        self, params: Params, frozen: Params, carry: Any, batch: Batch, key: Key
    ) -> tuple[Terms, Any]:
        carry, (total, count), aux = self._read(
            params, carry, batch, example_keys(key, batch.example_id)
        )
        return {
            "next": (1.0, (total.sum(), count.sum())),
            "model": (1.0, aux),
        }, jax.lax.stop_gradient(carry)

    def measure(self, params: Params, carry: Any, batch: Batch) -> tuple[dict[str, Array], Any]:
        """'nats' and 'tokens': the sum of -log p of the tokens that are predicted, and how many they are."""
        carry, (total, count), _ = self._read(params, carry, batch, None)
        return {"nats": total.T, "tokens": count.T}, carry

    def _read(
        self, params: Params, carry: Any, batch: Batch, key: Key | None
    ) -> tuple[Any, Sum, Sum]:
        """-> carry, (sum, count) [T, B] each of a segment's tokens, the model's aux."""

        def each(hidden: Array, given: tuple[Array, Array]) -> Sum:
            target, asked = given
            logits = self.model.logits(params, hidden).astype(jnp.float32)
            nats = (
                jax.nn.logsumexp(logits, -1)
                - jnp.take_along_axis(logits, target[..., None], -1)[..., 0]
            )
            return jnp.where(asked, nats, 0.0).sum(-1), asked.sum(-1).astype(jnp.float32)

        given = (
            batch.target.reshape(batch.items.shape),
            batch.query_mask.reshape(batch.items.shape),
        )
        s, stream = self.gradient_segments, (batch.items, batch.item_mask)
        return unroll(
            self.model, params, carry, *stream, each, given, batch.reset, key, gradient_segments=s
        )


@dataclasses.dataclass(frozen=True)
class Documents(Task):
    """Which class a document is of, said after each of its segments; the last one counts.

    The loss is a document's mean over its segments, each of which has the document's label.
    """

    model: SequenceModel
    gradient_segments: int = 1

    def init(self, key: Key) -> Params:
        return self.model.init(key)

    def memory(self, params: Params, batch_size: int) -> Any:
        """What is carried from segment to segment."""
        return self.model.init_state(params, batch_size)

    def losses(
        self, params: Params, frozen: Params, carry: Any, batch: Batch, key: Key
    ) -> tuple[Terms, Any]:
        logits, aux = self._logits(params, batch, example_keys(key, batch.example_id))
        there = batch.item_mask.any(-1) & batch.query_mask
        nats = (
            jax.nn.logsumexp(logits, -1)
            - jnp.take_along_axis(logits, batch.target[..., None], -1)[..., 0]
        )
        mean = jnp.where(there, nats, 0.0).sum(1) / jnp.maximum(there.sum(1), 1)
        return {
            "reason": (1.0, (mean.sum(), there.any(1).sum().astype(jnp.float32))),
            "model": (1.0, aux),
        }, carry

    def scores(self, params: Params, batch: Batch) -> Array:
        logits, _ = self._logits(params, batch, None)
        last = jnp.maximum(batch.item_mask.any(-1).sum(1) - 1, 0)
        return jnp.take_along_axis(logits, last[:, None, None], 1)

    def _logits(self, params: Params, batch: Batch, key: Key | None) -> tuple[Array, Sum]:
        """After every segment, f32 [B, T, classes]."""
        rows, segments, _ = batch.items.shape
        keys = None
        if key is not None:  # of the head; the segments' own are folded from 0 on
            keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
                key, segments + jnp.arange(segments)
            )
        _, logits, aux = unroll(
            self.model,
            params,
            self.memory(params, rows),
            batch.items,
            batch.item_mask,
            lambda hidden, key: self.model.logits(params, hidden, key),
            keys,
            key=key,
            gradient_segments=self.gradient_segments,
        )
        return logits.swapaxes(0, 1), aux


def make_documents(config: Any, data: Description) -> Documents:
    """The classifier that config.model describes, over documents of any length."""
    model = build_model(
        CLASSIFIERS, config, data.num_items, data.max_segments, data.questions.classes
    )
    return Documents(model, config.model.gradient_segments)


def build_model(
    registry: Registry,
    config: Any,
    vocabulary: int,
    max_segments: int | None = None,
    classes: int = 0,
) -> SequenceModel:
    """The sequence model that config.model and config.memoria describe.

    Args:
      max_segments: of the longest stream, where there is one.
    """
    settings = registry.settings(config.model.kind, config.model, "config.model.")
    context = context_of(config, vocabulary, max_segments, classes)
    return registry[config.model.kind].make(settings, context)


def context_of(
    config: Any, vocabulary: int, max_segments: int | None = None, classes: int = 0
) -> ModelContext:
    engrams = None
    if "memoria" in config.model.kind:
        rules = dict(config.memoria)
        layer, activation = rules.pop("layer"), rules.pop("activation")
        engrams = Engrams(memoria.MemoriaConfig(dim=config.model.dim, **rules), layer, activation)
    return ModelContext(
        vocabulary=vocabulary,
        segment_length=config.data.segment_length,
        max_segments=max_segments,
        classes=classes,
        dtype=config.train.compute_dtype,
        engrams=engrams,
    )


def make_language_model(config: Any, data: Description) -> LanguageModel:
    """The model that config.model describes, over the tokens of texts."""
    return LanguageModel(
        build_model(LANGUAGE_MODELS, config, data.num_items), config.model.gradient_segments
    )


def make_sorting(config: Any, data: Description) -> LastTokens:
    """The model that config.model describes, over streams that are all of one length."""
    n = config.data.segment_length
    segments = -(-data.max_items // n)
    model = build_model(LANGUAGE_MODELS, config, data.num_items, segments)
    reach = config.model.gradient_segments
    before = (data.max_items - data.num_queries) // n  # segments in which nothing is asked
    silent = max(0, before - (reach - 1)) if reach else 0
    return LastTokens(model, silent, reach)


def pretrained(config: Any, like: Params) -> Params:
    """`like` with the parameters of the checkpoint that config.model.pretrained names.

    What released checkpoints have no tensors for (the memory's modules, the classifier) stays. A table
    of more words than the tokenizer has is cut to the tokenizer's words (see `huggingface.read`).

    Raises:
      ValueError: a tensor is missing, or the model is of another size than the checkpoint; names the
        key to change.
    """
    m = config.model
    folder = paths.resolve(m.pretrained, "config.model.pretrained")
    if not folder.exists() or folder.name == huggingface.CONFIG:
        state = (
            "give its folder" if folder.exists() else "no such folder, and nothing is downloaded"
        )
        raise FileNotFoundError(
            f"config.model.pretrained={m.pretrained}: {state}. It is to hold config.json and model.safetensors"
        )
    kind = next((kind for kind in ("roberta", "bert") if kind in m.kind), "gpt2")
    words = len(like["wte"] if kind == "gpt2" else like["embeddings"]["word_embeddings"])
    if (folder / huggingface.CONFIG).is_file():
        sizes = huggingface.sizes_from_config(folder, kind)
        for name in ("dim", "layers", "heads"):
            if getattr(sizes, name) != m[name]:
                raise ValueError(
                    f"config.model.{name} = {m[name]}, but {folder} has {getattr(sizes, name)}"
                )
        if words > sizes.vocabulary:
            tokenizer = (
                "config.data.text.tokenizer"
                if kind == "gpt2"
                else "config.data.hyperpartisan.tokenizer"
            )
            raise ValueError(
                f"{tokenizer}: has {words} tokens, but {folder} has rows for {sizes.vocabulary}: take its own"
            )
        longest = sizes.positions
        if isinstance(sizes, bert.Sizes):
            sizes_of = roberta.sizes_of if kind == "roberta" else bert.sizes_of
            settings = CLASSIFIERS.settings(m.kind, m)
            own, longest = sizes_of(settings, context_of(config, words)), sizes.longest
            for name, theirs in (("epsilon", "layer_norm_eps"), ("padding", "pad_token_id")):
                if getattr(sizes, name) != getattr(own, name):
                    found = f"{theirs} = {getattr(sizes, name)}, and our {kind} is made for {getattr(own, name)} alone"
                    raise ValueError(
                        f"config.model.pretrained: {folder / huggingface.CONFIG} has {found}"
                    )
        if config.data.segment_length > longest:
            n = config.data.segment_length
            raise ValueError(
                f"config.data.segment_length = {n}: {folder} has positions for {longest} tokens"
            )
    else:
        logging.warning(
            "%s has no config.json: whether its heads are %d, and its norms ours, cannot be seen.",
            folder,
            m.heads,
        )
    fresh = [
        "classifier",
        "abstractor",
        "layer_#/memory_attention",
        "h_#/memory_attn",
        "h_#/long_term",
    ]
    fresh += ["h_#/ln_working_memory_attn", "h_#/ln_memory_attn"]
    if kind == "roberta" or not any("pooler.dense" in name for name in huggingface.names(folder)):
        fresh.append("pooler")
    return jax.device_get(huggingface.read(folder, like, kind, fresh))
