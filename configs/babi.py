"""bAbI, all 20 tasks with one model (RM section 4.2): a story is written once, and asked wherever it has a question.

    python -m rmjax.main --config=configs/babi.py --config.data.dir=tasks_1-20_v1-2 --workdir=runs/babi        # RM's
    # 2 cores: first the first task alone, in a minute; then all of them from what it learned, in about 75 minutes
    python -m rmjax.main --config=configs/babi.py:local,first --config.data.dir=tasks_1-20_v1-2 --workdir=runs/qa1
    python -m rmjax.main --config=configs/babi.py:local --config.data.dir=tasks_1-20_v1-2 --workdir=runs/babi \
        --config.train.start_from=runs/qa1

config.data.dir is the folder of the official release (v1.2), or its archive. A sentence is a segment, N = 15; answers
are classes, a list of them one class. Paper's size: d = 128, K = 20, 3 layers, 4 heads, two hops, all words negatives;
RM reports a mean error of 0.33 +- 0.15 %. `:local` is a reduced size: d = 64, one layer, no rehearsal, and
slots that keep an identity and items that choose theirs (`machine.slot_identity`, `item_scale`). In 300 steps of the
first task alone (`:local,first`) its error falls to 4 %; begun with all tasks at once, it does not for thousands.
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
    machine.dim, machine.slots, machine.timescale = 128, 20, 0  # what counts is who was where last
    config.rehearsal.sampled_items = 0
    config.reason.hops = 2
    config.teacher.dim, config.teacher.batch_size, config.teacher.steps = 128, 64, 5000
    config.train.batch_size, config.train.eval_batch_size = 64, 128
    config.train.steps, config.train.eval_every, config.train.save_every = 200_000, 2000, 500
    if "local" in chosen:
        machine.dim, machine.layers, machine.heads, machine.slot_identity = 64, 1, 4, True
        machine.item_scale = 3.0
        config.rehearsal.recollection = config.rehearsal.familiarity = 0.0
        config.train.learning_rate, config.train.schedule = 3e-3, "cosine"
        config.train.steps, config.train.eval_every, config.train.save_every = (
            20_000,
            1000,
            500,
        )  # 23 epochs
    if "first" in chosen:
        config.data.babi.tasks = "1"
        config.train.steps, config.train.eval_every = 300, 100
    return config
