"""Reasoning after memorizing: a memory is written, then questions are answered from it, and it is rehearsed."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.layers.embeddings import embed
from rmjax.machines import memorize
from rmjax.rehearsal import sampler
from rmjax.tasks import rehearsing
from rmjax.tasks.answers import Answers, questions_only
from rmjax.tasks.rehearsing import Rehearsal
from rmjax.types import (
    Array,
    Batch,
    Key,
    Memory,
    MemoryMachine,
    Params,
    Task,
    Terms,
    at,
    example_keys,
    replace_at,
)


@dataclasses.dataclass(frozen=True)
class Reasoning(Task):
    """A machine, its answers and the rehearsal, trained on one loss."""

    machine: MemoryMachine
    answers: Answers
    rehearsal: Rehearsal
    segment_length: int
    reason: float = 1.0  # lambda_3
    machine_loss: float = 1.0  # weight of what the machine's own `write` adds to the loss
    items_fixed: bool = False  # the item table is not trained: it came from somewhere better
    block: int = 0
    remat: bool = False
    gradient_segments: int = 0

    @property
    def table(self) -> tuple[str, ...] | None:
        """Where the item table is in the parameters; None: the machine has none."""
        return None if self.machine.table is None else ("machine", *self.machine.table)

    @property
    def rehearses(self) -> bool:
        return self.rehearsal.active

    def item_ids(self, batch: Batch, key: Key, num_items: int) -> Array:
        ids = [
            ids
            for ids in (batch.items, batch.negative_items)
            if jnp.issubdtype(ids.dtype, jnp.integer)
        ]
        if ids and self.rehearsal.recollection and self.rehearsal.sampled_items:
            ids.append(rehearsing.sample_items(self.rehearsal, key, num_items))
        return jnp.concatenate([x.ravel() for x in ids + self.answers.item_ids(batch)])

    def init(self, key: Key) -> Params:
        a, b, c, d = jax.random.split(key, 4)
        params = {
            "machine": self.machine.init(a),
            "head": self.answers.init_head(b),
            "encoder": self.answers.init_encoder(d),
        }
        if self.rehearsal.active:
            params["rehearsal"] = self.init_rehearsal(c, params["machine"])
        return params

    def memory(self, params: Params, batch_size: int) -> Memory:
        return self.machine.init_memory(params["machine"], batch_size)

    def init_rehearsal(self, key: Key, machine: Params) -> Params:
        """A decoder for memories of a machine with these parameters."""
        slots, _ = jax.eval_shape(
            lambda: self.machine.slots(machine, self.machine.init_memory(machine, 1))
        )
        return self.rehearsal.decoder.init(
            key, self.answers.item_dim, slots.shape[-1], self.segment_length
        )

    def memorize(self, params: Params, batch: Batch, key: Key | None = None):
        return memorize(
            self.machine,
            params["machine"],
            batch.items,
            batch.item_mask,
            key=key,
            positions=batch.position,
            block=self.block,
            remat=self.remat,
            gradient_segments=self.gradient_segments,
        )

    def answer(
        self,
        params: Params,
        memory: Memory,
        query: Array,
        query_mask: Array,
        *,
        each: bool = False,
        **asked: Array,
    ) -> Array:
        """Logits [B, Q] (of clicks) or [B, Q, C] (of classes or choices) from memories alone: [B], or with `each` one
        for every question, [B, Q], as `Memorized.asked` has them.

        query i32 [B, Q] or [B, Q, W], query_mask bool [B, Q]; of sentences and candidates also the fields of `Batch`:
        word_mask, candidates, candidate_mask, choices, choice_mask.
        """
        batch = questions_only(query, query_mask, **asked)
        return self._answer(params, None if each else memory, memory if each else None, batch)

    def _answer(
        self, params: Params, memory: Memory | None, at_query: Memory | None, batch: Batch
    ) -> Array:
        """Each answer is read from `at_query` [B, Q], the memory at its query's position, where that is given."""
        machine, its, encoder, mask = (
            self.machine,
            params["machine"],
            params["encoder"],
            batch.query_mask,
        )
        embed_items = functools.partial(machine.embed, its)
        query = self.answers.encode(encoder, embed_items, batch)
        if at_query is None:
            features = machine.read(its, memory, query, mask)
        else:
            rows = mask.size  # one memory per question
            each = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), at_query)
            features = machine.read(
                its, each, query.reshape(rows, 1, -1), mask.reshape(rows, 1)
            ).reshape(query.shape)
        return self.answers.logits(encoder, params["head"], embed_items, features, query, batch)

    def scores(self, params: Params, batch: Batch) -> Array:
        memorized = self.memorize(params, batch)
        return self._answer(params, memorized.memory, memorized.asked, batch)

    def losses(
        self, params: Params, frozen: Params, carry: Any, batch: Batch, key: Key
    ) -> tuple[Terms, Any]:
        if self.items_fixed:
            assert self.table is not None
            params = replace_at(params, self.table, jax.lax.stop_gradient(at(params, self.table)))
        keys = jax.vmap(lambda k: jax.random.split(k, 3))(example_keys(key, batch.example_id))
        memorized = self.memorize(params, batch, keys[:, 0])
        logits = self._answer(params, memorized.memory, memorized.asked, batch)
        terms: Terms = {"reason": (self.reason, self.answers.loss(logits, batch))}
        if self.machine.has_loss:
            terms["machine"] = (self.machine_loss, memorized.aux)
        if self.rehearsal.active:
            drawn = draw_query(keys[:, 1], batch, memorized)
            query = None
            if self.rehearsal.sampler == "teacher":
                asked = one_question(batch, drawn.which)
                query = self.answers.encode(
                    frozen["encoder"], functools.partial(embed, frozen), asked
                )
            segments = rehearsing.choose_segments(
                self.rehearsal, drawn.key, frozen, query, batch, drawn.valid
            )
            memory = drawn.memory
            terms |= rehearsing.losses(
                self.rehearsal, self.machine, params, batch, memory, segments, keys[:, 2], key
            )
        return terms, carry

    def rehearsals(self, params: Params, batch: Batch, other: Batch) -> dict[str, Array]:
        """The rehearsal losses of each stream with its own memory and with that of another, without dropout.

        Both memories are as they are at a drawn question, and the fragments are uniformly drawn ones before it; all
        draws depend on the example alone.

        Args:
          other: a batch of the same shape, in each row another stream; all masks false: there is none.

        Returns:
          For each loss that has a weight f32 [B, 3], the sum over a stream's fragments with its own memory, with
          the other's, and the number of fragments; and "spread" f32 [B, 2], half the squared distance of the two
          memories' slots, and the number of their entries.
        """
        r = dataclasses.replace(self.rehearsal, sampler="uniform")
        key = jax.random.key(0)
        keys = jax.vmap(lambda k: jax.random.split(k, 3))(example_keys(key, batch.example_id))
        asked = draw_query(keys[:, 0], batch, self.memorize(params, batch))
        strange = draw_query(keys[:, 0], other, self.memorize(params, other)).memory
        both = batch.item_mask.any((1, 2)) & other.item_mask.any((1, 2))
        segments = rehearsing.choose_segments(
            r, asked.key, None, None, batch, asked.valid & both[:, None]
        )
        cut = rehearsing.cut_fragments(r, keys[:, 1], batch, segments)
        losses = functools.partial(rehearsing.fragment_losses, r, self.machine, params, batch, cut)
        own, others = (losses(memory, keys[:, 2], key) for memory in (asked.memory, strange))
        sums = {
            name: jnp.stack([loss.sum(1), others[name][0].sum(1), counted.sum(1)], 1)
            for name, (loss, counted) in own.items()
        }
        (x, there), (y, _) = (
            self.machine.slots(params["machine"], memory) for memory in (asked.memory, strange)
        )
        there = jnp.broadcast_to((there & both[:, None])[..., None], x.shape)
        distance = jnp.where(there, jnp.square(x - y) / 2, 0.0).sum((1, 2))
        return sums | {"spread": jnp.stack([distance, there.sum((1, 2))], 1)}


