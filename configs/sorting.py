"""Sorting (Memoria section 4.1): sort 20 symbols by how often they occur in a long sequence.

    # Four segments of 1,024:
    python -m rmjax.main --config=configs/sorting.py --workdir=runs/sorting
    # Minutes on two CPU cores:
    python -m rmjax.main --config=configs/sorting.py:local --workdir=runs/sorting

Data: made while they are read. A sequence is longer than a segment, which is all that a model sees
at once.

Size: the paper's. 5 layers of 512, 80,000 sequences five times, Adam at 2e-4, warm-up 0.06.
`:local` is a reduced size: 16 segments of 64, two layers of 64, initial matrices of 0.05 (see
books.py). There transformer_xl, whose norms come after its sums, needs
`--config.model.initial=0.125` to learn anything in 1,000 steps.

Variants: `config.model.kind` is transformer, transformer_xl, compressive, infinity or memoria. A
memory has the length of a segment. `config.data.sorting.segments` is the number of segments; the
paper has 4, 8, 16, 32 and 47. `:256` and `:512` have shorter segments. `:short` removes Memoria's
long-term memory, and `:working` also the short-term memory (Memoria Table 6).

Score: accuracy at `:local` with 32 segments, 10 symbols and 1,000 steps, two seeds: Transformer
0.378; Memoria 0.433 with working memory only, 0.487 with short-term memory, 0.519 with long-term
memory too. Score and time at the paper's size were not measured here.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["local", "256", "512", "working", "short"])
    config = configs.base()
    config.data.name = "sorting"
    lengths = {"local": 64, "256": 256, "512": 512}
    n = next((length for name, length in lengths.items() if name in chosen), 1024)
    config.data.segment_length = n
    model, engrams, train = config.model, config.memoria, config.train
    model.remat = True  # only one segment has gradients
    engrams.working, engrams.short_term_capacity, engrams.initial_lifespan = n // 8, n // 2, 5.0
    engrams.remind_short_term, engrams.remind_long_term = n // 4, 5 * n // 8
    if "short" in chosen or "working" in chosen:
        engrams.remind_long_term = 0
    if "working" in chosen:
        engrams.remind_short_term = 0
    train.batch_size, train.eval_batch_size, train.clip = 32, 32, 1.0
    train.learning_rate, train.schedule, train.warmup = 2e-4, "linear", 0.06
    train.steps, train.eval_every, train.save_every = 12_500, 2500, 500  # five epochs
    if "local" in chosen:
        # With initial matrices of 0.02 such a narrow model begins to learn late.
        model.remat, model.initial = False, 0.05
        model.dim, model.layers, model.heads, model.dropout = 64, 2, 4, 0.0
        train.learning_rate, train.steps, train.eval_every = 1e-3, 1500, 500
        config.data.sorting.segments, config.data.sorting.valid = 16, 400
    return config
