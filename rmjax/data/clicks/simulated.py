"""Simulated lifelong click logs in XLong's schema, and the answers of the best possible reader.

A user has a few interests. Some end halfway through the log, and others begin there. The style of
an interest drifts from visit to visit; browsing and staples are noise. Half of the questions are
about interests last seen in the first half, so the recent clicks alone cannot answer them. All
questions ask for the LATEST style of an interest.

Every negative is as popular as its positive. The world is known, so `oracle_scores` integrates the
user out exactly: no reader of the same history has a higher expected AUC or log-likelihood.
"""

# mypy: disable-error-code=override
# `Source` declares attributes that are properties here, since they follow from the world's sizes.

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from rmjax.data.source import SPLITS, Generated, Source, cached, hash64
from rmjax.registry import a_seed, at_least, between, setting
from rmjax.types import Array, Key

MAX_INTERESTS = 8
# {number of interests: how many are (early, both, late)}: active in the first half of the log, in
# both halves, in the second half.
LIVES = {3: (1, 1, 1), 4: (2, 1, 1), 5: (2, 1, 2), 6: (2, 2, 2), 7: (3, 2, 2), 8: (3, 2, 3)}
_CLICKS_AT_ONCE = 2**21  # bounds the memory of `fetch` beside its result
_USERS_AT_ONCE = 256  # keeps the oracle's tables in the processor's cache


@dataclasses.dataclass(frozen=True)
class Settings:
    """The simulated world, and the number of users in each split."""

    section: ClassVar[str] = "simulated"

    train: int = setting(20000, at_least(1), "number of users in the training split")
    valid: int = setting(1000, at_least(1), "number of users in the validation split")
    test: int = setting(2000, at_least(1), "number of users in the test split")
    clicks_min: int = setting(1000, at_least(1), "number of clicks of the shortest stream")
    clicks_max: int = setting(1000, at_least(1), "number of clicks of the longest stream")
    visit: int = setting(10, at_least(1), "number of clicks of a visit")
    clusters: int = setting(32, at_least(9), "number of clusters of items")
    styles: int = setting(3, at_least(2), "number of styles of a cluster")
    items_per_style: int = setting(20, at_least(1), "number of items of a style")
    staples: int = setting(80, at_least(1), "number of items that everyone clicks")
    zipf: float = setting(
        1.0, at_least(0), "exponent of item popularity; 0: all items are equally popular"
    )
    browse: float = setting(
        0.2, between(0, 1), "probability that a visit goes to a cluster of no interest"
    )
    drift: float = setting(
        0.1, between(0, 1), "probability that the style of an interest changes between visits"
    )
    staple_rate: float = setting(0.3, between(0, 1), "probability that a click is on a staple")
    explore: float = setting(
        0.1, between(0, 1), "probability that a positive has a random cluster and style"
    )
    targets: int = setting(8, at_least(1), "number of positives of a user, each with a negative")
    hard: float = setting(
        0.2, between(0, 1), "probability that a negative has the cluster of its positive"
    )
    labelled: float = setting(
        1.0, between(0, 1), "share of the training users that are asked; others are streams alone"
    )
    world_seed: int = setting(0, a_seed, "seed that shuffles the item ids")


def make(settings: Settings, common: ConfigDict, seed: int) -> Source:
    """Opens the source, see `rmjax.Source`."""
    world = dict(vars(settings))
    users = {name: world.pop(name) for name in (*SPLITS, "labelled")}
    return cached(SimulatedClicks(ClicksConfig(**world), seed, **users), common.ram_bytes)


