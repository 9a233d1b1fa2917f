"""Golden traces of a reference implementation.

The reference equals the released package, memoria-pytorch 1.1.0, bit for bit, except for three
faults of the package:

- it draws seeds for short-term engrams that are not reminded;
- it reminds the oldest engram while long-term memory is empty;
- it returns a null engram when a search has no engram left.

Each scenario and variant has one file, which holds the config too.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from rmjax import memoria
from tests import ROOT
from tests.memoria.runs import alive, at, by_serial, run

FILES = sorted((ROOT / "tests" / "golden").glob("memoria_*.npz"))
VARIANTS = {
    "clean": {"ties": "oldest", "order": "released"},
    "clean_hash": {"ties": "hash", "order": "released"},
    "clean_paper_order": {"ties": "oldest", "order": "paper"},
    "clean_strict_edges": {"ties": "oldest", "order": "released", "follow_zero_edges": False},
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem.removeprefix("memoria_"))
def test_a_golden_trace_is_followed(path):
    golden = np.load(path)
    c = json.loads(str(golden["config"]))
    (variant,) = c["variants"]
    want = {name.partition("/")[2]: golden[name] for name in golden if "/" in name}
    config = memoria.MemoriaConfig(
        working=c["Nwm"],
        short_term_capacity=c["cap"],
        remind_short_term=c["Ks"],
        remind_long_term=c["Kl"],
        search_depth=c["depth"],
        initial_lifespan=float(c["L0"]),
        lifespan_extend=c["alpha"],
        dim=c["D"],
        long_term_capacity=200 if c["name"].startswith("s8") else None,
        correlation="negative_square",
        lifespan_increment="given",
        **VARIANTS[variant],
    )
    for b in range(c["B"]):
        xs = {
            "working": golden["sixteenths"][:, b].astype(np.float32) / 16,
            "serials": want["rem_ids"][:, b].astype(np.int32),
            "weights": np.where(want["rem_ids"][:, b] >= 0, want["rem_delta"][:, b], 0).astype(
                np.float32
            ),
            "key": np.zeros((c["T"], 2), np.uint32),
            "active": np.ones(c["T"], bool),
        }
        steps = run(config, xs, weigh=by_serial)
        for t in range(c["T"]):
            check_reminded(
                at(steps.reminding, t), at(steps.reminded, t), {k: v[t, b] for k, v in tables(want)}
            )
            check_state(
                at(steps.after, t),
                {k: v[t, b] for k, v in tables(want)},
                want.get(f"cofire_t{t}_b{b}"),
            )
        assert steps.after.evicted[-1] == 0


def tables(want):
    return ((name, value) for name, value in want.items() if not name.startswith("cofire_t"))


def check_reminded(state, reminded, want):
    actual = {
        "rem_stm_ids": reminded.short_term.serials,
        "rem_ltm_ids": reminded.long_term.serials,
        "init_ltm_ids": state.serial[reminded.seeds],
        "found_ltm_ids": state.serial[reminded.found],
    }
    for name, serials in actual.items():
        assert sorted(serials[serials >= 0]) == want[name][want[name] >= 0].tolist(), name


def check_state(state, want, cofire):
    slots = alive(state)
    serials = state.serial[slots].astype(np.int64)
    n = len(slots)
    assert serials.tolist() == want["alive_ids"][want["alive_ids"] >= 0].tolist()
    assert (state.kind[slots] == want["alive_type"][:n]).all()
    assert (state.lifespan[slots] == want["lifespan"][:n]).all()
    counts = np.asarray(memoria.cofire_counts(state))[np.ix_(slots, slots)].astype(np.int64)
    assert (counts.diagonal() == want["fire_count"][:n]).all()
    weights = 1 + (31 * serials[:, None] + 17 * serials) % 97
    assert counts.sum() == want["cofire_sum"] and (counts * weights).sum() == want["cofire_hash"]
    if cofire is not None:
        assert (counts == cofire).all()
