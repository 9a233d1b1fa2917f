"""The bench: sizes with random data, the flags, the counts, and what every record holds."""

from __future__ import annotations

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rmjax import tasks
from rmjax.data.pipeline import batches
from rmjax.run import stages
from rmjax.tools import bench, first_step, made_up, measures, work
from tests import ROOT

SMALL = {
    "machine.dim": 8,
    "machine.heads": 2,
    "machine.layers": 1,
    "train.batch_size": 4,
    "train.devices": 1,
}
NO_TEACHER = {"rehearsal.recollection": 0.0, "rehearsal.familiarity": 0.0}
CARDS = ["babi:local", "narrativeqa", "tvqa", "activitynet", "clicks:local", "hyperpartisan:local"]


@pytest.mark.parametrize("name", [*CARDS, "books", "movielens:local", "stories:local"])
def test_random_data_fit_a_card(name):
    """The loss of the card's task is defined on its batches; only shapes are computed."""
    path, _, options = name.partition(":")
    config = first_step.load(f"{ROOT}/configs/{path}.py:{options}".rstrip(":"))
    config.train.batch_size = 4
    run = measures.open_run(config, made_up.source_for(config))
    stage = stages.model_stage(run)
    batch = next(batches(run.source, **stages.data_settings(run), batch_size=4, num_steps=1))
    params = jax.eval_shape(stage.task.init, jax.random.key(0))
    carry = stages.blank_state(run, stage).carry
    teacher = tasks.make_teacher(config, run.source)
    frozen = jax.eval_shape(teacher.init, jax.random.key(0))["sampler"] if teacher else ()
    losses = jax.eval_shape(stage.task.losses, params, frozen, carry, batch, jax.random.key(0))
    assert all(total.shape == count.shape == () for _, (total, count) in losses[0].values())
    assert batch.query_mask.all() and batch.item_mask[:, 0].all()


@pytest.mark.parametrize(
    ("name", "shape", "dim"),
    [("xlong", (32, 50, 20), 64), ("babi", (64, 20, 15), 128), ("narrativeqa", (16, 40, 20), 256)],
)
def test_the_sizes_are_those_of_their_names(name, shape, dim):
    config, source = made_up.sized(name)
    settings = dict(seed=0, segment_length=config.data.segment_length, num_steps=2)
    one, two = batches(source, **settings, batch_size=config.train.batch_size)
    assert one.items.shape == two.items.shape == shape and config.machine.dim == dim
    assert one.item_mask.all() and (one.items != two.items).any()
    again = next(batches(source, **settings, batch_size=config.train.batch_size))
    np.testing.assert_array_equal(one.items, again.items)
    with pytest.raises(ValueError, match="no such size"):
        made_up.sized("large")


def test_all_cards_are_those_that_train_with_their_local_variants(monkeypatch):
    monkeypatch.chdir(ROOT)
    cards = first_step.cards()
    assert {"configs/xlong.py", "configs/xlong.py:local", "configs/activitynet.py"} <= {*cards}
    assert "configs/activitynet.py:local" not in cards  # it has no such variant
    assert "configs/memoria_bench.py" not in cards  # it times steps and trains nothing
    assert {card.partition(":")[0] for card in cards} == {
        str(path.relative_to(ROOT))
        for path in ROOT.glob("configs/*.py")
        if "config.data." in path.read_text()
    }
    with pytest.raises(ValueError, match="configs/babi.py:long: .* no such option; .* local"):
        first_step.load("configs/babi.py:long")


def test_longer_segments_of_a_card_are_fewer():
    """An article of 45 segments of 128 words has 12 of 512."""
    config = first_step.load(f"{ROOT}/configs/hyperpartisan.py")
    source = made_up.source_for(config)
    assert (source.segments, source.segment_length) == ((1, 2, 2, 3, 6, 12), 512)
    config.data.segment_length = 128
    assert made_up.source_for(config).segments == (3, 5, 7, 12, 21, 45)
    batch = next(batches(source, seed=0, segment_length=512, batch_size=4, num_steps=1, shapes=1))
    assert batch.items.shape == (4, 12, 512)


