"""PG-19 (Memoria section 4.2): language models over books, the first 2,000 of the training books.

    python -m rmjax.main --config=configs/pg19.py --config.data.dir=pg19 \
        --config.data.text.tokenizer=gpt2/tokenizer.json --workdir=runs/pg19

The folder is the released one: train, validation and test with a .txt of each book, metadata.csv for the titles.
The measure to compare with others is `word_perplexity`; Memoria reports that of its tokens. As `wikitext103.py` in all
else (1e-4 for infinity); of the books the first 7% are read (`config.data.text.train_share`).
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["local"])
    config = configs.base()
    config.data.name, config.data.segment_length, config.data.text.reset_segments = "pg19", 150, 500
    config.model.dim, config.model.layers, config.model.heads = 768, 12, 12
    engrams = config.memoria
    engrams.working, engrams.short_term_capacity = 50, 400
    engrams.remind_short_term, engrams.remind_long_term = 50, 50
    train = config.train
    train.batch_size, train.eval_batch_size, train.clip = 8, 8, 1.0
    train.learning_rate, train.schedule, train.warmup = 2e-4, "linear", 0.06
    train.steps, train.eval_every, train.save_every = (
        450_000,
        10_000,
        1000,
    )  # about three epochs of GPT-2's tokens
    if "local" in chosen:
        config.model.dim, config.model.layers, config.model.heads, config.model.dropout = (
            64,
            2,
            4,
            0.0,
        )
        config.model.initial = 0.07  # see books.py
        train.learning_rate, train.steps, train.eval_every, train.save_every = 1e-3, 2000, 500, 200
    return config
