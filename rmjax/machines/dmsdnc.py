"""The distributed DNC with a memory-refreshing loss (DMSDNC, Park et al. 2020).

It adds three ideas to the machines of `mann.py`. The slots lie in blocks with a write head each. A
gate chooses the block that a head reads. The reads must reconstruct items drawn at random.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.layers.embeddings import embed
from rmjax.machines import mann
from rmjax.registry import at_least, between, setting
from rmjax.rehearsal import objectives
from rmjax.types import Array, Context, Key, MemoryMachine, Params, Sum

if TYPE_CHECKING:
    from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Settings(mann.Settings):
    """Settings of the machine: those of `mann.Settings`, and four of its own.

    Attributes:
      memory_blocks: G; each has K / G slots.
      refresh_rate: share of the items that the controller must reconstruct after it wrote them.
      refresh_reads: the reconstruction sees the reads alone. The paper's sees the LSTM's output
        too, which knows the item without any memory.
      refresh_all: the loss compares with all items, as in the paper, not with those of the segment.
        It needs item ids: of features there is no table of all items.
    """

    memory_blocks: int = setting(2, at_least(1), "dmsdnc: blocks of slots, G; divides the slots")
    refresh_rate: float = setting(0.1, between(0, 1), "dmsdnc: share of reconstructed items")
    refresh_reads: bool = setting(False, doc="dmsdnc: reconstructs items from the reads alone")
    refresh_all: bool = setting(False, doc="dmsdnc: reconstructs item ids among all ids")

    @property
    def ignores(self) -> dict[str, str]:
        """Keys that such a run does not read, see `rmjax.registry.Registry.ignored_by`."""
        unread = "machine.refresh_reads", "machine.refresh_all"
        return {} if self.refresh_rate else dict.fromkeys(unread, "refresh_rate")

    def conflicts(self, config: ConfigDict | None = None) -> Iterator[str]:
        """Yields a message for each contradiction, see `rmjax.registry.Registry.settings`."""
        yield from super().conflicts(config)
        if self.slots % self.memory_blocks:
            yield "{memory_blocks} must divide {slots}"
        if self.refresh_all and config is not None and config.train.sparse_items:
            yield "{refresh_all}: with config.train.sparse_items no step may touch all items"


def look(memory: mann.MannMemory, content: Array, extra: Array) -> mann.MannMemory:
    """Reads by content in the blocks that the gate of each head chooses; see `mann.Access.look`."""
    return dataclasses.replace(memory, read_weights=content * jax.nn.softmax(extra, 1))


def make(num_items: int, settings: Settings, context: Context) -> MemoryMachine:
    """Builds the machine, see `rmjax.types.MemoryMachine`.

    Strengths of keys are 1 + softplus, as in the DNC. The released code takes softplus alone.

    Raises:
      ValueError: `refresh_all` is set, but the items are features.
    """
    s = settings
    if s.refresh_all and not num_items:
        cure = "the items are features, which have no table; set it to False"
        raise ValueError(f"refresh_all = True: {cure}")
    hidden = 0 if s.refresh_reads else s.hidden or s.dim

    def init_loss(key: Key) -> Params:
        return {"refresh": lecun_normal()(key, (hidden + s.read_heads * s.dim, s.dim))}

    def loss(params: Params, outputs: mann.Outputs, x: Array, mask: Array, key: Key | None) -> Sum:
        """The recollection loss of RM Eq. 3 on items drawn at random."""
        if key is None:  # in evaluation nothing is drawn
            return jnp.zeros(()), jnp.zeros(())
        drawn = jax.vmap(jax.random.bernoulli, (0, None, None))(key, s.refresh_rate, mask.shape[1:])
        recalled = jnp.concatenate(outputs[1:] if s.refresh_reads else outputs, -1)
        target = x * s.dim**-0.5  # of about unit length, as in rehearsal
        if s.refresh_all:
            others, same = embed(params, None) * s.dim**-0.5, None
        else:  # items equal to the target are no alternatives
            others = target[:, None]
            same = ((x[:, :, None] == x[:, None]).all(-1) | ~mask[:, None])[:, :, None]
        # Each item is a fragment of its own.
        recalled, target, drawn = (
            y[:, :, None] for y in (recalled @ params["refresh"], target, drawn & mask)
        )
        losses = objectives.recollection(recalled, target, others, same, drawn)
        return objectives.over_fragments(*losses)

    access = mann.Access(blocks=s.memory_blocks, extra=1, look=look)
    if s.refresh_rate:
        access = access._replace(loss=loss, init_loss=init_loss)
    return mann.make(num_items, settings, context, access)
