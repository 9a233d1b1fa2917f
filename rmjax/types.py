"""The contract, read first: what a batch is, what a memory machine is, what a task is.

Shapes use B examples, T segments, N items a segment, Q queries, K slots, d item width, m answer width; where questions
are sentences W words of one, A candidate answers of an example, C of them to choose from in a question.
Every array has its mask; what a masked entry holds is never looked at.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array
Key = jax.Array  # typed PRNG key(s), `jax.random.key`; a leading axis means one key per example
Params = Any  # pytree of f32 arrays
Memory = Any  # a machine's own frozen dataclass; leading axis B; has `segments` i32[B]
Weight = float | Callable[[Array], Array]  # of a loss term; a function of the step, i32 []
Sum = tuple[Array, Array]  # (sum, count), both f32 []; added over devices first, divided once


@flax.struct.dataclass
class Batch:
    """Streams cut into segments, and the questions asked of their memories.

    `position` counts the segments written before each question; None means every question comes at the end. Of a text
    whose every token asks for the next one, Q = T N.
    """

    items: Array  # i32 [B, T, N] item ids, or f32 [B, T, N, F] features (frames of a video)
    item_mask: Array  # bool [B, T, N] true where an item is
    query: Array  # i32 [B, Q] asked item ids or kinds of question, or [B, Q, W] words
    query_mask: Array  # bool [B, Q]
    target: Array  # i32 [B, Q] the answers (clicks: 1 clicked, 0 not; else which class, or which of the choices)
    negative_items: Array  # i32 [B, P] or f32 [B, P, F] items of another stream, for negative fragments
    negative_mask: Array  # bool [B, P]
    example_id: Array  # i32 [B] names the example in its split: what is drawn for it is drawn from this
    position: Array | None = None  # i32 [B, Q]
    word_mask: Array | None = None  # bool [B, Q, W] words of the questions
    candidates: Array | None = None  # i32 [B, A, V] candidate answers of an example, as words
    candidate_mask: Array | None = None  # bool [B, A, V]
    choices: Array | None = None  # i32 [B, Q, C] which candidates a question has
    choice_mask: Array | None = None  # bool [B, Q, C]
    reset: Array | None = None  # bool [B, T] whether a stream begins anew before a segment


class SegmentEncoder(NamedTuple):
    """What a machine of slots reads a segment with: items in, features of the same width out."""

    init: Callable[[Key, int, int], Params]
    """init(key, d, N) -> params, for segments of at most N items."""
    apply: Callable[..., Array]
    """apply(params, items [B,t,N], x f32 [B,t,N,d], mask [B,t,N], key=None [B,t]) -> f32 [B,t,N,d]. x are the items'
    rows in the machine's table; an encoder with a table of its own reads the ids. With a key: dropout."""


