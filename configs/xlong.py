"""Lifelong recommendation with a rehearsal memory (RM section 4.3.3).

    # The paper's size:
    python -m rmjax.main --config=configs/xlong.py --workdir=runs/xlong
    # Minutes on two CPU cores:
    python -m rmjax.main --config=configs/xlong.py:local --workdir=runs/xlong
    # The same with few labels, where rehearsal helps most:
    python -m rmjax.main --config=configs/xlong.py:local,few --workdir=runs/few

Data: the folder of the official XLong files, in config.data.dir. If it is empty, the streams are
simulated clicks.

Size: the paper's. d = 64, K = 20, N = 20, T = 50, 3 layers, 4 heads, B = 6, J = 200. `:local` is a
reduced size: d = 32, one layer, two heads, 2,000 items. There the item table is the teacher's and
stays fixed.

Variant: `:few` simulates the form of XLong, with one positive and one negative a user. The model
learns an item table of its own, and rehearsal is set up to need the memory. Fragments are masked
as a whole and drawn uniformly, and wrong items are those of another user. There is no familiarity
loss, since nothing of a fragment is shown. With more than two questions a user the weight of the
rehearsal falls in proportion (`rehearsal.labels`). It combines with `:local`, which then takes
1,400 steps at a rate of 2e-3.

Hardware and time: `:local` takes two to eight minutes on two CPU cores, `:local,few` five to
twelve.

Score: test AUC of simulated clicks at `:local`, three seeds, is 0.7606 +- 0.0040. The mean of all
clicks has 0.7464, and an oracle 0.912. With `:local,few`, a reduced size, it is 0.737 +- 0.004 over
five seeds, with a memory gain of 1.1 to 1.2 nats. Without rehearsal it is 0.611 +- 0.006, and an
oracle has 0.918. With 16 questions a user (`data.simulated.targets=8`) it is 0.793 +- 0.006 over
three seeds, and 0.771 +- 0.008 without. docs/results/few.md has the numbers. The paper's size was
not trained here.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["local", "few"])
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
    if "few" in chosen:
        clicks.targets = 1
        rehearsal, teacher.share_items = config.rehearsal, False
        rehearsal.sampler, rehearsal.negatives = "uniform", "partner"
        rehearsal.mask_ratio, rehearsal.familiarity = 1.0, 0.0
        rehearsal.labels = 2.0  # with more questions the rehearsal counts less
        if "local" in chosen:
            train.steps, train.learning_rate = 1400, 2e-3
    return config
