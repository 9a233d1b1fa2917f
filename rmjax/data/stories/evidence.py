"""CM's synthetic evidence task (CM section 4.2): a few facts of a stream, in order, are the answer's evidence.

Facts and queries fall into groups. Every answer to a query has an evidence, some facts of the query's group in order;
each (query, answer) is a logic chain. A stream is of uniformly random facts, the evidence of one chain is planted into
one part of it, and its query asks for the answer: one of `answers` ids, which all queries share.

As stated one evidence is planted, so its answer can nearly be told without the query; `distractors` mend that.
"""

# mypy: disable-error-code=override
# What `Source` has as attributes, the sizes of a world give as properties.

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.data.source import Examples, Questions, Source, hash64
from rmjax.registry import at_least, between, one_of, setting
from rmjax.types import Array, Key

SPLITS = ("train", "valid", "test")
PLACINGS = ("consecutive", "discrete")
_PARTS = {2: ("early", "later"), 4: ("0-25%", "25-50%", "50-75%", "75-100%")}
_TRIES = 64  # of a stream until its answer is the only one
_ITEMS_AT_ONCE = 2**18  # bounds what one call of `fetch` or `references` holds beside its result


@dataclasses.dataclass(frozen=True)
class Settings:
    """The world, and the streams of each logic chain in each split."""

    facts: int = setting(400, at_least(1), "kinds of fact, R_f")
    length: int = setting(200, at_least(1), "facts of a stream, R_l")
    queries: int = setting(40, at_least(1), "kinds of query, R_q")
    answers: int = setting(30, at_least(2), "answers of a query, R_a")
    evidence: int = setting(5, at_least(1), "facts of an evidence, R_c")
    groups: int = setting(20, at_least(1), "groups that facts and queries are split into")
    placing: str = setting(
        "consecutive", one_of("consecutive", "discrete"), "how evidence lies in a stream"
    )
    window: float = setting(
        0.2, between(0, 1), "longest span of discrete evidence, as a share of the stream"
    )
    parts: int = setting(
        2, at_least(1), "parts of the stream that evidence lies in: 2 halves, 4 quarters"
    )
    distractors: int = setting(0, at_least(0), "evidences of other queries in a stream")
    train: int = setting(400, at_least(1), "streams of each logic chain to train on")
    valid: int = setting(20, at_least(1), "streams of each logic chain to validate on")
    test: int = setting(50, at_least(1), "streams of each logic chain to test on")


def make(settings: Settings, common: Any, seed: int) -> Source:
    world = dict(vars(settings))
    samples = {split: world.pop(split) for split in SPLITS}
    return Synthetic(SyntheticConfig(**world), seed, **samples)  # faster made than kept


@dataclasses.dataclass(frozen=True)
class SyntheticConfig:
    """The sizes of CM section 4.2; its longer streams are facts=2000, length=1000, evidence=10, parts=4.

    Raises ValueError naming the field, its value and what is allowed.
    """

    facts: int = 400  # R_f
    length: int = 200  # R_l, facts in a stream
    queries: int = 40  # R_q
    answers: int = 30  # R_a, to each query
    evidence: int = 5  # R_c, facts in the evidence of an answer
    groups: int = 20  # of facts and queries; the facts of an evidence are of its query's group
    placing: str = (
        "consecutive"  # the evidence's facts are neighbours | "discrete": in order within `window`
    )
    window: float = 0.2  # the largest span of discrete evidence, as a share of the stream
    parts: int = 2  # of the stream; evidence lies in one. 2: early and later; 4: quartiles
    distractors: int = 0  # evidences of other queries, for other answers, anywhere; later ones overwrite earlier ones

    def __post_init__(self) -> None:
        for name in ("facts", "length", "queries", "answers", "evidence", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be at least 1")
        for name in ("facts", "queries"):
            if getattr(self, name) % self.groups:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: must be a multiple of groups={self.groups}"
                )
        if self.placing not in PLACINGS:
            raise ValueError(f"placing={self.placing!r}: must be one of {PLACINGS}")
        if self.parts not in _PARTS:
            raise ValueError(f"parts={self.parts!r}: must be one of {tuple(_PARTS)}")
        part = self.length // self.parts
        for name, most in {"a group": self.group_facts, "a part of the stream": part}.items():
            if self.evidence > most:
                raise ValueError(
                    f"evidence={self.evidence!r}: must be at most {most}, the facts of {name}"
                )
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
            raise ValueError(
                f"distractors={self.distractors!r}: must be in [0, {most}], of other queries and answers"
            )

    @property
    def chains(self) -> int:
        """Number of (query, answer)."""
        return self.queries * self.answers

    @property
    def group_facts(self) -> int:
        """Facts in a group: group g has facts g * group_facts and on."""
        return self.facts // self.groups

    @property
    def group_queries(self) -> int:
        """Queries in a group: group g has queries g * group_queries and on."""
        return self.queries // self.groups

    @property
    def width(self) -> int:
        """The window, in facts."""
        return round(self.window * self.length)

    @property
    def span(self) -> int:
        """Within how many positions the evidence lies."""
        return self.evidence if self.placing == "consecutive" else self.width


