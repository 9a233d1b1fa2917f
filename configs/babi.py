r"""bAbI, all 20 tasks with one model (RM section 4.2): a story is written once, and asked along it.

    # The paper's size:
    python -m rmjax.main --config=configs/babi.py --config.data.dir=tasks_1-20_v1-2 \
        --workdir=runs/babi
    # Two CPU cores: the first task alone, then all tasks from its parameters.
    python -m rmjax.main --config=configs/babi.py:local,first \
        --config.data.dir=tasks_1-20_v1-2 --workdir=runs/qa1
    python -m rmjax.main --config=configs/babi.py:local --config.data.dir=tasks_1-20_v1-2 \
        --config.train.start_from=runs/qa1 --workdir=runs/babi

Data: config.data.dir is the folder of the official release (v1.2), or its archive. A sentence is a
segment, N = 15. Answers are classes; a list of answers is one class.

Size: the paper's. d = 128, K = 20, 3 layers, 4 heads, two hops; all words are negatives. `:local`
is a reduced size: d = 64, one layer, no rehearsal. Its slots keep an identity
(`machine.slot_identity`), and its items choose their slots more sharply (`machine.item_scale`).

Hardware and time: on two CPU cores the first task takes a minute, and all tasks take 75 minutes.

Score: the mean test error of `:local` is 13.9 % (one run), and 12 of 20 tasks are below 5 %. RM
reports 0.33 +- 0.15 %. In 300 steps of the first task alone (`:local,first`) its validation error
falls to 4.6 % (test: 8.1 %). In a run that starts with all tasks at once, this takes thousands of
steps.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["local", "first"])
    config = configs.base()
    config.data.name = "babi"
    config.data.segment_length = 15
    config.data.buckets = 6
    machine = config.machine
    machine.dim, machine.slots, machine.timescale = (
        128,
        20,
        0,
    )  # only the last place of a person matters
    config.rehearsal.sampled_items = 0
    config.reason.hops = 2
    config.teacher.dim, config.teacher.batch_size, config.teacher.steps = 128, 64, 5000
    train = config.train
    train.batch_size, train.eval_batch_size = 64, 128
    train.steps, train.eval_every, train.save_every = 200_000, 2000, 500
    if "local" in chosen:
        machine.dim, machine.layers, machine.heads, machine.slot_identity = 64, 1, 4, True
        machine.item_scale = 3.0
        config.rehearsal.recollection = config.rehearsal.familiarity = 0.0
        train.learning_rate, train.schedule = 3e-3, "cosine"
        train.steps, train.eval_every, train.save_every = 20_000, 1000, 500  # 23 epochs
    if "first" in chosen:
        config.data.babi.tasks = "1"
        train.steps, train.eval_every = 300, 100
    return config
