"""Trains the small models whose numbers the figures show, and writes them to docs/figures/data.

    python docs/figures/measure.py            # everything: about 25 minutes on one idle CPU core
    python docs/figures/measure.py recall     # associative recall, for forgetting and state_size
    python docs/figures/measure.py slots      # slots over a stream; after `recall`

Runs are kept in runs/figures. The same command continues them, or reads them again.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from common import HERE, write

sys.path.insert(0, str(HERE.parents[1]))
import rmjax
from configs import recall, xlong
from rmjax.machines.rehearsal import slot_attention
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
STREAM = 1  # of the test split, whose slots are drawn


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


def measure_slots() -> None:
    """Measures two streams: what the slots take in of pairs, and how clicks change them."""
    write("slots", {"recall": slots_of_recall(), "clicks": slots_of_clicks()})


def slots_of_recall() -> dict[str, Any]:
    """The weights of RM Eq. 1 of the run `RM`, over a stream of 16 pairs of the test split.

    Returns:
      'keys', the number of kinds of key; 'items' [32], ids, those of values come after the keys;
      and 'weights' [K, 32].
    """
    task, params, source = trained(RUNS / "rm")
    machine, params = task.machine, params["machine"]
    settings = dataclasses.replace(source.settings, pairs=str(LONGEST))
    stream = dataclasses.replace(source, settings=settings).fetch("test", np.array([STREAM]))
    items, mask = rmjax.segment(stream["items"], stream["length"], task.segment_length)
    projected = machine.encode(params, items, mask)[1]
    memory, weights = machine.init_memory(params, 1), []
    for t in range(items.shape[1]):
        scored = memory.slots + params["slots"]  # machine.slot_identity
        part = slot_attention(params["attention"], scored, projected[:, t], mask[:, t], "items")
        weights.append(part[0])
        memory = rmjax.memorize(machine, params, *one(items, mask, t), memory).memory
    shares = np.round(np.concatenate(weights, -1), 3).tolist()
    keys = source.settings.key_ids
    return {"keys": keys, "items": stream["items"][0].tolist(), "weights": shares}


def slots_of_clicks() -> dict[str, Any]:
    """How much each segment of a user's clicks changes each slot, with configs/xlong.py:local.

    Returns:
      'test_auc' of the model; 'change' [T, K], the distance that a slot moves divided by sqrt(d).
    """
    rows = rmjax.fit(xlong.get_config("local"), RUNS / "clicks")
    task, params, source = trained(RUNS / "clicks")
    machine, params = task.machine, params["machine"]
    stream = source.fetch("test", np.array([STREAM]))
    items, mask = rmjax.segment(stream["items"], stream["length"], task.segment_length)
    advance = jax.jit(lambda part, memory: rmjax.memorize(machine, params, *part, memory).memory)
    memory, change = machine.init_memory(params, 1), []
    for t in range(items.shape[1]):
        before, memory = memory, advance(one(items, mask, t), memory)
        change.append(np.linalg.norm(memory.slots - before.slots, axis=-1)[0])
    width = np.sqrt(memory.slots.shape[-1])
    return {"test_auc": rows[0]["test_auc"], "change": np.round(change / width, 3).tolist()}


def one(items: np.ndarray, mask: np.ndarray, t: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment t of streams."""
    return items[:, t : t + 1], mask[:, t : t + 1]


def main() -> None:
    """Measures what the command line names; without a name, everything."""
    known = {"recall": measure_recall, "slots": measure_slots}
    for name in sys.argv[1:] or known:
        known[name]()


if __name__ == "__main__":
    main()
