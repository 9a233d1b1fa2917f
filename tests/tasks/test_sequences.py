"""Runs of sequence models: sorting, documents, and language models with a carry."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rmjax import config as configs
from rmjax import memoria, schedules, tasks
from rmjax.data import make_source
from rmjax.data.pipeline import batches
from rmjax.data.texts.tokenizers import make_tokenizer
from rmjax.evaluation import scoring
from rmjax.models import bert, gpt2, huggingface, roberta, unroll
from rmjax.registry import CLASSIFIERS, LANGUAGE_MODELS
from rmjax.run import stages, training
from rmjax.run.mapping import make_mapped
from rmjax.run.optimizer import make_optimizer
from rmjax.tools import explain, probe
from tests.run.test_train import stopped
from tests.runs import compilations_kept, lines, saved, tiny

SMALL = {
    "model": dict(dim=8, layers=1, heads=2, dropout=0.5),
    "memoria": dict(
        working=2,
        short_term_capacity=4,
        remind_short_term=2,
        remind_long_term=2,
        initial_lifespan=4.0,
    ),
}
SORTING = SMALL | {
    "data.name": "sorting",
    "data.segment_length": 24,
    "data.sorting": dict(length=70, train=64, valid=16, test=15),
    "train.steps": 3,
}
ONE_STEP = dict(seed=0, segment_length=24, negatives=1, num_steps=1)


@pytest.fixture(autouse=True, scope="module")
def kept(tmp_path_factory):
    with compilations_kept(tmp_path_factory.mktemp("compiled")):
        yield


def books(folder, **changes):
    """A run over three books of a few hundred bytes."""
    rng = np.random.default_rng(0)
    (folder / "books").mkdir(exist_ok=True)
    for name in "abcde":
        words = rng.choice(["one", "two", "three", "and", "or"], 300)
        (folder / "books" / f"{name}.txt").write_text(" ".join(words))
    data = {"data.name": "books", "data.dir": str(folder / "books")}
    data |= {"data.cache_dir": str(folder / "cache"), "data.text.reset_segments": 7}
    return tiny(**SMALL | data | {"data.segment_length": 16, "data.segments": 2} | changes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run over books: its config, the parent of its workdir `full`, and its table."""
    folder = tmp_path_factory.mktemp("texts")
    config = books(folder)
    return config, folder, training.train(config, folder / "full")


@pytest.mark.parametrize("kind", [pytest.param("transformer", marks=pytest.mark.slow), "memoria"])
def test_sorting_reads_the_logits_of_the_last_tokens(kind):
    """Compares with all segments read at once, and the logits picked by hand."""
    config = tiny(**SORTING, **{"model.kind": kind})
    source = make_source(config.data, 0)
    task = tasks.make_task(config, source)
    assert task.silent == 70 // 24
    params = jax.jit(task.init)(jax.random.key(0))
    batch = next(batches(source, "train", batch_size=4, **ONE_STEP))

    @jax.jit
    def at_once(params):
        logits = lambda hidden, _: task.model.logits(params, hidden)
        stream = batch.items, batch.item_mask
        return unroll(task.model, params, task.memory(params, 4), *stream, logits)[1]

    logits = at_once(params)
    flat = logits.swapaxes(0, 1).reshape(4, -1, 21)
    np.testing.assert_allclose(jax.jit(task.scores)(params, batch), flat[:, 70:90], atol=1e-5)
    # The targets are the next tokens.
    np.testing.assert_array_equal(batch.items.reshape(4, -1)[:, 71:90], batch.target[:, :-1])


def test_a_memory_of_only_working_engrams_is_trained():
    """Memoria Table 6, `+ Working Memory`, which never reminds of engrams."""
    config = tiny(**SORTING, **{"memoria.remind_short_term": 0, "memoria.remind_long_term": 0})
    source = make_source(config.data, 0)
    task = tasks.make_task(config, source)
    batch = next(batches(source, "train", batch_size=2, **ONE_STEP))
    loss = lambda params: task.losses(params, (), (), batch, jax.random.key(1))[0]["reason"][1][0]
    gradient = jax.jit(jax.grad(loss))(jax.jit(task.init)(jax.random.key(0)))
    chex.assert_tree_all_finite(gradient)
    assert optax.tree.norm(gradient["abstractor"]) > 0


