"""CM's synthetic evidence task (CM section 4.2): a few planted facts tell the answer to a query.

Facts and queries are divided into groups. Every answer to a query has an evidence: some facts of
the query's group, in order. A (query, answer) pair is a logic chain. A stream holds uniformly
random facts, and the evidence of one chain is planted into one part of it. The question of the
stream is the query of that chain. The answer is one of `answers` ids, which all queries share.

The paper plants a single evidence, so a reader can nearly find the answer without the query.
`distractors` prevent this.
"""

# mypy: disable-error-code=override
# `Source` declares its sizes as attributes; here they are properties computed from the world.

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rmjax.data.source import SPLITS, Examples, Generated, Questions, Source, hash64
from rmjax.registry import at_least, between, one_of, setting
from rmjax.types import Array, Key

PLACINGS = ("consecutive", "discrete")
_PARTS = {2: ("early", "later"), 4: ("0-25%", "25-50%", "50-75%", "75-100%")}
_TRIES = 64  # most draws of a stream until its answer is the only one
_ITEMS_AT_ONCE = 2**18  # bounds the memory that `fetch` and `references` take beside their results


@dataclasses.dataclass(frozen=True)
class Settings:
    """The world, and the number of streams of each logic chain in each split."""

    facts: int = setting(400, at_least(1), "kinds of fact, R_f")
    length: int = setting(200, at_least(1), "facts in a stream, R_l")
    queries: int = setting(40, at_least(1), "kinds of query, R_q")
    answers: int = setting(30, at_least(2), "answers to a query, R_a")
    evidence: int = setting(5, at_least(1), "facts in an evidence, R_c")
    groups: int = setting(20, at_least(1), "groups of facts and queries")
    placing: str = setting("consecutive", one_of(*PLACINGS), "how evidence lies in a stream")
    window: float = setting(
        0.2, between(0, 1), "longest span of discrete evidence, as a share of the stream"
    )
    parts: int = setting(
        2, at_least(1), "parts of the stream that evidence lies in: 2 halves, 4 quarters"
    )
    edge: float = setting(
        0.0,
        between(0, 0.5),
        "share of the stream at its begin and at its end that evidence lies in; 0: all of a part",
    )
    distractors: int = setting(0, at_least(0), "evidences of other queries in a stream")
    train: int = setting(400, at_least(1), "training streams of each logic chain")
    valid: int = setting(20, at_least(1), "validation streams of each logic chain")
    test: int = setting(50, at_least(1), "test streams of each logic chain")


