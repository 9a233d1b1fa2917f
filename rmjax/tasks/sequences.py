"""Tasks of sequence models, whose streams are read segment by segment and contain the questions."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from rmjax import memoria
from rmjax.config import array_dtype
from rmjax.data.source import Description
from rmjax.io import paths
from rmjax.layers.keys import fold
from rmjax.models import bert, gpt2, huggingface, roberta, truncated, unroll
from rmjax.models.gpt2 import no_loss
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

if TYPE_CHECKING:
    from ml_collections import ConfigDict

HEAD = np.uint32(2**32 - 1)  # names the keys of a classifier's head; no segment has this number

State = Any
"""The state of a sequence model, which is carried from segment to segment."""


@dataclasses.dataclass(frozen=True)
class _SequenceTask(Task):
    """A task of one sequence model, whose state is the memory."""

    model: SequenceModel

    def init(self, key: Key) -> Params:
        """Draws the parameters of the model."""
        return self.model.init(key)

    def memory(self, params: Params, batch_size: int) -> State:
        """The state of the model before the first segment."""
        return self.model.init_state(params, batch_size)


@dataclasses.dataclass(frozen=True)
class LastTokens(_SequenceTask):
    """Sorting: each of a stream's last Q tokens asks for the token after it.

    Attributes:
      model: reads the streams.
      silent: number of first segments that run without gradients; they have no questions.
      gradient_segments: see `unroll`.
    """

    silent: int
    gradient_segments: int = 1

    def losses(
        self, params: Params, frozen: Params, carry: State, batch: Batch, key: Key
    ) -> tuple[Terms, State]:
        """The terms of the loss, see `rmjax.types.Task.losses`."""
        logits, aux = self._logits(params, batch, example_keys(key, batch.example_id))
        loss = cross_entropy(logits, batch.target, batch.query_mask)
        return {"reason": (1.0, loss), "model": (1.0, aux)}, carry

    def scores(self, params: Params, batch: Batch) -> Array:
        """Answers to a batch's questions, see `rmjax.types.Task.scores`."""
        return self._logits(params, batch, None)[0]

    def _logits(self, params: Params, batch: Batch, key: Key | None) -> tuple[Array, Sum]:
        """The logits [B, Q, V] and the model's aux."""
        rows, asked = batch.target.shape
        _, hidden, aux = unroll(
            self.model,
            params,
            self.memory(params, rows),
            batch.items,
            batch.item_mask,
            lambda hidden, _: hidden,
            key=key,
            gradient_segments=self.gradient_segments,
            silent=self.silent,
        )
        tail = hidden.swapaxes(0, 1).reshape(rows, -1, hidden.shape[-1])
        before = self.silent * batch.items.shape[2]
        place = batch.item_mask.sum((1, 2))[:, None] - asked - before + jnp.arange(asked)
        last = jnp.take_along_axis(tail, jnp.maximum(place, 0)[..., None], 1)
        return self.model.logits(params, last), aux


@dataclasses.dataclass(frozen=True)
class LanguageModel(_SequenceTask):
    """Language modelling: every token asks for the next one; the state goes from batch to batch.

    Attributes:
      model: reads the streams.
      gradient_segments: see `unroll`.
    """

    gradient_segments: int = 1

    @property
    def carries(self) -> bool:
        """Streams go on from step to step."""
        return True

    def losses(
        self, params: Params, frozen: Params, carry: State, batch: Batch, key: Key
    ) -> tuple[Terms, State]:
        """The terms of the loss, see `rmjax.types.Task.losses`."""
        keys = example_keys(key, batch.example_id)
        carry, (total, count), aux = self._read(params, carry, batch, keys)
        terms: Terms = {"next": (1.0, (total.sum(), count.sum())), "model": (1.0, aux)}
        return terms, jax.lax.stop_gradient(carry)

    def measure(self, params: Params, carry: State, batch: Batch) -> tuple[dict[str, Array], State]:
        """Sums over segments, see `rmjax.types.Task.measure`.

        Args:
          params: of `init`.
          carry: the state after the batch before, at first `memory`.
          batch: the next segments of B streams.

        Returns:
          'nats' f32 [B, T], the sum of -log p over predicted tokens, and 'tokens' f32 [B, T], their
          number; and the state after the batch.
        """
        carry, (total, count), _ = self._read(params, carry, batch, None)
        return {"nats": total.T, "tokens": count.T}, carry

    def _read(
        self, params: Params, carry: State, batch: Batch, key: Key | None
    ) -> tuple[State, Sum, Sum]:
        """The state, the (sum, count) [T, B] over each segment's tokens, and the model's aux."""

        def nats_of_segment(hidden: Array, inputs: tuple[Array, Array]) -> Sum:
            target, asked = inputs
            nats = _nats(self.model.logits(params, hidden).astype(jnp.float32), target)
            return jnp.where(asked, nats, 0.0).sum(-1), asked.sum(-1).astype(jnp.float32)

        shape = batch.items.shape
        return unroll(
            self.model,
            params,
            carry,
            batch.items,
            batch.item_mask,
            nats_of_segment,
            (batch.target.reshape(shape), batch.query_mask.reshape(shape)),
            batch.reset,
            key,
            gradient_segments=self.gradient_segments,
        )


