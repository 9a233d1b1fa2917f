r"""WikiText-103 (Memoria section 4.2): language models that carry their memory across articles.

    python -m rmjax.main --config=configs/wikitext103.py --config.data.dir=wikitext-103-raw \
        --config.data.text.tokenizer=gpt2/tokenizer.json --workdir=runs/wikitext103

Data: the folder has wiki.{train,valid,test}.raw, or .tokens; those of WikiText-2 work too. Without
a tokenizer.json the tokens are bytes.

Size: the paper's. GPT-2 small (12 layers of 768), segments of 150, 8 rows, three epochs, Adam at
2e-4, warm-up 0.06. Memories begin anew every 500 segments. The paper trains transformer_xl at 1e-4;
the tables use one rate for all rows.

Variants: `config.model.kind` is transformer, transformer_xl, compressive, infinity or memoria. A
memory has the length of a segment. `:50` is Table 2 (mem2): segments of 50, at 1e-4. The paper uses
this rate for memoria and transformer_xl, and 2e-4 for the others. `config.model.pretrained=gpt2`
starts from a released checkpoint (Table 5, at 5e-5). `config.data.text.skip_first=True` leaves the
first token of a segment out, as in the paper's code. `:local` is a reduced size for two CPU cores:
two layers of 64.

Score: the measures are perplexities. Score and time were not measured here.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["50", "local"])
    config = configs.base()
    config.data.name, config.data.segment_length = "wikitext", 150
    config.data.text.reset_segments = 500
    model, engrams = config.model, config.memoria
    model.dim, model.layers, model.heads = 768, 12, 12
    engrams.working, engrams.short_term_capacity = 50, 400
    engrams.remind_short_term, engrams.remind_long_term = 50, 50
    train = config.train
    train.batch_size, train.eval_batch_size, train.clip = 8, 8, 1.0
    train.learning_rate, train.schedule, train.warmup = 2e-4, "linear", 0.06
    # About three epochs of GPT-2's tokens.
    train.steps, train.eval_every, train.save_every = 290_000, 10_000, 1000
    if "50" in chosen:
        config.data.segment_length = 50
        engrams.working, engrams.short_term_capacity = 16, 128
        engrams.remind_short_term, engrams.remind_long_term = 16, 16
        train.learning_rate, train.steps = 1e-4, 880_000
    if "local" in chosen:
        model.dim, model.layers, model.heads, model.dropout = 64, 2, 4, 0.0
        model.initial = 0.07  # see books.py
        train.learning_rate, train.steps, train.eval_every, train.save_every = 1e-3, 2000, 500, 200
    return config