def test_gradients_reach_further_back_when_asked():
    """In sorting, `model.gradient_segments` says how many segments do not run silently."""

    def made(reach):
        config = tiny(**SORTING, **{"model.gradient_segments": reach})
        return tasks.make_task(config, make_source(config.data, 0))

    assert [made(reach).silent for reach in (1, 2, 3, 9, 0)] == [2, 1, 0, 0, 0]


def test_a_sorting_run_ends_in_a_table_beside_the_oracles(tmp_path):
    rows = training.train(tiny(**SORTING, **{"model.kind": "transformer_xl"}), tmp_path)
    assert [row["memory"] for row in rows] == [
        "transformer_xl",
        "oracle, no counts",
        "oracle, last segment",
        "oracle, last two segments",
        "oracle, all counts",
    ]
    assert rows[-1]["test_accuracy"] == 1 and not (tmp_path / "teacher").exists()


def test_a_run_stopped_within_a_text_continues_bit_for_bit(finished):
    config, folder, table = finished
    for moment in ("model step 3", "model step 7", "model validation 8"):
        stopped(config, folder / "parts", moment)
    rows = training.train(config, folder / "parts")
    assert lines(folder / "parts") == lines(folder / "full")
    one, other = (saved(folder / name)[1] for name in ("parts", "full"))
    assert any("carry" in name for name in one)
    chex.assert_trees_all_equal(one, other)  # memories included
    assert rows == table == json.loads((folder / "full" / "results.json").read_text())
    names = "perplexity", "segment_perplexity", "word_perplexity", "bits_per_character"
    assert set(rows[0]) == {"memory"} | {f"test_{name}" for name in names}


def test_the_loss_equals_that_of_one_long_call(tmp_path):
    """Compares steps of two segments and a carry with all segments of a row at once."""
    config = books(tmp_path, **{"model.dropout": 0.0, "train.batch_size": 2})
    source = make_source(config.data, 0)
    task = tasks.make_task(config, source)
    params, steps = jax.jit(task.init)(jax.random.key(0)), source.parts("train", 2).steps
    carry, parts = task.memory(params, 2), []
    measure = jax.jit(task.measure)
    for step in range(steps):
        sums, carry = measure(params, carry, source.batch("train", step, 2))
        parts.append(sums["nats"])
    every = [source.batch("train", step, 2) for step in range(steps)]
    join = lambda name: np.concatenate([getattr(batch, name) for batch in every], 1)
    names = "items", "item_mask", "query_mask", "target", "reset"
    joined = every[0].replace(**{name: join(name) for name in names})
    sums, after = measure(params, task.memory(params, 2), joined)
    np.testing.assert_allclose(np.concatenate(parts, 1), sums["nats"], rtol=1e-4)
    chex.assert_trees_all_close(after, carry, rtol=1e-4, atol=1e-5)
    mean = sums["nats"].sum() / sums["tokens"].sum()
    assert np.isclose(mean, np.log(256), rtol=0.02)  # untrained


@pytest.mark.parametrize(
    "how", [dict(devices=2), pytest.param(dict(mapping="mesh", devices=2), marks=pytest.mark.slow)]
)
def test_a_step_on_two_devices_equals_a_step_on_one(tmp_path, how):
    config = books(tmp_path, **{"model.kind": "transformer_xl"})
    source = make_source(config.data, 0)
    task = tasks.make_task(config, source)
    init = lambda key: stages.init_state(task, make_optimizer(1e-3, 5.0), key)
    state = jax.jit(init)(jax.random.key(0))
    carry = jax.device_get(task.memory(state.params, 4))
    results = []
    for settings in (dict(devices=1), how):
        mapped = make_mapped(task, make_optimizer(1e-3, 5.0), 0, **settings)
        current, carried = mapped.put(jax.device_get(state)), mapped.put_carry(carry)
        for step in range(3):
            rest = mapped.put(()), source.batch("train", step, 4)
            current, carried, metrics = mapped.train_step(current, carried, *rest)
        remembered = mapped.get_carry(carried)
        sums, _ = mapped.measure(current.params, carried, source.batch("train", 3, 4))
        results.append((mapped.get(metrics), remembered, sums))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-5)