def test_work_is_done_and_counted():
    config, source = made_up.sized("xlong", SMALL | {"machine.kind": "gru"})
    source = dataclasses.replace(source, segments=(3,), num_items=50)
    run = measures.open_run(config, source)
    write, flops_of_1 = work.make(run, "write_1")
    _, flops_of_256 = work.make(run, "write_256")
    assert flops_of_256["flops"] == pytest.approx(256 * flops_of_1["flops"], rel=0.01)
    assert write().segments.tolist() == [work.HISTORY // 20 + 1]
    with work.counted_compilations() as programs:
        write()
    assert programs == []
    with work.counted_compilations() as programs:
        jax.jit(lambda x: x * 3 + 1)(jnp.ones(7)).block_until_ready()
    assert programs


@pytest.mark.parametrize("mapping", ["pmap", "mesh"])
def test_the_step_that_is_measured_is_compiled_once(mapping):
    """The program that tells the bytes is the one that runs."""
    settings = {"machine.kind": "gru", "train.mapping": mapping} | NO_TEACHER
    config, source = made_up.sized("xlong", SMALL | settings)
    source = dataclasses.replace(source, segments=(2,), num_items=50)
    step, _, peak = work.train_step(measures.open_run(config, source))
    with work.counted_compilations() as programs:
        assert peak() > 0
        step(), step()
    assert len(programs) == 1


@pytest.mark.parametrize(("name", "precision"), [("float32", "HIGHEST"), ("tensorfloat32", "HIGH")])
def test_a_gpu_writes_and_answers_in_the_precision_of_the_config(monkeypatch, name, precision):
    config, source = made_up.sized("xlong", SMALL | {"train.compute_dtype": name})
    run = measures.open_run(config, dataclasses.replace(source, num_items=50))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    programs, rng = measures.streaming(run), np.random.default_rng(0)
    memory = programs.machine.init_memory(programs.params, 1)
    both = zip(
        (programs.write, programs.answer), measures.segment_and_query(run, rng, 1), strict=True
    )
    for program, arguments in both:
        text = str(jax.make_jaxpr(program)(memory, *arguments))
        assert f"Precision.{precision}" in text and "precision=None" not in text


def test_batches_are_timed_apart_if_their_last_items_are_in_different_segments():
    """Some models skip the segments behind the last item, so such steps take less time."""
    one = {"machine.kind": "gru", "data.shapes": 1, "train.batch_size": 1}
    config, source = made_up.sized("xlong", SMALL | one)
    source = dataclasses.replace(source, segments=(1, 3), train=8)
    run = measures.open_run(config, source)
    kinds = measures.epoch_shapes(run, stages.model_stage(run))
    last = [int(kind.batch.item_mask.any((0, 2)).sum()) for kind in kinds]
    assert sorted(last) == [1, 3] and [kind.steps for kind in kinds] == [4, 4]
    assert len(measures.one_of_each(kind.batch for kind in kinds)) == 1


def test_a_machine_that_cannot_be_trained_is_a_row(monkeypatch):
    row = work.measure_machine("stm", "xlong", 1, {"machine.queries": 0})
    assert row["machine"] == "stm" and "config.machine.queries" in row["error"]
    assert work.machines("gru,stm") == ["gru", "stm"] and len(work.machines("all")) >= 17
    with pytest.raises(ValueError, match="did you mean 'gru'"):
        work.machines("gruu")


def test_the_share_of_the_rate_of_products():
    about = {"matmul_flops_per_second": {"float32": 100.0}, "peak_bytes": 5}
    compared = {"ours": about | {"flops": 30}, "theirs": {"peak_bytes": 7}}
    result = work.with_share(compared | {"seconds": [(2.0, 1.0), (0.5, 1.0), (1.0, 1.0)]})
    assert result["share_of_matmul_rate"] == pytest.approx(0.3) and result["ms"] == 1000.0
    assert result["peak_bytes_ours"] == 5 and result["peak_bytes_theirs"] == 7


def test_the_process_that_is_timed_gets_all_other_flags():
    line = ["--size=xlong", "--against", "python -m x", "--pairs=3", "--what=train", "--record=r"]
    assert bench._other_flags(line) == ["--size=xlong", "--what=train"]


def test_flags_that_set_keys():
    assert bench._setting("machine.dim=32") == ("machine.dim", 32)
    assert bench._setting("train.sparse_items=True") == ("train.sparse_items", True)
    assert bench._setting("machine.kind=gru") == ("machine.kind", "gru")
    for wrong in ("machine.dim", "machine.width=3"):
        with pytest.raises(ValueError, match="must be key=value"):
            bench._setting(wrong)


@pytest.mark.parametrize(
    ("text", "cause"),
    [("machine.dim=x", "a whole number"), ("train.clip=x", "a number"), ("data.x=1", "a key")],
)
def test_a_wrong_value_names_its_key(text, cause):
    with pytest.raises(ValueError, match=f"--set={text}: .*{cause}"):
        bench._setting(text)
    with pytest.raises(ValueError, match="--set=train.sparse_items=maybe: .*true or false"):
        bench._setting("train.sparse_items=maybe")


def given(monkeypatch, **values):
    """Sets flags of the bench."""
    plain = {"what": "train", "repeats": 1, "turns": False, "streaming": False, "set": []}
    names = ["cards", "against", "scale", "machines", "size", "config", "record"]
    chosen = dict.fromkeys(names) | plain | values
    asked = types.SimpleNamespace(**chosen)
    monkeypatch.setattr(bench, "flags", types.SimpleNamespace(FLAGS=asked))


@pytest.mark.parametrize(
    ("values", "cause"),
    [
        ({}, "--config is missing"),
        ({"cards": "all", "size": "babi"}, "--cards and --size: give one"),
        ({"config": {"data": 1}, "size": "babi"}, "--size and --config: give one"),
        ({"cards": "all", "scale": ["1"]}, "--cards and --scale measure in different ways"),
        ({"config": {"data": 1}, "machines": "gru"}, "--machines needs --size"),
        ({"size": "xlong", "machines": "gru", "repeats": 0}, "--repeats must be at least 1"),
        ({"config": {"data": 1}, "set": ["machine.dim=8"]}, "--set changes a size"),
        ({"size": "babi", "what": "write_1"}, "--what=write_1 needs --against"),
        ({"config": {"memoria": 1}, "scale": ["1"]}, "--scale needs the card of a run"),
        ({"size": "xlong", "scale": ["1", "x"]}, "--scale=1,x: must be whole numbers"),
    ],
)
def test_flags_that_do_not_fit_together_are_refused(monkeypatch, values, cause):
    given(monkeypatch, **values)
    with pytest.raises(ValueError, match=cause):
        bench._run()


def test_a_row_is_printed_and_recorded_before_the_next_is_measured(tmp_path, monkeypatch, capsys):
    """A table of many machines that is stopped keeps its first rows."""
    record = tmp_path / "records"
    given(monkeypatch, size="babi", machines="gru,stm", record=str(record), set=["machine.dim=8"])
    asked = []

    def measure(kind, size, repeats, changes):
        asked.append((kind, len(record.read_text().splitlines()), capsys.readouterr().out))
        assert (size, changes) == ("babi", {"machine.dim": 8})
        return {"machine": kind, "error": "none"}

    monkeypatch.setattr(work, "measure_machine", measure)
    with pytest.raises(ValueError, match="none of them could be trained"):
        bench._record("machines", bench._machines(""))
    (first, before, _), (second, after, out) = asked
    assert (first, before, second, after) == ("gru", 0, "stm", 1) and "gru" in out
    given(monkeypatch, record=str(tmp_path / "missing" / "records"))
    with pytest.raises(OSError):
        bench._record("machines", (asked.append(1) for _ in range(1)))
    assert len(asked) == 2


def test_tables_have_one_block_for_each_kind_of_row():
    assert work.markdown({"a": 1, "b": 0.123456}) == "| a | b |\n| --- | --- |\n| 1 | 0.1235 |"
    assert work.markdown({"a": 2, "b": 3.0}, ("a", "b")) == "| 2 | 3 |"
    assert work.markdown({"c": "x"}, ("a", "b")) == "\n| c |\n| --- |\n| x |"


def test_records_are_lines_of_json(tmp_path, monkeypatch, capsys):
    changes, source = made_up.SIZES["xlong"]
    source = dataclasses.replace(source, segments=(2,), num_items=20)
    monkeypatch.setitem(made_up.SIZES, "xlong", (changes | SMALL | NO_TEACHER, source))
    given(monkeypatch, record=str(tmp_path / "records"))
    for _ in range(2):
        bench._record("machines", [{"machine": "gru", "rates": {"float32": 1.0}}])
    bench._record("machines", [work.measure_machine("gru", "xlong", 1)])
    lines = list(map(json.loads, (tmp_path / "records").read_text().splitlines()))
    assert len(lines) == 3 and lines[0]["rates"] == {"float32": 1.0} and lines[0]["time"]
    record = lines[-1]
    assert record["kind"] == "machines" and record["machine"] == "gru"
    assert record["compilations"] == 0 and record["peak_bytes"] > 0 and record["step_ms"] > 0
    assert "| gru |" in capsys.readouterr().out