@dataclasses.dataclass(frozen=True)
class Documents(_SequenceTask):
    """Classification of documents; the model answers after each segment, the last answer counts.

    The loss of a document is the mean over its segments, all of which have the document's label.

    Attributes:
      model: reads the documents.
      gradient_segments: see `unroll`.
    """

    gradient_segments: int = 1

    def losses(
        self, params: Params, frozen: Params, carry: State, batch: Batch, key: Key
    ) -> tuple[Terms, State]:
        """The terms of the loss, see `rmjax.types.Task.losses`."""
        keys = example_keys(key, batch.example_id)
        counted = batch.item_mask.any(-1) & batch.query_mask
        documents = counted.any(1).sum().astype(jnp.float32)
        share = jnp.where(counted, 1.0 / jnp.maximum(counted.sum(1, keepdims=True), 1), 0.0)
        if self.gradient_segments == 1 and not self.model.has_loss:
            total, aux = self._truncated(params, batch, share, keys), no_loss()
        else:
            logits, aux = self._logits(params, batch, keys)
            total = jnp.where(counted, share * _nats(logits, batch.target), 0.0).sum()
        return {"reason": (1.0, (total, documents)), "model": (1.0, aux)}, carry

    def scores(self, params: Params, batch: Batch) -> Array:
        """Answers to a batch's questions, see `rmjax.types.Task.scores`."""
        logits, _ = self._logits(params, batch, None)
        last = jnp.maximum(batch.item_mask.any(-1).sum(1) - 1, 0)
        return jnp.take_along_axis(logits, last[:, None, None], 1)

    def _truncated(self, params: Params, batch: Batch, share: Array, key: Key) -> Array:
        """The sum f32 [] of `share` [B, T] times the loss of each segment, by `truncated`."""
        rows, segments, _ = batch.items.shape
        target = jnp.broadcast_to(batch.target, (rows, segments))

        def loss(params: Params, hidden: Array, inputs: tuple[Key, Array, Array]) -> Array:
            key, target, share = inputs
            nats = _nats(self.model.logits(params, hidden, key), target)
            return jnp.where(share > 0, share * nats, 0.0).sum()

        inputs = (_head_keys(key, segments), target, share)
        state = self.memory(params, rows)
        read = (batch.items, batch.item_mask)
        return truncated(self.model, params, state, *read, loss, inputs, key)

    def _logits(self, params: Params, batch: Batch, key: Key | None) -> tuple[Array, Sum]:
        """The logits f32 [B, T, classes] after every segment, and the model's aux."""
        rows, segments, _ = batch.items.shape
        keys = None if key is None else _head_keys(key, segments)
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
            skip_padding=True,
        )
        return logits.swapaxes(0, 1), aux


def _head_keys(key: Key, segments: int) -> Key | None:
    """Keys [B, T] for the head; the segments themselves use numbers from 0 on."""
    of_head = fold(key, HEAD)
    return jax.vmap(lambda t: fold(of_head, t), out_axes=1)(jnp.arange(segments))


def _nats(logits: Array, target: Array) -> Array:
    """-log p of the targets i32 [...] by logits [..., V], f32 [...]."""
    return jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, target[..., None], -1)[..., 0]


def make_documents(config: ConfigDict, data: Description) -> Documents:
    """Builds the task of the classifier of config.model, over documents of any length.

    Args:
      config: of the run.
      data: what the documents look like.

    Returns:
      The task.
    """
    model = build_model(
        CLASSIFIERS, config, data.num_items, data.max_segments, data.questions.classes
    )
    return Documents(model, config.model.gradient_segments)


def build_model(
    registry: Registry,
    config: ConfigDict,
    vocabulary: int,
    max_segments: int | None = None,
    classes: int = 0,
) -> SequenceModel:
    """Builds the sequence model of config.model and config.memoria.

    Args:
      registry: has the kind of the model.
      config: of the run.
      vocabulary: V.
      max_segments: of the longest stream; None: streams have no end.
      classes: number of classes of a classifier.

    Returns:
      The model.
    """
    settings = registry.settings(config.model.kind, config.model, "config.model.")
    context = context_of(config, vocabulary, max_segments, classes)
    return registry[config.model.kind].make(settings, context)