class Drawn(NamedTuple):
    """One question of each stream, and what is known before it."""

    key: Key  # [B], a fresh one
    which: Array  # i32 [B], the question
    valid: Array  # bool [B, T], the segments before it
    memory: Memory  # at its position


def draw_query(key: Key, batch: Batch, memorized) -> Drawn:
    """One asked query per stream, uniformly: what is rehearsed must be known before it."""
    key, fresh = jax.vmap(jax.random.split, out_axes=1)(key)
    which = jax.vmap(jax.random.categorical)(key, jnp.where(batch.query_mask, 0.0, -jnp.inf))
    row = jnp.arange(len(which))
    valid = batch.item_mask.any(-1) & batch.query_mask.any(-1)[:, None]
    memory = memorized.memory
    if batch.position is not None:
        valid &= jnp.arange(valid.shape[1]) < batch.position[row, which][:, None]
        memory = jax.tree.map(lambda x: x[row, which], memorized.asked)
    return Drawn(fresh, which, valid, memory)


def one_question(batch: Batch, which: Array) -> Batch:
    """The batch with one question a stream, which [B]."""
    pick = lambda x: None if x is None else x[jnp.arange(len(which)), which][:, None]
    picked = {name: pick(getattr(batch, name)) for name in ("query", "query_mask", "word_mask")}
    return batch.replace(**picked)  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Teacher(Task):
    """The history sampler as a task of its own (RM section 3.3.2): answers from the raw segments."""

    num_items: int
    answers: Answers
    width: int = 0  # see `embeddings.init_items`

    @property
    def table(self) -> tuple[str, ...]:
        return "sampler", "embed"

    def item_ids(self, batch: Batch, key: Key, num_items: int) -> Array:
        ids = [batch.items] if jnp.issubdtype(batch.items.dtype, jnp.integer) else []
        return jnp.concatenate([x.ravel() for x in ids + self.answers.item_ids(batch)])

    def init(self, key: Key) -> Params:
        a, b, c, d = jax.random.split(key, 4)
        dim = self.answers.dim
        return {
            "sampler": sampler.init(a, self.num_items, dim, self.width)
            | {"encoder": self.answers.init_encoder(c)},
            "head": self.answers.init_head(b),
        } | ({} if self._head_sees_query else {"merge": lecun_normal()(d, (2 * dim, dim))})

    @property
    def _head_sees_query(self) -> bool:
        return self.answers.questions.answer == "click"

    def scores(self, params: Params, batch: Batch) -> Array:
        valid = jnp.broadcast_to(
            batch.item_mask.any(-1)[:, None], (*batch.query_mask.shape, batch.items.shape[1])
        )
        if batch.position is not None:
            valid &= jnp.arange(valid.shape[-1]) < batch.position[..., None]
        eyes = params["sampler"]
        embed_items = functools.partial(embed, eyes)
        query = self.answers.encode(eyes["encoder"], embed_items, batch)
        features = sampler.fragment_features(eyes, batch.items, batch.item_mask)
        _, found = sampler.attend(eyes, query, features, valid)
        if not self._head_sees_query:  # of the reasoning feature [e; q] it would get e alone
            found = jnp.concatenate([found, query], -1) @ params["merge"]
        return self.answers.logits(
            eyes["encoder"], params["head"], embed_items, found, query, batch
        )

    def losses(
        self, params: Params, frozen: Params, carry: Any, batch: Batch, key: Key
    ) -> tuple[Terms, Any]:
        return {"reason": (1.0, self.answers.loss(self.scores(params, batch), batch))}, carry
