r"""PG-19 (Memoria section 4.2): language models over the first 2,000 of the training books.

    python -m rmjax.main --config=configs/pg19.py --config.data.dir=pg19 \
        --config.data.text.tokenizer=gpt2/tokenizer.json --workdir=runs/pg19

Data: config.data.dir is the released folder. It has train, validation and test with a .txt file for
each book, and metadata.csv with the titles. `config.data.text.train_share` keeps the first 7% of
the training books.

Size: the paper's, as in wikitext103.py (with 1e-4 for infinity). `:local` is a reduced size for two
CPU cores: two layers of 64.

Score: `word_perplexity` is the measure that other work reports. Memoria reports the perplexity of
its tokens. Score and time were not measured here.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["local"])
    config = configs.base()
    config.data.name, config.data.segment_length, config.data.text.reset_segments = "pg19", 150, 500
    model, engrams = config.model, config.memoria
    model.dim, model.layers, model.heads = 768, 12, 12
    engrams.working, engrams.short_term_capacity = 50, 400
    engrams.remind_short_term, engrams.remind_long_term = 50, 50
    train = config.train
    train.batch_size, train.eval_batch_size, train.clip = 8, 8, 1.0
    train.learning_rate, train.schedule, train.warmup = 2e-4, "linear", 0.06
    # About three epochs of GPT-2's tokens.
    train.steps, train.eval_every, train.save_every = 450_000, 10_000, 1000
    if "local" in chosen:
        model.dim, model.layers, model.heads, model.dropout = 64, 2, 4, 0.0
        model.initial = 0.07  # see books.py
        train.learning_rate, train.steps, train.eval_every, train.save_every = 1e-3, 2000, 500, 200
    return config