@dataclasses.dataclass(frozen=True)
class ClicksConfig:
    """The simulated world and its users.

    An item is (cluster, style, rank), or a staple, which has no cluster. Item ids are shuffled.

    Attributes:
      clusters: number of topics; more than the 8 interests that a user can have.
      styles: number of styles of each cluster.
      items_per_style: number of items of each style.
      staples: number of staples.
      zipf: exponent of the popularity of ranks; the same in every style and among the staples.
      visit: number of clicks of a visit. A visit is to one (cluster, style).
      clicks_min: fewest clicks of a user. Lengths are log-uniform multiples of `visit`; the
        simulator is meant for 1,000 to 50,000 clicks.
      clicks_max: most clicks of a user.
      browse: probability that a visit is to a cluster that is no interest of the user.
      drift: probability that the style of an interest changes from one visit to the next.
      staple_rate: probability that a click is on a staple; the first click of a visit never is.
      targets: number of positives of a user.
      explore: probability that a positive has a uniformly random (cluster, style).
      hard: probability that a negative has the cluster of its positive, in another style.
      world_seed: seed that shuffles the item ids.

    Raises:
      ValueError: a field is out of range; names the field, its value and the allowed range.
    """

    clusters: int = 32
    styles: int = 3
    items_per_style: int = 20
    staples: int = 80
    zipf: float = 1.0
    visit: int = 10
    clicks_min: int = 1000
    clicks_max: int = 1000
    browse: float = 0.2
    drift: float = 0.1
    staple_rate: float = 0.3
    targets: int = 8
    explore: float = 0.1
    hard: float = 0.2
    world_seed: int = 0

    def __post_init__(self) -> None:
        least = dict(clusters=MAX_INTERESTS + 1, styles=2, items_per_style=1, staples=1, visit=1)
        least |= dict(targets=1, clicks_min=2 * self.visit, clicks_max=self.clicks_min, zipf=0)
        for name, low in least.items():
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: must be at least {low}, and finite"
                )
        for name in ("browse", "drift", "staple_rate", "explore", "hard"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be in [0, 1]")
        for name in ("clicks_min", "clicks_max"):
            if getattr(self, name) % self.visit:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: must be a multiple of visit={self.visit}"
                )

    @property
    def num_items(self) -> int:
        """Number of items, staples included."""
        return self.clusters * self.styles * self.items_per_style + self.staples


class Latents(NamedTuple):
    """The hidden state of one user that `simulate` drew. No reader sees it.

    Interests are ordered early, both, late. V is the number of visits, and Q = 2 targets is the
    number of questions.
    """

    interests: Array  # i32 [] number of interests
    lives: Array  # i32 [3] number of interests that are early, both, late
    cluster: Array  # i32 [8] cluster of each interest; entries after the last interest are unused
    style: Array  # i32 [8] style of each interest after the last visit
    visit_interest: Array  # i32 [V] interest of each visit; `interests` or more: browsing
    visit_cluster: Array  # i32 [V]
    visit_style: Array  # i32 [V]
    target_interest: Array  # i32 [targets] interest of each positive; -1: a random item
    query_cluster: Array  # i32 [Q]
    query_style: Array  # i32 [Q]
    query_rank: Array  # i32 [Q]


