"""Trains the small models whose numbers the figures show, and writes them to docs/figures/data.

    python docs/figures/measure.py            # everything: about half an hour on one CPU core
    python docs/figures/measure.py recall     # associative recall, for forgetting and state_size
    python docs/figures/measure.py clicks     # slots over a stream of clicks

Runs are kept in runs/figures. The same command continues them, or reads them again.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from common import HERE, write

sys.path.insert(0, str(HERE.parents[1]))
import rmjax
from configs import recall, xlong
from rmjax.data.clicks.simulated import simulate
from rmjax.data.source import SPLITS
from rmjax.run.training import trained

RUNS = HERE.parents[1] / "runs" / "figures"
BUFFER = {"recent": 8, "before": 1, "pooled": False}
# {name of the run: (kind, settings of the machine, steps)}. The card is configs/recall.py:local.
RECALL: dict[str, tuple[str, dict[str, Any], int]] = {
    "Gated delta rule, small": ("gated_delta", {"dim": 12, "heads": 1}, 1000),
    "DNC": ("dnc", {}, 300),
    "Last 8 items": ("buffer", BUFFER, 600),
    "RM": ("rehearsal", {}, 1500),
    "Gated delta rule, d = 6": ("gated_delta", {"dim": 6, "heads": 1}, 1000),
    "Gated delta rule, d = 8": ("gated_delta", {"dim": 8, "heads": 1}, 1000),
    "Gated delta rule, d = 16": ("gated_delta", {"dim": 16, "heads": 1}, 1000),
    "Gated delta rule, d = 24": ("gated_delta", {"dim": 24, "heads": 1}, 1000),
    "RM, K = 4": ("rehearsal", {"slots": 4}, 1500),
    "RM, K = 8": ("rehearsal", {"slots": 8}, 1500),
    "RM, K = 32": ("rehearsal", {"slots": 32}, 1500),
}
LONGEST, STREAMS, BATCH = 16, 2000, 500  # pairs of a stream; streams that are measured
USER = 0  # of the test split, whose clicks are drawn


def measure_recall() -> None:
    """Measures each run by the age of the pair that is asked for, in streams of 16 pairs."""
    measured = {}
    for name, (kind, settings, steps) in RECALL.items():
        config = recall.get_config("local")
        config.machine.update(kind=kind, **settings)
        config.train.steps = steps
        workdir = RUNS / name.lower().replace(",", "").replace("=", "").replace(" ", "-")
        rows = rmjax.fit(config, workdir)
        flags = {"machine.kind": kind} | {f"machine.{key}": settings[key] for key in settings}
        flags["train.steps"] = steps
        command = " ".join(f"--config.{key}={value}" for key, value in flags.items())
        measured[name] = {
            "flags": command,
            "state_floats": rows[0]["state_floats"],
            "pairs": {key: rows[0][key] for key in rows[0] if key.endswith(" pairs")},
            "by_age": by_age(workdir, config.data.segment_length),
        }
        logging.info("%s: %s", name, measured[name])
        write("recall", measured)


def by_age(workdir: Path, segment_length: int) -> list[float]:
    """The accuracy by the number of pairs written after the one that is asked for: [LONGEST]."""
    task, params, source = trained(workdir)
    settings = dataclasses.replace(source.settings, pairs=str(LONGEST), test=STREAMS)
    source = dataclasses.replace(source, settings=settings)
    right, asked = np.zeros(LONGEST), np.zeros(LONGEST)
    for start in range(0, STREAMS, BATCH):
        rows = np.arange(start, start + BATCH)
        streams, drawn = source.fetch("test", rows), source.draw("test", rows)
        items, mask = rmjax.segment(streams["items"], streams["length"], segment_length)
        memory = rmjax.memorize(task.machine, params["machine"], items, mask).memory
        logits = task.answer(params, memory, streams["query"], streams["query_mask"])
        age = LONGEST - 1 - drawn.asked
        np.add.at(right, age, np.asarray(logits).argmax(-1) == streams["target"])
        np.add.at(asked, age, 1)
    return [round(float(share), 4) for share in right / asked]


def measure_clicks() -> None:
    """Measures how much each segment of a user's clicks changes each slot, with configs/xlong.py.

    The change is the length of m_k after the segment minus m_k before it, divided by sqrt(d).
    """
    config = xlong.get_config("local")
    rows = rmjax.fit(config, RUNS / "clicks")
    task, params, source = trained(RUNS / "clicks")
    machine, params = task.machine, params["machine"]
    streams, latents = simulate(source.config, source.seed, SPLITS.index("test"), np.array([USER]))
    items, mask = rmjax.segment(streams["items"], streams["length"], config.data.segment_length)
    advance = jax.jit(
        lambda memory, t: (
            rmjax.memorize(
                machine,
                params,
                jax.lax.dynamic_slice_in_dim(items, t, 1, 1),
                jax.lax.dynamic_slice_in_dim(mask, t, 1, 1),
                memory,
            ).memory
        )
    )
    memory, changes = machine.init_memory(params, 1), []
    for t in range(items.shape[1]):
        before, memory = memory, advance(memory, t)
        changes.append(jnp.linalg.norm(memory.slots - before.slots, axis=-1)[0])
    change = np.stack(changes) / np.sqrt(memory.slots.shape[-1])
    measured = {
        "test_auc": rows[0]["test_auc"],
        "interests": int(latents.interests[0]),
        "visit_interest": latents.visit_interest[0].tolist(),
        "change": np.round(change, 3).tolist(),
    }
    write("clicks", measured)


def main() -> None:
    """Measures what the command line names; without a name, everything."""
    known = {"recall": measure_recall, "clicks": measure_clicks}
    for name in sys.argv[1:] or known:
        known[name]()


if __name__ == "__main__":
    main()