def test_perplexities_by_hand():
    class Text:
        tokens, words, characters, tokenizer = np.zeros(120), 30, 100, make_tokenizer("bytes")

    nats, tokens = np.array([[2.0, 6.0], [0.0, 4.0]]), np.array([[2, 3], [0, 5]])
    result = scoring.perplexities(Text(), nats, tokens)
    mean, by_segment = 12 / 10, (np.exp(1.0) + np.exp(2.0) + np.exp(0.8)) / 3
    assert result["perplexity"] == pytest.approx(np.exp(mean))
    assert result["segment_perplexity"] == pytest.approx(by_segment)
    assert result["word_perplexity"] == pytest.approx(np.exp(mean * 120 / 30))
    assert result["bits_per_character"] == pytest.approx(mean * 1.2 / np.log(2))
    Text.tokenizer = make_tokenizer("words", ["a b"])  # drops white space
    assert scoring.perplexities(Text(), nats, tokens).keys() == {"perplexity", "segment_perplexity"}


def test_the_rate_rises_and_falls_linearly():
    optimizer = make_optimizer(0.1, 0, schedules.build("linear", 8), 2)
    params, sizes = jnp.zeros(1), []
    state = optimizer.init(params)
    for _ in range(11):
        updates, state = optimizer.update(jnp.ones(1), state, params)
        sizes.append(-float(updates[0]))
    np.testing.assert_allclose(sizes, 0.1 * np.array([0, 0.5, *np.linspace(1, 0, 9)]), atol=1e-4)


def test_probing_reports_the_age_of_reminded_engrams(finished, tmp_path):
    """Computes ages from the serials, which are given at birth, in a loop over segments."""
    config, workdir = finished[0], finished[1] / "full"
    report = probe.measure(config, workdir)
    assert json.loads((workdir / "probe.json").read_text()) == report
    assert (workdir / "mean_age.png").stat().st_size > 1000 and "mean age" in probe.show(report)
    task, params, source = training.trained(workdir)
    rows = config.train.eval_batch_size
    state, step, ages = task.memory(params, rows), jax.jit(task.model.step), []
    for batch in source.evaluation("test", rows):
        for t in range(2):
            state = step(params, state, batch.items[:, t], batch.item_mask[:, t])[1]
            seen = jax.tree.map(np.asarray, state.record)
            chosen = seen.reminded & (seen.kind == memoria.LONG_TERM)
            old = len(ages) - 1 - seen.serial // 2
            means = [old[i][chosen[i]].mean() for i in range(rows) if chosen[i].any()]
            ages.append(np.mean(means) if means else None)
    assert len(ages) > config.data.text.reset_segments and ages[0] is None and ages[-1] is not None
    assert [age is None for age in ages] == [age is None for age in report["mean_age"]]
    both = [(x, y) for x, y in zip(ages, report["mean_age"], strict=True) if x is not None]
    np.testing.assert_allclose(*zip(*both, strict=True), rtol=1e-5)
    with pytest.raises(ValueError, match="'transformer' has no engrams to probe"):
        probe.measure(books(tmp_path, **{"model.kind": "transformer"}), tmp_path / "run")


def test_a_model_starts_from_a_released_checkpoint(tmp_path):
    sizes = gpt2.Sizes(vocabulary=256, positions=40, dim=8, layers=1, heads=2)
    body = gpt2.make(sizes).init(jax.random.key(3))
    huggingface.write(tmp_path / "gpt2", body, "gpt2")
    fields = dict(vocab_size=256, n_positions=40, n_embd=8, n_layer=1, n_head=2)
    fields |= dict(model_type="gpt2", resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1)
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(fields))
    config = books(tmp_path, **{"model.pretrained": str(tmp_path / "gpt2")})
    with training.opened(config, tmp_path / "run") as run:
        params = stages.fresh_state(run, stages.model_stage(run)).params
    np.testing.assert_array_equal(params["wte"], body["wte"])
    np.testing.assert_array_equal(params["wpe"], body["wpe"][:16])  # segments of 16
    kernels = (tree["h_0"]["mlp"]["c_fc"]["kernel"] for tree in (params, body))
    np.testing.assert_array_equal(*kernels)
    assert "abstractor" in params and "abstractor" not in body
    other = books(tmp_path, **{"model.pretrained": str(tmp_path / "gpt2"), "model.heads": 4})
    refused = pytest.raises(ValueError, match="config.model.heads = 4, but .*gpt2 has 2")
    with training.opened(other, tmp_path / "other") as run, refused:
        stages.fresh_state(run, stages.model_stage(run))