def context_of(
    config: ConfigDict, vocabulary: int, max_segments: int | None = None, classes: int = 0
) -> ModelContext:
    """The context of the model of config.model; for the arguments see `build_model`."""
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
        dtype=jnp.dtype(array_dtype(config)),
        engrams=engrams,
    )


def make_language_model(config: ConfigDict, data: Description) -> LanguageModel:
    """Builds the task of the language model of config.model, over the tokens of texts."""
    model = build_model(LANGUAGE_MODELS, config, data.num_items)
    return LanguageModel(model, config.model.gradient_segments)


def make_sorting(config: ConfigDict, data: Description) -> LastTokens:
    """Builds the task of the model of config.model, over streams of one length."""
    n = config.data.segment_length
    segments = -(-data.max_items // n)
    model = build_model(LANGUAGE_MODELS, config, data.num_items, segments)
    reach = config.model.gradient_segments
    before = (data.max_items - data.num_queries) // n  # segments without questions
    silent = max(0, before - (reach - 1)) if reach else 0
    return LastTokens(model, silent, reach)


def pretrained(config: ConfigDict, like: Params) -> Params:
    """Parameters from the checkpoint that config.model.pretrained names.

    Modules without tensors in released checkpoints (the memory's modules, the classifier) keep
    their values. A table of more words than the tokenizer has is cut to the tokenizer's words, see
    `huggingface.read`.

    Args:
      config: of the run.
      like: the model's initial parameters.

    Returns:
      A tree like `like`.

    Raises:
      FileNotFoundError: the folder does not exist, or lacks the files.
      ValueError: a tensor is missing, or the model and the checkpoint differ in size; the error
        names the key to change.
    """
    kind = next((kind for kind in ("roberta", "bert") if kind in config.model.kind), "gpt2")
    folder = _checkpoint_folder(config)
    if (folder / huggingface.CONFIG).is_file():
        words = len(like["wte"] if kind == "gpt2" else like["embeddings"]["word_embeddings"])
        _check_sizes(config, huggingface.sizes_from_config(folder, kind), folder, kind, words)
    else:
        logging.warning(
            "%s has no config.json, so it is not checked that the checkpoint has %d heads and our "
            "layer norms.",
            folder,
            config.model.heads,
        )
    fresh = ["classifier", "abstractor", "layer_#/memory_attention"]
    fresh += [
        "h_#/memory_attn",
        "h_#/long_term",
        "h_#/ln_working_memory_attn",
        "h_#/ln_memory_attn",
    ]
    if kind == "roberta" or not any("pooler.dense" in name for name in huggingface.names(folder)):
        fresh.append("pooler")
    return jax.device_get(huggingface.read(folder, like, kind, fresh))


def _checkpoint_folder(config: ConfigDict) -> Path:
    """The folder of config.model.pretrained."""
    name = config.model.pretrained
    folder = paths.resolve(name, "config.model.pretrained")
    if folder.exists() and folder.name != huggingface.CONFIG:
        return folder
    cause = "give its folder" if folder.exists() else "no such folder, and nothing is downloaded"
    raise FileNotFoundError(
        f"config.model.pretrained={name}: {cause}. It must hold config.json and model.safetensors"
    )


def _check_sizes(
    config: ConfigDict, sizes: gpt2.Sizes, folder: Path, kind: str, words: int
) -> None:
    """Checks that the sizes of a checkpoint fit a model of so many words; see `pretrained`."""
    m, n = config.model, config.data.segment_length
    for name in ("dim", "layers", "heads"):
        if getattr(sizes, name) != m[name]:
            raise ValueError(
                f"config.model.{name} = {m[name]}, but {folder} has {getattr(sizes, name)}"
            )
    if words > sizes.vocabulary:
        key = "text" if kind == "gpt2" else "hyperpartisan"
        raise ValueError(
            f"config.data.{key}.tokenizer: has {words} tokens, but {folder} has rows for "
            f"{sizes.vocabulary}: use the checkpoint's own tokenizer"
        )
    longest = sizes.positions
    if isinstance(sizes, bert.Sizes):
        sizes_of = roberta.sizes_of if kind == "roberta" else bert.sizes_of
        ours = sizes_of(CLASSIFIERS.settings(m.kind, m), context_of(config, words))
        longest = sizes.longest
        for name, field in (("epsilon", "layer_norm_eps"), ("padding", "pad_token_id")):
            if getattr(sizes, name) != getattr(ours, name):
                raise ValueError(
                    f"config.model.pretrained: {folder / huggingface.CONFIG} has {field} = "
                    f"{getattr(sizes, name)}, but our {kind} supports {getattr(ours, name)} only"
                )
    if n > longest:
        raise ValueError(
            f"config.data.segment_length = {n}: {folder} has positions for {longest} tokens"
        )
