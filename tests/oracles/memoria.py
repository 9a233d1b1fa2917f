"""Memoria step by step in plain Python and float64.

Engrams are in a dict by serial, counts in a dict of dicts by both serials.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable

import numpy as np

WORKING, SHORT, LONG = 1, 2, 3


@dataclasses.dataclass
class Engram:
    vector: np.ndarray
    kind: int
    lifespan: float
    age: int = 0


def hash32(salt: int, source: int, candidate: int) -> int:
    mask = 0xFFFFFFFF
    h = (candidate * 0x9E3779B1 & mask) ^ (source * 0x85EBCA77 & mask) ^ (salt * 0xC2B2AE3D & mask)
    h = (h ^ (h >> 15)) * 0x2C1B3C6D & mask
    return h ^ (h >> 12)


class Memoria:
    """The memory of one stream. If ties are random, `salt` takes the place of the key."""

    def __init__(self, config):
        self.config = config
        self.engrams: dict[int, Engram] = {}
        self.counts: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
        self.next_serial = self.evicted = 0
        self.largest = np.iinfo(config.counts_dtype).max

    def of_kind(self, kind: int) -> list[int]:
        # The dict keeps the order of birth, so serials rise.
        return [serial for serial, engram in self.engrams.items() if engram.kind == kind]

    def remind(self, working: np.ndarray, salt: int | None = None):
        config = self.config
        for serial in self.of_kind(WORKING):
            self.remove(serial)
        for vector in working:
            engram = Engram(vector.astype(np.float64), WORKING, config.initial_lifespan)
            self.engrams[self.next_serial] = engram
            self.next_serial += 1
        if config.ties == "hash":
            salt = self.next_serial // config.working
        short = self.nearest(self.of_kind(SHORT), working, config.remind_short_term)
        seeds = self.seeds(short, salt) if config.remind_long_term else set()
        met = self.search(seeds) if config.remind_long_term else set()
        long = self.nearest(sorted(met), working, config.remind_long_term)
        return short, long, seeds, met

    def nearest(self, serials: list[int], working: np.ndarray, k: int) -> list[int]:
        def score(serial: int) -> float:
            squares = ((self.engrams[serial].vector - working.astype(np.float64)) ** 2).sum(-1)
            if self.config.correlation == "negative_square":
                return -squares.mean()
            return np.logaddexp.reduce(-squares)

        return sorted(serials, key=lambda serial: (-score(serial), serial))[:k]

    def seeds(self, short: list[int], salt: int | None) -> set[int]:
        config, long = self.config, self.of_kind(LONG)
        if config.search_seeds == "full":
            return set(long)
        seeds = set()
        for source in short if long else []:
            counts = self.counts[source]
            most = max(counts[target] for target in long)
            if most or config.follow_zero_edges:
                ties = [target for target in long if counts[target] == most]
                hashed = lambda target, source=source: hash32(salt, source, target)
                seeds.add(self.choose(ties, hashed))
        if config.search_seeds == "all_short_term" and long:
            for source in set(self.of_kind(SHORT)) - set(short):
                if config.ties in ("oldest", "newest"):
                    seeds.add(self.choose(long, lambda target: 0))
                else:
                    share = (hash32(salt, source, 0) >> 8) / 2**24
                    place = int(np.float32(share) * np.float32(len(long)))
                    seeds.add(long[min(place, len(long) - 1)])
        return seeds

    def choose(self, ties: list[int], hashed: Callable[[int], int]) -> int:
        if self.config.ties == "oldest":
            return min(ties)
        return max(ties) if self.config.ties == "newest" else max(ties, key=hashed)

    def search(self, seeds: set[int]) -> set[int]:
        if self.config.search_seeds == "full":
            return seeds
        met, level = set(seeds), set(seeds)
        for _ in range(self.config.search_depth):
            free = [serial for serial in self.of_kind(LONG) if serial not in met]
            after = set()
            for source in level if free else []:
                counts = self.counts[source]
                best = max(free, key=lambda target: (counts[target], -target))  # noqa: B023
                if counts[best] or self.config.follow_zero_edges:
                    after.add(best)
            met |= after
            level = after
        return met

    def memorize(self, short: list[int], long: list[int], weights: dict[int, float]) -> None:
        config = self.config
        reminded = [*short, *long]
        together = [*self.of_kind(WORKING), *reminded]
        for i in together:
            counts = self.counts[i]
            for j in together:
                counts[j] = min(counts[j] + 1, self.largest)
        gains = self.gains(short, reminded, weights)
        for serial, engram in self.engrams.items():
            engram.lifespan += gains.get(serial, 0.0) - 1.0
            engram.age += 1
        if config.order == "paper":
            self.forget()
            self.move()
        else:
            self.move()
            self.forget()
        while len(self.of_kind(LONG)) > config.long_term:
            weakness = lambda serial: (self.engrams[serial].lifespan, serial)
            self.remove(min(self.of_kind(LONG), key=weakness))
            self.evicted += 1

    def gains(
        self, short: list[int], reminded: list[int], weights: dict[int, float]
    ) -> dict[int, float]:
        config = self.config
        if config.lifespan_increment == "given":
            return {serial: weights[serial] for serial in reminded}
        weights = {serial: max(0.0, weights[serial]) for serial in reminded}
        number, total = len(reminded), sum(weights.values())
        if config.lifespan_increment == "released":
            number, total = number + (len(short) < len(self.of_kind(SHORT))), 1.0
        return {
            serial: w / (total or 1.0) * number * config.lifespan_extend
            for serial, w in weights.items()
        }

    def forget(self) -> None:
        for serial in [serial for serial, engram in self.engrams.items() if engram.lifespan <= 0]:
            self.remove(serial)

    def move(self) -> None:
        for serial in self.of_kind(WORKING):
            self.engrams[serial].kind = SHORT
        short = self.of_kind(SHORT)
        for serial in short[: max(0, len(short) - self.config.short_term_capacity)]:
            self.engrams[serial].kind = LONG

    def remove(self, serial: int) -> None:
        del self.engrams[serial]
        for other in self.counts.pop(serial, ()):
            self.counts[other].pop(serial, None)
