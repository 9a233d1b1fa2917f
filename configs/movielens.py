r"""Real clicks: any MovieLens release as lifelong recommendation with a rehearsal memory.

    python -m rmjax.main --config=configs/movielens.py --config.data.dir=ml-latest-small \
        --workdir=runs/movielens

Data: config.data.dir is the folder of ratings.csv (grouplens.org/datasets/movielens). A question is
asked at every 10th interaction after the 20th. It compares the film with another of the same
popularity. N = 10, so that every question falls between two segments.

Size: `:local` is a reduced size for two CPU cores and the latest-small release: d = 32, one layer,
two heads, K = 10. The item table is the teacher's and stays fixed, since 6,579 targets are too few
to train a table with every memory.

Score: test AUC at `:local` on latest-small is 0.5629 +- 0.0163 over three seeds. The mean of all
ratings has 0.5782, and the nearest id has 0.612. The full size was not measured here.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["local"])
    config = configs.base()
    config.data.name = "movielens"
    config.data.segment_length = 10
    if "local" in chosen:
        machine, train = config.machine, config.train
        machine.dim, machine.layers, machine.heads, machine.slots = 32, 1, 2, 10
        config.rehearsal.layers = 1
        config.reason.head = "mlp"
        config.teacher.dim, config.teacher.share_items = 32, True
        config.teacher.steps, config.teacher.learning_rate = 200, 3e-3
        train.steps, train.learning_rate, train.schedule = 150, 3e-3, "cosine"
        train.eval_every, train.save_every = 25, 50
    return config
