"""What a step of Memoria costs (remind + memorize & forget, no model), at the sizes of the paper's experiments.

    python -m rmjax.bench --config=configs/memoria_bench.py             # all rows, one JSON object; minutes
    python -m rmjax.bench --config=configs/memoria_bench.py:lm,tiny     # some of them

Rows: lm (WikiText-103, PG-19; B.2), sorting (32 segments of 1024; B.1), sorting32 (the same, at its batch of 32), tiny.
`released_ms` is that of memoria-pytorch 1.1.0, torch 2.13, two threads of a 2-core AMD EPYC; its correlation is -d^2,
its search starts from all of short-term memory. What is streamed: topics that drift. Steps from `first` on are timed,
of `steps`. Only when asked for: huge, one stream with room for 100,000 engrams (11 GB).
"""

from ml_collections import ConfigDict

from rmjax import config as configs
from rmjax.memoria import MemoriaConfig
from rmjax.tools.memoria_bench import FIELDS

DEFAULTS = {
    name: getattr(MemoriaConfig(), name)
    for name in FIELDS
    if getattr(MemoriaConfig(), name) is not None
}
SORTING = {
    "steps": 32,
    "first": 16,
    "working": 128,
    "short_term_capacity": 512,
    "remind_short_term": 256,
    "remind_long_term": 640,
    "initial_lifespan": 5.0,
    "max_segments": 32,
    "dim": 512,
}
ROWS = {
    "lm": {"batch": 8, "steps": 150, "first": 100, "released_ms": 1067.0},
    "sorting": SORTING | {"batch": 4, "released_ms": 1743.0},
    "sorting32": SORTING | {"batch": 32, "released_ms": 16563.0},
    "tiny": {
        "batch": 1,
        "steps": 600,
        "first": 100,
        "working": 8,
        "short_term_capacity": 64,
        "remind_short_term": 8,
        "remind_long_term": 8,
        "dim": 64,
        "released_ms": 3.6,
    },
    "huge": {
        "batch": 1,
        "steps": 60,
        "first": 40,
        "long_term_capacity": 99_550,
        "counts_dtype": "int8",
    },
}


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, list(ROWS))
    chosen = chosen or ROWS.keys() - {"huge"}
    return ConfigDict(
        {"memoria": {name: DEFAULTS | row for name, row in ROWS.items() if name in chosen}}
    )
