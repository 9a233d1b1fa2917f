"""Lifelong recommendation (RM section 4.3.3): will this user, known by a memory of all clicks, click this item?"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from rmjax.machines import memorize
from rmjax.reason import heads
from rmjax.rehearsal import fragments, objectives, sampler
from rmjax.rehearsal.decoder import Decoder
from rmjax.types import Array, Batch, Key, Memory, MemoryMachine, Params, Sum, example_keys


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What is rehearsed, and how much each loss weighs (RM Eq. 7)."""

    decoder: Decoder
    fragments: int = 6  # B
    mask_ratio: float = 0.5
    replace_ratio: float = 0.5
    sampled_items: int = 200  # J; 0: all items
    recollection: float = 1.0  # lambda_1
    familiarity: float = 0.5  # lambda_2
    sampler: str = "teacher"  # or "uniform"

    @property
    def active(self) -> bool:
        return bool(self.recollection or self.familiarity)


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """A machine, a click head and the rehearsal, trained on one loss. Implements `Task`."""

    machine: MemoryMachine
    rehearsal: Rehearsal
    num_items: int
    dim: int
    segment_length: int
    head_width: int = 0  # hidden width of the click head; 0: the linear layer RM prints
    reason: float = 1.0  # lambda_3
    items_fixed: bool = False  # the item table is not trained: it came from somewhere better
    block: int = 0
    remat: bool = False

    def init(self, key: Key) -> Params:
        a, b, c = jax.random.split(key, 3)
        params = {"machine": self.machine.init(a), "head": heads.init_click(b, self.dim, self.dim, self.head_width)}
        if self.rehearsal.active:
            memory = jax.eval_shape(lambda: self.machine.slots(params["machine"], self._empty(params, 1)))
            slot_width = memory[0].shape[-1]
            params["rehearsal"] = self.rehearsal.decoder.init(c, self.dim, slot_width, self.segment_length)
        return params

    def _empty(self, params: Params, batch_size: int) -> Memory:
        return self.machine.init_memory(params["machine"], batch_size)

    def _memorize(self, params: Params, batch: Batch, key: Key | None = None):
        return memorize(
            self.machine,
            params["machine"],
            batch.items,
            batch.item_mask,
            key=key,
            positions=batch.position,
            block=self.block,
            remat=self.remat,
        )

    def answer(self, params: Params, memory: Memory, query: Array, query_mask: Array) -> Array:
        """Logits of a click [B, Q] on the items query i32 [B, Q], mask bool [B, Q], from the memory alone."""
        features = self.machine.read(params["machine"], memory, query, query_mask)
        return heads.click(params["head"], features, self.machine.embed(params["machine"], query))

    def _answer(self, params: Params, memorized, batch: Batch) -> Array:
        """Logits [B, Q], each read from the memory at its query's position."""
        if memorized.asked is None:
            return self.answer(params, memorized.memory, batch.query, batch.query_mask)
        rows = batch.query.size  # one memory per question
        memory = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), memorized.asked)
        query, mask = batch.query.reshape(rows, 1), batch.query_mask.reshape(rows, 1)
        return self.answer(params, memory, query, mask).reshape(batch.query.shape)

    def scores(self, params: Params, batch: Batch) -> Array:
        return self._answer(params, self._memorize(params, batch), batch)

    def losses(self, params: Params, frozen: Params, batch: Batch, key: Key) -> dict[str, tuple[float, Sum]]:
        if self.items_fixed:
            table = jax.lax.stop_gradient(params["machine"]["embed"])
            params = params | {"machine": params["machine"] | {"embed": table}}
        drawn = example_keys(key, batch.example_id)
        keys = jax.vmap(lambda k: jax.random.split(k, 3))(drawn)
        memorized = self._memorize(params, batch, keys[:, 0])
        logits = self._answer(params, memorized, batch)
        terms = {"reason": (self.reason, heads.click_loss(logits, batch.target, batch.query_mask))}
        if self.rehearsal.active:
            sampled = None
            if self.rehearsal.sampled_items:
                sampled = jax.random.randint(key, (self.rehearsal.sampled_items,), 0, self.num_items)
            terms |= self._rehearse(params, frozen, batch, memorized, keys[:, 1:], sampled)
        return terms

    def _rehearse(self, params, frozen, batch: Batch, memorized, keys: Key, sampled: Array | None):
        """The rehearsal losses at one drawn query of each stream, on fragments from before its position."""
        r, machine = self.rehearsal, self.machine
        chosen, query, valid, memory = draw_query(keys[:, 0], batch, memorized)
        fragment_key, decoder_key = jax.vmap(jax.random.split, out_axes=1)(keys[:, 1])
        if r.sampler == "teacher":
            features = sampler.fragment_features(frozen, batch.items, batch.item_mask)
            scores = sampler.attend(frozen, query[:, None], features, valid[:, None])[0][:, 0]
        else:
            scores = sampler.uniform_scores(chosen, valid.shape[1:])
        found = fragments.select(scores, valid, r.fragments, halves=r.sampler == "teacher")
        cut = fragments.build(
            fragment_key,
            batch.items,
            batch.item_mask,
            found,
            batch.negative_items,
            batch.negative_mask,
            r.mask_ratio,
            r.replace_ratio,
        )
        both = jnp.concatenate([cut.items, cut.negative], 1)
        twice = lambda x: jnp.concatenate([x, x], 1)  # noqa: E731
        slots = machine.slots(params["machine"], memory)
        x = machine.embed(params["machine"], both)
        recalled = r.decoder(params["rehearsal"], x, twice(cut.mask), twice(cut.hidden), *slots, key=decoder_key)
        terms = {}
        if r.familiarity:
            weights = params["rehearsal"]["familiar"]
            logits = (recalled[:, :, 0] @ weights["kernel"] + weights["bias"])[..., 0]
            positive, negative = jnp.split(logits, 2, 1)
            terms["familiarity"] = (r.familiarity, objectives.familiarity(positive, negative, cut.pair))
        if r.recollection:
            masked = jnp.take_along_axis(recalled[:, : r.fragments, 1:], cut.hidden_at[..., None], 2)
            truth = jnp.take_along_axis(cut.items, cut.hidden_at, 2)
            table = params["machine"]["embed"]
            loss = objectives.recollection(masked, truth, cut.hidden_mask, table, sampled)
            terms["recollection"] = (r.recollection, loss)
        return terms


