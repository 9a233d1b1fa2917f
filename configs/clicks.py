r"""Clicks from your own table: which item comes next?

    python -m rmjax.main --config=configs/clicks.py:local --workdir=runs/clicks \
        --config.data.table.path=events.parquet

Data: config.data.table.path is a .csv, .tsv, .inter (RecBole), .parquet, .arrow or .feather file,
or a folder of such files; `pip install 'rmjax[tables]'` reads them. It has the columns user_id,
item_id and timestamp, or those that config.data.table.user, item and time name. Ids are integers or
strings. N = 10. A question is asked at every 10th event after the 20th, and with `:local` at every
event after it. config.data.table.ask=pairs compares an item with another one instead. A question
then sees complete segments of N items only.

Size: `:local` is a reduced size for two CPU cores: d = 64, one layer, two heads, K = 10. Fragments
for rehearsal are drawn uniformly and masked completely.

Score: on the log of `python examples/shop_log.py`, NDCG@10 is 0.297 after 1.5 minutes on two cores
(one seed). It is 0.319 for what most often follows the last item, and 0.029 for popularity.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["local"])
    config = configs.base()
    config.data.name = "table"
    config.data.segment_length = 10
    config.train.new_items = "mean"
    if "local" in chosen:
        machine, train = config.machine, config.train
        config.data.table.every = 1
        machine.dim, machine.layers, machine.heads, machine.slots = 64, 1, 2, 10
        config.rehearsal.layers, config.rehearsal.sampler = 1, "uniform"
        config.rehearsal.mask_ratio, config.rehearsal.negatives = 1.0, "partner"
        config.rehearsal.familiarity = 0.0
        config.reason.head = "mlp"
        train.steps, train.learning_rate, train.schedule = 600, 1e-2, "cosine"
        train.eval_every, train.save_every = 200, 100
    return config