class Planted(NamedTuple):
    """What was planted into a stream, in that order: the distractors, then the true evidence."""

    query: Array  # i32 [distractors + 1]
    answer: Array  # i32 [distractors + 1]
    positions: Array  # i32 [distractors + 1, evidence]; what is planted later overwrites
    unique: Array  # bool [], whether no other evidence of the last query occurs


@dataclasses.dataclass(frozen=True)
class Synthetic(Source):
    """A source of streams of facts, each with one query after its end.

    Example i is of chain i % chains (query, answer = divmod(chain, answers)), with its evidence in part
    (i // chains) % parts: every split has as many examples of each chain, and a chain as many in each part, up to one.

    With the defaults a reader that counts each evidence's facts in a window is right in 96% of streams, of a bag of all
    facts in 66%, of the last half alone in 97% of those with late evidence and 3% of the others (chance).
    """

    config: SyntheticConfig = SyntheticConfig()
    seed: int = 0  # of the world and its streams
    train: int = 400  # samples of each chain in each split
    valid: int = 20
    test: int = 50
    positions_at_end: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self) -> None:
        for name in SPLITS:
            if self.size(name) < 0:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be at least 0")

    @property
    def num_items(self) -> int:
        return self.config.facts

    @property
    def numbering(self) -> str:
        """What facts, queries and answers stand for: all that `make_world` depends on."""
        c = self.config
        sizes = f"{c.facts} facts in {c.groups} groups, {c.queries} queries of {c.answers} answers"
        return f"synthetic evidence, world {self.seed}: {sizes}, {c.evidence} facts each"

    @property
    def max_items(self) -> int:
        return self.config.length

    @property
    def num_queries(self) -> int:
        return 1

    @property
    def questions(self) -> Questions:
        kinds, classes = self.config.queries, self.config.answers
        return Questions(
            query="kind", kinds=kinds, answer="class", classes=classes, metric="accuracy"
        )

    @functools.cached_property
    def world(self) -> np.ndarray:
        """The evidence of every answer to every query, i32 [queries, answers, evidence]."""
        return make_world(self.config, self.seed)

    def size(self, split: str) -> int:
        """Streams in a split. Raises ValueError for a split not in SPLITS."""
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: must be one of {SPLITS}")
        return int(getattr(self, split)) * self.config.chains

    def fetch(self, split: str, indices: np.ndarray) -> Examples:
        """The streams `indices` [B] of a split; a stream depends on (seed, split, index) alone.

        Returns items i32 [B, L], length i32 [B], query i32 [B, 1], query_mask bool [B, 1], target i32 [B, 1],
        example_id i32 [B].
        Raises ValueError for an unknown split, an index outside it, or a world too small for answers to be unique.
        """
        indices = np.asarray(indices)
        outside = indices[(indices < 0) | (indices >= self.size(split))]
        if outside.size:
            raise ValueError(
                f"indices={outside[:8].tolist()}: must be in [0, {self.size(split)}) for split {split!r}"
            )
        total = len(indices)
        chunk = max(1, min(total, _ITEMS_AT_ONCE // self.max_items))
        padded = np.pad(indices.astype(np.int32), (0, max(1, -(-total // chunk)) * chunk - total))
        parts = []
        for part in padded.reshape(-1, chunk):
            streams, planted = draw(self.config, self.world, self.seed, SPLITS.index(split), part)
            if not np.all(planted.unique):
                raise ValueError(
                    f"facts={self.config.facts}: other answers' evidence occurs in every one of {_TRIES} tries of a "
                    "stream; take more facts or evidence, or fewer answers"
                )
            parts.append(jax.device_get(streams))
        return {name: np.concatenate([part[name] for part in parts])[:total] for name in parts[0]}

    def groups(self, split: str) -> dict[str, np.ndarray]:
        """Which streams have their evidence in each part, bool [size, 1]."""
        part = np.arange(self.size(split))[:, None] // self.config.chains % self.config.parts
        return {name: part == i for i, name in enumerate(_PARTS[self.config.parts])}

    def references(self, split: str) -> dict[str, np.ndarray]:
        """Answers i32 [size, 1] of readers that know every evidence but not the order of its facts; see `oracles`."""
        size = self.size(split)
        chunk = max(1, min(size, _ITEMS_AT_ONCE // self.max_items))
        answers: dict[str, np.ndarray] = {}
        for start in range(0, size, chunk):
            streams = self.fetch(split, np.arange(start, start + chunk) % size)  # all of one shape
            for name, chosen in oracles(
                self.config, self.world, streams["items"], streams["query"]
            ).items():
                answers.setdefault(name, np.empty((size, 1), np.int32))[start : start + chunk] = (
                    chosen[: size - start]
                )
        return answers


# ---- the world, on the host


def make_world(config: SyntheticConfig, seed: int) -> np.ndarray:
    """Evidence i32 [queries, answers, evidence]: distinct facts of the query's group, in order; no two answers to a
    query have the same.
    """
    query, answer, fact = np.ogrid[: config.queries, : config.answers, : config.group_facts]
    attempt = np.zeros((config.queries, config.answers, 1), int)
    while True:
        order = np.argsort(hash64("evidence", seed, query, answer, attempt, fact), axis=-1)[
            ..., : config.evidence
        ]
        same = (order[:, :, None] == order[:, None]).all(-1)  # [queries, answers, answers]
        again = np.tril(same, -1).any(-1)
        if not again.any():
            return (query // config.group_queries * config.group_facts + order).astype(np.int32)
        attempt[again] += 1


# ---- streams: one at a time, vmapped in `draw`


@functools.partial(jax.jit, static_argnums=0)
def generate(
    config: SyntheticConfig, world: Array, seed: Array | int, split_id: Array | int, indices: Array
) -> dict[str, Array]:
    """Streams and questions `indices` [B]: the arrays of `Synthetic.fetch`, for the `world` of `make_world`."""
    return draw(config, world, seed, split_id, indices)[0]


@functools.partial(jax.jit, static_argnums=0)
def draw(
    config: SyntheticConfig, world: Array, seed: Array | int, split_id: Array | int, indices: Array
) -> tuple[dict[str, Array], Planted]:
    """`generate`, and what was planted."""
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
    """A stream [L] with distractors anywhere and the evidence of (query, answer) in the part; `unique` is not known."""
    many = config.distractors + 1
    sizes = {"fact": config.length, "query": config.queries - 1, "answer": many - 1, "start": many}
    sizes |= {"place": many * config.span}
    uniform = jax.random.uniform(
        key, (sum(sizes.values()),), jnp.float32
    )  # at once: every call costs compilation
    fact_u, query_u, answer_u, start_u, place_u = jnp.split(
        uniform, np.cumsum(list(sizes.values()))[:-1]
    )

    # Distances from the true query and answer, modulo how many there are: never 0.
    far, away = (
        jnp.argsort(query_u)[: many - 1].astype(jnp.int32) + 1,
        _integers(answer_u, 1, config.answers),
    )
    queries = jnp.append((query + far) % config.queries, query)
    answers = jnp.append((answer + away) % config.answers, answer)

    # Of a window anywhere in a part, uniformly random positions; a distractor's part is the stream.
    bounds = jnp.array(
        [i * config.length // config.parts for i in range(config.parts + 1)], jnp.int32
    )
    low = jnp.zeros(many, jnp.int32).at[-1].set(bounds[part])
    high = jnp.full(many, config.length, jnp.int32).at[-1].set(bounds[part + 1])
    start = _integers(start_u, low, high - config.span + 1)
    chosen = jnp.sort(jnp.argsort(place_u.reshape(many, config.span))[:, : config.evidence])
    positions = start[:, None] + chosen.astype(jnp.int32)

    items = _integers(fact_u, 0, config.facts)
    for i in range(many):
        items = items.at[positions[i]].set(world[queries[i], answers[i]])
    return items, Planted(queries, answers, positions, jnp.array(False))


def _integers(uniform: Array, low: Array | int, high: Array | int) -> Array:
    """Uniform in [low, high). The product stays below high - low, for `uniform` has 23 bits."""
    return low + jnp.floor(uniform * jnp.asarray(high - low, jnp.float32)).astype(jnp.int32)


def _occurs(items: Array, evidence: Array, span: int) -> Array:
    """Which of the evidences [A, C] occur in order within `span` positions of the stream [L]: bool [A]."""

    def step(state, now):
        latest, found = (
            state  # latest [A, C]: where a match of the first 1 .. C facts starts, the latest such
        )
        item, at = now
        longer = jnp.concatenate([jnp.full_like(latest[:, :1], at), latest[:, :-1]], axis=1)
        latest = jnp.where(evidence == item, longer, latest)
        return (latest, found | (at - latest[:, -1] < span)), None

    start = jnp.full(evidence.shape, -span, jnp.int32), jnp.zeros(len(evidence), bool)
    (_, found), _ = jax.lax.scan(step, start, (items, jnp.arange(len(items), dtype=jnp.int32)))
    return found


# ---- readers that know the world


def oracles(
    config: SyntheticConfig, world: np.ndarray, items: np.ndarray, query: np.ndarray
) -> dict[str, np.ndarray]:
    """The answer [B, 1] with most distinct facts of its evidence present, by reader (ties: the smallest answer; without
    the query the smallest query first). A window is as wide as evidence can be, wherever it holds most.
    """
    inside = most_in_window(config, world, items, config.span)
    last_half = most_in_window(config, world, items[:, config.length // 2 :], config.span)
    anywhere = most_in_window(config, world, items, config.length)
    rows = np.arange(len(items))[:, None]
    chosen = {
        "oracle, bag of facts": anywhere[rows, query].argmax(-1),
        "oracle, bag in a window": inside[rows, query].argmax(-1),
        "oracle, last half only": last_half[rows, query].argmax(-1),
        "oracle, without the query": inside.reshape(len(items), -1).argmax(-1)[:, None]
        % config.answers,
    }
    return {name: answer.astype(np.int32) for name, answer in chosen.items()}


def most_in_window(
    config: SyntheticConfig, world: np.ndarray, items: np.ndarray, width: int
) -> np.ndarray:
    """Most distinct facts of each evidence within `width` positions of streams [B, L]: i32 [B, queries, answers]."""
    return jax.device_get(_most_in_window(config, world, items, width))


@functools.partial(jax.jit, static_argnums=0)
def _most_in_window(
    config: SyntheticConfig, world: Array, items: Array, width: Array | int
) -> Array:
    batch, length = items.shape
    per = config.group_facts
    # A group's facts side by side, in time: only windows that end at one of them need a look.
    order = jnp.sort(items // per * length + jnp.arange(length, dtype=jnp.int32), axis=1)
    position, fact = order % length, jnp.take_along_axis(items, order % length, axis=1) % per
    ends = jax.vmap(lambda row: jnp.searchsorted(row, jnp.arange(config.groups + 1) * length))(
        order
    )  # [B, groups + 1]
    chains = world.reshape(config.groups, -1, config.evidence) % per
    member = (
        (chains[..., None] == jnp.arange(per)).any(2).astype(jnp.float32)
    )  # [groups, chains of one, facts of one]

    def of_group(group):
        first, end, member = group  # [B], [B], [chains of one, facts of one]

        def step(state):
            i, last, best = state
            at = jnp.minimum(first + i, length - 1)[:, None]
            # Past its last fact a stream looks at its last window, again and again.
            now = jnp.where(first + i < end, jnp.take_along_axis(position, at, 1)[:, 0], length - 1)
            new = jnp.where(first + i < end, jnp.take_along_axis(fact, at, 1)[:, 0], -1)
            last = jnp.where(jnp.arange(per)[:, None] == new, now, last)  # [facts of one, B]
            present = (now - last < width).astype(jnp.float32)
            return i + 1, last, jnp.maximum(best, member @ present)

        start = (
            0,
            jnp.full((per, batch), -width, jnp.int32),
            jnp.zeros((len(member), batch), jnp.float32),
        )
        return jax.lax.while_loop(lambda s: s[0] < jnp.max(end - first), step, start)[2].astype(
            jnp.int32
        )

    best = jax.lax.map(
        of_group, (ends[:, :-1].T, ends[:, 1:].T, member)
    )  # [groups, chains of one, B]
    return best.reshape(config.queries, config.answers, batch).transpose(2, 0, 1)
