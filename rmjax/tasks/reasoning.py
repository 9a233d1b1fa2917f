"""Reasoning after memorizing: a memory is written, rehearsed and asked questions."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.linen.initializers import lecun_normal

from rmjax.layers.embeddings import embed
from rmjax.machines import Memorized, memorize
from rmjax.reason.ranking import EmbedItems
from rmjax.rehearsal import sampler
from rmjax.tasks import rehearsing
from rmjax.tasks.answers import Answers, questions_only
from rmjax.tasks.rehearsing import Rehearsal
from rmjax.types import (
    Array,
    Batch,
    Key,
    Limit,
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
    """A machine, the answers and the rehearsal, trained on one loss (RM Eq. 7).

    Attributes:
      machine: the memory.
      answers: query encoder and head.
      rehearsal: what is rehearsed.
      segment_length: N.
      reason: lambda_3, weight of the loss of the answers.
      machine_loss: weight of the loss that the machine's own `write` adds.
      items_fixed: the item table is not trained, since it comes from a better source.
      block: see `rmjax.machines.memorize`.
      remat: see `rmjax.machines.memorize`.
      gradient_segments: see `rmjax.machines.memorize`.
    """

    machine: MemoryMachine
    answers: Answers
    rehearsal: Rehearsal
    segment_length: int
    reason: float = 1.0
    machine_loss: float = 1.0
    items_fixed: bool = False
    block: int = 0
    remat: bool = False
    gradient_segments: int = 0

    @property
    def table(self) -> tuple[str, ...] | None:
        """Path of the item table in the parameters; None: the machine has none."""
        return None if self.machine.table is None else ("machine", *self.machine.table)

    @property
    def item_arrays(self) -> tuple[tuple[str, ...], ...]:
        """Paths of all arrays with one row for each item id, see `rmjax.types.Task`."""
        ranking = self.answers.ranking
        return super().item_arrays + (() if ranking is None else ranking.item_arrays("head"))

    @property
    def rehearses(self) -> bool:
        """Whether a rehearsal loss has a weight."""
        return self.rehearsal.active

    @property
    def limit(self) -> Limit | None:
        """The limit of the rehearsal's gradient, see `rmjax.types.Task.limit`."""
        return self.rehearsal.limit

    def item_ids(self, batch: Batch, key: Key, num_items: int) -> Array:
        """Rows of the item table that `losses` reads, see `rmjax.types.Task.item_ids`."""
        both = (batch.items, batch.negative_items)
        ids = [ids for ids in both if jnp.issubdtype(ids.dtype, jnp.integer)]
        if ids and self.rehearsal.recollection and self.rehearsal.sampled_items:
            ids.append(rehearsing.sample_items(self.rehearsal, key, num_items))
        return jnp.concatenate([x.ravel() for x in ids + self.answers.item_ids(batch, key)])

    def init(self, key: Key) -> Params:
        """Draws parameters of the machine, the head, the encoder and the rehearsal's decoder."""
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
        """The memory of empty streams."""
        return self.machine.init_memory(params["machine"], batch_size)

    def init_rehearsal(self, key: Key, machine: Params) -> Params:
        """Draws the parameters of a decoder for memories of a machine with these parameters."""
        empty = lambda: self.machine.slots(machine, self.machine.init_memory(machine, 1))
        slots, _ = jax.eval_shape(empty)
        widths = self.answers.item_dim, slots.shape[-1]
        return self.rehearsal.decoder.init(key, *widths, self.segment_length)

    def memorize(self, params: Params, batch: Batch, key: Key | None = None) -> Memorized:
        """Writes the streams of a batch; the key [B] draws dropout; None: no dropout.

        If the batch has `items_before`, an asked memory also holds the items between the last full
        segment and the question. A live stream's memory holds them too. Otherwise it lacks them.
        """
        memorized = memorize(
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
        if memorized.asked is None or batch.items_before is None:
            return memorized
        return memorized._replace(asked=self._write_tails(params, memorized.asked, batch, key))

    def _write_tails(self, params: Params, asked: Memory, batch: Batch, key: Key | None) -> Memory:
        """Writes the items behind the last full segment into the memories [B, Q] of questions."""
        assert batch.position is not None and batch.items_before is not None
        rows, queries = batch.position.shape
        length = batch.items.shape[2]
        segment = jnp.minimum(batch.position, batch.items.shape[1] - 1)[..., None]
        tail, mask = (jnp.take_along_axis(x, segment, 1) for x in (batch.items, batch.item_mask))
        mask &= jnp.arange(length) < (batch.items_before - length * batch.position)[..., None]
        flat = lambda x: x.reshape(rows * queries, *x.shape[2:])
        written = memorize(
            self.machine,
            params["machine"],
            flat(tail)[:, None],
            flat(mask)[:, None],
            jax.tree.map(flat, asked),
            key=None if key is None else key[jnp.arange(rows * queries) // queries],
        )
        return jax.tree.map(lambda x: x.reshape(rows, queries, *x.shape[1:]), written.memory)

    def answer(
        self,
        params: Params,
        memory: Memory,
        query: Array,
        query_mask: Array,
        *,
        per_question: bool = False,
        **fields: Array,
    ) -> Array:
        """Answers questions from memories alone.

        Args:
          params: of `init`.
          memory: of B streams; with `per_question` [B, Q], one memory for each question, such as
            `Memorized.asked`.
          query: i32 [B, Q] or [B, Q, W]; for a model that ranks items, see `Answers.asked_live`.
          query_mask: bool [B, Q].
          per_question: whether each question has a memory of its own.
          **fields: further fields of `Batch` for questions of words and for candidates: word_mask,
            candidates, candidate_mask, choices, choice_mask.

        Returns:
          Logits [B, Q] of clicks, [B, Q, C] of classes or choices, or [B, Q, V] of all items.
        """
        if "each" in fields:  # the old name, for one release
            warnings.warn("each= is now per_question=", DeprecationWarning, stacklevel=2)
            per_question = bool(fields.pop("each"))
        batch = questions_only(query, query_mask, **fields)
        memory, at_query = (None, memory) if per_question else (memory, None)
        return self.answers.logits(*self._read(params, memory, at_query, batch), batch)

    def top_k(
        self,
        params: Params,
        memory: Memory,
        query: Array,
        query_mask: Array,
        k: int,
        exclude: Array | None = None,
    ) -> tuple[Array, Array]:
        """The best items for each question, from memories alone; needs the time of one score each.

        Args:
          params: of `init`.
          memory: of B streams.
          query: i32 [B, Q], as for `answer`.
          query_mask: bool [B, Q].
          k: how many items.
          exclude: see `Ranking.top_k`.

        Returns:
          See `rmjax.reason.ranking.top_k`.

        Raises:
          ValueError: the model does not rank items.
        """
        ranking = self.answers.ranking
        if ranking is None:
            answer = self.answers.questions.answer
            raise ValueError(f"top_k ranks items, but this model was trained to answer: {answer}")
        batch = questions_only(query, query_mask)
        _, head, embed_items, features, _ = self._read(params, memory, None, batch)
        return ranking.top_k(head, embed_items, features, k, exclude)

    def _read(
        self, params: Params, memory: Memory | None, at_query: Memory | None, batch: Batch
    ) -> tuple[Params, Params, EmbedItems, Array, Array]:
        """Reads `at_query` [B, Q], the memory at each query's position, or else `memory`.

        Returns the arguments of `Answers.logits` that come before the batch.
        """
        machine, machine_params, mask = self.machine, params["machine"], batch.query_mask
        embed_items = functools.partial(machine.embed, machine_params)
        query = self.answers.encode(params["encoder"], embed_items, batch)
        if at_query is None:
            features = machine.read(machine_params, memory, query, mask)
        else:
            rows = mask.size  # one memory per question
            flat = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), at_query)
            asked = query.reshape(rows, 1, -1), mask.reshape(rows, 1)
            features = machine.read(machine_params, flat, *asked).reshape(query.shape)
        return params["encoder"], params["head"], embed_items, features, query

    def scores(self, params: Params, batch: Batch) -> Array:
        """Answers to a batch's questions, see `rmjax.types.Task.scores`."""
        batch, memorized = self.answers.asked(batch), self.memorize(params, batch)
        read = self._read(params, memorized.memory, memorized.asked, batch)
        return self.answers.scores(*read, batch)

    def losses(
        self, params: Params, frozen: Params, carry: Any, batch: Batch, key: Key
    ) -> tuple[Terms, Any]:
        """The terms of the loss, see `rmjax.types.Task.losses`."""
        if self.items_fixed:
            assert self.table is not None
            params = replace_at(params, self.table, jax.lax.stop_gradient(at(params, self.table)))
        batch = self.answers.asked(batch)
        keys = jax.vmap(lambda k: jax.random.split(k, 3))(example_keys(key, batch.example_id))
        memorized = self.memorize(params, batch, keys[:, 0])
        read = self._read(params, memorized.memory, memorized.asked, batch)
        terms: Terms = {"reason": (self.reason, self.answers.loss(*read, batch, key))}
        if self.machine.has_loss:
            terms["machine"] = (self.machine_loss, memorized.aux)
        if self.rehearsal.active:
            drawn = draw_query(keys[:, 1], batch, memorized)
            query, valid = None, drawn.valid
            if self.rehearsal.sampler == "teacher":
                asked = one_question(batch, drawn.which)
                valid &= asked.query_mask  # without a question the teacher chooses nothing
                embed_items = functools.partial(embed, frozen)
                query = self.answers.encode(frozen["encoder"], embed_items, asked)
            segments = rehearsing.choose_segments(
                self.rehearsal, drawn.key, frozen, query, batch, valid
            )
            memory = drawn.memory
            terms |= rehearsing.losses(
                self.rehearsal, self.machine, params, batch, memory, segments, keys[:, 2], key
            )
        return terms, carry

    def rehearsals(self, params: Params, batch: Batch, other: Batch) -> dict[str, Array]:
        """The rehearsal losses with the own memory and with another stream's, without dropout.

        Both memories are those at the position of a drawn question. The fragments are drawn
        uniformly from the segments before it. All draws depend on the example alone.

        Args:
          params: of `init`.
          batch: B streams.
          other: a batch of the same shape, with another stream in each row. A row whose masks are
            all false has no other stream.

        Returns:
          {name of a loss that has a weight: f32 [B, 3]}: the sum over a stream's fragments with the
          own memory; the same with the other memory; and the number of fragments. And "spread" f32
          [B, 2]: half the squared distance of the two memories' slots, and the number of entries.
        """
        r = dataclasses.replace(self.rehearsal, sampler="uniform")
        key = jax.random.key(0)
        keys = jax.vmap(lambda k: jax.random.split(k, 3))(example_keys(key, batch.example_id))
        asked = draw_query(keys[:, 0], batch, self.memorize(params, batch))
        strange = draw_query(keys[:, 0], other, self.memorize(params, other)).memory
        both = batch.item_mask.any((1, 2)) & other.item_mask.any((1, 2))
        valid = asked.valid & both[:, None]
        segments = rehearsing.choose_segments(r, asked.key, None, None, batch, valid)
        cut = rehearsing.cut_fragments(r, keys[:, 1], batch, segments)
        losses = functools.partial(rehearsing.fragment_losses, r, self.machine, params, batch, cut)
        own, others = (losses(memory, keys[:, 2], key) for memory in (asked.memory, strange))
        sums = {
            name: jnp.stack([loss.sum(1), others[name][0].sum(1), counted.sum(1)], 1)
            for name, (loss, counted) in own.items()
        }
        (x, mask), (y, _) = (
            self.machine.slots(params["machine"], memory) for memory in (asked.memory, strange)
        )
        mask = jnp.broadcast_to((mask & both[:, None])[..., None], x.shape)
        distance = jnp.where(mask, jnp.square(x - y) / 2, 0.0).sum((1, 2))
        return sums | {"spread": jnp.stack([distance, mask.sum((1, 2))], 1)}


