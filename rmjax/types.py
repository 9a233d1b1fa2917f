"""The contracts of the package; read them first: batches, machines, models, tasks, loggers.

Letters in shapes:

    B  examples (streams) of a batch      Q  questions of an example
    T  segments of a stream               W  words of a question
    N  items of a segment                 A  candidate answers of an example
    L  items of the longest stream        V  words of a candidate; or the vocabulary's size
    K  slots of a memory                  C  candidates that one question chooses from
    d  width of items in a machine        m  width of questions and answers in a machine
    F  width of an item given as features P  items of another stream, for negative fragments

Every array has a mask. Code never lets the value of a masked entry reach a result.
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
Memory = Any  # frozen dataclass of the machine; leading axis B; has a field `segments`, i32 [B]
Features = Any  # pytree of arrays with the same leading axes; the machine chooses the rest
State = Any  # pytree with leading axis B: what a sequence model remembers
Carry = Any  # pytree that a task hands from step to step; () where a task carries nothing
Sum = tuple[Array, Array]  # (sum, count), both f32 []; added over devices first, divided once
Counts = Mapping[str, Array]  # f32 [] of each term of a loss, and of "streams", over all devices
Weight = float | Callable[[Array, Counts], Array]  # a number, or f(step i32 [], counts)
Terms = dict[str, tuple[Weight, Sum]]  # of a loss: the loss adds up weight * sum / count


@flax.struct.dataclass
class Batch:
    """Streams cut into segments, and the questions asked of their memories.

    In a language model's batch every token asks for the next one, so Q = T N.
    """

    items: Array  # i32 [B, T, N] item ids, or f32 [B, T, N, F] features (frames of a video)
    item_mask: Array  # bool [B, T, N], true where an item is
    query: Array  # i32 [B, Q], items asked about or kinds of question; or i32 [B, Q, W] words
    query_mask: Array  # bool [B, Q]
    target: Array  # i32 [B, Q], answers: 1 clicked, 0 not; the class, the right choice, the item
    negative_items: Array  # i32 [B, P] or f32 [B, P, F], of another stream: negative fragments
    negative_mask: Array  # bool [B, P]
    example_id: Array  # i32 [B], names the example in its split; its random draws depend on it
    position: Array | None = None  # i32 [B, Q], segments before each question; None: all of them
    items_before: Array | None = None  # i32 [B, Q], places before each question, if items are asked
    word_mask: Array | None = None  # bool [B, Q, W], words of the questions
    candidates: Array | None = None  # i32 [B, A, V], candidate answers of an example, as words
    candidate_mask: Array | None = None  # bool [B, A, V]
    choices: Array | None = None  # i32 [B, Q, C], indices of the candidates that a question has
    choice_mask: Array | None = None  # bool [B, Q, C]
    reset: Array | None = None  # bool [B, T], true where a new stream begins with the segment


class SegmentEncoder(NamedTuple):
    """Reads segments for machines of slots: items in, features of the same width out."""

    init: Callable[[Key, int, int], Params]
    """init(key, d, N): draws parameters.

    Args:
      key: of the draws.
      d: width of the machine.
      N: largest number of items in a segment.

    Returns:
      The encoder's parameters.
    """
    apply: Callable[..., Array]
    """apply(params, items, x, mask, key=None): reads t segments at once.

    Args:
      params: from `init`.
      items: i32 [B, t, N] or f32 [B, t, N, F]; for encoders that look ids up in their own table.
      x: f32 [B, t, N, d], the items' rows in the machine's table.
      mask: bool [B, t, N].
      key: [B, t], for dropout; None: no dropout.

    Returns:
      f32 [B, t, N, d], features.
    """


_LEAST = (("segment_length", 1), ("max_items", 0), ("width", 0), ("hops", 1), ("mix_slots", 0))


@dataclasses.dataclass(frozen=True)
class Context:
    """What a machine must know of the run, beside its own settings.

    Raises:
      ValueError: a size is no integer, or too small.
    """

    segment_length: int = 20  # N
    max_items: int = 1000  # L
    width: int = 0  # of feature items or word vectors; 0: items are ids, and table rows are d wide
    hops: int = 1  # attention hops over the slots in `read`
    norm_hops: bool = False  # a layer norm of the question between hops
    mix_slots: int = 0  # rounds in which slots attend to each other before the first hop
    dtype: jnp.dtype = jnp.float32  # of the encoder's matrix products
    # Replaces the encoder that the settings name. A kind that reads it says so in its settings by
    # `takes_segment_encoder: ClassVar[bool] = True`; for others `machines.build` raises.
    segment_encoder: SegmentEncoder | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ValueError(f"{name} = {value!r}: must be a whole number, at least {least}")


class MemoryMachine(NamedTuple):
    """A memory as a bundle of pure functions; variants replace one of them.

    No function keeps state. `write` never sees a question. `machines.make` wraps `write` in two
    ways: a wholly padded segment returns the memory bit for bit, and `memory.segments` counts all
    other segments.
    """

    init: Callable[[Key], Params]
    """init(key): draws parameters.

    Args:
      key: of the draws.

    Returns:
      The machine's parameters.
    """
    init_memory: Callable[[Params, int], Memory]
    """init_memory(params, batch_size): the memory of an empty stream.

    Args:
      params: from `init`.
      batch_size: B.

    Returns:
      A memory with leading axis B.
    """
    encode: Callable[..., Features]
    """encode(params, items, mask, key=None): turns items into what `write` reads.

    It never sees the memory, so all segments can be encoded at once.

    Args:
      params: from `init`.
      items: i32 [B, t, N] or f32 [B, t, N, F]. Segments are independent of one another, so the
        axes B and t may be swapped.
      mask: bool [B, t, N].
      key: [B, t], for dropout; None: no dropout.

    Returns:
      Features, a pytree of [B, t, ...]; the machine chooses the rest.
    """
    write: Callable[..., tuple[Memory, Sum]]
    """write(params, memory, features, mask, key=None): writes one segment; `memorize` scans it.

    Args:
      params: from `init`.
      memory: of B streams.
      features: of one segment, a pytree of [B, ...]; `encode` chooses the rest.
      mask: bool [B, N].
      key: [B], for dropout; None: no dropout.

    Returns:
      The memory after the segment, and aux: the (sum, count) of the machine's own loss, see
      `has_loss`. Padded rows add nothing to aux.
    """
    slots: Callable[[Params, Memory], tuple[Array, Array]]
    """slots(params, memory): the rows that readers attend to.

    Args:
      params: from `init`.
      memory: of B streams.

    Returns:
      f32 [B, K, d] slots, and their mask bool [B, K].
    """
    read: Callable[..., Array]
    """read(params, memory, query, query_mask, key=None): answers from the memory alone.

    Args:
      params: from `init`.
      memory: of B streams.
      query: f32 [B, Q, m], features of the questions.
      query_mask: bool [B, Q].
      key: [B], for dropout; None: no dropout.

    Returns:
      f32 [B, Q, m], answer features.
    """
    embed: Callable[[Params, Array | None], Array]
    """embed(params, items): features of single items, as `encode` sees them.

    Args:
      params: from `init`.
      items: i32 [...] ids, or f32 [..., F] features; None: all items of the table.

    Returns:
      f32 [..., d], entries of about unit variance; f32 [num_items, d] for None.
    """
    constant_size: bool
    """Whether a stream's memory takes the same number of bytes at every length of the stream."""
    gradient_range: int | None
    """How many segments back gradients from the memory reach; None: to the first segment."""
    table: tuple[str, ...] | None = ("embed",)
    """Path in the parameters to the item table, one row for each item id; None: no such table."""
    has_loss: bool = False
    """Whether the aux of `write` is added to the loss."""
    write_segments: Callable[..., Memory] | None = None
    """write_segments(params, memory, features, mask, cut): writes t segments at once.

    `memorize` calls it in place of a scan over `write`. It has the results of that scan, padding
    and counts of segments included. None: the machine has no faster way than the scan. A machine
    that has a loss of its own, or draws in `write`, has none.

    Args:
      params: from `init`.
      memory: of B streams.
      features: of the segments, a pytree of [t, B, ...].
      mask: bool [t, B, N].
      cut: bool [t, B], true where no gradient may pass to earlier segments; None: nowhere.

    Returns:
      The memory after each segment, leading axes [t, B].
    """


