"""A folder of books: language models that carry what they remember from segment to segment, book after book.

    python -m rmjax.main --config=configs/books.py --config.data.dir=<folder of .txt> --workdir=runs/books

Whole books are held out; one or two are cut by position. Bytes by default, or
`--config.data.text.tokenizer=tokenizer.json` for subwords.
`config.model.kind`: transformer, transformer_xl, compressive, infinity, memoria. A small model for two CPU cores:
two layers of 64, segments of 64 bytes, eight rows; a memory is as long as a segment. Matrices begin at 0.07 in place
of GPT-2's 0.02: what an engram adds has gone through five of them, and 0.07 sqrt(64) is 0.02 sqrt(768).
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    configs.options(arg, [])
    config = configs.base()
    config.data.name, config.data.segment_length = "books", 64
    config.model.dim, config.model.layers, config.model.heads, config.model.dropout = 64, 2, 4, 0.0
    config.model.initial = 0.07
    engrams = config.memoria
    engrams.working, engrams.short_term_capacity = 21, 168
    engrams.remind_short_term, engrams.remind_long_term = 21, 21
    config.data.text.reset_segments = 500
    train = config.train
    train.batch_size, train.eval_batch_size, train.clip = 8, 8, 1.0
    train.learning_rate, train.schedule, train.warmup = 1e-3, "linear", 0.06
    train.steps, train.eval_every, train.save_every = 4000, 1000, 500
    return config