class Drawn(NamedTuple):
    """One question of each stream, and what is known before it."""

    key: Key  # [B], a fresh one
    which: Array  # i32 [B], the question
    valid: Array  # bool [B, T], the segments before it
    memory: Memory  # at its position


def draw_query(key: Key, batch: Batch, memorized: Memorized) -> Drawn:
    """Draws one asked question of each stream; rehearsal uses only what comes before it.

    Args:
      key: [B].
      batch: B streams with their questions.
      memorized: of the batch.

    Returns:
      The questions, drawn uniformly. If a stream has no question, all its segments are valid. If
      questions lie inside the streams of the batch, none is.
    """
    key, fresh = jax.vmap(jax.random.split, out_axes=1)(key)
    which = jax.vmap(jax.random.categorical)(key, jnp.where(batch.query_mask, 0.0, -jnp.inf))
    row = jnp.arange(len(which))
    valid = batch.item_mask.any(-1)
    memory = memorized.memory
    if batch.position is not None:
        valid &= batch.query_mask.any(-1)[:, None]
        valid &= jnp.arange(valid.shape[1]) < batch.position[row, which][:, None]
        memory = jax.tree.map(lambda x: x[row, which], memorized.asked)
    return Drawn(fresh, which, valid, memory)


def one_question(batch: Batch, which: Array) -> Batch:
    """The batch with one question per stream, the one of index `which` [B]."""
    pick = lambda x: x[jnp.arange(len(which)), which][:, None]
    return dataclasses.replace(
        batch,
        query=pick(batch.query),
        query_mask=pick(batch.query_mask),
        word_mask=None if batch.word_mask is None else pick(batch.word_mask),
    )


