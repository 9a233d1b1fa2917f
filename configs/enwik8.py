r"""enwik8 (Memoria section 4.2): language models over the characters of Wikipedia.

    python -m rmjax.main --config=configs/enwik8.py --config.data.dir=enwik8.zip \
        --workdir=runs/enwik8

Data: config.data.dir is the file or its zip. As is usual, a character is a byte. The splits have
90, 5 and 5 million bytes.

Size: the paper's. 12 layers of 768, segments of 512, 8 rows, 20 epochs, 170 engrams of each kind.
Memories begin anew every 1,500 segments. `:local` is a reduced size for two CPU cores: two layers
of 64.

Score: the measure is `bits_per_character`. The paper's code dropped the line breaks (204 symbols),
so the numbers of the paper do not quite compare with those of others. Score and time were not
measured here.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["local"])
    config = configs.base()
    config.data.name, config.data.segment_length = "enwik8", 512
    config.data.text.reset_segments = 1500
    model, engrams = config.model, config.memoria
    model.dim, model.layers, model.heads = 768, 12, 12
    engrams.working, engrams.short_term_capacity = 170, 1360
    engrams.remind_short_term, engrams.remind_long_term = 170, 170
    train = config.train
    train.batch_size, train.eval_batch_size, train.clip = 8, 8, 1.0
    train.learning_rate, train.schedule, train.warmup = 2e-4, "linear", 0.06
    train.steps, train.eval_every, train.save_every = 439_000, 20_000, 1000  # 20 epochs
    if "local" in chosen:
        model.dim, model.layers, model.heads, model.dropout = 64, 2, 4, 0.0
        model.initial = 0.07  # see books.py
        train.learning_rate, train.steps, train.eval_every, train.save_every = 1e-3, 2000, 500, 200
    return config
