"""Lifelong recommendation with a rehearsal memory (RM section 4.3.3).

    # The paper's size:
    python -m rmjax.main --config=configs/xlong.py --workdir=runs/xlong
    # Minutes on two CPU cores:
    python -m rmjax.main --config=configs/xlong.py:local --workdir=runs/xlong

Data: the folder of the official XLong files, in config.data.dir. If it is empty, the streams are
simulated clicks.

Size: the paper's. d = 64, K = 20, N = 20, T = 50, 3 layers, 4 heads, B = 6, J = 200. `:local` is a
reduced size: d = 32, one layer, two heads, 2,000 items. There the item table is the teacher's and
stays fixed.

Hardware and time: `:local` takes four to eight minutes on two CPU cores.

Score: test AUC of simulated clicks at `:local`, three seeds, is 0.7606 +- 0.0040. The mean of all
clicks has 0.7464, and an oracle 0.912. The paper's size was not trained here.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["local"])
    config = configs.base()
    config.data.name = "xlong"
    machine, teacher, train = config.machine, config.teacher, config.train
    train.batch_size, train.steps = 128, 20_000
    teacher.batch_size, teacher.steps = 128, 4_000
    clicks = config.data.simulated
    clicks.clusters, clicks.styles, clicks.items_per_style, clicks.staples = 200, 5, 100, 1000
    if "local" in chosen:
        clicks.clusters, clicks.styles, clicks.items_per_style, clicks.staples = 32, 3, 20, 80
        machine.dim, machine.layers, machine.heads, config.rehearsal.layers = 32, 1, 2, 1
        config.reason.head = "mlp"
        teacher.dim, teacher.share_items = 32, True
        teacher.batch_size, teacher.steps, teacher.learning_rate = 64, 1000, 1e-2
        train.batch_size, train.steps, train.learning_rate = 64, 470, 1e-2
        train.schedule = "cosine"
        train.eval_every, train.save_every, train.eval_batch_size = 200, 100, 200
    return config
