"""Real clicks: any MovieLens release as lifelong recommendation with a rehearsal memory.

    python -m rmjax.main --config=configs/movielens.py --config.data.dir=ml-latest-small --workdir=runs/movielens

config.data.dir is the folder of ratings.csv (grouplens.org/datasets/movielens). A question at every 10th interaction
after the 20th, against a film of the same popularity; N = 10, so that every question falls between two segments.
`:local` is a reduced size for two CPU cores and the latest-small release: d = 32, one layer, two heads, K = 10;
the item table is the teacher's, fixed, since 6,579 targets are too few to train one with every memory.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["local"])
    config = configs.base()
    config.data.name = "movielens"
    config.data.segment_length = 10
    if "local" in chosen:
        config.machine.dim, config.machine.layers, config.machine.heads, config.rehearsal.layers = (
            32,
            1,
            2,
            1,
        )
        config.machine.slots = 10
        config.reason.head = "mlp"
        config.teacher.dim, config.teacher.share_items = 32, True
        config.teacher.steps, config.teacher.learning_rate = 200, 3e-3
        config.train.steps, config.train.learning_rate, config.train.schedule = 150, 3e-3, "cosine"
        config.train.eval_every, config.train.save_every = 25, 50
    return config
