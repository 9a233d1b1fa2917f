"""Simulated lifelong click logs in XLong's schema, and what the best possible reader of them would answer.

A user has a few interests, of which some die halfway through the log and some are born there, and whose style drifts
from visit to visit; browsing and staples are noise. Half of the questions are about interests last seen in the first
half, so a reader of the recent clicks alone cannot answer them, and all ask for an interest's LATEST style.

Every negative is as popular as its positive. The world is known, so `oracle_scores` integrates the user out exactly:
no reader of the same history has a higher expected AUC or log-likelihood.
"""

# mypy: disable-error-code=override
# What `Source` has as attributes, the sizes of a world give as properties.

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rmjax.data.source import Source, cached
from rmjax.registry import a_seed, at_least, between, setting
from rmjax.types import Array, Key

SPLITS = ("train", "valid", "test")
MAX_INTERESTS = 8
# Interests of a user -> how many are (early, both, late): active in the first half, in both, in the second.
LIVES = {3: (1, 1, 1), 4: (2, 1, 1), 5: (2, 1, 2), 6: (2, 2, 2), 7: (3, 2, 2), 8: (3, 2, 3)}
_CLICKS_AT_ONCE = 2**21  # bounds what one call of `fetch` holds beside its result
_USERS_AT_ONCE = 256  # keeps the oracle's tables in cache


@dataclasses.dataclass(frozen=True)
class Settings:
    """The world, and its users in each split."""

    section: ClassVar[str] = "simulated"

    train: int = setting(20000, at_least(1), "users to train on")
    valid: int = setting(1000, at_least(1), "users to validate on")
    test: int = setting(2000, at_least(1), "users to test on")
    clicks_min: int = setting(1000, at_least(1), "clicks of the shortest stream")
    clicks_max: int = setting(1000, at_least(1), "clicks of the longest stream")
    visit: int = setting(10, at_least(1), "clicks a visit")
    clusters: int = setting(32, at_least(9), "clusters of items")
    styles: int = setting(3, at_least(2), "styles a cluster")
    items_per_style: int = setting(20, at_least(1), "items a style")
    staples: int = setting(80, at_least(1), "items everyone clicks")
    zipf: float = setting(1.0, at_least(0), "how uneven items are in popularity; 0: even")
    browse: float = setting(
        0.2, between(0, 1), "chance that a visit is to a cluster of no interest"
    )
    drift: float = setting(
        0.1, between(0, 1), "chance that an interest's style changes between its visits"
    )
    staple_rate: float = setting(0.3, between(0, 1), "chance that a click is on a staple")
    explore: float = setting(0.1, between(0, 1), "chance that a positive is of no interest")
    targets: int = setting(8, at_least(1), "positives of a user, each with a negative")
    hard: float = setting(0.2, between(0, 1), "chance that a negative has its positive's cluster")
    world_seed: int = setting(0, a_seed, "shuffles the item ids")


def make(settings: Settings, common: Any, seed: int) -> Source:
    world = dict(vars(settings))
    users = {split: world.pop(split) for split in SPLITS}
    return cached(SimulatedClicks(ClicksConfig(**world), seed, **users), common.ram_bytes)


@dataclasses.dataclass(frozen=True)
class ClicksConfig:
    """The world and its users. Item = (cluster, style, rank), or a staple of no cluster; ids are shuffled.

    Raises ValueError naming the field, its value and what is allowed.
    """

    clusters: int = 32  # topics; more than the 8 interests a user can have
    styles: int = 3  # of each cluster
    items_per_style: int = 20
    staples: int = 80
    zipf: float = (
        1.0  # exponent of the popularity of ranks, the same in every group and among staples
    )
    visit: int = 10  # clicks in a visit: one (cluster, style)
    clicks_min: int = (
        1000  # clicks of a user: log-uniform, a multiple of `visit`; meant for 1,000 to 50,000
    )
    clicks_max: int = 1000
    browse: float = 0.2  # probability that a visit is to a cluster which is no interest
    drift: float = (
        0.1  # probability that an interest's style changes from one of its visits to the next
    )
    staple_rate: float = 0.3  # probability that a click, other than a visit's first, is on a staple
    targets: int = 8  # positives of a user
    explore: float = 0.1  # probability that a positive is of a uniformly random (cluster, style)
    hard: float = 0.2  # probability that a negative has its positive's cluster, in another style
    world_seed: int = 0  # shuffles the item ids

    def __post_init__(self) -> None:
        least = {
            "clusters": MAX_INTERESTS + 1,
            "styles": 2,
            "items_per_style": 1,
            "staples": 1,
            "visit": 1,
        }
        least |= {
            "targets": 1,
            "clicks_min": 2 * self.visit,
            "clicks_max": self.clicks_min,
            "zipf": 0,
        }
        for name, low in least.items():
            if not low <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r}: must be at least {low}")
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
        return self.clusters * self.styles * self.items_per_style + self.staples


