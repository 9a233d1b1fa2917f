r"""ActivityNet-QA (RM and CM section 4.4): questions about a video of three minutes.

    python -m rmjax.main --config=configs/activitynet.py --config.data.dir=activitynet-qa \
        --config.data.activitynet.features=features --workdir=runs/activitynet

Data: config.data.dir is a clone of github.com/MILVLG/activitynet-qa. The stream is the features of
the video's frames. The folder of features has one .npy, .npz or .h5 file for each video, with an
array [frames, width]. The released .hdf5 of all videos is read too. The classes are the 1,000 most
frequent answers.

Size: the paper's. d = 256, K = 20, N = 20, 3 layers, 4 heads, two hops; 30 other frames of the
video are negatives. `:continual` is CM, with Z = 4, B = 5 and uniformly drawn fragments.

Score: the paper's accuracy is 36.3 % for RM, 34.6 % without rehearsal, and 35.7 % for CM. The final
table also has the accuracy that the question alone gives. Score and time at this size were not
measured here.
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
    train = config.train
    train.batch_size, train.eval_batch_size = 32, 32
    train.steps, train.eval_every, train.save_every = 5000, 200, 200  # 50 epochs of 3,200 videos
    if "continual" in chosen:
        config.machine.kind = "continual"
        config.rehearsal.sum_pairs = True  # CM Eq. 5
        config.rehearsal.fragments, config.rehearsal.sampler = 5, "uniform"
    return config