@dataclasses.dataclass(frozen=True)
class ModelContext:
    """What a sequence model must know of the run, beside its own settings."""

    vocabulary: int  # V
    segment_length: int  # N
    max_segments: int | None = None  # of the longest stream; None: no limit is known
    classes: int = 0  # of a classifier; 0: the model is a language model
    dtype: jnp.dtype = jnp.float32  # of matrix products
    engrams: Any = None  # `models.memoria_gpt2.Engrams`, for models with Memoria


class SequenceModel(NamedTuple):
    """A model of token streams as a bundle of pure functions.

    Its `state` holds what it remembers of earlier segments: a pytree with leading axis B. V is the
    size of the vocabulary, D the width. A wholly padded segment returns the state bit for bit.
    `rmjax.models.scan` scans `step` over segments.
    """

    init: Callable[[Key], Params]
    """init(key): draws parameters.

    Args:
      key: of the draws.

    Returns:
      The model's parameters.
    """
    init_state: Callable[[Params, int], State]
    """init_state(params, batch_size): the state before a stream's first segment.

    Args:
      params: from `init`.
      batch_size: B.

    Returns:
      A state with leading axis B.
    """
    reset: Callable[[State, Array], State]
    """reset(state, where): empties the state of some streams, which begin anew.

    Args:
      state: of B streams.
      where: bool [B], which streams.

    Returns:
      The state; that of all other streams stays bit for bit.
    """
    step: Callable[..., tuple[Array, State, Sum]]
    """step(params, state, tokens, mask, key=None): reads one segment.

    Args:
      params: from `init`.
      state: of B streams.
      tokens: i32 [B, N]. Padding stands at the end of a row only.
      mask: bool [B, N].
      key: [B], for dropout; None: no dropout.

    Returns:
      f32 [B, N, D] hidden values; the state after the segment; aux, a (sum, count) that is added
      to the loss.
    """
    logits: Callable[..., Array]
    """logits(params, hidden, key=None): scores of tokens or classes.

    Args:
      params: from `init`.
      hidden: f32 [..., D]; f32 [B, N, D] for a classifier.
      key: [B], for dropout; None: no dropout.

    Returns:
      f32 [..., V]; f32 [B, classes] from a classifier.
    """
    has_loss: bool = True
    """Whether the aux of `step` may be more than (0, 0)."""


