"""NarrativeQA, summaries, multiple choice (RM and CM section 4.3): which answer of the story's is this question's?

    python -m rmjax.main --config=configs/narrativeqa.py --config.data.dir=narrativeqa --workdir=runs/narrativeqa

config.data.dir is a clone of github.com/google-deepmind/narrativeqa (documents.csv, qaps.csv,
third_party/wikipedia/summaries.csv). Candidates are the answers to all questions of the story; MRR. Paper's size:
d = 256, K = 20, N = 20, 3 layers, 4 heads, two hops, all words as negatives; RM reports 29.4 (valid) and 28.7 (test).
`:continual` is CM (28.8 and 28.1): Z = 4, B = 5, fragments drawn uniformly. config.data.vectors takes a GloVe file.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["continual"])
    config = configs.base()
    config.data.name = "narrativeqa"
    config.data.segment_length = 20
    config.machine.dim, config.machine.slots, config.machine.timescale = 256, 20, 30
    config.machine.dropout = 0.1
    config.rehearsal.sampled_items = 0
    config.reason.hops, config.reason.head = 2, "mlp"
    config.teacher.dim, config.teacher.batch_size, config.teacher.steps = 256, 16, 2000
    config.train.batch_size, config.train.eval_batch_size = 16, 16
    config.train.steps, config.train.eval_every, config.train.save_every = (
        7000,
        350,
        175,
    )  # 100 epochs of 1,102 stories
    if "continual" in chosen:
        config.machine.kind = "continual"
        config.rehearsal.sum_pairs = True  # CM Eq. 5
        config.rehearsal.fragments, config.rehearsal.sampler = 5, "uniform"
    return config
