"""Real clicks: any MovieLens release as lifelong recommendation with a rehearsal memory.

    python -m rmjax.main --config=configs/movielens.py --config.data.dir=ml-latest-small --workdir=runs/movielens

config.data.dir is the folder of ratings.csv (grouplens.org/datasets/movielens). A question at every 10th interaction
after the 20th, against a film of the same popularity; N = 10, so that every question falls between two segments.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    configs.options(arg, [])
    config = configs.base()
    config.data.name = "movielens"
    config.data.segment_length = 10
    return config
