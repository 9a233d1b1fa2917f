"""The ablation tables of the papers as data: rows of config changes and reported numbers.

The paper's numbers belong to the paper's sizes and data, even when they are printed beside the
results of a smaller config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from rmjax.registry import MACHINES
from rmjax.tools import systems
from rmjax.tools.systems import Changes

Numbers = Mapping[str, float]  # {"test_accuracy": 0.2356, "early": 0.2214}


class Row(NamedTuple):
    """One row of a table.

    Attributes:
      changes: {config key: value} of this row.
      paper: the paper's numbers by setting; by config.data.name if the table has no settings.
      start: name of the run in `Table.starts` whose parameters this row begins with; '' for none.
    """

    changes: Changes
    paper: Mapping[str, Numbers] = {}
    start: str = ""


class Table(NamedTuple):
    """One table of a paper.

    Attributes:
      source: the paper and the table's number.
      rows: {name: row}.
      settings: {name: changes of the config}; every row is run in every setting.
      share_teacher: all rows of a seed use the teacher that the first row trained.
      baseline: name of the row that the other rows are compared with, seed by seed; '' for none.
      curve: columns that end with it are points of a curve, see `rmjax.tools.curves`; '' for none.
      starts: {name: changes} of runs that rows begin with. Each is made once for each seed, without
        the changes of a setting, and has no line in the table.
      onward: after the first setting, a row begins with the parameters that it had at the end of
        the setting before.
      compared: further columns that are compared with the baseline, beside the test measure.
        "early - later" is the first of two columns minus the second.
      wide: a record has one line for each setting and one column for each row, of the test measure.
    """

    source: str
    rows: Mapping[str, Row]
    settings: Mapping[str, Changes] = {"": {}}
    share_teacher: bool = False
    baseline: str = ""
    curve: str = ""
    starts: Mapping[str, Changes] = {}
    onward: bool = False
    compared: tuple[str, ...] = ()
    wide: bool = False


NO_REHEARSAL: dict[str, object] = {"rehearsal.recollection": 0.0, "rehearsal.familiarity": 0.0}


KINDS = {  # names in the papers -> kinds of machines
    "DNC": "dnc",
    "NUTM": "nutm",
    "DMSDNC": "dmsdnc",
    "STM": "stm",
    "CT": "compressive",
    "GRU4REC": "gru",
    "HPMN": "hpmn",
    "MIMN": "mimn",
}
MODERN = {"Gated delta": "gated_delta", "Titans": "titans", "RMT": "rmt", "FFM": "ffm"}
CM: dict[str, object] = {
    "machine.kind": "continual",
    "rehearsal.fragments": 5,
    "rehearsal.sampler": "uniform",
    "rehearsal.sum_pairs": True,
}

Percents = tuple[float, float, float]


def _cm1(discrete: Percents, consecutive: Percents) -> dict[str, Numbers]:
    """Numbers of CM Table 1: percents of early, later and all questions, in both settings."""
    names = ("early", "later", "test_accuracy")
    return {
        setting: {name: percent / 100 for name, percent in zip(names, numbers, strict=True)}
        for setting, numbers in (("discrete", discrete), ("consecutive", consecutive))
    }


def _rm(mrr: float, accuracy: float, auc: float) -> dict[str, Numbers]:
    """Numbers of RM Tables 5 and 6: MRR and accuracy in percent, and AUC."""
    return {
        "narrativeqa": {"test_mrr": mrr / 100},
        "activitynet": {"test_accuracy": accuracy / 100},
        "xlong": {"test_auc": auc},
    }


def _system(kind: str, paper: Mapping[str, Numbers]) -> Row:
    """A row of a memory without rehearsal."""
    changes = NO_REHEARSAL | {"machine.kind": kind} | dict(systems.DEFAULTS.get(kind, {}))
    return Row(changes, paper)


def _paper(data: str, measure: str, **values: float) -> dict[str, Row]:
    """Rows of systems by their names in the papers, with the numbers of one data set."""
    numbers = {name: {data: {f"test_{measure}": value}} for name, value in values.items()}
    return {name: _system(KINDS[name], numbers[name]) for name in values}


def _rm_row(data: str, measure: str, value: float) -> dict[str, Row]:
    changes = {"machine.kind": "rehearsal"}
    return {"RM": Row(changes, {data: {f"test_{measure}": value}})}


def _cm_rows(data: str, measure: str, full: float, only_reason: float) -> dict[str, Row]:
    """The rows of CM, the first of which rehearses."""
    number = lambda value: {data: {f"test_{measure}": value}}
    return {
        "CM (Full)": Row(CM, number(full)),
        "CM (Only Reason)": Row(CM | NO_REHEARSAL, number(only_reason)),
    }


def _model(kind: str) -> dict[str, object]:
    return {"model.kind": kind}


WORKING: Changes = {
    "model.kind": "memoria",
    "memoria.remind_short_term": 0,
    "memoria.remind_long_term": 0,
}
SHORT_TERM: Changes = {"model.kind": "memoria", "memoria.remind_long_term": 0}
# Only Memoria resets its memory in training (Memoria Appendix B.2).
NO_RESETS: dict[str, object] = {"data.text.reset_segments": 0}
ONE_SEGMENT: dict[str, object] = {"data.hyperpartisan.max_segments": 1}
SEGMENTS = {f"{n} segments": {"data.sorting.segments": n} for n in (4, 8, 16, 32, 47)}


def _sorting(*percents: float) -> dict[str, Numbers]:
    """Accuracies in percent, for the first of `SEGMENTS`."""
    return {
        name: {"test_accuracy": percent / 100}
        for name, percent in zip(SEGMENTS, percents, strict=False)
    }


def _mem1(wikitext103: float, pg19: float, enwik8: float) -> dict[str, Numbers]:
    """Numbers of Memoria Table 1: two perplexities, and bits per character."""
    return {
        "wikitext": {"test_segment_perplexity": wikitext103},
        "pg19": {"test_segment_perplexity": pg19},
        "enwik8": {"test_bits_per_character": enwik8},
    }


def _mem2(perplexity: float) -> dict[str, Numbers]:
    return {"wikitext": {"test_segment_perplexity": perplexity}}


def _mem3(f1: float, accuracy: float) -> dict[str, Numbers]:
    return {"hyperpartisan": {"macro_f1": f1 / 100, "test_accuracy": accuracy / 100}}


CM_LONG: Changes = {
    "data.synthetic.facts": 2000,
    "data.synthetic.length": 1000,
    "data.synthetic.evidence": 10,
    "data.synthetic.parts": 4,
    "data.segment_length": 20,
    "machine.slots": 20,
    "machine.timescale": 50,
}
FULL = Row({}, _rm(28.7, 36.3, 0.8817))
ONE_LABEL: Changes = {"data.simulated.targets": 1}
LABELS: dict[str, Changes] = {
    **{f"{n} a user": {"data.simulated.targets": n} for n in (1, 2, 4, 8)},
    **{
        f"1 for {n} % of users": {
            **ONE_LABEL,
            "data.simulated.labelled": n / 100,
            "rehearsal.sampler": "uniform",  # a teacher needs the question of every user
        }
        for n in (5, 20)
    },
}
# Six segments have evidence anywhere. Longer streams have it in the first tenth or in the last one.
# At the card's rate CM diverges in long streams, and without a bound its slots overflow.
EDGES: Changes = {"data.synthetic.edge": 0.1, "data.synthetic.window": 0.1}
WORLDS: dict[str, Changes] = {
    f"T = {segments}": {
        "data.synthetic.length": 10 * segments,
        "machine.timescale": segments,
        "machine.slot_bound": 1.0,
        "train.learning_rate": rate,
        "train.batch_size": batch,
        "train.steps": 400,
        **(EDGES if segments > 6 else {}),
    }
    for segments, rate, batch in ((6, 2e-3, 128), (20, 1e-3, 64), (50, 3e-4, 32), (100, 1e-4, 32))
}
PRINTED: Changes = {
    "rehearsal.recollection": 1.0,
    "rehearsal.familiarity": 0.5,
    "rehearsal.mask_ratio": 0.5,
    "rehearsal.negatives": "uniform",
    "rehearsal.sampler": "uniform",
}
ALONE: Changes = {**PRINTED, "rehearsal.familiarity": 0.0}
COMPLETE: Changes = {**ALONE, "rehearsal.mask_ratio": 1.0}
PARTNER: Changes = {**COMPLETE, "rehearsal.negatives": "partner"}
# What a rehearsal may ask for: {row: changes}. "Partner" negatives are another stream's items.
REHEARSALS: dict[str, Changes] = {
    "none": NO_REHEARSAL,
    "half of each fragment, and familiarity": PRINTED,
    "half of each fragment": ALONE,
    "half, partner negatives": {**ALONE, "rehearsal.negatives": "partner"},
    "half, in runs of five": {**ALONE, "rehearsal.span": 5},
    "complete fragments": COMPLETE,
    "complete, near negatives": {**COMPLETE, "rehearsal.negatives": "near"},
    "complete, negatives of the stream": {**COMPLETE, "rehearsal.negatives": "stream"},
    "complete, partner negatives": PARTNER,
    "partner, rising weight": {**PARTNER, "rehearsal.schedule": "rising"},
    "partner, falling weight": {**PARTNER, "rehearsal.schedule": "falling"},
    "partner, balanced gradients": {**PARTNER, "rehearsal.balance": 1.0},
    "partner, items detached": {**PARTNER, "rehearsal.detach_items": True},
}
# What may help a task of bAbI: {row: changes}.
BABI: dict[str, Changes] = {
    "two hops": {},
    "four hops": {"reason.hops": 4, "reason.norm": True},
    "slots meet": {"reason.mix": 2},
    "three layers": {"machine.layers": 3},
    "bi-GRU": {"machine.encoder": "bigru"},
    "softmax over items": {"machine.normalize": "items", "machine.item_scale": 1.0},
    "with rehearsal": {  # with the card's decoder and fragments a step takes five times as long
        "rehearsal.recollection": 1.0,
        "rehearsal.layers": 1,
        "rehearsal.fragments": 2,
        "rehearsal.sampler": "uniform",
    },
}

TABLES = {
    "cm1": Table(
        "CM Table 1",
        {
            "Directly Reason": Row(
                NO_REHEARSAL | {"machine.kind": "directly_reason"},
                _cm1((9.45, 9.32, 9.39), (13.57, 13.41, 13.49)),
            ),
            "Multi-Hop Reason": Row(
                NO_REHEARSAL | {"machine.kind": "multihop_reason"},
                _cm1((32.16, 33.42, 32.29), (34.38, 34.50, 34.44)),
            ),
            "DNC": _system("dnc", _cm1((13.37, 22.54, 17.95), (20.56, 26.59, 23.58))),
            "NUTM": _system("nutm", _cm1((17.84, 23.59, 20.72), (24.31, 29.71, 27.01))),
            "DMSDNC": _system("dmsdnc", _cm1((18.17, 24.21, 21.19), (24.92, 30.74, 27.83))),
            "STM": _system("stm", _cm1((17.90, 23.47, 20.68), (23.55, 29.64, 26.59))),
            "CM (Only Reason)": Row(
                NO_REHEARSAL, _cm1((18.71, 25.13, 21.92), (25.79, 31.38, 28.63))
            ),
            "CM (Full)": Row({}, _cm1((22.14, 24.98, 23.56), (28.42, 31.71, 30.07))),
            "CM (Only L_item)": Row(
                {"rehearsal.familiarity": 0.0}, _cm1((21.79, 24.46, 23.13), (27.88, 31.12, 29.50))
            ),
            "CM (Only L_seq)": Row(
                {"rehearsal.recollection": 0.0}, _cm1((19.75, 23.81, 21.78), (26.63, 30.25, 28.44))
            ),
            "CM (Single Head)": Row(
                {"machine.subspaces": 1}, _cm1((21.24, 24.12, 22.68), (27.79, 31.14, 29.47))
            ),
            "RM": Row(
                {
                    "machine.kind": "rehearsal",
                    "rehearsal.sampler": "teacher",
                    "rehearsal.fragments": 6,
                    "rehearsal.sum_pairs": False,
                }
            ),
        },
        {name: {"data.synthetic.placing": name} for name in ("discrete", "consecutive")},
        baseline="CM (Only Reason)",
    ),
    # The first row of these tables rehearses, so its teacher serves all rows.
    "cm2": Table(
        "CM Table 2",
        _cm_rows("narrativeqa", "mrr", 0.281, 0.276)
        | _paper("narrativeqa", "mrr", DNC=0.252, NUTM=0.272, DMSDNC=0.275, STM=0.267),
        share_teacher=True,
        baseline="CM (Only Reason)",
    ),
    "cm3": Table(
        "CM Table 3",
        _cm_rows("tvqa", "accuracy", 0.6112, 0.5987)
        | _paper("tvqa", "accuracy", DNC=0.5592, NUTM=0.5841),
        share_teacher=True,
        baseline="CM (Only Reason)",
    ),
    "cm4": Table(
        "CM Table 4",
        _cm_rows("activitynet", "accuracy", 0.357, 0.346)
        | _paper("activitynet", "accuracy", DNC=0.303, NUTM=0.331),
        share_teacher=True,
        baseline="CM (Only Reason)",
    ),
    "cm5": Table(
        "CM Table 5",
        _cm_rows("xlong", "auc", 0.8824, 0.8756)
        | _paper("xlong", "auc", GRU4REC=0.8702, HPMN=0.8645, MIMN=0.8731),
        share_teacher=True,
        baseline="CM (Only Reason)",
    ),
    # DNC, NUTM, DMSDNC and STM stand in RM Table 1 with the numbers of their own papers, which have
    # other sizes and read the question inside the stream; see `systems.ORIGINAL`.
    "rm1": Table(
        "RM Table 1",
        _rm_row("babi", "error", 0.0033)
        | _paper("babi", "error", DNC=0.167, NUTM=0.056, DMSDNC=0.0153, STM=0.0039, CT=0.0081),
        share_teacher=True,
    ),
    "rm2": Table(
        "RM Table 2",
        _rm_row("narrativeqa", "mrr", 0.287)
        | _paper("narrativeqa", "mrr", DNC=0.252, NUTM=0.272, DMSDNC=0.275, STM=0.267, CT=0.283),
        share_teacher=True,
    ),
    "rm3": Table(
        "RM Table 3",
        _rm_row("activitynet", "accuracy", 0.363)
        | _paper("activitynet", "accuracy", DNC=0.303, NUTM=0.331, DMSDNC=0.324)
        | _paper("activitynet", "accuracy", STM=0.337, CT=0.354),
        share_teacher=True,
    ),
    "rm4": Table(
        "RM Table 4",
        _rm_row("xlong", "auc", 0.8817)
        | _paper("xlong", "auc", GRU4REC=0.8702, HPMN=0.8645, MIMN=0.8731),
        share_teacher=True,
    ),
    "rm5": Table(
        "RM Table 5",
        {
            "Full": FULL,
            # The paper prints 24.6. This must be a slip for 34.6, the number in CM's Table 4.
            "w/o. rehearsal": Row(NO_REHEARSAL, _rm(27.5, 24.6, 0.8745)),
            "only L_rec": Row({"rehearsal.familiarity": 0.0}, _rm(28.6, 36.0, 0.8802)),
            "only L_fam": Row({"rehearsal.recollection": 0.0}, _rm(28.1, 35.4, 0.8776)),
            "random sampler": Row({"rehearsal.sampler": "uniform"}, _rm(28.3, 35.7, 0.8813)),
        },
        share_teacher=True,
        baseline="w/o. rehearsal",
    ),
    "rm6": Table(
        "RM Table 6",
        {
            "Full": FULL,
            "GRU Encoder": Row({"machine.encoder": "bigru"}, _rm(28.3, 35.9, 0.8789)),
            "15% Mask Ratio": Row({"rehearsal.mask_ratio": 0.15}, _rm(28.5, 36.0, 0.8809)),
        },
        share_teacher=True,
    ),
    "rm_slots": Table(
        "RM Figure 3",
        {f"K = {k}": Row({"machine.slots": k}) for k in (10, 15, 20, 25)},
        share_teacher=True,
    ),
    "rm_segments": Table(
        "RM Figure 4", {f"N = {n}": Row({"data.segment_length": n}) for n in (10, 15, 20, 25, 30)}
    ),
    "cm_slots": Table(
        "CM Figure 4", {f"K = {k}": Row({"machine.slots": k}) for k in (5, 10, 15, 20, 25)}
    ),
    "cm_segments": Table(
        "CM Figure 6", {f"N = {n}": Row({"data.segment_length": n}) for n in (5, 10, 15, 20)}
    ),
    "cm_long": Table(
        "CM Figure 5",
        {
            "CM (Only Reason)": Row(NO_REHEARSAL),
            "CM (Full)": Row({}),
            "Multi-Hop Reason": Row(NO_REHEARSAL | {"machine.kind": "multihop_reason"}),
        },
        {"": CM_LONG},
    ),
    # For configs/xlong.py:local,few. A label is one positive and one negative question.
    "few": Table(
        "Test AUC by number of labels",
        {
            "without rehearsal": Row(NO_REHEARSAL),
            "with rehearsal": Row({}),
            "rehearsal first": Row(NO_REHEARSAL, start="rehearsal alone"),
        },
        LABELS,
        baseline="without rehearsal",
        # It has all streams and no label. Its only evaluation is the last, which is so the best.
        starts={"rehearsal alone": {**ONE_LABEL, "reason.weight": 0.0, "train.eval_every": 10**9}},
    ),
    # For configs/synthetic.py:local.
    "forgetting": Table(
        "Accuracy by age of the evidence",
        {
            "without rehearsal": Row(NO_REHEARSAL),
            "with rehearsal": Row({"rehearsal.familiarity": 0.0}),  # it stays at chance, see cm1
        },
        WORLDS,
        baseline="without rehearsal",
        onward=True,
        compared=("early", "later", "early - later"),
    ),
    # For any task with rehearsal; --config.rehearsal.sampled_items must not be 0.
    "rehearsals": Table(
        "What a rehearsal asks for, and its memory gain",
        {name: Row(changes) for name, changes in REHEARSALS.items()},
        baseline="none",
    ),
    # For configs/babi.py:local. A run takes 3 to 16 minutes on one core.
    "babi_alone": Table(
        "Error of each task of bAbI, trained alone",
        {name: Row(changes) for name, changes in BABI.items()}
        | {"after the first task": Row({}, start="the first task")},
        {
            f"qa{n}": {
                "data.babi.tasks": str(n),
                # Stories of qa4, qa16 and qa19 have one question. Those of qa3 are long.
                "train.steps": {3: 500, 4: 4000, 16: 4000, 19: 4000}.get(n, 1500),
                "train.eval_every": 250,
            }
            for n in range(1, 21)
        },
        wide=True,
        starts={
            "the first task": {  # as configs/babi.py:first
                "data.babi.tasks": "1",
                "train.steps": 300,
                "train.eval_every": 100,
            }
        },
    ),
    # One training of a row sees streams of all sizes, and gives its complete curve.
    "capacity": Table(
        "Accuracy by the number of pairs",
        {
            "Multi-Hop Reason (all items)": Row({"machine.kind": "multihop_reason"}),
            **{name: _system(kind, {}) for name, kind in (KINDS | MODERN).items()},
            "GRU4REC of 128": Row({"machine.kind": "gru", "machine.dim": 128}),
            # About as many numbers in the state as a GRU of 128.
            "Gated delta of 12": Row(
                {"machine.kind": "gated_delta", "machine.dim": 12, "machine.heads": 1}
            ),
            "RM": Row({"machine.kind": "rehearsal"}),
            "CM": Row({"machine.kind": "continual"}),
            "RM with rehearsal": Row(
                {
                    "machine.kind": "rehearsal",
                    "rehearsal.recollection": 1.0,
                    "rehearsal.familiarity": 0.5,
                }
            ),
            "RM (softmax over slots)": Row(
                {"machine.kind": "rehearsal", "machine.normalize": "slots"}
            ),
        },
        curve=" pairs",
    ),
    "mem1": Table(
        "Memoria Table 1",
        {
            "Transformer": Row(_model("transformer"), _mem1(26.755, 31.631, 1.28)),
            "Transformer-XL": Row(
                _model("transformer_xl") | NO_RESETS, _mem1(24.543, 29.945, 1.19)
            ),
            "Compressive Transformer": Row(
                _model("compressive") | NO_RESETS, _mem1(24.794, 29.603, 1.16)
            ),
            "infinity-former": Row(_model("infinity") | NO_RESETS, _mem1(24.685, 29.154, 1.21)),
            "Memoria Transformer": Row(_model("memoria"), _mem1(23.471, 29.149, 1.16)),
            "its working memory": Row(WORKING),
            "and short-term memory": Row(SHORT_TERM),
        },
    ),
    "mem2": Table(
        "Memoria Table 2, segments of 50",
        {
            "Transformer": Row(_model("transformer"), _mem2(39.287)),
            "Transformer-XL": Row(_model("transformer_xl") | NO_RESETS, _mem2(31.459)),
            "Compressive Transformer": Row(_model("compressive") | NO_RESETS, _mem2(31.644)),
            "infinity-former": Row(_model("infinity") | NO_RESETS, _mem2(31.790)),
            "Memoria Transformer": Row(_model("memoria"), _mem2(30.007)),
        },
    ),
    "mem3": Table(
        "Memoria Table 3, test (its published split)",
        {
            "BERT": Row(_model("bert") | ONE_SEGMENT, _mem3(91.67, 93.05)),
            "RoBERTa": Row(_model("roberta") | ONE_SEGMENT, _mem3(95.24, 95.38)),
            "Memoria BERT": Row(_model("memoria_bert"), _mem3(94.59, 94.77)),
            "Memoria RoBERTa": Row(_model("memoria_roberta"), _mem3(96.51, 96.62)),
        },
    ),
    "mem4": Table(
        "Memoria Table 4, segments of 1,024",
        {
            "Transformer-XL": Row(_model("transformer_xl"), _sorting(68.86, 40.09, 35.06, 33.87)),
            "Compressive Transformer": Row(
                _model("compressive"), _sorting(79.51, 71.84, 44.03, 35.07)
            ),
            "infinity-former": Row(_model("infinity"), _sorting(84.28, 74.34, 47.31, 39.71)),
            "Memoria Transformer": Row(_model("memoria"), _sorting(82.27, 74.08, 66.58, 63.42)),
        },
        SEGMENTS,
    ),
    "mem6": Table(
        "Memoria Table 6",
        {
            "Transformer": Row(_model("transformer"), _sorting(36.19, 33.79, 31.69, 29.94, 19.04)),
            "+ Working Memory": Row(WORKING, _sorting(79.69, 70.85, 62.21, 52.01, 34.32)),
            "+ Short-term Memory": Row(SHORT_TERM, _sorting(82.66, 76.20, 66.37, 58.75, 54.87)),
            "+ Long-term Memory": Row(
                _model("memoria"), _sorting(82.27, 74.08, 66.58, 63.42, 63.26)
            ),
        },
        SEGMENTS,
    ),
}


def memories() -> Table:
    """All registered memories beside one another; only RM and CM rehearse.

    Returns:
      A table whose other rows are named like the kinds. The first row trains the shared teacher.
    """
    rows = {"RM": Row({"machine.kind": "rehearsal"}), "CM": Row({"machine.kind": "continual"})}
    names = {"rehearsal": "RM reason only", "continual": "CM reason only"}
    rows |= {names.get(kind, kind): _system(kind, {}) for kind in MACHINES}
    return Table("Memories", rows, share_teacher=True)


def tuned(table: Table, values: Mapping[str, Changes]) -> Table:
    """A table whose rows take their tuned values.

    Args:
      table: the table.
      values: {name of a row: changes}; other rows stay.

    Returns:
      The table.
    """
    rows = {
        name: row._replace(changes={**row.changes, **values.get(name, {})})
        for name, row in table.rows.items()
    }
    return table._replace(rows=rows)


def original(table: Table) -> Table:
    """A table whose systems have their published hyper-parameters, see `systems.ORIGINAL`."""
    kinds = {name: str(row.changes.get("machine.kind")) for name, row in table.rows.items()}
    return tuned(table, {name: systems.ORIGINAL.get(kind, {}) for name, kind in kinds.items()})


def tune() -> Table:
    """The search for learning rates and clips: the rows of `memories`, in a grid of settings."""
    grid = {
        f"rate {rate:g} clip {clip:g}": {
            "train.learning_rate": rate,
            "train.clip": clip,
            "train.loggers": "jsonl",  # where the scores of the validation split are
        }
        for rate in systems.LEARNING_RATES
        for clip in systems.CLIPS
    }
    table = memories()
    searched = [key for key in next(iter(grid.values()))]
    rows = {
        name: row._replace(changes={k: v for k, v in row.changes.items() if k not in searched})
        for name, row in table.rows.items()
    }
    return table._replace(source="Learning rates and clips", rows=rows, settings=grid)


BUILT = {"memories": memories, "tune": tune}  # tables of all kinds that are registered


def table_of(name: str) -> Table:
    """The table of a name in `TABLES` or `BUILT`."""
    return BUILT[name]() if name in BUILT else TABLES[name]