def draw_query(key: Key, batch: Batch, memorized) -> tuple[Key, Array, Array, Memory]:
    """One asked query per stream, uniformly: what is rehearsed must be known before it.

    -> a fresh key [B], the query's item [B], the valid segments before it [B, T], the memory at its position.
    """
    key, fresh = jax.vmap(jax.random.split, out_axes=1)(key)
    which = jax.vmap(jax.random.categorical)(key, jnp.where(batch.query_mask, 0.0, -jnp.inf))
    row = jnp.arange(len(which))
    valid = batch.item_mask.any(-1) & batch.query_mask.any(-1)[:, None]
    memory = memorized.memory
    if batch.position is not None:
        valid &= jnp.arange(valid.shape[1]) < batch.position[row, which][:, None]
        memory = jax.tree.map(lambda x: x[row, which], memorized.asked)
    return fresh, batch.query[row, which], valid, memory


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The history sampler as a task of its own (RM section 3.3.2): answers from the raw segments. Implements `Task`."""

    num_items: int
    dim: int
    head_width: int = 0

    def init(self, key: Key) -> Params:
        a, b = jax.random.split(key)
        return {
            "sampler": sampler.init(a, self.num_items, self.dim),
            "head": heads.init_click(b, self.dim, self.dim, self.head_width),
        }

    def scores(self, params: Params, batch: Batch) -> Array:
        valid = jnp.broadcast_to(batch.item_mask.any(-1)[:, None], (*batch.query.shape, batch.items.shape[1]))
        if batch.position is not None:
            valid &= jnp.arange(valid.shape[-1]) < batch.position[..., None]
        features = sampler.fragment_features(params["sampler"], batch.items, batch.item_mask)
        _, found, query = sampler.attend(params["sampler"], batch.query, features, valid)
        return heads.click(params["head"], found, query)

    def losses(self, params: Params, frozen: Params, batch: Batch, key: Key) -> dict[str, tuple[float, Sum]]:
        return {"reason": (1.0, heads.click_loss(self.scores(params, batch), batch.target, batch.query_mask))}
