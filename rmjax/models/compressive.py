"""The Compressive Transformer (Rae et al. 2020): Transformer-XL that compresses old memories.

Transformer-XL drops them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import flax.struct
import jax
import jax.numpy as jnp

from rmjax.layers import compressive
from rmjax.layers.compressive import Compressed
from rmjax.models import gpt2, transformer_xl
from rmjax.models.gpt2 import Sizes, no_loss, tied_logits
from rmjax.models.transformer_xl import Memories, TransformerXL
from rmjax.registry import at_least, setting
from rmjax.types import Array, Key, ModelContext, Params, SequenceModel, Sum

if TYPE_CHECKING:
    from ml_collections import ConfigDict


@flax.struct.dataclass
class Remembered:
    """The state."""

    layers: tuple[Compressed, ...]
    segments: Array  # i32 [B] read so far


def make(
    sizes: Sizes, *, memory: int, compressed: int, rate: int = 4, reconstruction: float = 1.0
) -> SequenceModel:
    """Builds a Compressive Transformer.

    Args:
      sizes: of the model.
      memory: recent rows that each layer remembers.
      compressed: compressed rows that each layer remembers.
      rate: inputs per compressed row.
      reconstruction: weight of the attention-reconstruction loss (Rae et al. 2020, Algorithm 2), a
        mean over layers. Only the compression learns from it. The compression learns from the rest
        of the loss only where gradients pass between segments.

    Returns:
      The model.
    """
    module = TransformerXL(sizes, prenorm=True)

    def memories(layers: tuple[Compressed, ...]) -> Memories:
        return tuple((layer.rows, layer.mask) for layer in layers)

    def init(key: Key) -> Params:
        model, compression = jax.random.split(key)
        tokens, empty = jnp.zeros((1, 1), jnp.int32), memories(init_state(None, 1).layers)
        params = module.init(model, tokens, tokens == 0, empty)["params"]
        keys = jax.random.split(compression, sizes.layers)
        init_layer = lambda k: compressive.init_compression(k, sizes.dim, rate)
        return params | {"compression": {f"h_{i}": init_layer(k) for i, k in enumerate(keys)}}

    def init_state(params: Params, batch_size: int) -> Remembered:
        layer = compressive.empty(batch_size, memory, compressed, sizes.dim, sizes.dtype)
        return Remembered((layer,) * sizes.layers, jnp.zeros(batch_size, jnp.int32))

    def reset(state: Remembered, where: Array) -> Remembered:
        layers = tuple(compressive.reset(layer, where) for layer in state.layers)
        return Remembered(layers, jnp.where(where, 0, state.segments))

    def step(
        params: Params, state: Remembered, tokens: Array, mask: Array, key: Key | None = None
    ) -> tuple[Array, Remembered, Sum]:
        names = [f"h_{i}" for i in range(sizes.layers)]
        hidden, inputs = module.apply({"params": params}, tokens, mask, memories(state.layers), key)
        layers, lost = [], []
        for name, layer, x in zip(names, state.layers, inputs, strict=True):
            compression = params["compression"][name]
            after, fallen = compressive.push(compression, layer, x, mask)
            layers.append(after)
            if reconstruction:
                given = params[name], compression, sizes.heads, x, mask, *fallen
                lost.append(compressive.reconstruction_loss(*given))
        aux = no_loss()
        if lost:
            total, count = compressive.mean_over_layers(lost)
            aux = (reconstruction * total, count)
        return hidden, Remembered(tuple(layers), state.segments + mask.any(-1)), aux

    return SequenceModel(init, init_state, reset, step, tied_logits(sizes))


@dataclasses.dataclass(frozen=True)
class Settings(transformer_xl.Settings):
    """Settings of the model."""

    compression: int = setting(
        4, at_least(1), "compressive: inputs in one row; half of the rows are compressed"
    )
    reconstruction: float = setting(
        1.0, at_least(0), "compressive: weight of the attention-reconstruction loss"
    )

    def conflicts(self, config: ConfigDict | None = None) -> Iterator[str]:
        """Yields a message for each conflict, see `rmjax.registry.Registry.settings`."""
        yield from super().conflicts(config)
        rows = self.rows(config)
        if rows < 2:
            yield f"{{memory}}: that is {rows} rows (0: a segment's); must be at least 2"


def build(settings: Settings, context: ModelContext) -> SequenceModel:
    """Builds the model, see `rmjax.types.SequenceModel`; half of its rows are compressed."""
    length = settings.memory or context.segment_length
    recent = length // 2
    return make(
        Sizes(**gpt2.size_fields(settings, context)),
        memory=recent,
        compressed=length - recent,
        rate=settings.compression,
        reconstruction=settings.reconstruction,
    )