def make(settings: Settings, common: ConfigDict, seed: int) -> Source:
    """Builds the source. It is not cached, since drawing a stream is faster than keeping it."""
    world = dict(vars(settings))
    samples = {split: world.pop(split) for split in SPLITS}
    return Synthetic(SyntheticConfig(**world), seed, **samples)


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """The sizes of a world; the defaults are those of CM section 4.2.

    CM's longer streams are facts=2000, length=1000, evidence=10, parts=4.

    Raises:
      ValueError: a size is out of range, or conflicts with another; names the field, its value and
        the allowed values.
    """

    facts: int = 400  # R_f
    length: int = 200  # R_l, facts in a stream
    queries: int = 40  # R_q
    answers: int = 30  # R_a, answers to each query
    evidence: int = 5  # R_c, facts in the evidence of an answer
    groups: int = 20  # of facts and queries; an evidence has facts of its query's group
    placing: str = "consecutive"  # side by side | "discrete": in order within `window`
    window: float = 0.2  # the largest span of discrete evidence, as a share of the stream
    parts: int = 2  # of the stream; evidence lies in one. 2: early and later; 4: quarters
    edge: float = 0.0  # two parts have only this share of the stream, at its two ends; 0: halves
    # Evidences of other queries, for other answers, anywhere in the stream. What is planted later
    # overwrites what was planted earlier.
    distractors: int = 0

    def __post_init__(self) -> None:
        for name in ("facts", "length", "queries", "answers", "evidence", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be at least 1")
        for name in ("facts", "queries"):
            if getattr(self, name) % self.groups:
                must = f"must be a multiple of groups={self.groups}"
                raise ValueError(f"{name}={getattr(self, name)!r}: {must}")
        if self.placing not in PLACINGS:
            raise ValueError(f"placing={self.placing!r}: must be one of {PLACINGS}")
        if self.parts not in _PARTS:
            raise ValueError(f"parts={self.parts!r}: must be one of {tuple(_PARTS)}")
        if not 0 <= self.edge <= 0.5 or (self.edge and self.parts != 2):
            must = f"must be 0, or at most 0.5 with parts=2, not parts={self.parts}"
            raise ValueError(f"edge={self.edge!r}: {must}")
        part = min(end - begin for begin, end in zip(*self.bounds, strict=True))
        place = f"a part of the stream, edge={self.edge:g}" if self.edge else "a part of the stream"
        for name, most in {"a group": self.group_facts, place: part}.items():
            if self.evidence > most:
                must = f"must be at most {most}, the facts of {name}"
                raise ValueError(f"evidence={self.evidence!r}: {must}")
        orders = math.perm(self.group_facts, self.evidence)
        if self.answers > orders:
            raise ValueError(
                f"answers={self.answers!r}: must be at most {orders}, the ways to choose and order "
                f"evidence={self.evidence} of a group's {self.group_facts} facts"
            )
        if not 0 <= self.window <= 1 or not self.evidence <= self.width <= part:
            raise ValueError(
                f"window={self.window!r}: must be a share of length={self.length} that is at least "
                f"evidence={self.evidence} and at most {part} facts, a part of the stream"
            )
        most = self.queries - 1 if self.answers > 1 else 0
        if not 0 <= self.distractors <= most:
            must = f"must be in [0, {most}], since they belong to other queries and other answers"
            raise ValueError(f"distractors={self.distractors!r}: {must}")

    @property
    def chains(self) -> int:
        """Number of (query, answer) pairs."""
        return self.queries * self.answers

    @property
    def group_facts(self) -> int:
        """Facts in a group. Group g starts at fact g * group_facts."""
        return self.facts // self.groups

    @property
    def group_queries(self) -> int:
        """Queries in a group. Group g starts at query g * group_queries."""
        return self.queries // self.groups

    @property
    def bounds(self) -> tuple[list[int], list[int]]:
        """The first position of each part, and the position after its last one."""
        if self.edge:
            size = round(self.edge * self.length)
            return [0, self.length - size], [size, self.length]
        ends = [i * self.length // self.parts for i in range(self.parts + 1)]
        return ends[:-1], ends[1:]

    @property
    def width(self) -> int:
        """The window, in facts."""
        return round(self.window * self.length)

    @property
    def span(self) -> int:
        """Number of successive positions within which an evidence lies."""
        return self.evidence if self.placing == "consecutive" else self.width


class Planted(NamedTuple):
    """The evidences planted into a stream, in order: the distractors, then the true evidence."""

    query: Array  # i32 [distractors + 1]
    answer: Array  # i32 [distractors + 1]
    positions: Array  # i32 [distractors + 1, evidence]; later rows overwrite earlier ones
    unique: Array  # bool [], no other answer to the last query has its evidence in the stream


@dataclasses.dataclass(frozen=True)
class Synthetic(Generated):
    """A source of streams of facts. Every stream has one query, after its end.

    Example i belongs to chain i % chains, where query, answer = divmod(chain, answers). The
    evidence lies in part (i // chains) % parts. Therefore every split has equally many examples of
    each chain. Within a chain, the parts differ by at most one example.

    With the defaults, a reader that counts the facts of each evidence in a window is right in 96%
    of the streams. A reader of the bag of all facts is right in 66%. A reader of the last half
    alone is right in 97% of the streams with late evidence, and in 3% of the others (chance).

    Attributes:
      config: the sizes of the world.
      seed: of the world and its streams.
      train: streams of each chain in the training split.
      valid: streams of each chain in the validation split.
      test: streams of each chain in the test split.

    Raises:
      ValueError: a number of streams is negative.
    """

    config: SyntheticConfig = SyntheticConfig()
    seed: int = 0
    train: int = 400
    valid: int = 20
    test: int = 50
    positions_at_end: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self) -> None:
        for name in SPLITS:
            if self.size(name) < 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be at least 0")

    @property
    def num_items(self) -> int:
        """See `Source`."""
        return self.config.facts

    @property
    def numbering(self) -> str:
        """The meaning of facts, queries and answers: everything that `make_world` depends on."""
        c = self.config
        sizes = f"{c.facts} facts in {c.groups} groups, {c.queries} queries of {c.answers} answers"
        return f"synthetic evidence, world {self.seed}: {sizes}, {c.evidence} facts each"

    @property
    def max_items(self) -> int:
        """See `Source`."""
        return self.config.length

    @property
    def num_queries(self) -> int:
        """See `Source`."""
        return 1

    @property
    def questions(self) -> Questions:
        """See `Source`."""
        kinds, classes = self.config.queries, self.config.answers
        return Questions("kind", kinds=kinds, answer="class", classes=classes, metric="accuracy")

    @functools.cached_property
    def world(self) -> np.ndarray:
        """The evidence of every answer to every query, i32 [queries, answers, evidence]."""
        return make_world(self.config, self.seed)

    def size(self, split: str) -> int:
        """Number of streams in a split: so many of each logic chain."""
        return super().size(split) * self.config.chains

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """Draws streams. A stream depends on (seed, split, index) alone.

        Args:
          split: one of `SPLITS`.
          indices: integers [B].

        Returns:
          items i32 [B, L], length i32 [B], query i32 [B, 1], query_mask bool [B, 1],
          target i32 [B, 1], example_id i32 [B].

        Raises:
          ValueError: the split is unknown, an index is outside the split, or the world is too small
            for answers to be unique.
        """
        indices = np.asarray(indices)
        outside = indices[(indices < 0) | (indices >= self.size(split))]
        if outside.size:
            must = f"must be in [0, {self.size(split)}) for split {split!r}"
            raise ValueError(f"indices={outside[:8].tolist()}: {must}")
        total = len(indices)
        chunk = max(1, min(total, _ITEMS_AT_ONCE // self.max_items))
        padded = np.pad(indices.astype(np.int32), (0, max(1, -(-total // chunk)) * chunk - total))
        parts = []
        for part in padded.reshape(-1, chunk):
            streams, planted = draw(self.config, self.world, self.seed, SPLITS.index(split), part)
            if not np.all(planted.unique):
                raise ValueError(
                    f"facts={self.config.facts}: a stream was drawn {_TRIES} times, and other "
                    "answers' evidence occurs in every draw; use more facts, longer evidence or "
                    "fewer answers"
                )
            parts.append(jax.device_get(streams))
        return {name: np.concatenate([part[name] for part in parts])[:total] for name in parts[0]}

    def groups(self, split: str) -> dict[str, np.ndarray]:
        """{part of the stream: bool [size, 1], whether the evidence lies in it}."""
        part = np.arange(self.size(split))[:, None] // self.config.chains % self.config.parts
        return {name: part == i for i, name in enumerate(_PARTS[self.config.parts])}

    def references(self, split: str) -> dict[str, np.ndarray]:
        """{reader: answers i32 [size, 1]}, for readers that know the evidences; see `oracles`.

        These readers ignore the order of the facts in an evidence.
        """
        size = self.size(split)
        chunk = max(1, min(size, _ITEMS_AT_ONCE // self.max_items))
        answers: dict[str, np.ndarray] = {}
        for start in range(0, size, chunk):
            # Indices wrap around, so that all chunks have one shape.
            streams = self.fetch(split, np.arange(start, start + chunk) % size)
            chosen = oracles(self.config, self.world, streams["items"], streams["query"])
            for name, answer in chosen.items():
                rows = answers.setdefault(name, np.empty((size, 1), np.int32))
                rows[start : start + chunk] = answer[: size - start]
        return answers


# ---- the world, computed on the host


def make_world(config: SyntheticConfig, seed: int) -> np.ndarray:
    """Draws the evidence of every answer to every query.

    An evidence has distinct facts of the query's group, in order. No two answers to a query have
    the same evidence.

    Args:
      config: the sizes.
      seed: of the draws.

    Returns:
      i32 [queries, answers, evidence].
    """
    query, answer, fact = np.ogrid[: config.queries, : config.answers, : config.group_facts]
    attempt = np.zeros((config.queries, config.answers, 1), int)
    while True:
        draws = hash64("evidence", seed, query, answer, attempt, fact)
        order = np.argsort(draws, axis=-1)[..., : config.evidence]
        same = (order[:, :, None] == order[:, None]).all(-1)  # [queries, answers, answers]
        again = np.tril(same, -1).any(-1)
        if not again.any():
            return (query // config.group_queries * config.group_facts + order).astype(np.int32)
        attempt[again] += 1


# ---- streams; written for one stream, vmapped in `draw`


@functools.partial(jax.jit, static_argnums=0)
def generate(
    config: SyntheticConfig, world: Array, seed: Array | int, split_id: Array | int, indices: Array
) -> dict[str, Array]:
    """Draws streams and questions, as `draw` without what was planted."""
    return draw(config, world, seed, split_id, indices)[0]


@functools.partial(jax.jit, static_argnums=0)
def draw(
    config: SyntheticConfig, world: Array, seed: Array | int, split_id: Array | int, indices: Array
) -> tuple[dict[str, Array], Planted]:
    """Draws streams and questions.

    Args:
      config: the sizes.
      world: i32 [queries, answers, evidence], see `make_world`.
      seed: i32 [], of the streams.
      split_id: i32 [], index of the split in `SPLITS`.
      indices: i32 [B], the streams.

    Returns:
      (the arrays of `Synthetic.fetch`, what was planted with leading axis B).
    """
    split_key = jax.random.fold_in(jax.random.key(seed), split_id)
    world, indices = jnp.asarray(world, jnp.int32), jnp.asarray(indices, jnp.int32)
    return jax.vmap(
        lambda index: _stream(config, world, jax.random.fold_in(split_key, index), index)
    )(indices)


def _stream(
    config: SyntheticConfig, world: Array, key: Key, index: Array
) -> tuple[dict[str, Array], Planted]:
    query, answer = jnp.divmod(index % config.chains, config.answers)
    part = index // config.chains % config.parts
    others = jnp.arange(config.answers) != answer

    def attempt(state):
        tries, *_ = state
        items, planted = _plant(config, world, jax.random.fold_in(key, tries), query, answer, part)
        unique = ~jnp.any(_occurs(items, world[query], config.span) & others)
        return tries + 1, items, planted._replace(unique=unique)

    shapes = jax.eval_shape(lambda: attempt((jnp.int32(0),)))
    start = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    _, items, planted = jax.lax.while_loop(lambda s: ~s[2].unique & (s[0] < _TRIES), attempt, start)
    streams = {
        "items": items,
        "length": jnp.int32(config.length),
        "query": query[None],
        "query_mask": jnp.ones(1, bool),
        "target": answer[None],
        "example_id": index,
    }
    return streams, planted


def _plant(
    config: SyntheticConfig, world: Array, key: Key, query: Array, answer: Array, part: Array
) -> tuple[Array, Planted]:
    """Draws a stream [L]: distractors anywhere, the evidence of (query, answer) in the part.

    `unique` is not computed.
    """
    many = config.distractors + 1
    sizes = {"fact": config.length, "query": config.queries - 1, "answer": many - 1, "start": many}
    sizes |= {"place": many * config.span}
    # One call draws all numbers, since every call costs compilation.
    uniform = jax.random.uniform(key, (sum(sizes.values()),), jnp.float32)
    ends = np.cumsum(list(sizes.values()))[:-1]
    fact_u, query_u, answer_u, start_u, place_u = jnp.split(uniform, ends)

    # Distances from the true query and the true answer, modulo their numbers; never 0.
    far = jnp.argsort(query_u)[: many - 1].astype(jnp.int32) + 1
    away = _integers(answer_u, 1, config.answers)
    queries = jnp.append((query + far) % config.queries, query)
    answers = jnp.append((answer + away) % config.answers, answer)

    # A window lies anywhere in its part, and the positions are uniformly random in the window.
    # The part of a distractor is the stream.
    first, last = (jnp.array(ends, jnp.int32) for ends in config.bounds)
    low = jnp.zeros(many, jnp.int32).at[-1].set(first[part])
    high = jnp.full(many, config.length, jnp.int32).at[-1].set(last[part])
    start = _integers(start_u, low, high - config.span + 1)
    chosen = jnp.sort(jnp.argsort(place_u.reshape(many, config.span))[:, : config.evidence])
    positions = start[:, None] + chosen.astype(jnp.int32)

    items = _integers(fact_u, 0, config.facts)
    for i in range(many):
        items = items.at[positions[i]].set(world[queries[i], answers[i]])
    return items, Planted(queries, answers, positions, jnp.array(False))


def _integers(uniform: Array, low: Array | int, high: Array | int) -> Array:
    """Uniform integers in [low, high).

    The product stays below high - low, because `uniform` has 23 bits.
    """
    return low + jnp.floor(uniform * jnp.asarray(high - low, jnp.float32)).astype(jnp.int32)


def _occurs(items: Array, evidence: Array, span: int) -> Array:
    """Which evidences [A, C] occur in order within `span` positions of a stream [L]: bool [A]."""

    def step(state, entry):
        # latest i32 [A, C]: the latest start of a match of the first 1 .. C facts.
        latest, occurred = state
        item, at = entry
        longer = jnp.concatenate([jnp.full_like(latest[:, :1], at), latest[:, :-1]], axis=1)
        latest = jnp.where(evidence == item, longer, latest)
        return (latest, occurred | (at - latest[:, -1] < span)), None

    start = jnp.full(evidence.shape, -span, jnp.int32), jnp.zeros(len(evidence), bool)
    entries = (items, jnp.arange(len(items), dtype=jnp.int32))
    (_, occurred), _ = jax.lax.scan(step, start, entries)
    return occurred


# ---- readers that know the world


def oracles(
    config: SyntheticConfig, world: np.ndarray, items: np.ndarray, query: np.ndarray
) -> dict[str, np.ndarray]:
    """Answers of readers that know every evidence.

    A reader chooses the answer with the most distinct facts of its evidence in the stream. On a
    tie it chooses the smallest answer; the reader without the query chooses the smallest query
    first. A window has the width of `config.span`. It lies where it holds the most facts.

    Args:
      config: the sizes.
      world: i32 [queries, answers, evidence].
      items: i32 [B, L], the streams.
      query: i32 [B, 1].

    Returns:
      {reader: answers i32 [B, 1]}.
    """
    inside = most_in_window(config, world, items, config.span)
    last_half = most_in_window(config, world, items[:, config.length // 2 :], config.span)
    anywhere = most_in_window(config, world, items, config.length)
    rows = np.arange(len(items))[:, None]
    chain = inside.reshape(len(items), -1).argmax(-1)[:, None]
    chosen = {
        "oracle, bag of facts": anywhere[rows, query].argmax(-1),
        "oracle, bag in a window": inside[rows, query].argmax(-1),
        "oracle, last half only": last_half[rows, query].argmax(-1),
        "oracle, without the query": chain % config.answers,
    }
    return {name: answer.astype(np.int32) for name, answer in chosen.items()}


def most_in_window(
    config: SyntheticConfig, world: np.ndarray, items: np.ndarray, width: int
) -> np.ndarray:
    """Counts the distinct facts of each evidence in the window that holds the most of them.

    Args:
      config: the sizes.
      world: i32 [queries, answers, evidence].
      items: i32 [B, L], the streams.
      width: positions of a window.

    Returns:
      i32 [B, queries, answers].
    """
    return jax.device_get(_most_in_window(config, world, items, width))


@functools.partial(jax.jit, static_argnums=0)
def _most_in_window(
    config: SyntheticConfig, world: Array, items: Array, width: Array | int
) -> Array:
    """i32 [B, queries, answers]. Below, C counts the chains of a group, and R its facts."""
    batch, length = items.shape
    per = config.group_facts
    # Sort the facts by group, then by time. Only windows that end at a fact of the group matter.
    order = jnp.sort(items // per * length + jnp.arange(length, dtype=jnp.int32), axis=1)
    position, fact = order % length, jnp.take_along_axis(items, order % length, axis=1) % per
    bounds = jnp.arange(config.groups + 1) * length
    ends = jax.vmap(lambda row: jnp.searchsorted(row, bounds))(order)  # [B, groups + 1]
    chains = world.reshape(config.groups, -1, config.evidence) % per
    member = (chains[..., None] == jnp.arange(per)).any(2).astype(jnp.float32)  # [groups, C, R]

    def of_group(group):
        first, end, member = group  # [B], [B], [C, R]

        def step(state):
            i, last, best = state
            at = jnp.minimum(first + i, length - 1)[:, None]
            # A stream that has no more facts of the group looks at its last window again.
            inside = first + i < end
            time = jnp.where(inside, jnp.take_along_axis(position, at, 1)[:, 0], length - 1)
            new = jnp.where(inside, jnp.take_along_axis(fact, at, 1)[:, 0], -1)
            last = jnp.where(jnp.arange(per)[:, None] == new, time, last)  # [R, B]
            present = (time - last < width).astype(jnp.float32)
            return i + 1, last, jnp.maximum(best, member @ present)

        last = jnp.full((per, batch), -width, jnp.int32)
        start = (0, last, jnp.zeros((len(member), batch), jnp.float32))
        _, _, best = jax.lax.while_loop(lambda s: s[0] < jnp.max(end - first), step, start)
        return best.astype(jnp.int32)

    best = jax.lax.map(of_group, (ends[:, :-1].T, ends[:, 1:].T, member))  # [groups, C, B]
    return best.reshape(config.queries, config.answers, batch).transpose(2, 0, 1)
