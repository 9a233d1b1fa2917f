"""The contract, read first: what a batch is, what a memory machine is, what a task is.

Shapes use B examples, T segments, N items a segment, Q queries, K slots, d item width, m answer width; where questions
are sentences W words of one, A candidate answers of an example, C of them to choose from in a question.
Every array has its mask; what a masked entry holds is never looked at.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

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
    negative_items: (
        Array  # i32 [B, P] or f32 [B, P, F] items of another stream, for negative fragments
    )
    negative_mask: Array  # bool [B, P]
    example_id: (
        Array  # i32 [B] names the example in its split: what is drawn for it is drawn from this
    )
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
    """init(key, d, N): draws parameters.

    Args:
      key: draws them.
      d: width of the machine.
      N: most items of a segment.

    Returns:
      The encoder's own tree.
    """
    apply: Callable[..., Array]
    """apply(params, items, x, mask, key=None): reads t segments at once.

    Args:
      params: of `init`.
      items: [B, t, N]; an encoder with a table of its own reads the ids.
      x: f32 [B, t, N, d], the items' rows in the machine's table.
      mask: bool [B, t, N].
      key: [B, t], draws dropout; None: there is none.

    Returns:
      Features f32 [B, t, N, d].
    """


@dataclasses.dataclass(frozen=True)
class Context:
    """What a machine is told of the streams that it will read, beside its own settings."""

    segment_length: int = 20  # N
    max_items: int = 1000  # L, of the longest stream
    width: int = (
        0  # of items that are features, or of word vectors; 0: the table is as wide as the machine
    )
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
    """init(key): draws parameters.

    Args:
      key: draws them.

    Returns:
      The machine's own tree.
    """
    init_memory: Callable[[Params, int], Memory]
    """init_memory(params, batch_size): the memory of an empty stream.

    Args:
      params: of `init`.
      batch_size: B.

    Returns:
      A memory with leading axis B.
    """
    encode: Callable[..., Any]
    """encode(params, items, mask, key=None): what `write` reads. It never looks at the memory.

    Args:
      params: of `init`.
      items: [B, t, N]. Segments are independent, so the two leading axes may come in either order.
      mask: bool [B, t, N].
      key: [B, t], draws dropout; None: there is none.

    Returns:
      Features, a pytree of [B, t, N, ...].
    """
    write: Callable[..., tuple[Memory, Sum]]
    """write(params, memory, features, mask, key=None): writes one segment; `memorize` scans it.

    Args:
      params: of `init`.
      memory: of B streams.
      features: of one segment, a pytree of [B, N, ...].
      mask: bool [B, N].
      key: [B], draws dropout; None: there is none.

    Returns:
      The memory after the segment, and aux: the (sum, count) of the machine's own loss, see `has_loss`. Padded rows
      count for nothing in it.
    """
    slots: Callable[[Params, Memory], tuple[Array, Array]]
    """slots(params, memory): what readers attend to.

    Args:
      params: of `init`.
      memory: of B streams.

    Returns:
      f32 [B, K, d] and its mask bool [B, K].
    """
    read: Callable[..., Array]
    """read(params, memory, query, query_mask, key=None): answers from the memory alone.

    Args:
      params: of `init`.
      memory: of B streams.
      query: f32 [B, Q, m], features of the questions.
      query_mask: bool [B, Q].
      key: [B], draws dropout; None: there is none.

    Returns:
      Answer features f32 [B, Q, m].
    """
    embed: Callable[[Params, Array | None], Array]
    """embed(params, items): features of single items, as `encode` sees them.

    Args:
      params: of `init`.
      items: ids i32 [...], or features f32 [..., F]; None: all items.

    Returns:
      f32 [..., d] with entries of about unit variance; [V, d] of all items.
    """
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

    A wholly padded segment returns the state bit for bit. `rmjax.models.scan` scans `step` over segments.
    """

    init: Callable[[Key], Params]
    """init(key): draws parameters.

    Args:
      key: draws them.

    Returns:
      The model's own tree.
    """
    init_state: Callable[[Params, int], Any]
    """init_state(params, batch_size): what is remembered before a stream's first segment.

    Args:
      params: of `init`.
      batch_size: B.

    Returns:
      A state with leading axis B.
    """
    reset: Callable[[Any, Array], Any]
    """reset(state, where): some streams begin anew.

    Args:
      state: of B streams.
      where: bool [B], which ones.

    Returns:
      The state; that of the other streams stays bit for bit.
    """
    step: Callable[..., tuple[Array, Any, Sum]]
    """step(params, state, tokens, mask, key=None): reads one segment.

    Args:
      params: of `init`.
      state: of B streams.
      tokens: i32 [B, N]. They come first in their segment, padding after them.
      mask: bool [B, N].
      key: [B], draws dropout; None: there is none.

    Returns:
      hidden [B, N, D]; the state after the segment; aux, a (sum, count) that is added to the loss.
    """
    logits: Callable[..., Array]
    """logits(params, hidden, key=None): what the hidden values say.

    Args:
      params: of `init`.
      hidden: [..., D]; [B, N, D] where the model is a classifier.
      key: [B], draws dropout; None: there is none.

    Returns:
      f32 [..., V]; f32 [B, classes] of a classifier.
    """