class Limit(NamedTuple):
    """Terms of a loss whose joint gradient may not outgrow that of the other terms."""

    terms: tuple[str, ...]  # their names
    ratio: float  # largest norm of their gradient, relative to the norm of the others' gradient


class Task(Protocol):
    """Binds a machine or a model to a kind of data: batch -> loss terms and scores.

    One train step serves every task. A task is a subclass of this one. It must define `init` and
    `losses`; it overrides those of the other members that it supports. `scores` answers
    questions. Tasks whose streams continue from step to step define `measure` in place of it.
    """

    @property
    def carries(self) -> bool:
        """Whether streams continue from step to step, so that their memory is carried along."""
        return False

    @property
    def table(self) -> tuple[str, ...] | None:
        """Path in the parameters to the item table, a row for each item id; None: no such table."""
        return None

    @property
    def item_arrays(self) -> tuple[tuple[str, ...], ...]:
        """Paths of all arrays in the parameters that have one row for each item id."""
        return () if self.table is None else (self.table,)

    @property
    def rehearses(self) -> bool:
        """Whether `rehearsals` is defined."""
        return False

    @property
    def limit(self) -> Limit | None:
        """The terms whose gradient is limited, see `rmjax.run.step`; None: the loss is a sum."""
        return None

    @abc.abstractmethod
    def init(self, key: Key) -> Params:
        """Draws all trained parameters.

        Args:
          key: of the draws.

        Returns:
          A tree of f32 arrays.
        """

    def memory(self, params: Params, batch_size: int) -> Carry:
        """The carry of streams before their first segment.

        Args:
          params: from `init`.
          batch_size: B.

        Returns:
          A tree with leading axis B; () where nothing is carried.
        """
        return ()

    @abc.abstractmethod
    def losses(
        self, params: Params, frozen: Params, carry: Carry, batch: Batch, key: Key
    ) -> tuple[Terms, Carry]:
        """The terms of the loss.

        Args:
          params: from `init`.
          frozen: parameters that are used but not trained; () if none are.
          carry: what the previous step returned, `memory` at the first step; () unless `carries`.
          batch: B streams with their questions.
          key: a function of (seed, step). Draws that differ between examples come from
            `example_keys(key, batch.example_id)`.

        Returns:
          {term: (weight, (sum, count))}, and the carry after the batch.
        """

    def scores(self, params: Params, batch: Batch) -> Array:
        """Answers to a batch's questions.

        Args:
          params: from `init`.
          batch: B streams with their questions.

        Returns:
          f32 [B, Q], larger where a click is more likely; f32 [B, Q, C], largest at the answer; or
          f32 [B, Q], the rank of the target among all items, if an item is the answer.

        Raises:
          NotImplementedError: the task answers no questions.
        """
        raise _unable(self, "answers no questions")

    def measure(self, params: Params, carry: Carry, batch: Batch) -> tuple[dict[str, Array], Carry]:
        """The sums that evaluation adds up over batches, for tasks that `carries` marks.

        Args:
          params: from `init`.
          carry: what the previous batch returned, `memory` at the first batch.
          batch: the next segments of B streams.

        Returns:
          {name: f32 [B, T]}, sums over each segment; and the carry after the batch.

        Raises:
          NotImplementedError: the task carries nothing.
        """
        raise _unable(self, "has no streams that continue from step to step")

    def item_ids(self, batch: Batch, key: Key, num_items: int) -> Array:
        """The rows of `table` that `losses` reads for a batch.

        Args:
          batch: as `losses` takes it.
          key: as `losses` takes it.
          num_items: rows of the table.

        Returns:
          i32 [M], with repetitions; ids out of range are clipped.

        Raises:
          NotImplementedError: the task has no item table.
        """
        raise _unable(self, "has no item table")

    def rehearsals(self, params: Params, batch: Batch, other: Batch) -> dict[str, Array]:
        """Rehearsal losses with a stream's own memory and with the memory of another stream.

        The difference shows what the rehearsal owes to the memory.

        Args:
          params: from `init`.
          batch: B streams.
          other: a batch of the same shape, with another stream in each row.

        Returns:
          {name: f32 [B, n]}, sums for each stream, see `rmjax.evaluation.scoring.memory_gain`.

        Raises:
          NotImplementedError: the task rehearses nothing.
        """
        raise _unable(self, "rehearses nothing")


