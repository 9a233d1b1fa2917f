"""Memoria BERT and Memoria RoBERTa (Memoria section 4.3, Figure 8).

One layer's output makes working engrams of the current segment. The layers above attend to these
and to the engrams they remind of.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from rmjax import memoria
from rmjax.layers.keys import fold
from rmjax.models import bert, gpt2
from rmjax.models.bert import Attention, Embeddings, Head, Layer, Sizes, head_logits
from rmjax.models.gpt2 import maybe_remat, no_loss
from rmjax.models.memoria_gpt2 import Abstractor, check_config, latest
from rmjax.types import Array, Key, ModelContext, Params, SequenceModel, Sum

if TYPE_CHECKING:
    from ml_collections import ConfigDict


class MemoryLayer(Layer):
    """BERT's layer, with an attention to engrams between the two parts, see `remember`."""

    def setup(self):
        """Creates the submodules."""
        super().setup()
        self.memory_attention = Attention(self.sizes)

    def remember(
        self, x: Array, mask: Array, working: Array, reminded: Array, valid: Array, key: Key | None
    ) -> tuple[Array, Array]:
        """Attends to x, to working engrams, then to reminded engrams; the last two share weights.

        Args:
          x: [B, N, D].
          mask: bool [B, N].
          working: [B, N_wm, D].
          reminded: [B, k, D].
          valid: bool [B, k].
          key: [B], draws dropout; None: no dropout.

        Returns:
          x, and the attention that each reminded engram got, f32 [B, k].
        """
        x, _ = self.attention(x, x, mask, fold(key, 0))
        x, _ = self.memory_attention(x, working, jnp.ones(working.shape[:2], bool), fold(key, 2))
        seen, weights = self.memory_attention(x, reminded, valid, fold(key, 3))
        x = jnp.where(valid.any(-1)[:, None, None], seen, x)  # without engrams x stays as it is
        return self.feedforward(x, fold(key, 1)), jax.vmap(memoria.contribution)(weights, mask)


class MemoriaBert(nn.Module):
    """The encoder in two parts.

    `below` has the layers up to `memory_layer` and the abstractor; `above` has the other layers.

    Attributes:
      sizes: of the model.
      engrams: number of working engrams N_wm.
      memory_layer: index of the layer whose output makes the engrams.
      activation: see `Abstractor`.
    """

    sizes: Sizes
    engrams: int
    memory_layer: int
    activation: str = "relu"

    def setup(self):
        """Creates the submodules."""
        s = self.sizes
        self.embeddings = Embeddings(s)
        below, last = self.memory_layer + 1, s.layers
        plain, remembering = maybe_remat(s, Layer), maybe_remat(s, MemoryLayer, ("remember",))
        self.layer = [plain(s) for _ in range(below)] + [remembering(s) for _ in range(below, last)]
        self.abstractor = Abstractor(self.engrams, self.activation, s.dtype, s.initial)

    def below(self, tokens: Array, mask: Array, key: Key | None) -> tuple[Array, Array]:
        """Reads tokens [B, N] and mask bool [B, N].

        Returns:
          x [B, N, D] and working engrams [B, N_wm, D].
        """
        x = self.embeddings(tokens, mask, None, fold(key, self.sizes.layers))
        for i, layer in enumerate(self.layer[: self.memory_layer + 1]):
            x = layer(x, mask, fold(key, i))
        return x, self.abstractor(x, mask)

    def above(
        self, x: Array, mask: Array, working: Array, reminded: Array, valid: Array, key: Key | None
    ) -> tuple[Array, Array]:
        """Goes on from `below`; for the arguments see `MemoryLayer.remember`.

        Returns:
          Hidden [B, N, D], and the attention that each reminded engram got, f32 [B, k], a mean over
          layers.
        """
        first, looked = self.memory_layer + 1, []
        for i, layer in enumerate(self.layer[first:], first):
            x, attention = layer.remember(x, mask, working, reminded, valid, fold(key, i))
            looked.append(attention)
        return x, sum(looked) / len(looked)

    def __call__(
        self, tokens: Array, mask: Array, reminded: Array, valid: Array
    ) -> tuple[Array, Array]:
        """Applies the module, see the class."""
        x, working = self.below(tokens, mask, None)
        return self.above(x, mask, working, reminded, valid, None)


@flax.struct.dataclass
class Remembered:
    """The state."""

    engrams: memoria.State  # leading axis B
    segments: Array  # i32 [B] read so far
    record: memoria.Record  # [B, C] engrams present and reminded in the last segment


