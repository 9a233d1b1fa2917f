"""Hyperpartisan news (Memoria section 4.3): long articles, read segment by segment by Memoria BERT or RoBERTa.

    python -m rmjax.main --config=configs/hyperpartisan.py:local --config.data.dir=<folder> --workdir=runs/news
    python -m rmjax.main --config=configs/hyperpartisan.py --config.data.dir=<folder> --workdir=runs/news \
        --config.model.pretrained=<checkpoint> --config.data.hyperpartisan.tokenizer=<checkpoint>/tokenizer.json

The folder has the official by-article files and Longformer's hp-splits.json. Of that split 51 of 65 test articles are
in train; here the test is the 65 articles that are in neither train nor dev (`config.data.hyperpartisan.split`:
'published' is the other). `config.model.kind`: memoria_bert, memoria_roberta, bert, roberta. The last two have no
memory: with `config.data.hyperpartisan.max_segments` = 1 they read the first 512 tokens, as in the paper and in the
table mem3; else they answer from an article's last segment. Paper's size: base models, segments of 512, batch 16, Adam
at 5e-5, 20 epochs, five seeds. `:local`: a small model from scratch, words as tokens, segments of 128; its matrices
begin at 0.07, see books.py.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["local"])
    config = configs.base()
    config.data.name, config.data.segment_length = "hyperpartisan", 512
    model, engrams, train = config.model, config.memoria, config.train
    model.kind, model.dim, model.layers, model.heads = "memoria_bert", 768, 12, 12
    engrams.working, engrams.remind_short_term, engrams.remind_long_term = 64, 64, 64
    engrams.short_term_capacity, engrams.initial_lifespan, engrams.layer = 128, 12.0, 9
    train.batch_size, train.eval_batch_size, train.clip = 16, 16, 1.0
    train.learning_rate, train.schedule, train.warmup = 5e-5, "linear", 0.1
    train.steps, train.eval_every, train.save_every = (
        660,
        33,
        33,
    )  # 20 epochs; of whole articles, in buckets, 19
    if "local" in chosen:
        config.data.segment_length = 128
        model.dim, model.layers, model.heads, model.dropout, model.initial = 64, 3, 4, 0.2, 0.07
        engrams.working, engrams.remind_short_term, engrams.remind_long_term = 16, 16, 16
        engrams.short_term_capacity, engrams.layer = 32, 0
        train.learning_rate, train.steps, train.eval_every = 5e-4, 330, 33
    return config
