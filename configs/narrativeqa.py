r"""NarrativeQA summaries, multiple choice (RM and CM section 4.3): which answer fits a question?

    python -m rmjax.main --config=configs/narrativeqa.py --config.data.dir=narrativeqa \
        --workdir=runs/narrativeqa

Data: config.data.dir is a clone of github.com/google-deepmind/narrativeqa. The run reads
documents.csv, qaps.csv and third_party/wikipedia/summaries.csv. The candidates are the answers to
all questions of a story. config.data.vectors takes a GloVe file.

Size: the paper's. d = 256, K = 20, N = 20, 3 layers, 4 heads, two hops; all words are negatives.
`:continual` is CM, with Z = 4, B = 5 and uniformly drawn fragments.

Score: the paper's MRR is 29.4 (valid) and 28.7 (test) for RM, 28.8 and 28.1 for CM. Score and time
at this size were not measured here.
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
    train = config.train
    train.batch_size, train.eval_batch_size = 16, 16
    train.steps, train.eval_every, train.save_every = 7000, 350, 175  # 100 epochs of 1,102 stories
    if "continual" in chosen:
        config.machine.kind = "continual"
        config.rehearsal.sum_pairs = True  # CM Eq. 5
        config.rehearsal.fragments, config.rehearsal.sampler = 5, "uniform"
    return config
