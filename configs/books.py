r"""A folder of books: language models that carry their memory across segments and books.

    python -m rmjax.main --config=configs/books.py --config.data.dir=<folder of .txt> \
        --workdir=runs/books

Data: entire books are held out for validation and test. One or two books are cut by position. The
tokens are bytes, or subwords with `--config.data.text.tokenizer=tokenizer.json`.

Size: a small model for two CPU cores. Two layers of 64, segments of 64 bytes, eight rows; a memory
has the length of a segment. Matrices start at 0.07 in place of GPT-2's 0.02: what an engram adds
has passed through five matrices, and 0.07 sqrt(64) is 0.02 sqrt(768).

Variants: `config.model.kind` is transformer, transformer_xl, compressive, infinity or memoria.

Hardware and time: 2 to 7 minutes on one CPU core.

Score: bits per character on 14 books of Project Gutenberg, two seeds: compressive 2.952,
transformer_xl 2.962, infinity 3.076, memoria 3.078, transformer 3.088.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    configs.options(arg, [])
    config = configs.base()
    config.data.name, config.data.segment_length = "books", 64
    model, engrams = config.model, config.memoria
    model.dim, model.layers, model.heads, model.dropout = 64, 2, 4, 0.0
    model.initial = 0.07
    engrams.working, engrams.short_term_capacity = 21, 168
    engrams.remind_short_term, engrams.remind_long_term = 21, 21
    config.data.text.reset_segments = 500
    train = config.train
    train.batch_size, train.eval_batch_size, train.clip = 8, 8, 1.0
    train.learning_rate, train.schedule, train.warmup = 1e-3, "linear", 0.06
    train.steps, train.eval_every, train.save_every = 4000, 1000, 500
    return config