class Latents(NamedTuple):
    """What `simulate` drew of one user and no reader is shown. Interests are ordered early, both, late."""

    interests: Array  # i32 [] how many
    lives: Array  # i32 [3] how many are early, both, late
    cluster: Array  # i32 [8] of each interest; those after the last are no interests
    style: Array  # i32 [8] of each interest after the last visit
    visit_interest: Array  # i32 [V] which interest a visit is to; `interests` or more: browsing
    visit_cluster: Array  # i32 [V]
    visit_style: Array  # i32 [V]
    target_interest: Array  # i32 [targets] which interest a positive is of; -1: explored
    query_cluster: Array  # i32 [Q]
    query_style: Array  # i32 [Q]
    query_rank: Array  # i32 [Q]


@dataclasses.dataclass(frozen=True)
class SimulatedClicks(Source):
    """A source of streams of clicks, each with questions after its end: would the user click this item?

    With the defaults `oracle_scores` has AUC 0.912; of the last 20 clicks alone 0.602, of the clusters alone 0.822.
    """

    config: ClicksConfig = ClicksConfig()
    seed: int = 0  # of the users
    train: int = 20000  # users in each split
    valid: int = 1000
    test: int = 2000
    positions_at_end: bool = dataclasses.field(default=True, init=False)

    def __post_init__(self) -> None:
        for name in SPLITS:
            if self.size(name) < 0:
                raise ValueError(f"{name}={self.size(name)!r}: must be at least 0")

    @property
    def num_items(self) -> int:
        return self.config.num_items

    @property
    def numbering(self) -> str:
        """What item ids stand for: all that `_item_ids` and `_group_item` depend on."""
        c = self.config
        sizes = f"{c.clusters} clusters of {c.styles} styles of {c.items_per_style} items, {c.staples} staples"
        return f"simulated clicks, world {c.world_seed}: {sizes}"

    @property
    def max_items(self) -> int:
        return self.config.clicks_max

    @property
    def num_queries(self) -> int:
        return 2 * self.config.targets

    def size(self, split: str) -> int:
        """Users in a split. Raises ValueError for a split not in SPLITS."""
        if split not in SPLITS:
            raise ValueError(f"split={split!r}: must be one of {SPLITS}")
        return int(getattr(self, split))

    def fetch(self, split: str, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The users `indices` [B] of a split; a user depends on (seed, split, index) alone.

        Returns items i32 [B, L] (0 after the end), length i32 [B], query i32 [B, Q] (positive, negative, positive,
        ...), query_mask bool [B, Q], target i32 [B, Q] (1, 0, 1, ...), example_id i32 [B].
        Raises ValueError for an unknown split or an index outside it.
        """
        indices = np.asarray(indices, np.int32)
        outside = indices[(indices < 0) | (indices >= self.size(split))]
        if outside.size:
            raise ValueError(
                f"indices={outside[:8].tolist()}: must be in [0, {self.size(split)}) for split {split!r}"
            )
        total = len(indices)
        chunk = max(1, min(total, _CLICKS_AT_ONCE // self.max_items))
        padded = np.pad(indices, (0, max(1, -(-total // chunk)) * chunk - total))
        parts = [
            jax.device_get(generate(self.config, self.seed, SPLITS.index(split), part))
            for part in padded.reshape(-1, chunk)
        ]
        return {name: np.concatenate([part[name] for part in parts])[:total] for name in parts[0]}

    def references(self, split: str) -> dict[str, np.ndarray]:
        """What the best possible readers of all clicks and of the last 20 (whole visits) answer: f64 [size, Q]."""
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
    """Streams and questions of users `indices` [B]: the arrays of `SimulatedClicks.fetch`."""
    return simulate(config, seed, split_id, indices)[0]


@functools.partial(jax.jit, static_argnums=0)
def simulate(
    config: ClicksConfig, seed: Array | int, split_id: Array | int, indices: Array
) -> tuple[dict[str, Array], Latents]:
    """`generate`, and what was drawn on the way."""
    split_key = jax.random.fold_in(jax.random.key(seed), split_id)
    return jax.vmap(lambda index: _user(config, jax.random.fold_in(split_key, index), index))(
        indices
    )


def _user(config: ClicksConfig, key: Key, index: Array) -> tuple[dict[str, Array], Latents]:
    user_key, order_key, visit_key, click_key, question_key = jax.random.split(key, 5)
    length_u, interests_u = _uniform(user_key, (2,))
    visits = config.clicks_min // config.visit + _draw(length_u, _length_steps(config))
    interests = _integer(interests_u, min(LIVES), max(LIVES) + 1)
    lives = jnp.array(list(LIVES.values()), jnp.int32)[interests - min(LIVES)]
    # In random order the first `interests` clusters are a uniform choice, and so is the life of each.
    order = jnp.argsort(jax.random.bits(order_key, (config.clusters,), jnp.uint32)).astype(
        jnp.int32
    )

    slot, visit_style, style = _visits(config, visit_key, visits, interests, lives)
    clicks = _clicks(config, click_key, order[slot], visit_style)
    target_interest, cluster, query_style, rank = _questions(
        config, question_key, order, lives, style
    )

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
    first = order[:MAX_INTERESTS]
    latents = Latents(interests, lives, first, style, slot, order[slot], visit_style, target_interest, cluster,
                      query_style, rank)  # fmt: skip
    return streams, latents


def _visits(
    config: ClicksConfig, key: Key, visits: Array, interests: Array, lives: Array
) -> tuple[Array, Array, Array]:
    """(place in the user's order of clusters [V], style [V]) of each visit, and each interest's last style [8]."""
    start_key, key = jax.random.split(key)
    at = jnp.arange(config.clicks_max // config.visit)
    browse_u, slot_u, drift_u, change_u, style_u = _uniform(key, (5, *at.shape))
    early, both, _ = lives
    first_half = at < visits // 2
    low, high = jnp.where(first_half, 0, early), jnp.where(first_half, early + both, interests)
    browsing = browse_u < config.browse
    slot = _integer(
        slot_u, jnp.where(browsing, interests, low), jnp.where(browsing, config.clusters, high)
    )

    # An interest's style after n visits is its start plus its n changes so far, modulo the number of styles.
    start = _integer(_uniform(start_key, (MAX_INTERESTS,)), 0, config.styles)
    mine = (
        ~browsing[:, None] & (slot[:, None] == jnp.arange(MAX_INTERESTS)) & (at < visits)[:, None]
    )
    change = _change(config, drift_u, change_u)[:, None]
    style = (
        start + jnp.cumsum(jnp.where(mine, change, 0), axis=0, dtype=jnp.int32)
    ) % config.styles  # [V, 8]
    visited = jnp.sum(jnp.where(mine, style, 0), axis=1, dtype=jnp.int32)
    return slot, jnp.where(browsing, _integer(style_u, 0, config.styles), visited), style[-1]


def _clicks(config: ClicksConfig, key: Key, cluster: Array, style: Array) -> Array:
    """Unshuffled items [V, visit] clicked in visits to (cluster [V], style [V])."""
    staple_u, rank_u, staple_rank_u = _uniform(key, (3, cluster.shape[0], config.visit))
    staple = (staple_u < config.staple_rate) & (jnp.arange(config.visit) > 0)
    rank = _draw(rank_u, _zipf_steps(config.zipf, config.items_per_style))
    staple_rank = _draw(staple_rank_u, _zipf_steps(config.zipf, config.staples))
    topical = _group_item(config, cluster[:, None], style[:, None], rank)
    return jnp.where(staple, config.num_items - config.staples + staple_rank, topical)


def _questions(
    config: ClicksConfig, key: Key, order: Array, lives: Array, style: Array
) -> tuple[Array, Array, Array, Array]:
    """Interest of each positive [targets] (-1: explored); cluster, style, rank [Q], positives and negatives in turn."""
    (
        explore_u,
        early_u,
        interest_u,
        drift_u,
        change_u,
        cluster_u,
        style_u,
        rank_u,
        hard_u,
        other_u,
        easy_u,
    ) = _uniform(key, (11, config.targets))
    ask_early = early_u < 0.5
    low, high = (
        jnp.where(ask_early, 0, lives[0]),
        jnp.where(ask_early, lives[0], jnp.sum(lives, dtype=jnp.int32)),
    )
    interest = _integer(interest_u, low, high)
    drifted = (style[interest] + _change(config, drift_u, change_u)) % config.styles
    explore = explore_u < config.explore
    cluster = jnp.where(explore, _integer(cluster_u, 0, config.clusters), order[interest])
    positive_style = jnp.where(explore, _integer(style_u, 0, config.styles), drifted)
    rank = _draw(
        rank_u, _zipf_steps(config.zipf, config.items_per_style)
    )  # the pair's: popularity says nothing

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
    """One step of drift: 0, or with probability `drift` a uniform move to another style."""
    return jnp.where(drift_u < config.drift, _integer(change_u, 1, config.styles), 0)


def _group_item(config: ClicksConfig, cluster: Array, style: Array, rank: Array) -> Array:
    return (cluster * config.styles + style) * config.items_per_style + rank


# Draws are uniform numbers compared with tables or scaled: no rounding that could depend on the size of the batch.


def _uniform(key: Key, shape: tuple[int, ...]) -> Array:
    return jax.random.uniform(key, (math.prod(shape),), jnp.float32).reshape(
        shape
    )  # flat: compiles 20 times faster


def _integer(uniform: Array, low: Array | int, high: Array | int) -> Array:
    """Uniform in [low, high). The product stays below high - low, for `uniform` has 23 bits."""
    size = jnp.asarray(high - low, jnp.float32)
    return low + jnp.floor(uniform * size).astype(jnp.int32)


def _draw(uniform: Array, steps: np.ndarray) -> Array:
    """Outcomes of the distribution with cumulative probabilities `steps` (its last, 1, left out)."""
    return jnp.searchsorted(jnp.asarray(steps), uniform, side="right").astype(jnp.int32)


def _zipf_steps(exponent: float, ranks: int) -> np.ndarray:
    weight = np.arange(1, ranks + 1) ** -float(exponent)
    return np.cumsum(weight / weight.sum())[:-1].astype(np.float32)


def _length_steps(config: ClicksConfig) -> np.ndarray:
    """Of how many visits a user has beyond the least: log-uniform clicks, rounded to the nearest multiple."""
    low, high = math.log(config.clicks_min), math.log(config.clicks_max)
    edges = np.arange(config.clicks_min, config.clicks_max, config.visit) + config.visit / 2
    return ((np.log(edges) - low) / max(high - low, 1e-9)).astype(np.float32)


@functools.lru_cache(maxsize=8)
def _item_ids(config: ClicksConfig) -> np.ndarray:
    """i32 [num_items]: unshuffled item -> id. From the world's seed alone."""
    with jax.ensure_compile_time_eval():
        ids = jax.random.permutation(
            jax.random.key(config.world_seed), jnp.arange(config.num_items, dtype=jnp.int32)
        )
        return np.asarray(ids)


# ---- the oracle: NumPy float64, users on the last axis


def oracle_scores(
    config: ClicksConfig,
    streams: dict[str, np.ndarray],
    last: int | None = None,
    styles: bool = True,
) -> np.ndarray:
    """Log p(query | positive, history) - log p(query | negative, history), f64 [B, Q]; its sigmoid is P(target = 1).

    The user's number of interests, their clusters, lives and styles are integrated out exactly. The first click of a
    visit tells its (cluster, style); ranks and staples say nothing about the rest.

    Args:
      streams: what `SimulatedClicks.fetch` returns; only items, length and query are looked at.
      last: how many clicks at the end are seen, a multiple of `visit`; None: all.
      styles: False scores by the clusters visited, whatever their styles.
    Raises ValueError for a `last` that cuts a visit.
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
    """What the visits seen say of each cluster."""

    first: np.ndarray  # [C, B] visits in the first half
    second: np.ndarray  # [C, B] visits in the second half
    stays: np.ndarray  # [C, B] visits in the style of the cluster's visit before
    changes: np.ndarray  # [C, B] visits in another
    style: np.ndarray  # [C, B] of the last visit; -1: none


def _count_visits(
    config: ClicksConfig, group: np.ndarray, visits: np.ndarray, last: int | None
) -> _Counts:
    """Counts from the group [B, V] of each visit, of which each user made `visits` [B]."""
    users, at = len(group), np.arange(group.shape[1])
    since = 0 if last is None else visits[:, None] - last // config.visit
    seen = (at < visits[:, None]) & (at >= since)
    cluster = np.where(
        seen, group // config.styles, config.clusters
    )  # the unseen get a column of their own

    def count(which: np.ndarray, clusters: np.ndarray) -> np.ndarray:
        cell = (clusters * users + np.arange(users)[:, None])[which]
        return np.bincount(cell, minlength=(config.clusters + 1) * users).reshape(-1, users)[:-1]

    first_half = at < visits[:, None] // 2
    order = np.argsort(cluster, axis=1, kind="stable")  # a cluster's visits side by side, in time
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
    """Scores [B, Q] of the groups `query` [B, Q]."""
    evidence, asked = zip(
        *(_interest_posterior(config, counts, m, styles) for m in LIVES), strict=True
    )
    weight = np.exp(
        np.stack(evidence) - np.max(evidence, axis=0)
    )  # [m, B]; the prior of m is uniform
    asked_cluster = np.einsum("mb,mcb->cb", weight / weight.sum(0), np.stack(asked))

    cluster, style = query // config.styles, query % config.styles
    user = np.arange(len(query))[:, None]
    last_style = counts.style[cluster, user]
    style_chance = np.where(
        last_style == style, 1 - config.drift, config.drift / (config.styles - 1)
    )
    style_chance = np.where((last_style < 0) | (not styles), 1 / config.styles, style_chance)

    groups = config.clusters * config.styles
    asked_here = (1 - config.explore) * asked_cluster[cluster, user]
    positive = asked_here * style_chance + config.explore / groups
    positive_cluster = asked_here + config.explore / config.clusters
    negative = config.hard * (positive_cluster - positive) / (config.styles - 1) + (
        1 - config.hard
    ) * (1 - positive_cluster) / (groups - config.styles)
    with np.errstate(divide="ignore"):
        return np.log(positive) - np.log(np.maximum(negative, 0))


def _interest_posterior(
    config: ClicksConfig, counts: _Counts, interests: int, styles: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Of a user with so many interests: log p(visits) [B], and how likely a positive asks for each cluster [C, B].

    Given its life, a cluster's visits are independent of the other clusters', and all choices of which clusters have
    which life are equally likely: a sum over choices is a coefficient of a product of one polynomial per cluster in
    (early, both, late). `before` and `after` are the products over the clusters on either side of one.
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
        chain = _power(1 - config.drift, counts.stays) + _power(
            config.drift / (config.styles - 1), counts.changes
        )
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
        # One cluster has the life, those before it take any part of the others, those after it the rest.
        left = before[:-1][_cut(axis, slice(None, -1))]
        right = after[1:, ::-1, ::-1, ::-1][_cut(axis, slice(1, None))]
        log_terms = left + right + (alive[axis] - scale)[:, None, None, None]
        probability.append(np.exp(log_terms).sum((1, 2, 3)))
    p_early, p_both, p_late = probability
    choices = (
        math.lgamma(clusters + 1)
        - math.lgamma(clusters - interests + 1)
        - sum(math.lgamma(n + 1) for n in lives)
    )
    return total - choices, 0.5 * p_early / early + 0.5 * (p_both + p_late) / (both + late)


def _times(table: np.ndarray, none: np.ndarray, alive: list[np.ndarray]) -> np.ndarray:
    """Log of a polynomial [e, b, l, B] times (none + early x + both y + late z), higher terms dropped."""
    product = table + none
    for axis, weight in enumerate(alive):
        up, down = _cut(axis, slice(1, None))[1:], _cut(axis, slice(None, -1))[1:]
        product[up] = np.logaddexp(product[up], table[down] + weight)
    return product


def _cut(axis: int, part: slice) -> tuple[slice, ...]:
    """Index of a [C, e, b, l, B] table that takes `part` of one of e, b, l."""
    return tuple(part if i == axis + 1 else slice(None) for i in range(4))


def _power(base: float, exponent: np.ndarray) -> np.ndarray:
    """Log base^exponent, where 0^0 = 1."""
    return (
        np.where(exponent > 0, exponent * math.log(base), 0.0)
        if base > 0
        else np.where(exponent > 0, -np.inf, 0.0)
    )