def _unable(task: Task, words: str) -> NotImplementedError:
    return NotImplementedError(f"{type(task).__name__} {words}")


@dataclasses.dataclass(frozen=True)
class LoggerContext:
    """What a logger must know of the run, beside its own settings."""

    workdir: Path
    config: dict[str, Any]  # the whole config of the run, as nested dicts
    stage: str  # 'teacher' or 'model'; steps are counted within a stage
    start_step: int = 0  # the step that the stage resumes from; 0 at its start
    evaluated: bool = True  # False: `start_step` is still to be evaluated, perhaps a second time


class Logger(Protocol):
    """Receives the numbers of a run.

    A run that stopped resumes from `LoggerContext.start_step`, so later steps are reported again.
    A logger must then keep no step twice.
    """

    def write(self, kind: str, step: int, values: Mapping[str, int | float]) -> None:
        """Takes the numbers of one step.

        Args:
          kind: what was measured: 'train', 'valid' and so on.
          step: within the stage.
          values: {name: number}; a number may be NaN or infinite.
        """

    def close(self) -> None:
        """Ends the log of this stage; `write` is not called afterwards."""


def example_keys(key: Key, example_id: Array) -> Key:
    """One key for each example, the same in whatever batch the example comes.

    Args:
      key: one key, [].
      example_id: i32 [B].

    Returns:
      Keys [B].
    """
    return jax.vmap(jax.random.fold_in, (None, 0))(key, example_id)


def at(tree: Params, path: tuple[str, ...]) -> Params:
    """The subtree at a path of a tree of dicts."""
    return functools.reduce(operator.getitem, path, tree)


def replace_at(tree: Params, path: tuple[str, ...], value: Params) -> Params:
    """A copy of a tree of dicts whose subtree at `path` is `value`."""
    first, *rest = path
    return tree | {first: replace_at(tree[first], tuple(rest), value) if rest else value}
