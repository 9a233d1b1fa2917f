"""TVQA from the subtitles alone (CM section 4.3): which of five answers is right?

    python -m rmjax.main --config=configs/tvqa.py --config.data.dir=tvqa --workdir=runs/tvqa

Data: config.data.dir holds tvqa_train.jsonl, tvqa_val.jsonl and tvqa_preprocessed_subtitles.jsonl
(tvqa.cs.unc.edu). The test split is the release's validation file, since the public test file has
no answers. config.data.vectors takes a GloVe file.

Size: the paper's. d = 256, K = 20, N = 20, 3 layers, 4 heads, Z = 4, two hops, B = 5; all words are
negatives.

Score: the paper's accuracy is 61.12 % for CM, and 59.87 % without rehearsal. Score and time at this
size were not measured here.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    configs.options(arg, [])
    config = configs.base()
    config.data.name = "tvqa"
    config.data.segment_length = 20
    config.data.buckets = 4
    config.machine.kind = "continual"
    config.rehearsal.sum_pairs = True  # CM Eq. 5
    config.machine.dim, config.machine.slots, config.machine.timescale = 256, 20, 15
    config.machine.dropout = 0.1
    config.rehearsal.fragments, config.rehearsal.sampler = 5, "uniform"
    config.rehearsal.sampled_items = 0
    config.reason.hops, config.reason.head = 2, "mlp"
    train = config.train
    train.batch_size, train.eval_batch_size = 64, 64
    train.steps, train.eval_every, train.save_every = 8000, 300, 300  # 30 epochs of 17,000 clips
    return config