@dataclasses.dataclass(frozen=True)
class SimulatedClicks(Generated):
    """Streams of clicks. After the stream, each user is asked: would you click this item?

    With the defaults, `oracle_scores` has AUC 0.912. It has 0.602 if it sees the last 20 clicks
    only, and 0.822 if it sees the clusters only.

    Attributes:
      config: the world.
      seed: seed of the users.
      train: number of users in 'train'.
      valid: number of users in 'valid'.
      test: number of users in 'test'.
      labelled: share of the users in 'train' that are asked. A hash of (seed, index) chooses them,
        so a larger share contains a smaller one. The others have streams without questions.
      positions_at_end: see `Source`.

    Raises:
      ValueError: a split has a negative size, or the share is outside [0, 1].
    """

    config: ClicksConfig = ClicksConfig()
    seed: int = 0
    train: int = 20000
    valid: int = 1000
    test: int = 2000
    labelled: float = 1.0
    positions_at_end: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self) -> None:
        for name in SPLITS:
            if self.size(name) < 0:
                raise ValueError(f"{name}={self.size(name)!r}: must be at least 0")
        if not 0 <= self.labelled <= 1:
            raise ValueError(f"labelled={self.labelled!r}: must be in [0, 1]")

    @property
    def num_items(self) -> int:
        """See `Source`."""
        return self.config.num_items

    @property
    def numbering(self) -> str:
        """See `Source`; names all that `_item_ids` and `_group_item` depend on."""
        c = self.config
        sizes = f"{c.clusters} clusters of {c.styles} styles of {c.items_per_style} items"
        sizes += f", {c.staples} staples"
        return f"simulated clicks, world {c.world_seed}: {sizes}"

    @property
    def max_items(self) -> int:
        """See `Source`."""
        return self.config.clicks_max

    @property
    def num_queries(self) -> int:
        """See `Source`."""
        return 2 * self.config.targets

    def fetch(self, split: str, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Draws users, see `Source.fetch`. A user depends on (seed, split, index) alone.

        Args:
          split: 'train', 'valid' or 'test'.
          indices: i [B].

        Returns:
          items i32 [B, L] (0 after the end), length i32 [B], query i32 [B, Q] (positive, negative,
          positive, ...); query_mask bool [B, Q], target i32 [B, Q] (1, 0, 1, ...), and
          example_id i32 [B]. A user without labels has no question: query_mask is false, and query
          and target are 0.

        Raises:
          ValueError: the split is unknown, or an index is outside it.
        """
        indices = np.asarray(indices, np.int32)
        outside = indices[(indices < 0) | (indices >= self.size(split))]
        if outside.size:
            allowed = f"must be in [0, {self.size(split)}) for split {split!r}"
            raise ValueError(f"indices={outside[:8].tolist()}: {allowed}")
        total = len(indices)
        chunk = max(1, min(total, _CLICKS_AT_ONCE // self.max_items))
        padded = np.pad(indices, (0, max(1, -(-total // chunk)) * chunk - total))
        parts = [
            jax.device_get(generate(self.config, self.seed, SPLITS.index(split), part))
            for part in padded.reshape(-1, chunk)
        ]
        streams = {
            name: np.concatenate([part[name] for part in parts])[:total] for name in parts[0]
        }
        if split == "train" and self.labelled < 1:
            draws = hash64("labelled", self.seed, indices) / 2.0**64
            for name in ("query", "query_mask", "target"):
                streams[name] = np.where((draws < self.labelled)[:, None], streams[name], 0).astype(
                    streams[name].dtype
                )
        return streams

    def references(self, split: str) -> dict[str, np.ndarray]:
        """Scores the questions by the best possible readers, see `Source.references`.

        Args:
          split: 'train', 'valid' or 'test'.

        Returns:
          Two scores f64 [size, Q]: one reader sees all clicks, the other the last 20, rounded down
          to complete visits.
        """
        streams = self.fetch(split, np.arange(self.size(split)))
        recent = 20 // self.config.visit * self.config.visit
        return {
            "oracle, full history": oracle_scores(self.config, streams),
            f"oracle, last {recent} clicks": oracle_scores(self.config, streams, last=recent),
        }


# ---- the simulator: one user at a time, vmapped in `simulate`


@functools.partial(jax.jit, static_argnums=0)
def generate(
    config: ClicksConfig, seed: Array | int, split_id: Array | int, indices: Array
) -> dict[str, Array]:
    """Draws the streams and questions of users.

    Args:
      config: the world.
      seed: seed of the users.
      split_id: index of the split in `SPLITS`.
      indices: i32 [B], the users.

    Returns:
      The arrays of `SimulatedClicks.fetch`.
    """
    return simulate(config, seed, split_id, indices)[0]


@functools.partial(jax.jit, static_argnums=0)
def simulate(
    config: ClicksConfig, seed: Array | int, split_id: Array | int, indices: Array
) -> tuple[dict[str, Array], Latents]:
    """Draws users like `generate`, and also returns their hidden state.

    Args:
      config: the world.
      seed: seed of the users.
      split_id: index of the split in `SPLITS`.
      indices: i32 [B], the users.

    Returns:
      (arrays of `SimulatedClicks.fetch`, latents with a leading axis B).
    """
    split_key = jax.random.fold_in(jax.random.key(seed), split_id)
    user = lambda index: _user(config, jax.random.fold_in(split_key, index), index)
    return jax.vmap(user)(indices)


def _user(config: ClicksConfig, key: Key, index: Array) -> tuple[dict[str, Array], Latents]:
    """Draws one user."""
    user_key, order_key, visit_key, click_key, question_key = jax.random.split(key, 5)
    length_u, interests_u = _uniform(user_key, (2,))
    visits = config.clicks_min // config.visit + _draw(length_u, _length_steps(config))
    interests = _integer(interests_u, min(LIVES), max(LIVES) + 1)
    lives = jnp.array(list(LIVES.values()), jnp.int32)[interests - min(LIVES)]
    # The clusters are in random order: the first `interests` of them, and the life of each, are a
    # uniform choice.
    random_bits = jax.random.bits(order_key, (config.clusters,), jnp.uint32)
    order = jnp.argsort(random_bits).astype(jnp.int32)

    slot, visit_style, style = _visits(config, visit_key, visits, interests, lives)
    clicks = _clicks(config, click_key, order[slot], visit_style)
    questions = _questions(config, question_key, order, lives, style)
    target_interest, cluster, query_style, rank = questions

    ids = jnp.asarray(_item_ids(config))
    length = visits * config.visit
    query = ids[_group_item(config, cluster, query_style, rank)]
    streams = {
        "items": jnp.where(jnp.arange(config.clicks_max) < length, ids[clicks.reshape(-1)], 0),
        "length": length,
        "query": query,
        "query_mask": jnp.ones(query.shape, bool),
        "target": jnp.tile(jnp.array([1, 0], jnp.int32), config.targets),
        "example_id": index.astype(jnp.int32),
    }
    of_users = interests, lives, order[:MAX_INTERESTS], style
    of_visits = slot, order[slot], visit_style
    of_questions = target_interest, cluster, query_style, rank
    latents = Latents(*of_users, *of_visits, *of_questions)
    return streams, latents


def _visits(
    config: ClicksConfig, key: Key, visits: Array, interests: Array, lives: Array
) -> tuple[Array, Array, Array]:
    """Draws the visits.

    Returns:
      (slot [V], style [V], last style of each interest [8]). A slot is a place in the user's order
      of clusters, whose first places are the interests.
    """
    start_key, key = jax.random.split(key)
    at = jnp.arange(config.clicks_max // config.visit)
    browse_u, slot_u, drift_u, change_u, style_u = _uniform(key, (5, *at.shape))
    early, both, _ = lives
    first_half = at < visits // 2
    low, high = jnp.where(first_half, 0, early), jnp.where(first_half, early + both, interests)
    browsing = browse_u < config.browse
    first, end = jnp.where(browsing, interests, low), jnp.where(browsing, config.clusters, high)
    slot = _integer(slot_u, first, end)

    # After n visits, an interest has its first style plus its n changes, modulo `styles`.
    start = _integer(_uniform(start_key, (MAX_INTERESTS,)), 0, config.styles)
    of_slot = slot[:, None] == jnp.arange(MAX_INTERESTS)
    mine = ~browsing[:, None] & of_slot & (at < visits)[:, None]
    change = _change(config, drift_u, change_u)[:, None]
    changes = jnp.cumsum(jnp.where(mine, change, 0), axis=0, dtype=jnp.int32)
    style = (start + changes) % config.styles  # [V, 8]
    visited = jnp.sum(jnp.where(mine, style, 0), axis=1, dtype=jnp.int32)
    return slot, jnp.where(browsing, _integer(style_u, 0, config.styles), visited), style[-1]


def _clicks(config: ClicksConfig, key: Key, cluster: Array, style: Array) -> Array:
    """Draws the unshuffled items [V, visit] of visits to (cluster [V], style [V])."""
    staple_u, rank_u, staple_rank_u = _uniform(key, (3, cluster.shape[0], config.visit))
    staple = (staple_u < config.staple_rate) & (jnp.arange(config.visit) > 0)
    rank = _draw(rank_u, _zipf_steps(config.zipf, config.items_per_style))
    staple_rank = _draw(staple_rank_u, _zipf_steps(config.zipf, config.staples))
    topical = _group_item(config, cluster[:, None], style[:, None], rank)
    return jnp.where(staple, config.num_items - config.staples + staple_rank, topical)


def _questions(
    config: ClicksConfig, key: Key, order: Array, lives: Array, style: Array
) -> tuple[Array, Array, Array, Array]:
    """Draws the questions.

    Returns:
      Interest of each positive [targets], -1 for a random item; cluster, style and rank of each
      question [Q], positive, negative, positive, ...
    """
    uniform = _uniform(key, (11, config.targets))
    explore_u, early_u, interest_u, drift_u, change_u, cluster_u = uniform[:6]
    style_u, rank_u, hard_u, other_u, easy_u = uniform[6:]
    ask_early = early_u < 0.5
    low = jnp.where(ask_early, 0, lives[0])
    high = jnp.where(ask_early, lives[0], jnp.sum(lives, dtype=jnp.int32))
    interest = _integer(interest_u, low, high)
    drifted = (style[interest] + _change(config, drift_u, change_u)) % config.styles
    explore = explore_u < config.explore
    cluster = jnp.where(explore, _integer(cluster_u, 0, config.clusters), order[interest])
    positive_style = jnp.where(explore, _integer(style_u, 0, config.styles), drifted)
    # A pair shares its rank, so that popularity says nothing.
    rank = _draw(rank_u, _zipf_steps(config.zipf, config.items_per_style))

    hard = hard_u < config.hard
    other_cluster = (cluster + _integer(other_u, 1, config.clusters)) % config.clusters
    other_style = (positive_style + _integer(other_u, 1, config.styles)) % config.styles
    negative_cluster = jnp.where(hard, cluster, other_cluster)
    negative_style = jnp.where(hard, other_style, _integer(easy_u, 0, config.styles))

    def in_turn(positive: Array, negative: Array) -> Array:
        return jnp.stack([positive, negative], axis=-1).reshape(-1)

    return (
        jnp.where(explore, -1, interest),
        in_turn(cluster, negative_cluster),
        in_turn(positive_style, negative_style),
        in_turn(rank, rank),
    )


def _change(config: ClicksConfig, drift_u: Array, change_u: Array) -> Array:
    """Draws a step of drift: with probability `drift` a uniform change of style, otherwise 0."""
    return jnp.where(drift_u < config.drift, _integer(change_u, 1, config.styles), 0)


def _group_item(config: ClicksConfig, cluster: Array, style: Array, rank: Array) -> Array:
    """Numbers the item (cluster, style, rank), unshuffled."""
    return (cluster * config.styles + style) * config.items_per_style + rank


# Draws compare uniform numbers with tables, or scale them. No rounding depends on the batch size.


def _uniform(key: Key, shape: tuple[int, ...]) -> Array:
    """Draws uniform numbers. They are drawn flat, which compiles 20 times faster."""
    return jax.random.uniform(key, (math.prod(shape),), jnp.float32).reshape(shape)


def _integer(uniform: Array, low: Array | int, high: Array | int) -> Array:
    """Scales to [low, high). The product stays below high - low, since `uniform` has 23 bits."""
    size = jnp.asarray(high - low, jnp.float32)
    return low + jnp.floor(uniform * size).astype(jnp.int32)


def _draw(uniform: Array, steps: np.ndarray) -> Array:
    """Draws from the cumulative probabilities `steps`, whose last one, 1, is left out."""
    return jnp.searchsorted(jnp.asarray(steps), uniform, side="right").astype(jnp.int32)


def _zipf_steps(exponent: float, ranks: int) -> np.ndarray:
    """Computes the cumulative Zipf probabilities of the ranks, without the last one."""
    weight = np.arange(1, ranks + 1) ** -float(exponent)
    return np.cumsum(weight / weight.sum())[:-1].astype(np.float32)


def _length_steps(config: ClicksConfig) -> np.ndarray:
    """Computes the cumulative probabilities of the number of visits above the least.

    Clicks are log-uniform, rounded to the nearest multiple of a visit.
    """
    low, high = math.log(config.clicks_min), math.log(config.clicks_max)
    edges = np.arange(config.clicks_min, config.clicks_max, config.visit) + config.visit / 2
    return ((np.log(edges) - low) / max(high - low, 1e-9)).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _item_ids(config: ClicksConfig) -> np.ndarray:
    """Shuffles the items by the world's seed: i32 [num_items], the id of each unshuffled item."""
    with jax.ensure_compile_time_eval():
        items = jnp.arange(config.num_items, dtype=jnp.int32)
        return np.asarray(jax.random.permutation(jax.random.key(config.world_seed), items))


# ---- the oracle: NumPy float64, users on the last axis


def oracle_scores(
    config: ClicksConfig,
    streams: dict[str, np.ndarray],
    last: int | None = None,
    styles: bool = True,
) -> np.ndarray:
    """Scores the questions as the best possible reader of a history does.

    The number of interests of the user, their clusters, lives and styles are integrated out
    exactly. The first click of a visit determines its (cluster, style); ranks and staples say
    nothing about the others.

    Args:
      config: the world.
      streams: what `SimulatedClicks.fetch` returns; only items, length and query are read.
      last: number of clicks at the end that the reader sees, a multiple of `visit`; None: all.
      styles: whether the reader sees the styles of the visits, beside their clusters.

    Returns:
      f64 [B, Q], log p(query | positive, history) - log p(query | negative, history). Its sigmoid
      is P(target = 1).

    Raises:
      ValueError: `last` is negative or cuts a visit.
    """
    if last is not None and (last < 0 or last % config.visit):
        raise ValueError(
            f"last={last!r}: must be None or a multiple of visit={config.visit}, at least 0"
        )
    unshuffled = np.argsort(_item_ids(config))
    parts = []
    for at in range(0, len(streams["length"]), _USERS_AT_ONCE):
        rows = slice(at, at + _USERS_AT_ONCE)
        first_click = unshuffled[streams["items"][rows, :: config.visit]]
        group = first_click // config.items_per_style
        counts = _count_visits(config, group, streams["length"][rows] // config.visit, last)
        query = unshuffled[streams["query"][rows]] // config.items_per_style
        parts.append(_score(config, counts, query, styles))
    return np.concatenate(parts) if parts else np.zeros(streams["query"].shape)


class _Counts(NamedTuple):
    """Statistics of the visits that the reader sees, by cluster."""

    first: np.ndarray  # [C, B] number of visits in the first half
    second: np.ndarray  # [C, B] number of visits in the second half
    stays: np.ndarray  # [C, B] number of visits in the style of the cluster's previous visit
    changes: np.ndarray  # [C, B] number of visits in another style than the previous one
    style: np.ndarray  # [C, B] style of the last visit; -1: no visit


def _count_visits(
    config: ClicksConfig, group: np.ndarray, visits: np.ndarray, last: int | None
) -> _Counts:
    """Counts the visits by cluster. `group` [B, V] names the (cluster, style) of a visit.

    `visits` [B] is the number of visits of each user.
    """
    users, at = len(group), np.arange(group.shape[1])
    since = 0 if last is None else visits[:, None] - last // config.visit
    seen = (at < visits[:, None]) & (at >= since)
    # Unseen visits count for an extra cluster, which is dropped.
    cluster = np.where(seen, group // config.styles, config.clusters)

    def count(which: np.ndarray, clusters: np.ndarray) -> np.ndarray:
        cell = (clusters * users + np.arange(users)[:, None])[which]
        return np.bincount(cell, minlength=(config.clusters + 1) * users).reshape(-1, users)[:-1]

    first_half = at < visits[:, None] // 2
    order = np.argsort(
        cluster, axis=1, kind="stable"
    )  # visits of a cluster become adjacent, by time
    sorted_cluster = np.take_along_axis(cluster, order, 1)
    sorted_style = np.take_along_axis(group % config.styles, order, 1)
    same = sorted_cluster[:, 1:] == sorted_cluster[:, :-1]
    stay = sorted_style[:, 1:] == sorted_style[:, :-1]
    style = np.full((config.clusters + 1, users), -1)
    user, end = np.nonzero(np.pad(~same, ((0, 0), (0, 1)), constant_values=True))
    style[sorted_cluster[user, end], user] = sorted_style[user, end]
    return _Counts(
        count(first_half, cluster),
        count(~first_half, cluster),
        count(same & stay, sorted_cluster[:, 1:]),
        count(same & ~stay, sorted_cluster[:, 1:]),
        style[:-1],
    )


def _score(config: ClicksConfig, counts: _Counts, query: np.ndarray, styles: bool) -> np.ndarray:
    """Scores the groups `query` [B, Q]: f64 [B, Q]."""
    posteriors = (_interest_posterior(config, counts, m, styles) for m in LIVES)
    evidence, asked = zip(*posteriors, strict=True)
    # [m, B]; the prior of m is uniform
    weight = np.exp(np.stack(evidence) - np.max(evidence, axis=0))
    asked_cluster = np.einsum("mb,mcb->cb", weight / weight.sum(0), np.stack(asked))

    cluster, style = query // config.styles, query % config.styles
    user = np.arange(len(query))[:, None]
    last_style = counts.style[cluster, user]
    other_style = config.drift / (config.styles - 1)
    p_style = np.where(last_style == style, 1 - config.drift, other_style)
    p_style = np.where((last_style < 0) | (not styles), 1 / config.styles, p_style)

    groups = config.clusters * config.styles
    p_interest = (1 - config.explore) * asked_cluster[cluster, user]
    positive = p_interest * p_style + config.explore / groups
    positive_cluster = p_interest + config.explore / config.clusters
    hard = config.hard * (positive_cluster - positive) / (config.styles - 1)
    easy = (1 - config.hard) * (1 - positive_cluster) / (groups - config.styles)
    negative = hard + easy
    with np.errstate(divide="ignore"):
        return np.log(positive) - np.log(np.maximum(negative, 0))


def _interest_posterior(
    config: ClicksConfig, counts: _Counts, interests: int, styles: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Computes the posterior of a user with a given number of interests.

    Given its life, the visits of a cluster are independent of those of the other clusters. All
    assignments of lives to clusters are equally likely. The sum over assignments is therefore a
    coefficient of a product of polynomials in (early, both, late), one polynomial per cluster.
    `before` and `after` are the products over the clusters on either side of a cluster.

    Returns:
      log p(visits) [B], and the probability that a positive asks for each cluster [C, B].
    """
    early, both, late = lives = LIVES[interests]
    first, second = counts.first, counts.second
    browse_one = config.browse / (config.clusters - interests)
    first_one, second_one = (
        (1 - config.browse) / (early + both),
        (1 - config.browse) / (both + late),
    )
    uniform = chain = np.zeros(first.shape)
    if styles:
        uniform = -(first + second) * math.log(config.styles)
        stays = _power(1 - config.drift, counts.stays)
        chain = stays + _power(config.drift / (config.styles - 1), counts.changes)
        chain = chain - (first + second > 0) * math.log(config.styles)
    none = _power(browse_one, first + second) + uniform
    alive = [
        _power(first_one, first) + _power(0.0, second) + chain,
        _power(first_one, first) + _power(second_one, second) + chain,
        _power(0.0, first) + _power(second_one, second) + chain,
    ]

    clusters, users = first.shape
    shape = tuple(n + 1 for n in lives)
    before = np.full((clusters + 1, *shape, users), -np.inf)
    after = before.copy()
    before[0, 0, 0, 0] = after[-1, 0, 0, 0] = 0
    for c in range(clusters):
        before[c + 1] = _times(before[c], none[c], [w[c] for w in alive])
    for c in reversed(range(clusters)):
        after[c] = _times(after[c + 1], none[c], [w[c] for w in alive])
    total = before[(-1, *lives)]  # [B]
    scale = np.where(np.isfinite(total), total, 0)

    probability = []
    for axis in range(3):
        # One cluster has the life. The clusters before it take some of the other lives, and the
        # clusters after it take the rest.
        left = before[:-1][_cut(axis, slice(None, -1))]
        right = after[1:, ::-1, ::-1, ::-1][_cut(axis, slice(1, None))]
        log_terms = left + right + (alive[axis] - scale)[:, None, None, None]
        probability.append(np.exp(log_terms).sum((1, 2, 3)))
    p_early, p_both, p_late = probability
    choices = math.lgamma(clusters + 1) - math.lgamma(clusters - interests + 1)
    choices -= sum(math.lgamma(n + 1) for n in lives)
    return total - choices, 0.5 * p_early / early + 0.5 * (p_both + p_late) / (both + late)


def _times(table: np.ndarray, none: np.ndarray, alive: list[np.ndarray]) -> np.ndarray:
    """Multiplies a polynomial [e, b, l, B] by none + early x + both y + late z, in logarithms.

    Higher terms are dropped.
    """
    product = table + none
    for axis, weight in enumerate(alive):
        up, down = _cut(axis, slice(1, None))[1:], _cut(axis, slice(None, -1))[1:]
        product[up] = np.logaddexp(product[up], table[down] + weight)
    return product


def _cut(axis: int, part: slice) -> tuple[slice, ...]:
    """Makes the index that takes `part` of axis e, b or l of a table [C, e, b, l, B]."""
    return tuple(part if i == axis + 1 else slice(None) for i in range(4))


def _power(base: float, exponent: np.ndarray) -> np.ndarray:
    """Computes log(base^exponent), where 0^0 = 1."""
    if base > 0:
        return np.where(exponent > 0, exponent * math.log(base), 0.0)
    return np.where(exponent > 0, -np.inf, 0.0)