def make(
    sizes: Sizes,
    classes: int,
    config: memoria.MemoriaConfig,
    *,
    memory_layer: int = 9,
    activation: str = "relu",
) -> SequenceModel:
    """Builds Memoria BERT.

    Args:
      sizes: of the encoder.
      classes: number of classes.
      config: rules of the memory; `dim` must be the model's width.
      memory_layer: index of the layer whose output for the current segment the abstractor reads.
        This path has gradients; stored engrams have none.
      activation: see `Abstractor`.

    Returns:
      The model; its `logits` are f32 [B, classes] of hidden [B, N, D].

    Raises:
      ValueError: the widths differ, `memory_layer` is not below the last layer, or ties are random.
    """
    check_config(config, sizes)
    if not 0 <= memory_layer < sizes.layers - 1:
        raise ValueError(
            f"memory_layer must be one of 0 .. {sizes.layers - 2}, below the last, "
            f"got {memory_layer}"
        )
    module = MemoriaBert(sizes, config.working, memory_layer, activation)
    head = Head(sizes, classes)
    recalls = config.remind_short_term + config.remind_long_term

    def init(key: Key) -> Params:
        tokens, keys = jnp.zeros((1, 1), jnp.int32), jax.random.split(key)
        none = jnp.zeros((1, recalls, sizes.dim)), jnp.zeros((1, recalls), bool)
        (hidden, _), params = module.init_with_output(keys[0], tokens, tokens == 0, *none)
        return params["params"] | head.init(keys[1], hidden)["params"]

    def init_state(params: Params, batch_size: int) -> Remembered:
        engrams = memoria.fork(memoria.init(config), batch_size)
        return Remembered(engrams, jnp.zeros(batch_size, jnp.int32), memoria.empty_record(engrams))

    def reset(state: Remembered, where: Array) -> Remembered:
        engrams = memoria.reset(state.engrams, where)
        record = latest(state.record, memoria.empty_record(engrams), where)
        return Remembered(engrams, jnp.where(where, 0, state.segments), record)

    def step(
        params: Params, state: Remembered, tokens: Array, mask: Array, key: Key | None = None
    ) -> tuple[Array, Remembered, Sum]:
        alive, run = mask.any(-1), functools.partial(module.apply, {"params": params})
        x, working = cast(tuple, run(tokens, mask, key, method="below"))
        remind = jax.vmap(functools.partial(memoria.remind, config))
        engrams, reminded = remind(state.engrams, working, fold(key, sizes.layers + 1), alive)
        record = latest(state.record, jax.vmap(memoria.record)(engrams, reminded), alive)
        recalled = reminded.engrams.astype(sizes.dtype), reminded.valid
        hidden, weights = cast(tuple, run(x, mask, working, *recalled, key, method="above"))
        finish = jax.vmap(functools.partial(memoria.memorize_and_forget, config))
        engrams = finish(engrams, reminded, weights, alive)
        return hidden, Remembered(engrams, state.segments + alive, record), no_loss()

    logits = functools.partial(head_logits, head)
    return SequenceModel(init, init_state, reset, step, logits, has_loss=False)


@dataclasses.dataclass(frozen=True)
class Settings(gpt2.Settings):
    """Settings of the model; the rules of the memory are in config.memoria."""

    def conflicts(self, config: ConfigDict | None = None) -> Iterator[str]:
        """Yields a message for each conflict, see `rmjax.registry.Registry.settings`."""
        yield from super().conflicts(config)
        last = self.layers - 2
        if last < 0:
            yield "{layers}: two are needed, one of them above the memory's layer"
        elif config is not None and config.memoria.layer > last:
            cure = f"must be at most {last}, for {{layers}}, of which one is above it"
            yield f"config.memoria.layer = {config.memoria.layer}: {cure}"


def build_on(sizes: Sizes, context: ModelContext) -> SequenceModel:
    """Builds Memoria on an encoder of these sizes, see `rmjax.types.SequenceModel`."""
    engrams = context.engrams
    layer = sizes.layers - 2 if engrams.layer < 0 else engrams.layer
    rules = dataclasses.replace(engrams.rules, dim=sizes.dim, max_segments=context.max_segments)
    return make(sizes, context.classes, rules, memory_layer=layer, activation=engrams.activation)


def build(settings: Settings, context: ModelContext) -> SequenceModel:
    """Builds the classifier, see `rmjax.types.SequenceModel`."""
    return build_on(bert.sizes_of(settings, context), context)