@dataclasses.dataclass(frozen=True)
class Context:
    """What a machine is told of the streams that it will read, beside its own settings."""

    segment_length: int = 20  # N
    max_items: int = 1000  # L, of the longest stream
    width: int = 0  # of items that are features, or of word vectors; 0: the table is as wide as the machine
    hops: int = 1  # of attention over the slots, in reading
    dtype: Any = jnp.float32  # of the encoder's products
    segment_encoder: SegmentEncoder | None = None  # in the place of the one that the settings name

    def __post_init__(self):
        for name, least in (("segment_length", 1), ("max_items", 0), ("width", 0), ("hops", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"{name} = {value!r}: must be a whole number, at least {least}")


class MemoryMachine(NamedTuple):
    """A memory as a bundle of pure functions; variants rebind one of them.

    No function keeps state, and `write` never sees a query. `machines.make` sees to it that a wholly padded segment
    returns the memory bit for bit, and that others are counted in its `segments`.
    """

    init: Callable[[Key], Params]
    """init(key) -> params, the machine's own tree."""
    init_memory: Callable[[Params, int], Memory]
    """init_memory(params, batch_size) -> memory of an empty stream, leading axis B."""
    encode: Callable[..., Any]
    """encode(params, items [B,t,N], mask [B,t,N], key=None [B,t]) -> features, a pytree of [B,t,N,...].
    Never looks at the memory; segments are independent, so the two leading axes may come in either order."""
    write: Callable[..., tuple[Memory, Sum]]
    """write(params, memory, features [B,N,...], mask [B,N], key=None [B]) -> memory, aux. One segment; scanned.
    aux is the (sum, count) of the machine's own loss, in which padded rows count for nothing; see `has_loss`."""
    slots: Callable[[Params, Memory], tuple[Array, Array]]
    """slots(params, memory) -> [B,K,d], [B,K] mask: what readers attend to."""
    read: Callable[..., Array]
    """read(params, memory, query f32 [B,Q,m], query_mask [B,Q], key=None [B]) -> answer features [B,Q,m]."""
    embed: Callable[[Params, Array | None], Array]
    """embed(params, items i32 [...] or f32 [...,F]) -> features [..., d] of single items, as `encode` sees them, with
    entries of about unit variance. items None: of all items, [V, d]."""
    constant_size: bool
    """Whether bytes of memory per stream are the same for every length."""
    gradient_range: int | None
    """How many segments back a gradient from the memory reaches; None: to the first."""
    table: tuple[str, ...] | None = ("embed",)
    """Path in the parameters of a table with a row for each item id; None: there is none."""
    has_loss: bool = False
    """Whether `write` adds to the loss."""


@dataclasses.dataclass(frozen=True)
class ModelContext:
    """What a sequence model is told of the streams that it will read, beside its own settings."""

    vocabulary: int  # V
    segment_length: int  # N
    max_segments: int | None = None  # of the longest stream, where there is one
    classes: int = 0  # of a classifier
    dtype: Any = jnp.float32  # of products
    engrams: Any = None  # models.memoria_gpt2.Engrams, of models with Memoria


class SequenceModel(NamedTuple):
    """A model of token streams as a bundle of pure functions; what it remembers of earlier segments is `state`, a
    pytree with leading axis B. V is the vocabulary, D the width.

    A wholly padded segment returns the state bit for bit. `rmjax.models.unroll` scans `step` over segments.
    """

    init: Callable[[Key], Params]
    """init(key) -> params."""
    init_state: Callable[[Params, int], Any]
    """init_state(params, batch_size) -> what is remembered before a stream's first segment."""
    reset: Callable[[Any, Array], Any]
    """reset(state, where bool [B]) -> state; those streams begin anew, the others stay bit for bit."""
    step: Callable[..., tuple[Array, Any, Sum]]
    """step(params, state, tokens i32 [B,N], mask bool [B,N], key=None [B]) -> hidden [B,N,D], state, aux, a (sum,
    count) that is added to the loss. Tokens come first in their segment, padding after them. With a key: dropout."""
    logits: Callable[..., Array]
    """logits(params, hidden [...,D], key=None [B]) -> f32 [...,V]; of a classifier hidden [B,N,D] -> f32 [B,classes].
    With a key: dropout."""


class Task(Protocol):
    """Binds a machine to a kind of data: batch -> loss terms and scores. One train step serves every task."""

    def init(self, key: Key) -> Params:
        """Parameters of everything that is trained."""

    def losses(self, params: Params, frozen: Params, batch: Batch, key: Key) -> dict[str, tuple[Weight, Sum]]:
        """{term: (weight, (sum, count))}; the loss is the weighted sum of sum / count. A weight is a number, or a
        function of the step.

        `frozen` holds parameters that are used but not trained. `key` is a function of (seed, step); whatever differs
        between examples is drawn from `example_keys(key, batch.example_id)`.
        """

    def scores(self, params: Params, batch: Batch) -> Array:
        """f32 [B, Q], larger = more likely a click; or [B, Q, C], the largest where the answer is."""


@runtime_checkable
class ItemTask(Task, Protocol):
    """A task one of whose parameters may be a table with a row for every item."""

    @property
    def table(self) -> tuple[str, ...] | None:
        """Where it is in the parameters; None: there is none."""

    def item_ids(self, batch: Batch, key: Key, num_items: int) -> Array:
        """i32 [M]: every item whose row `losses` reads, repeated ones too; out of range they are clipped."""


@runtime_checkable
class RehearsalTask(Task, Protocol):
    """A task that can tell what its rehearsal owes to the memory."""

    def rehearsals(self, params: Params, batch: Batch, other: Batch) -> dict[str, Array]:
        """f32 [B, n]: sums of each stream, with its own memory and with that of the same row of `other`."""


@runtime_checkable
class StreamTask(Protocol):
    """A task whose streams go on from step to step. The carry is what `memory` gives, as it was after the last step."""

    def init(self, key: Key) -> Params: ...

    def memory(self, params: Params, batch_size: int) -> Any:
        """What is remembered of streams before their first segment, leading axis B."""

    def stream_losses(
        self, params: Params, carry: Any, batch: Batch, key: Key
    ) -> tuple[dict[str, tuple[Weight, Sum]], Any]:
        """As `Task.losses`, and the carry after the batch."""

    def measure(self, params: Params, carry: Any, batch: Batch) -> tuple[dict[str, Array], Any]:
        """Sums over a batch's segments, f32 [B, T] each, and the carry after it."""


def example_keys(key: Key, example_id: Array) -> Key:
    """One key per example, [B]: the same wherever in whatever batch the example comes."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, example_id)


def at(tree: Params, path: tuple[str, ...]) -> Any:
    """The part of a tree of dicts at a path."""
    return functools.reduce(operator.getitem, path, tree)


def replace_at(tree: Params, path: tuple[str, ...], value: Any) -> Params:
    """A copy of a tree of dicts, with another part at a path."""
    first, *rest = path
    return tree | {first: replace_at(tree[first], tuple(rest), value) if rest else value}