@pytest.mark.parametrize("rows, fits", [(320, True), (300, True), (299, False)])
def test_a_tokenizer_larger_than_the_table_is_refused(tmp_path, rows, fits):
    config = configs.base()
    config.data.segment_length, config.model.pretrained = 16, str(tmp_path)
    config.model.update(kind="transformer", dim=8, layers=1, heads=2)
    sizes = gpt2.Sizes(vocabulary=rows, positions=16, dim=8, layers=1, heads=2)
    released = gpt2.make(sizes).init(jax.random.key(3))
    huggingface.write(tmp_path, released, "gpt2")
    fields = dict(vocab_size=rows, n_positions=16, n_embd=8, n_layer=1, n_head=2)
    (tmp_path / "config.json").write_text(json.dumps(fields))
    model = tasks.sequences.build_model(LANGUAGE_MODELS, config, 300)
    params = model.init(jax.random.key(0))
    if not fits:
        cause = "data.text.tokenizer: has 300 tokens, but .* has rows for 299: use the checkpoint's"
        with pytest.raises(ValueError, match=cause):
            tasks.sequences.pretrained(config, params)
        return
    begun = tasks.sequences.pretrained(config, params)
    chex.assert_trees_all_equal(begun, released | {"wte": released["wte"][:300]})
    assert model.logits(begun, np.ones((1, 8), np.float32)).shape == (1, 300)


@pytest.mark.parametrize(
    "changes, field",
    [(dict(eps=1e-12), "layer_norm_eps = 1e-12"), (dict(pad=0), "pad_token_id = 0")],
)
def test_a_checkpoint_of_other_norms_or_positions_is_refused(tmp_path, monkeypatch, changes, field):
    config = configs.base()
    config.data.name, config.data.segment_length = "hyperpartisan", 16
    config.model.pretrained = "~/roberta"
    config.model.update(kind="roberta", dim=8, layers=1, heads=2)
    settings = CLASSIFIERS.settings("roberta", config.model)
    sizes = roberta.sizes_of(settings, tasks.sequences.context_of(config, 30))
    params = bert.make_classifier(sizes, 2).init(jax.random.key(0))
    monkeypatch.setenv("HOME", str(tmp_path))
    huggingface.write(tmp_path / "roberta", params, "roberta")
    fields = dict(model_type="roberta", vocab_size=30, max_position_embeddings=18, hidden_size=8)
    fields |= dict(type_vocab_size=1, num_hidden_layers=1, num_attention_heads=2)
    fields |= dict(hidden_dropout_prob=0.1, intermediate_size=32)

    def write(eps=1e-5, pad=1):
        norms = dict(layer_norm_eps=eps, pad_token_id=pad)
        (tmp_path / "roberta" / "config.json").write_text(json.dumps(fields | norms))

    write()
    chex.assert_trees_all_equal(tasks.sequences.pretrained(config, params), params)
    write(**changes)
    cause = f"roberta/config.json has {field}, but our roberta supports"
    with pytest.raises(ValueError, match=cause):
        tasks.sequences.pretrained(config, params)


def test_explain_reports_the_cost_of_a_step_with_a_carry(tmp_path):
    config = books(tmp_path, **{"model.kind": "transformer_xl"})
    cost = explain.report(config)
    assert cost["flops_per_step"] > 0 and cost["batch_size"] == config.train.batch_size
    # The inputs of one layer in a segment, their number, and the segments read.
    assert cost["memory_bytes_per_stream"] == 16 * 8 * 4 + 4 + 4
