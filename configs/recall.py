"""Recall: which value stood behind this key? Associative recall (MQAR), and joint recall.

    # MQAR's sizes, and joint recall:
    python -m rmjax.main --config=configs/recall.py:pairs --workdir=runs/pairs
    python -m rmjax.main --config=configs/recall.py:joint --workdir=runs/joint
    # Minutes on one CPU core, and the curve of accuracy by the number of pairs:
    python -m rmjax.main --config=configs/recall.py:local --workdir=runs/recall
    python -m rmjax.ablate --config=configs/recall.py:local --table=capacity --workdir=runs/capacity
    # Another memory, such as dnc or gated_delta:
    python -m rmjax.main --config=configs/recall.py:local --config.machine.kind=dnc --workdir=runs/d

Data: made while they are read. A stream is written segment by segment. All questions come after
it, so they are answered from memory alone.

Size: `:pairs` (also without an option) has the sizes of MQAR (Arora et al. 2023). They are 4,095
keys, 4,096 values and a blank, streams of 256 items with 4 to 64 pairs, a = 0.01, and 180,000
training streams. In the paper streams of 4 pairs have 64 items and those of 8 have 128, and they
are over half of the training streams. `:joint` has the sizes of Zhan et al. (2025): 16 contexts,
16 keys and 16 values. Here a stream has one of four sizes, 5x5 to 16x16, and there are 40,000
training streams. In the paper it has one of the 144 sizes up to 16x16, with 10,000 streams each.
Machine and training are this card's own. `:local` is a reduced size: 32 keys, 16 values, 2 to 16
pairs without blanks, d = 32, K = 16. `:joint,local` has 8 contexts, 8 keys and 16 values. `:tiny`
is for tests.

The machine is not the paper's in four points. A bidirectional GRU encodes segments, the softmax of
Eq. 1 is over items, slots keep an identity, and items choose their slots more sharply. The paper's
Transformer and softmax over slots were tried for 2,000 steps, without rehearsal. Their accuracy at
4 pairs stays at that of a guess among the values of the stream. `machine.timescale` is the number
of segments of the longest stream, since a memory that forgets before training learns late or never.
The buffer reads items without their order, unless `machine.before` gives each slot the items before
its own. It needs 1 in associative recall and 2 in joint recall, and `machine.recent` as long as the
stream.

Hardware and time: a run of `:local` takes 2 to 3.5 minutes on one busy CPU core, mostly compiling.
Item by item, MIMN takes up to 9 minutes, and STM 15.

Score: accuracy at `:local` for 2, 4, 8 and 16 pairs after 1,500 steps, one seed: RM 0.964, 0.902,
0.770, 0.609; CM 0.878, 0.748, 0.556, 0.418; gated delta, DNC and Multi-hop Reason, which keeps all
items, 1 everywhere. The GRU has 0.51, 0.34, 0.25 and 0.19, near a reader that knows the values
alone. At `:joint,local` and 4, 8 and 16 pairs gated delta has 0.997, 0.990 and 0.922. RM has 0.827,
0.710 and 0.486 with its 16 slots, and 1, 0.997 and 0.974 with `machine.slots=64`.
docs/results/recall.md has all memories. Scores at the sizes of the papers were not measured here.
"""

from ml_collections import ConfigDict

from rmjax import config as configs


def get_config(arg: str = "") -> ConfigDict:
    chosen = configs.options(arg, ["pairs", "joint", "local", "tiny"])
    config = configs.base()
    config.data.name = "recall"
    data, machine, train = config.data.recall, config.machine, config.train
    data.pairs, data.length, data.train, data.test = "4,8,16,32,64", 256, 180_000, 3000
    config.data.segment_length = 8
    machine.kind, machine.dim, machine.slots, machine.layers = "rehearsal", 128, 64, 1
    machine.encoder, machine.normalize, machine.timescale = "bigru", "items", 32
    machine.slot_identity, machine.item_scale = True, 3.0
    config.rehearsal.recollection = config.rehearsal.familiarity = 0.0
    config.rehearsal.sampler, config.rehearsal.layers = "uniform", 1
    config.reason.hops, config.reason.head = 2, "mlp"
    train.batch_size, train.eval_batch_size = 256, 500
    train.learning_rate, train.schedule, train.warmup = 5e-3, "cosine", 0.05
    train.steps, train.eval_every, train.save_every = 22_500, 2250, 500  # 32 epochs
    joint, small = "joint" in chosen, "local" in chosen or "tiny" in chosen
    if joint:
        data.pairs, data.length, data.train, data.test = "5x5,8x8,12x12,16x16", 0, 40_000, 400
        data.context_ids = data.key_ids = data.value_ids = 16
        config.data.segment_length, machine.timescale = 12, 64
        train.steps, train.eval_every = 20_000, 2000
    if small:
        data.pairs = "2x2,2x4,4x4" if joint else "2,4,8,16"
        data.context_ids, data.key_ids = (8, 8) if joint else (0, 32)
        data.value_ids, data.length, data.train, data.valid, data.test = 16, 0, 96_000, 400, 1000
        machine.dim, machine.heads, machine.slots, machine.timescale = 32, 2, 16, 4
        train.batch_size = 64
        train.steps, train.eval_every, train.save_every = 1500, 500, 500
    if "tiny" in chosen:
        data.train, data.valid, data.test = 64, 12, 12
        machine.dim, machine.slots = 8, 4
        train.batch_size, train.eval_batch_size = 8, 8
        train.steps, train.eval_every, train.save_every = 2, 2, 2
    return config
