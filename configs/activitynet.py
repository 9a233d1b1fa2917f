"""ActivityNet-QA (RM and CM section 4.4): questions about a video of three minutes, from its frames' features.

    python -m rmjax.main --config=configs/activitynet.py --config.data.dir=activitynet-qa \\
        --config.data.activitynet.features=features --workdir=runs/activitynet

config.data.dir is a clone of github.com/MILVLG/activitynet-qa; the folder of features has one .npz or .h5 file a video,
[frames, width]. Answers are the 1,000 most frequent ones. Paper's size: d = 256, K = 20, N = 20, 3 layers, 4 heads, two
hops, 30 other frames of the video as negatives; RM reports an accuracy of 36.3 %, 34.6 without rehearsal. What the
question alone gives is printed beside the model. `:continual` is CM (35.7): Z = 4, B = 5, fragments drawn uniformly.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["continual"])
    config = configs.base()
    config.data.name = "activitynet"
    config.data.segment_length = 20
    config.machine.dim, config.machine.slots, config.machine.timescale = 256, 20, 10
    config.machine.dropout = 0.1
    config.rehearsal.sampled_items = 30
    config.reason.hops = 2
    config.teacher.dim, config.teacher.batch_size, config.teacher.steps = 256, 32, 2000
    config.train.batch_size, config.train.eval_batch_size = 32, 32
    config.train.steps, config.train.eval_every, config.train.save_every = (
        5000,
        200,
        200,
    )  # 50 epochs of 3,200 videos
    if "continual" in chosen:
        config.machine.kind = "continual"
        config.rehearsal.sum_pairs = True  # CM Eq. 5
        config.rehearsal.fragments, config.rehearsal.sampler = 5, "uniform"
    return config
