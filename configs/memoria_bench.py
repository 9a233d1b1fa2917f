"""The time of a step of Memoria at the sizes of the paper's experiments.

    python -m rmjax.bench --config=configs/memoria_bench.py          # all rows but huge; minutes
    python -m rmjax.bench --config=configs/memoria_bench.py:lm,tiny  # some rows

A step is remind, memorize and forget, without a model. The stream is topics that drift. The steps
from `first` to `steps` are timed. The result is one JSON object.

Rows: lm (WikiText-103 and PG-19; B.2), sorting (32 segments of 1024; B.1), sorting32 (the same at
its batch of 32), tiny, and huge. The row huge runs only on request. It is one stream with room for
100,000 engrams (11 GB).

These medians in ms a step are expected on a 2-core AMD EPYC:

    lm 6.5    sorting 22 to 29    sorting32 173 to 221    tiny 0.20 to 0.25    huge 79

They have the edge rule negative_square, and a search from the reminded engrams. `released_ms` is
the time of memoria-pytorch 1.1.0 with torch 2.13 and two threads of a 2-core AMD EPYC. There the
correlation is -d^2, and the search starts from all of short-term memory.
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
