"""Lifelong recommendation with a rehearsal memory (RM section 4.3.3).

    python -m rmjax.main --config=configs/xlong.py --workdir=runs/xlong          # the paper's size
    python -m rmjax.main --config=configs/xlong.py:local --workdir=runs/xlong    # minutes on two CPU cores

`:local` is a reduced size: d = 32, one layer, two heads, 2,000 items; the item table is the teacher's, fixed.
With config.data.dir empty the streams are simulated clicks; set it to the folder of the official XLong files for the
real ones. Paper's size: d = 64, K = 20, N = 20, T = 50, 3 layers, 4 heads, B = 6, J = 200.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["local"])
    config = configs.base()
    config.data.name = "xlong"
    config.train.batch_size = 128
    config.train.steps = 20_000
    config.teacher.steps = 4_000
    config.teacher.batch_size = 128
    simulated = config.data.simulated
    simulated.clusters, simulated.styles, simulated.items_per_style, simulated.staples = (
        200,
        5,
        100,
        1000,
    )
    if "local" in chosen:
        simulated.clusters, simulated.styles, simulated.items_per_style, simulated.staples = (
            32,
            3,
            20,
            80,
        )
        config.machine.dim, config.machine.layers, config.machine.heads, config.rehearsal.layers = (
            32,
            1,
            2,
            1,
        )
        config.reason.head = "mlp"
        config.teacher.dim, config.teacher.share_items = 32, True
        config.teacher.batch_size, config.teacher.steps, config.teacher.learning_rate = (
            64,
            1000,
            1e-2,
        )
        config.train.batch_size, config.train.steps, config.train.learning_rate = 64, 470, 1e-2
        config.train.schedule = "cosine"
        config.train.eval_every, config.train.save_every, config.train.eval_batch_size = (
            200,
            100,
            200,
        )
    return config