@dataclasses.dataclass(frozen=True)
class Teacher(Task):
    """The history sampler as a task of its own (RM section 3.3.2), which reads the raw segments.

    Attributes:
      num_items: V.
      answers: query encoder and head.
      width: see `embeddings.init_items`.
    """

    num_items: int
    answers: Answers
    width: int = 0

    @property
    def table(self) -> tuple[str, ...]:
        """Path of the item table in the parameters."""
        return "sampler", "embed"

    def item_ids(self, batch: Batch, key: Key, num_items: int) -> Array:
        """Rows of the item table that `losses` reads, see `rmjax.types.Task.item_ids`."""
        ids = [batch.items] if jnp.issubdtype(batch.items.dtype, jnp.integer) else []
        return jnp.concatenate([x.ravel() for x in ids + self.answers.item_ids(batch, key)])

    def init(self, key: Key) -> Params:
        """Draws parameters of the sampler with its encoder, the head and, if used, the merge."""
        a, b, c, d = jax.random.split(key, 4)
        dim = self.answers.dim
        eyes = sampler.init(a, self.num_items, dim, self.width)
        eyes |= {"encoder": self.answers.init_encoder(c)}
        params = {"sampler": eyes, "head": self.answers.init_head(b)}
        if not self._head_sees_query:
            params["merge"] = lecun_normal()(d, (2 * dim, dim))
        return params

    @property
    def _head_sees_query(self) -> bool:
        return self.answers.questions.answer == "click"

    def scores(self, params: Params, batch: Batch) -> Array:
        """Answers to a batch's questions, see `rmjax.types.Task.scores`."""
        batch = self.answers.asked(batch)
        return self.answers.scores(*self._read(params, batch), batch)

    def _read(
        self, params: Params, batch: Batch
    ) -> tuple[Params, Params, EmbedItems, Array, Array]:
        """Reads the raw segments; returns what `Reasoning._read` does."""
        valid = jnp.broadcast_to(
            batch.item_mask.any(-1)[:, None], (*batch.query_mask.shape, batch.items.shape[1])
        )
        if batch.position is not None:
            valid &= jnp.arange(valid.shape[-1]) < batch.position[..., None]
        eyes = params["sampler"]
        embed_items = functools.partial(embed, eyes)
        query = self.answers.encode(eyes["encoder"], embed_items, batch)
        features = sampler.fragment_features(eyes, batch.items, batch.item_mask)
        _, read = sampler.attend(eyes, query, features, valid)
        if not self._head_sees_query:  # without this the head would read e of [e; q] alone
            read = jnp.concatenate([read, query], -1) @ params["merge"]
        return eyes["encoder"], params["head"], embed_items, read, query

    def losses(
        self, params: Params, frozen: Params, carry: Any, batch: Batch, key: Key
    ) -> tuple[Terms, Any]:
        """The loss of the answers, see `rmjax.types.Task.losses`."""
        batch = self.answers.asked(batch)
        loss = self.answers.loss(*self._read(params, batch), batch, key)
        return {"reason": (1.0, loss)}, carry
