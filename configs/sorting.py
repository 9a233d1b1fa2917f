"""Sorting (Memoria section 4.1): 20 symbols by how often they came in a sequence that is longer than the model sees.

    python -m rmjax.main --config=configs/sorting.py --workdir=runs/sorting                # 4 segments of 1,024
    python -m rmjax.main --config=configs/sorting.py:local --workdir=runs/sorting          # minutes on two CPU cores

`config.model.kind` chooses the model: transformer, transformer_xl, compressive, infinity, memoria.
`config.data.sorting.segments` is how long a sequence is (the paper: 4, 8, 16, 32 and 47); `:256` and `:512` are shorter
segments. A memory is as long as a segment. `:short` takes Memoria's long-term memory away, `:working` its short-term
memory too (Memoria Table 6). Paper's size: 5 layers of 512, 80,000 sequences five times, Adam at 2e-4, warm-up 0.06.
`:local` is a reduced size: 16 segments of 64, two layers of 64, matrices that begin at 0.05 (see books.py);
transformer_xl, whose norms come after its sums, needs `--config.model.initial=0.125` to learn anything in 1,000 steps.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["local", "256", "512", "working", "short"])
    config = configs.base()
    config.data.name = "sorting"
    config.data.segment_length = n = (
        64 if "local" in chosen else 256 if "256" in chosen else 512 if "512" in chosen else 1024
    )
    config.model.remat = True  # one segment alone has gradients
    engrams = config.memoria
    engrams.working, engrams.remind_short_term, engrams.remind_long_term = (
        n // 8,
        n // 4,
        5 * n // 8,
    )
    engrams.short_term_capacity, engrams.initial_lifespan = n // 2, 5.0
    if "short" in chosen or "working" in chosen:
        engrams.remind_long_term = 0
    if "working" in chosen:
        engrams.remind_short_term = 0
    train = config.train
    train.batch_size, train.eval_batch_size, train.clip = 32, 32, 1.0
    train.learning_rate, train.schedule, train.warmup = 2e-4, "linear", 0.06
    train.steps, train.eval_every, train.save_every = 12_500, 2500, 500  # five epochs
    if "local" in chosen:
        config.model.remat, config.model.initial = (
            False,
            0.05,
        )  # so narrow a model begins to learn late with 0.02
        config.model.dim, config.model.layers, config.model.heads, config.model.dropout = (
            64,
            2,
            4,
            0.0,
        )
        train.learning_rate, train.steps, train.eval_every = 1e-3, 1500, 500
        config.data.sorting.segments, config.data.sorting.valid = 16, 400
    return config