Terms = dict[
    str, tuple[Weight, Sum]
]  # {term: (weight, (sum, count))}; the loss adds up weight * sum / count


class Task(Protocol):
    """Binds a machine or a model to a kind of data: batch -> loss terms and scores. One train step serves every task.

    A task is a subclass: it has `init` and `losses`, and overrides of the rest what it is able to do. `scores` gives
    answers to questions; `measure` takes its place where streams go on from step to step.
    """

    @property
    def carries(self) -> bool:
        """Whether streams go on from step to step: `memory` is carried then, and () otherwise."""
        return False

    @property
    def table(self) -> tuple[str, ...] | None:
        """Path in the parameters of a table with a row for each item id; None: there is none."""
        return None

    @property
    def rehearses(self) -> bool:
        """Whether `rehearsals` can tell what the rehearsal owes to the memory."""
        return False

    @abc.abstractmethod
    def init(self, key: Key) -> Params:
        """Parameters of everything that is trained.

        Args:
          key: draws them.

        Returns:
          A tree of f32 arrays.
        """

    def memory(self, params: Params, batch_size: int) -> Any:
        """What is remembered of streams before their first segment.

        Args:
          params: of `init`.
          batch_size: B.

        Returns:
          A tree with leading axis B; () where nothing is remembered.
        """
        return ()

    @abc.abstractmethod
    def losses(
        self, params: Params, frozen: Params, carry: Any, batch: Batch, key: Key
    ) -> tuple[Terms, Any]:
        """The terms of the loss.

        Args:
          params: of `init`.
          frozen: parameters that are used but not trained; () where there are none.
          carry: what the step before returned, at first `memory`; () unless `carries`.
          batch: B streams with their questions.
          key: a function of (seed, step). What differs between examples is drawn from
            `example_keys(key, batch.example_id)`.

        Returns:
          {term: (weight, (sum, count))} and the carry after the batch. A weight is a number, or a function of the step.
        """

    def scores(self, params: Params, batch: Batch) -> Array:
        """Answers to a batch's questions.

        Args:
          params: of `init`.
          batch: B streams with their questions.

        Returns:
          f32 [B, Q], larger = more likely a click; or [B, Q, C], the largest where the answer is.
        """
        raise _unable(self, "answers no questions")

    def measure(self, params: Params, carry: Any, batch: Batch) -> tuple[dict[str, Array], Any]:
        """What evaluation adds up, of a task that `carries`.

        Args:
          params: of `init`.
          carry: what the batch before returned, at first `memory`.
          batch: the next segments of B streams.

        Returns:
          {name: f32 [B, T]}, sums over each segment; and the carry after the batch.
        """
        raise _unable(self, "has no streams that go on")

    def item_ids(self, batch: Batch, key: Key, num_items: int) -> Array:
        """Which rows of the `table` `losses` reads.

        Args:
          batch: as `losses` takes it.
          key: the same.
          num_items: rows of the table.

        Returns:
          i32 [M], with repetitions; ids out of range are clipped.
        """
        raise _unable(self, "has no item table")

    def rehearsals(self, params: Params, batch: Batch, other: Batch) -> dict[str, Array]:
        """The rehearsal's losses with each stream's own memory and with another stream's.

        Args:
          params: of `init`.
          batch: B streams.
          other: a batch of the same shape, with another stream in each row.

        Returns:
          {name: f32 [B, n]}: sums of each stream, see `evaluate.memory_gain`.
        """
        raise _unable(self, "rehearses nothing")


def _unable(task: Task, words: str) -> NotImplementedError:
    return NotImplementedError(f"{type(task).__name__} {words}")


@dataclasses.dataclass(frozen=True)
class LoggerContext:
    """What a logger is told of the run, beside its own settings."""

    workdir: Path
    config: dict[str, Any]  # all of the run's
    stage: str  # what counts the steps: 'teacher' or 'model'
    start_step: int = 0  # that the stage goes on from; 0 at its start
    evaluated: bool = True  # False: `start_step` is still to be evaluated, perhaps again


class Logger(Protocol):
    """Where numbers go. Going on after a stop it leaves no step twice: steps after `start_step` come again."""

    def write(self, kind: str, step: int, values: Mapping[str, int | float]) -> None:
        """Takes the numbers of one step.

        Args:
          kind: 'train', 'valid', ...: what they are of.
          step: of the stage.
          values: numbers by name; they may be NaN or infinite.
        """

    def close(self) -> None:
        """Nothing more comes from this stage."""


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
