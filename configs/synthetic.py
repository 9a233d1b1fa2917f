"""CM's synthetic evidence task (CM section 4.2): which evidence for this query lay in the stream, and what does it say?

    python -m rmjax.main --config=configs/synthetic.py --workdir=runs/synthetic           # the paper's world and size
    python -m rmjax.main --config=configs/synthetic.py:local --workdir=runs/evidence      # minutes on two CPU cores

`:long` is the paper's longer stream (2,000 facts, streams of 1,000, evidence of 10, by quarter), `:discrete` evidence
scattered over a fifth of the stream, `:local` a reduced world: 80 facts, streams of 60, 8 queries, 4 answers; they
combine: `:long,discrete`. Paper's size: d = 128, K = 20, N = 10, 3 layers, 4 heads, Z = 4, B = 5, all facts as
negatives.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["long", "discrete", "local"])
    config = configs.base()
    config.data.name = "synthetic"
    config.data.segment_length = 10
    config.data.synthetic.placing = "discrete" if "discrete" in chosen else "consecutive"
    machine = config.machine
    machine.kind, machine.dim, machine.slots, machine.timescale = "continual", 128, 20, 20
    config.rehearsal.fragments, config.rehearsal.sampled_items, config.rehearsal.sampler = (
        5,
        0,
        "uniform",
    )
    config.rehearsal.sum_pairs = True  # CM Eq. 5
    config.reason.hops = 2
    config.train.batch_size, config.train.eval_batch_size = 256, 512
    config.train.steps, config.train.eval_every, config.train.save_every = (
        18_750,
        1875,
        500,
    )  # ten epochs
    world = config.data.synthetic
    if "long" in chosen:
        world.facts, world.length, world.evidence, world.parts = 2000, 1000, 10, 4
        config.data.segment_length, machine.timescale = 20, 50
    if "local" in chosen:
        world.facts, world.length, world.queries, world.answers, world.groups = 80, 60, 8, 4, 4
        world.train, world.valid, world.test = 4000, 50, 200
        config.data.segment_length, machine.timescale = 10, 6
        machine.dim, machine.layers, machine.heads, machine.slots = 64, 1, 2, 10
        config.rehearsal.layers = 1
        config.train.batch_size, config.train.learning_rate, config.train.schedule = (
            128,
            2e-3,
            "cosine",
        )
        config.train.steps, config.train.eval_every, config.train.save_every = 300, 100, 100
        config.teacher.steps, config.teacher.batch_size, config.teacher.dim = 300, 128, 64
    return config
