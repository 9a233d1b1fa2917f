"""TVQA from subtitles alone (CM section 4.3): which of five answers is right?

    python -m rmjax.main --config=configs/tvqa.py --config.data.dir=tvqa --workdir=runs/tvqa

config.data.dir holds tvqa_train.jsonl, tvqa_val.jsonl and tvqa_preprocessed_subtitles.jsonl (tvqa.cs.unc.edu). The test
split is the release's validation file, the public test file has no answers. Paper's size: d = 256, K = 20, N = 20,
3 layers, 4 heads, Z = 4, two hops, B = 5, all words as negatives; CM reports an accuracy of 61.12 %, 59.87 without
rehearsal. config.data.vectors takes a GloVe file.
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
    config.rehearsal.fragments, config.rehearsal.sampled_items, config.rehearsal.sampler = (
        5,
        0,
        "uniform",
    )
    config.reason.hops, config.reason.head = 2, "mlp"
    config.train.batch_size, config.train.eval_batch_size = 64, 64
    config.train.steps, config.train.eval_every, config.train.save_every = (
        8000,
        300,
        300,
    )  # 30 epochs of 17,000 clips
    return config
