"""Settings of memory systems as data: the published ones, and those that were tuned here."""

from __future__ import annotations

from collections.abc import Mapping

Changes = Mapping[str, object]  # {"machine.slots": 10}

# The published hyper-parameters of systems, as far as a config has them: `--original` sets them.
# DNC, NUTM, DMSDNC and STM: their code for bAbI. HPMN and MIMN: their code for clicks. CT: RM 4.1.
ORIGINAL: Mapping[str, Changes] = {
    "dnc": {
        "machine.slots": 256,
        "machine.dim": 64,
        "machine.read_heads": 4,
        "machine.hidden": 256,
        "train.learning_rate": 1e-4,
        "train.clip": 10.0,
    },
    "nutm": {
        "machine.slots": 192,
        "machine.dim": 64,
        "machine.read_heads": 4,
        "machine.hidden": 172,
        "machine.programs": 4,
        "train.learning_rate": 3e-5,
        "train.clip": 10.0,
        "train.batch_size": 32,
    },
    "dmsdnc": {
        "machine.slots": 256,
        "machine.dim": 48,
        "machine.read_heads": 4,
        "machine.hidden": 256,
        "machine.memory_blocks": 2,
        "machine.refresh_rate": 0.1,
        "train.learning_rate": 3e-5,
        "train.clip": 50.0,
        "train.batch_size": 32,
    },
    "stm": {
        "machine.dim": 90,
        "machine.queries": 20,
        "machine.pool": True,
        "machine.reader": "own",
        "train.learning_rate": 6e-4,
        "train.clip": 5.0,
        "train.batch_size": 128,
    },
    "compressive": {
        "machine.slots": 20,
        "machine.layers": 3,
        "machine.heads": 4,
        "machine.compression": 5,
    },
    "hpmn": {
        "machine.dim": 32,
        "machine.levels": 5,
        "machine.period": 2,
        "machine.covariance": 5e-5,
        "machine.reader": "own",
        "train.learning_rate": 1e-3,
        "train.batch_size": 500,
    },
    "mimn": {
        "machine.dim": 32,
        "machine.slots": 4,
        "machine.reader": "own",
        "train.learning_rate": 1e-3,
        "train.batch_size": 256,
    },
}

# What a system needs on any data, unless it was tuned. Other values are those of the config.
DEFAULTS: Mapping[str, Changes] = {
    "dnc": {"train.clip": 10.0},
    "nutm": {"train.clip": 10.0},
    "dmsdnc": {"train.clip": 10.0},
}

# {config.data.name: {row of the table 'memories': changes}}, chosen on the validation split by
#     python -m rmjax.ablate --table=tune --config=... --seeds=1
# which prints the entry of its data. --tuned=<its tuned.json> serves until the entry stands here.
TUNED: Mapping[str, Mapping[str, Changes]] = {
    "synthetic": {  # configs/synthetic.py:discrete,local; docs/results/memories_evidence.md
        row: {"train.learning_rate": rate, "train.clip": 5.0}
        for rate, rows in {
            2e-3: ("CM reason only", "rmt"),
            3e-3: ("RM", "CM", "RM reason only", "dnc", "dmsdnc", "ffm"),
            1e-2: (
                *("gru", "buffer", "directly_reason", "multihop_reason", "nutm", "compressive"),
                *("hpmn", "mimn", "gated_delta", "titans"),
            ),
        }.items()
        for row in rows
    },
}

LEARNING_RATES = (3e-4, 1e-3, 2e-3, 3e-3, 1e-2)  # that the table 'tune' tries
CLIPS = (5.0, 10.0)
