from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["pairs", "joint", "local", "tiny"])
    config = configs.base()
    config.data.name = "recall"
    config.data.segment_length = 8
    data, machine, train = config.data.recall, config.machine, config.train
    machine.kind, machine.dim, machine.slots, machine.timescale = "rehearsal", 64, 16, 4
    machine.layers = 1
    config.rehearsal.recollection = config.rehearsal.familiarity = 0.0
    config.rehearsal.sampled_items = 0
    config.rehearsal.sampler = "uniform"
    config.reason.hops, config.reason.head = 2, "mlp"
    data.pairs, data.keys, data.values, data.length = "4", 16, 16, 0
    data.train, data.valid, data.test = 100_000, 500, 1000
    train.batch_size, train.eval_batch_size = 128, 500
    train.learning_rate, train.schedule, train.warmup = 2e-3, "cosine", 0.05
    train.steps, train.eval_every, train.save_every = 2000, 250, 1000
    return config
