r"""Your own stories and questions, as JSON lines: a story is written once, and asked in words.

    # Two CPU cores:
    python -m rmjax.main --config=configs/stories.py:local --config.data.dir=<folder or file> \
        --workdir=runs/stories
    # Then, in Python:
    model = rmjax.open_model("runs/stories")
    model.ask(["Mary went to the hall.", "She took a map."], "Where is Mary?")

Data: config.data.dir is a folder with train.jsonl (valid.jsonl and test.jsonl are optional), or one
.jsonl file. A line is a story with its questions, see rmjax/data/stories/jsonl.py. An answer is one
of the question's choices, or one of the answers in the training stories. A sentence is a segment,
N = 20.

In a closed language, such as bAbI's, `--config.data.min_count=1` keeps every word. The default 2
makes words that occur once unknown, so that the model learns what an unknown word means.
config.data.vectors takes a GloVe file.

Size: d = 128, K = 20, 3 layers, 4 heads, two hops. `:local` is a reduced size: d = 64, one layer,
no rehearsal. Its slots and items are those of configs/babi.py.

Hardware and time: `:local` takes one minute of one CPU core.

Score: bAbI's task 1 (10,000 questions) as JSON lines, `:local` with `--config.data.min_count=1`:
the test accuracy is 100 % of 1,000 questions (one run). The full size was not measured here.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["local"])
    config = configs.base()
    config.data.name = "stories"
    machine, train = config.machine, config.train
    machine.dim, machine.slots, machine.timescale = 128, 20, 0
    config.rehearsal.sampled_items = 0
    config.reason.hops, config.reason.head = 2, "mlp"  # choices need a hidden layer
    config.teacher.dim, config.teacher.batch_size, config.teacher.steps = 128, 64, 5000
    train.batch_size, train.eval_batch_size = 64, 128
    train.steps, train.eval_every, train.save_every = 20_000, 1000, 500
    if "local" in chosen:
        machine.dim, machine.layers, machine.heads, machine.slot_identity = 64, 1, 4, True
        machine.item_scale = 3.0
        config.rehearsal.recollection = config.rehearsal.familiarity = 0.0
        train.batch_size, train.learning_rate, train.schedule = 32, 3e-3, "cosine"
        train.steps, train.eval_every, train.save_every = 600, 100, 100
    return config
