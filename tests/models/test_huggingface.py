import dataclasses
import functools
import json
import logging
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from rmjax.models import bert, gpt2, huggingface
from rmjax.models.huggingface import read, sizes_from_config, write

NEEDED = "the oracle; pip install 'rmjax[parity]'"
THEIR_NAMES = {"gpt2": "GPT2", "bert": "Bert", "roberta": "Roberta"}  # of transformers
V, DIM, B, N, CLASSES = 50, 32, 3, 11, 3
PAD = 2
SMALL = dict(vocabulary=V, positions=16, dim=DIM, layers=2, heads=4, dropout=0.2)
KINDS = {
    "gpt2": gpt2.Sizes(**SMALL),
    "bert": bert.Sizes(**SMALL, types=3, epsilon=0.1),
    "roberta": bert.roberta_sizes(**SMALL, padding=PAD, epsilon=0.2),
}
ENCODER = dict(
    vocab_size=V,
    max_position_embeddings=16,
    hidden_size=DIM,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=4 * DIM,
    hidden_dropout_prob=0.2,
    attention_probs_dropout_prob=0.2,
)
CONFIGS = {  # the same sizes in the words of config.json
    "gpt2": dict(vocab_size=V, n_positions=16, n_embd=DIM, n_layer=2, n_head=4)
    | dict(resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.2),
    "bert": ENCODER | dict(type_vocab_size=3, layer_norm_eps=0.1, pad_token_id=PAD),
    "roberta": ENCODER | dict(type_vocab_size=1, layer_norm_eps=0.2, pad_token_id=PAD),
}
MASK = np.arange(N) < np.array([[N], [6], [1]])


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def model(kind, sizes=None):
    sizes = sizes or KINDS[kind]
    return gpt2.make(sizes) if kind == "gpt2" else bert.make_classifier(sizes, CLASSES)


@functools.cache
def shapes(kind):
    return jax.eval_shape(model(kind).init, jax.random.key(0))


def random(like):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0.1, 0.3, x.shape), x.dtype), like)


def logits(kind, params, sizes=None):
    made, (tokens, _) = model(kind, sizes), texts()
    if kind != "gpt2":
        return jax.jit(made.logits)(params, tokens, MASK)
    hidden = lambda p: made.step(p, made.init_state(p, B), tokens, MASK)[0]
    return jax.jit(lambda p: made.logits(p, hidden(p)))(params)[MASK]


def texts():
    """tokens [B, N], padded by a token used for nothing else, as in RoBERTa; types [B, N]."""
    rng = np.random.default_rng(1)
    return np.where(MASK, rng.integers(PAD + 1, V, (B, N)), PAD), rng.integers(0, 3, (B, N))


def same(params, expected):
    assert jax.tree.structure(params) == jax.tree.structure(expected)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    for (path, a), b in zip(leaves, jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, err_msg=str(path))
        assert a.dtype == jnp.float32


def rewrite(file, change):
    """Changes the {name: tensor} of a file."""
    save_file({name: np.ascontiguousarray(x) for name, x in change(load_file(file)).items()}, file)


def test_reading_returns_what_was_written(tmp_path, kind):
    params = random(shapes(kind))
    files = {"a/b": "a/b/model.safetensors", "c.safetensors": "c.safetensors"}
    for path, file in ((tmp_path / path, file) for path, file in files.items()):
        assert write(path, params, kind) == tmp_path / file
        same(read(path, shapes(kind), kind), params)
        same(read(str(tmp_path / file), params, kind), params)
    written = sorted(x.name for x in tmp_path.rglob("*") if x.is_file())
    assert written == ["c.safetensors", "model.safetensors"]
    size = sum(x.size for x in load_file(tmp_path / "c.safetensors").values())
    assert size == sum(map(jnp.size, jax.tree.leaves(params)))


@pytest.mark.parametrize(
    "kind, name, ours",
    [
        ("gpt2", "transformer.wte.weight", lambda p: p["wte"]),
        (
            "gpt2",
            "transformer.h.1.attn.c_attn.weight",
            lambda p: p["h_1"]["attn"]["c_attn"]["kernel"].T,
        ),
        ("gpt2", "transformer.h.0.ln_2.bias", lambda p: p["h_0"]["ln_2"]["bias"]),
        (
            "bert",
            "bert.encoder.layer.1.intermediate.dense.weight",
            lambda p: p["layer_1"]["intermediate"]["kernel"],
        ),
        (
            "bert",
            "bert.encoder.layer.0.output.LayerNorm.weight",
            lambda p: p["layer_0"]["LayerNorm"]["scale"],
        ),
        ("bert", "bert.pooler.dense.bias", lambda p: p["pooler"]["bias"]),
        ("bert", "classifier.weight", lambda p: p["classifier"]["kernel"]),
        (
            "roberta",
            "roberta.embeddings.position_embeddings.weight",
            lambda p: p["embeddings"]["position_embeddings"],
        ),
        ("roberta", "classifier.dense.weight", lambda p: p["pooler"]["kernel"]),
        ("roberta", "classifier.out_proj.bias", lambda p: p["classifier"]["bias"]),
    ],
)
def test_names_are_those_of_the_released_files(tmp_path, kind, name, ours):
    params = random(shapes(kind))
    np.testing.assert_array_equal(load_file(write(tmp_path, params, kind))[name], ours(params))


def test_shards_prefixes_old_names_and_half_precision(tmp_path, kind, caplog):
    params = random(shapes(kind))
    file = write(tmp_path, params, kind)
    tensors = load_file(file)
    file.unlink()
    plain = {re.sub(r"^(transformer|bert|roberta)\.", "", name): x for name, x in tensors.items()}
    assert plain.keys() != tensors.keys()
    old = {
        re.sub("Norm.weight", "Norm.gamma", re.sub("Norm.bias", "Norm.beta", name)): x
        for name, x in plain.items()
    }
    assert (old.keys() != plain.keys()) == (kind != "gpt2")
    names = sorted(old)
    for i, shard in enumerate((names[::2], names[1::2])):
        save_file({name: old[name] for name in shard}, tmp_path / f"model-{i}-of-2.safetensors")
    weight_map = {name: f"model-{i % 2}-of-2.safetensors" for i, name in enumerate(names)}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    same(read(tmp_path, shapes(kind), kind), params)
    same(read(index, shapes(kind), kind), params)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        half = {name: x.astype(dtype) for name, x in tensors.items()}
        save_file(half, tmp_path / "half.safetensors")
        rounded = jax.tree.map(lambda x, d=dtype: x.astype(d).astype(jnp.float32), params)
        same(read(tmp_path / "half.safetensors", shapes(kind), kind), rounded)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    (tmp_path / "model-1-of-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-1-of-2\.safetensors not found; fetch it"):
        read(tmp_path, shapes(kind), kind)


HARMLESS = {
    "gpt2": ["h.0.attn.bias", "transformer.h.1.attn.masked_bias"],
    "bert": ["bert.embeddings.position_ids", "cls.predictions.bias", "cls.seq_relationship.weight"],
    "roberta": [
        "roberta.embeddings.position_ids",
        "lm_head.dense.weight",
        "lm_head.bias",
        "roberta.pooler.dense.bias",
    ],
}


def test_unknown_tensors_are_logged_and_harmless_ones_are_not(tmp_path, kind, caplog):
    params = random(shapes(kind))
    file = write(tmp_path, params, kind)
    more = {name: np.ones(2, np.float32) for name in HARMLESS[kind]}
    rewrite(file, lambda x: x | more)
    same(read(file, params, kind), params)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    more = {"score.weight": np.ones(2, np.float32), "h.0.crossattention.bias": np.ones(1)}
    rewrite(file, lambda x: x | more)
    same(read(file, params, kind), params)
    extra = "h.0.crossattention.bias, score.weight"
    assert f"{file}: 2 tensors have no place in the model: {extra}" in caplog.text


def test_a_checkpoint_of_more_layers_is_refused(tmp_path, kind):
    file = write(tmp_path, random(shapes(kind)), kind)
    fewer = dataclasses.replace(KINDS[kind], layers=1)
    cause = r"has more than the 1 layers of the model: .*(h|layer)\.1\."
    with pytest.raises(ValueError, match=cause):
        read(file, jax.eval_shape(model(kind, fewer).init, jax.random.key(0)), kind)


def test_a_copy_of_the_word_table_is_not_logged_but_another_head_is(tmp_path, caplog):
    params = random(shapes("gpt2"))
    file = write(tmp_path, params, "gpt2")
    words = load_file(file)["transformer.wte.weight"]
    for change, text in ((0, ""), (1, "1 tensors have no place in the model: lm_head.weight")):
        head = words + np.float32(change)
        rewrite(file, lambda x, head=head: x | {"lm_head.weight": head})
        same(read(file, params, "gpt2"), params)
        assert text in caplog.text and bool(text) == bool(caplog.text)


def test_missing_tensors_are_named_unless_they_are_fresh(tmp_path):
    params = random(shapes("gpt2"))
    file = write(tmp_path, params, "gpt2")
    memory = {
        "h_0": {**params["h_0"], "memory_attn": {"kernel": jnp.ones((2, 3))}},
        "abstractor": {"query": jnp.ones(4)},
    }
    more = params | memory
    for fresh in (
        ("abstractor", "h_#/memory_attn"),
        iter(["abstractor", "h_0/memory_attn/kernel"]),
    ):
        same(read(file, more, "gpt2", fresh), more)
    for fresh, missing in (
        (
            (),
            "abstractor/query (has no name in them), h_0/memory_attn/kernel (has no name in them)",
        ),
        (
            ("abstract", "h_1/memory_attn", "h_#/memory", "abstractor"),
            "h_0/memory_attn/kernel (has no name in them)",
        ),
    ):
        with pytest.raises(ValueError) as error:
            read(file, more, "gpt2", fresh)
        assert f"{file} as 'gpt2' has no tensors for {missing}. Set kind" in str(error.value)
    rewrite(file, lambda x: {name: value for name, value in x.items() if "ln_f" not in name})
    cause = re.escape("for ln_f/bias (transformer.ln_f.bias), ln_f/scale (transformer.ln_f.w")
    with pytest.raises(ValueError, match=cause):
        read(file, params, "gpt2")
    other = jax.tree.map(jnp.zeros_like, params)
    params_read = read(file, other, "gpt2", ["ln_f", "h_1"])
    same(params_read, params | {name: other[name] for name in ("ln_f", "h_1")})


def test_the_body_of_one_kind_is_not_that_of_another(tmp_path):
    params = random(shapes("bert"))
    write(tmp_path, params, "bert")
    cause = r"as 'roberta' has no tensors for .*\(roberta\.embeddings\.LayerNorm\.bias\)"
    with pytest.raises(ValueError, match=cause):
        read(tmp_path, params, "roberta", ["pooler", "classifier"])


def test_a_new_head_on_an_old_body(tmp_path, caplog):
    params = random(shapes("bert"))
    body = {name: x for name, x in params.items() if name not in ("classifier", "pooler")}
    write(tmp_path, body, "bert")
    same(read(tmp_path, shapes("bert") | params, "bert", ["classifier", "pooler"]), params)
    cause = r"classifier/bias \(classifier.bias\), .* pooler/kernel \(bert.pooler.dense.w"
    with pytest.raises(ValueError, match=cause):
        read(tmp_path, params, "bert")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    file = write(tmp_path, params, "bert")
    same(read(file, jax.eval_shape(lambda: body), "bert"), body)
    assert "4 tensors have no place in the model: bert.pooler.dense.bias" in caplog.text


def test_another_shape_is_an_error(tmp_path):
    positions = "transformer.wpe.weight has shape (16, 32), but the model's wpe needs (17, 32)"
    words = "word_embeddings.weight has shape (50, 32), but the model's embeddings/word_embeddings"
    for kind, change, message in (
        ("gpt2", dict(positions=17), positions),
        ("bert", dict(vocabulary=V + 1), words),
    ):
        file = write(tmp_path, random(shapes(kind)), kind)
        other = model(kind, dataclasses.replace(KINDS[kind], **change))
        like = jax.eval_shape(other.init, jax.random.key(0))
        with pytest.raises(ValueError) as error:
            read(file, like, kind)
        assert message in str(error.value) and str(file) in str(error.value)
        cures = {"gpt2": "1 tokens shorter", "bert": "own tokenizer, or one of at most 50 tokens"}
        assert cures[kind] in str(error.value)
    file = write(tmp_path, random(shapes("gpt2")), "gpt2")
    name = "transformer.h.0.mlp.c_fc.weight"
    rewrite(file, lambda x: x | {name: x[name].T})
    cause = "(128, 32), but the model's h_0/mlp/c_fc/kernel needs (32, 128)"
    with pytest.raises(ValueError, match=re.escape(cause)):
        read(file, shapes("gpt2"), "gpt2")


def test_a_model_of_shorter_segments_has_the_first_positions(tmp_path, kind):
    params = random(shapes(kind))
    file, shorter = write(tmp_path, params, kind), dataclasses.replace(KINDS[kind], positions=14)
    params_read = read(file, jax.eval_shape(model(kind, shorter).init, jax.random.key(0)), kind)
    np.testing.assert_allclose(logits(kind, params_read, shorter), logits(kind, params), rtol=1e-6)


def test_parameters_without_a_name_are_not_written(tmp_path):
    params = random(shapes("gpt2"))
    extra = {"abstractor": {"query": jnp.ones(4)}}
    more = params | extra | {"h_0": {**params["h_0"], "extra": {"bias": jnp.ones(1)}}}
    cause = "'gpt2' have no names for abstractor/query, h_0/extra/bias; leave them out"
    with pytest.raises(ValueError, match=cause):
        write(tmp_path, more, "gpt2")
    assert not list(tmp_path.iterdir())


def test_files_that_are_missing_or_damaged(tmp_path):
    for call in (
        lambda: read(tmp_path, {}, "t5"),
        lambda: write(tmp_path, {}, "t5"),
        lambda: sizes_from_config("", "t5"),
    ):
        with pytest.raises(ValueError, match="kind='t5': expected one of gpt2, bert, roberta"):
            call()
    cause = re.escape(f"{tmp_path} has nothing, but neither model.safetensors nor")
    with pytest.raises(FileNotFoundError, match=cause):
        read(tmp_path, {}, "bert")
    (tmp_path / "pytorch_model.bin").touch()
    cause = "has pytorch_model.bin, but neither .* save_pretrained converts other formats"
    with pytest.raises(FileNotFoundError, match=cause):
        read(tmp_path, {}, "bert")
    with pytest.raises(FileNotFoundError, match=r"none\.safetensors not found; fetch it"):
        read(tmp_path / "none.safetensors", {}, "bert")
    file = write(tmp_path, random(shapes("bert")), "bert")
    data, pointer = file.read_bytes(), b"version https://git-lfs.github.com/spec/v1\n"
    for content in (b"", data[:7], data[:300], data[:-1], pointer):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(f"{file} is damaged or cut short (")):
            read(file, shapes("bert"), "bert")
    cause = r"config\.json not found; a checkpoint's folder has it"
    with pytest.raises(FileNotFoundError, match=cause):
        sizes_from_config(file, "bert")
    (tmp_path / "config.json").write_text('{"model_type":')
    with pytest.raises(ValueError, match=r"config\.json: no whole JSON: line 1, column"):
        sizes_from_config(tmp_path, "bert")


BASE = dict(
    attention_probs_dropout_prob=0.1,
    hidden_act="gelu",
    hidden_dropout_prob=0.1,
    hidden_size=768,
    initializer_range=0.02,
    intermediate_size=3072,
    num_attention_heads=12,
    num_hidden_layers=12,
)
RELEASED = {  # config.json of gpt2, bert-base-uncased and roberta-base
    "gpt2": dict(
        activation_function="gelu_new",
        architectures=["GPT2LMHeadModel"],
        attn_pdrop=0.1,
        bos_token_id=50256,
        embd_pdrop=0.1,
        eos_token_id=50256,
        initializer_range=0.02,
        layer_norm_epsilon=1e-05,
        model_type="gpt2",
        n_ctx=1024,
        n_embd=768,
        n_head=12,
        n_layer=12,
        n_positions=1024,
        resid_pdrop=0.1,
        vocab_size=50257,
    ),
    "bert": BASE
    | dict(
        architectures=["BertForMaskedLM"],
        layer_norm_eps=1e-12,
        max_position_embeddings=512,
        model_type="bert",
        pad_token_id=0,
        position_embedding_type="absolute",
        type_vocab_size=2,
        vocab_size=30522,
    ),
    "roberta": BASE
    | dict(
        architectures=["RobertaForMaskedLM"],
        bos_token_id=0,
        eos_token_id=2,
        layer_norm_eps=1e-05,
        max_position_embeddings=514,
        model_type="roberta",
        pad_token_id=1,
        type_vocab_size=1,
        vocab_size=50265,
    ),
}


def test_released_sizes_are_the_defaults(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[kind]))
    make, vocabulary = {
        "gpt2": (gpt2.Sizes, 50257),
        "bert": (bert.Sizes, 30522),
        "roberta": (bert.roberta_sizes, 50265),
    }[kind]
    for path in (tmp_path, tmp_path / "config.json", tmp_path / "model.safetensors"):
        assert sizes_from_config(path, kind) == make(vocabulary=vocabulary)


def test_sizes_are_read_from_any_config(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[kind]))
    assert sizes_from_config(tmp_path, kind) == KINDS[kind]


WRONG = [  # (kind, field, value, text of the error)
    ("gpt2", "activation_function", "relu", "found 'relu', but our 'gpt2' supports 'gelu_new' or"),
    ("gpt2", "n_inner", 3000, "found 3000, but our 'gpt2' supports None or 3072 only"),
    ("gpt2", "layer_norm_epsilon", 1e-6, "found 1e-06"),
    ("gpt2", "n_head", None, "found None, but a whole number is expected"),
    ("gpt2", "n_layer", True, "found True, but a whole number is expected"),
    ("gpt2", "attn_pdrop", 1.5, "found 1.5, but a number from 0 to just below 1 is expected"),
    ("bert", "layer_norm_eps", float("nan"), "found nan, but a number from 0"),
    ("roberta", "pad_token_id", None, "found None, but a whole number is expected"),
    ("gpt2", "scale_attn_by_inverse_layer_idx", True, "found True"),
    ("gpt2", "tie_word_embeddings", False, "found False"),
    ("gpt2", "model_type", "gpt_neo", "found 'gpt_neo'"),
    (
        "bert",
        "hidden_act",
        "gelu_new",
        "found 'gelu_new', but our 'bert' supports 'gelu' or 'gelu_python' only",
    ),
    (
        "bert",
        "position_embedding_type",
        "relative_key",
        "found 'relative_key', but our 'bert' supports 'absolute' only",
    ),
    ("bert", "intermediate_size", 1000, "found 1000, but our 'bert' supports 3072 only"),
    ("bert", "is_decoder", True, "found True"),
    ("roberta", "model_type", "bert", "found 'bert', but our 'roberta' supports 'roberta' only"),
]


@pytest.mark.parametrize("kind, field, value, text", WRONG)
def test_unsupported_values_are_refused(tmp_path, kind, field, value, text):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[kind] | {field: value}))
    with pytest.raises(ValueError) as error:
        sizes_from_config(tmp_path, kind)
    assert f"{tmp_path / 'config.json'}, field {field}: {text}" in str(error.value)


def test_a_config_of_missing_or_impossible_sizes(tmp_path):
    for kind, content, text in (
        ("gpt2", {"n_embd": 770}, "config.json: width 770 is not a multiple of heads 12"),
        (
            "bert",
            {"hidden_size": 24},
            "field intermediate_size: missing, and transformers takes 3072, but our 'bert'",
        ),
        ("bert", {"d_model": 8}, "config.json has none of the fields vocab_size, "),
        ("bert", [], "config.json: expected a JSON object, found '[]'"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=re.escape(text)):
            sizes_from_config(tmp_path, kind)


DEFAULTS = {"gpt2": gpt2.Sizes(vocabulary=50257), "bert": bert.Sizes(vocabulary=30522)} | {
    "roberta": bert.roberta_sizes(vocabulary=50265, positions=512, types=2, epsilon=1e-12)
}


def test_missing_fields_have_the_defaults_of_transformers(tmp_path, kind):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    assert sizes_from_config(tmp_path, kind) == DEFAULTS[kind]
    transformers = pytest.importorskip("transformers", reason=NEEDED)
    theirs = getattr(transformers, THEIR_NAMES[kind] + "Config")()
    for field, value in huggingface.KINDS[kind].defaults.items():
        assert getattr(theirs, field, value) == value, field


def test_sizes_under_the_other_names_of_transformers(tmp_path):
    other = dict(
        hidden_size=32, max_position_embeddings=16, num_attention_heads=4, num_hidden_layers=2
    )
    (tmp_path / "config.json").write_text(json.dumps(dict(vocab_size=V, resid_pdrop=0.2) | other))
    assert sizes_from_config(tmp_path, "gpt2") == KINDS["gpt2"]


@pytest.mark.parametrize(
    "kind, change",
    [
        ("gpt2", {"activation_function": "gelu_fast"}),
        ("gpt2", {"activation_function": "gelu_pytorch_tanh"}),
        ("bert", {"hidden_act": "gelu_python"}),
    ],
)
def test_names_of_the_same_activation(tmp_path, kind, change):
    made = theirs(kind, **change)
    made.save_pretrained(tmp_path)
    assert sizes_from_config(tmp_path, kind) == KINDS[kind]
    np.testing.assert_allclose(
        logits(kind, read(tmp_path, shapes(kind), kind)), their_logits(kind, made), atol=1e-4
    )


@pytest.mark.parametrize(
    "kind, change",
    [
        ("gpt2", {"attn_pdrop": 0.0}),
        ("bert", {"classifier_dropout": 0.3}),
        ("roberta", {"classifier_dropout": 0}),
    ],
)
def test_different_dropouts_become_one_with_a_warning(tmp_path, caplog, kind, change):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[kind]))
    sizes = sizes_from_config(tmp_path, kind)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    (tmp_path / "config.json").write_text(json.dumps(RELEASED[kind] | change))
    assert sizes_from_config(tmp_path, kind) == sizes and sizes.dropout == 0.1
    ((field, value),) = change.items()
    assert f"{field} = {value}" in caplog.text
    assert "our layers share one dropout: 0.1" in caplog.text


def test_a_larger_word_table_is_cut_to_the_tokenizer(tmp_path, kind, caplog):
    params, fewer = random(shapes(kind)), dataclasses.replace(KINDS[kind], vocabulary=V - 7)
    file = write(tmp_path, params, kind)
    like = jax.eval_shape(model(kind, fewer).init, jax.random.key(0))
    cut = read(file, like, kind)
    assert "has 50 rows, and the tokenizer 43 words: the last 7 rows are left out" in caplog.text
    tokens = np.minimum(texts()[0], V - 8)
    if kind == "gpt2":
        made, large = model(kind, fewer), model(kind)
        hidden = made.step(cut, made.init_state(cut, B), tokens, MASK)[0]
        expected = large.step(params, large.init_state(params, B), tokens, MASK)[0]
        np.testing.assert_array_equal(hidden[MASK], expected[MASK])
        assert made.logits(cut, hidden).shape == (B, N, V - 7)
        full = large.logits(params, hidden)
        np.testing.assert_allclose(made.logits(cut, hidden), full[..., :-7], atol=1e-5)
    else:
        expected = model(kind).logits(params, tokens, MASK)
        np.testing.assert_array_equal(model(kind, fewer).logits(cut, tokens, MASK), expected)


def header(file, change):
    """Edits the JSON header of a safetensors file, and keeps the bytes of the tensors."""
    content = file.read_bytes()
    size = int.from_bytes(content[:8], "little")
    edited = json.dumps(change(json.loads(content[8 : 8 + size]))).encode()
    file.write_bytes(len(edited).to_bytes(8, "little") + edited + content[8 + size :])


BIAS = {"gpt2": "transformer.ln_f.bias", "bert": "bert.embeddings.LayerNorm.bias"} | {
    "roberta": "roberta.embeddings.LayerNorm.bias"
}


def test_weights_must_be_finite_and_of_floating_point(tmp_path, kind):
    params, name = random(shapes(kind)), BIAS[kind]
    bad = np.r_[np.zeros(DIM - 2), np.nan, np.inf].astype(np.float32)
    for value, text in (
        (bad, f"{name} has 2 values of {DIM} that are NaN"),
        (
            np.full(DIM, 1e300),
            f"{name} has {DIM} values of {DIM} that are NaN or infinite in float32",
        ),
        (np.ones(DIM, bool), f"{name} is of type BOOL, and weights are F64, F32"),
        (np.ones(DIM, np.int64), f"{name} is of type I64"),
    ):
        file = write(tmp_path, params, kind)
        rewrite(file, lambda x, value=value: x | {name: value})
        with pytest.raises(ValueError, match=re.escape(text)) as error:
            read(tmp_path, shapes(kind), kind)
        assert str(tmp_path) in str(error.value)
    write(tmp_path, params, kind)
    header(file, lambda x: x | {name: x[name] | {"dtype": "I32"}})  # the bytes stay floats
    with pytest.raises(ValueError, match=re.escape(f"{name} is of type I32")):
        read(tmp_path, shapes(kind), kind)


def test_an_index_names_files_of_its_own_folder(tmp_path):
    params, folder = random(shapes("gpt2")), tmp_path / "repo" / "snapshots" / "abc"
    tensors = load_file(write(tmp_path / "other.safetensors", params, "gpt2"))
    folder.mkdir(parents=True)
    index = folder / "model.safetensors.index.json"
    for shard in ("../../../other.safetensors", str(tmp_path / "other.safetensors")):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard)}))
        cause = f"{index}: the file {shard!r} is outside the folder {folder}"
        with pytest.raises(ValueError, match=re.escape(cause)):
            read(folder, params, "gpt2")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, "a.safetensors")}))
    (folder / "a.safetensors").symlink_to(tmp_path / "other.safetensors")
    cause = "a.safetensors is a link to " + str(tmp_path / "other")
    with pytest.raises(ValueError, match=re.escape(cause)):
        read(folder, params, "gpt2")
    (folder / "a.safetensors").unlink()
    # This is the layout of Hugging Face's cache.
    write(tmp_path / "repo" / "blobs" / "0123.safetensors", params, "gpt2")
    (folder / "a.safetensors").symlink_to("../../blobs/0123.safetensors")
    same(read(folder, params, "gpt2"), params)
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*tensors, "lost"], "a.safetensors")}))
    with pytest.raises(ValueError, match="a.safetensors has no tensor lost, as the index says"):
        read(folder, params, "gpt2")
    for content in ("[]", "{}", '{"weight_map": {"wte.weight": 7}}', "[" * 5000, "1" * 5000):
        index.write_text(content)
        with pytest.raises(ValueError, match=re.escape(str(index))):
            read(folder, params, "gpt2")


@functools.cache
def theirs(kind, **changes):
    """A model of transformers with random parameters, biases and norms too."""
    torch = pytest.importorskip("torch", reason=NEEDED)
    transformers = pytest.importorskip("transformers", reason=NEEDED)
    name = THEIR_NAMES[kind]
    rest = dict(bos_token_id=0, eos_token_id=0) if kind == "gpt2" else dict(num_labels=CLASSES)
    config = getattr(transformers, f"{name}Config")(**CONFIGS[kind] | changes, **rest)
    name += "LMHeadModel" if kind == "gpt2" else "ForSequenceClassification"
    made = getattr(transformers, name)(config)
    with torch.no_grad():
        for i, parameter in enumerate(made.parameters()):
            parameter.normal_(0.1, 0.3, generator=torch.Generator().manual_seed(i))
    return made.eval()


def their_logits(kind, made):
    torch = pytest.importorskip("torch", reason=NEEDED)
    with torch.no_grad():
        tokens, mask = torch.tensor(texts()[0]), torch.tensor(MASK).long()
        out = made(input_ids=tokens, attention_mask=mask).logits.numpy()
    return out[MASK] if kind == "gpt2" else out


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_checkpoints_of_transformers_give_the_logits_of_transformers(tmp_path, kind, shard, caplog):
    made = theirs(kind)
    made.save_pretrained(tmp_path, max_shard_size=shard)
    assert (tmp_path / "model.safetensors").exists() == (shard == "1GB")
    assert sizes_from_config(tmp_path, kind) == KINDS[kind]
    params = read(tmp_path, shapes(kind), kind)
    np.testing.assert_allclose(logits(kind, params), their_logits(kind, made), atol=1e-4)
    assert not [record for record in caplog.records if "no place" in record.message]


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_hidden_states_are_those_of_transformers(tmp_path, kind):
    torch, made, sizes = pytest.importorskip("torch", reason=NEEDED), theirs(kind), KINDS[kind]
    tokens, types = texts()
    mask, types = MASK.copy(), types % sizes.types
    mask[1, 2], tokens[1, 2] = False, PAD  # a gap, which RoBERTa does not count
    made.base_model.save_pretrained(tmp_path)
    like = {name: x for name, x in shapes(kind).items() if name not in ("pooler", "classifier")}
    with torch.no_grad():
        inputs = dict(input_ids=tokens, attention_mask=mask.astype(int), token_type_ids=types)
        inputs = {name: torch.tensor(x) for name, x in inputs.items()}
        expected = made.base_model(**inputs).last_hidden_state.numpy()
    params = {"params": read(tmp_path, like, kind)}
    hidden = jax.jit(bert.Bert(sizes).apply)(params, tokens, mask, types)
    np.testing.assert_allclose(hidden[mask], expected[mask], atol=1e-4)


def test_transformers_reads_our_checkpoints(tmp_path, kind):
    made, params = theirs(kind), random(shapes(kind))
    made.save_pretrained(tmp_path)
    (file := tmp_path / "model.safetensors").rename(tmp_path / "theirs")
    files = tmp_path / "theirs", write(tmp_path, params, kind)
    formats = [safe_open(x, "numpy").metadata()["format"] for x in files]
    assert formats[0] == formats[1] and file.exists()
    loaded, info = type(made).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    np.testing.assert_allclose(logits(kind, params), their_logits(kind, loaded.eval()), atol=1e-4)


def test_bfloat16_files_of_transformers(tmp_path, kind):
    torch, made = pytest.importorskip("torch", reason=NEEDED), theirs(kind)
    made.save_pretrained(tmp_path / "full")
    loaded = type(made).from_pretrained(tmp_path / "full").to(torch.bfloat16)
    loaded.save_pretrained(tmp_path / "half")
    full, half = (read(tmp_path / name, shapes(kind), kind) for name in ("full", "half"))
    same(half, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), full))


def test_the_wrong_file_is_named(tmp_path):
    params = random(shapes("gpt2"))
    tensors = load_file(write(tmp_path, params, "gpt2"))
    cause = f"{tmp_path / 'model.safetensors'} as 'bert' has no tensors for"
    with pytest.raises(ValueError, match=re.escape(cause)):
        read(tmp_path, random(shapes("bert")), "bert")
    index, shard = tmp_path / "model.safetensors.index.json", tmp_path / "a.safetensors"
    (tmp_path / "model.safetensors").rename(shard)
    missing = "b.safetensors not found; fetch it, or save the model to this path"
    for name, cause in (
        ("b.safetensors", f"{missing} ({index.name} names it)"),
        ("b" * 300, f"{index}, field weight_map"),
        ("\0", f"{index}, field weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
        with pytest.raises((ValueError, FileNotFoundError), match=re.escape(cause)):
            read(tmp_path, params, "gpt2")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, shard.name)}))
    rewrite(shard, lambda tensors: {name: x * np.nan for name, x in tensors.items()})
    with pytest.raises(ValueError, match=re.escape(f"{shard}: transformer.")):
        read(tmp_path, params, "gpt2")


@pytest.mark.parametrize(
    "field, value, cause",
    [
        ("resid_pdrop", 10**400, ", field resid_pdrop: found 1000"),
        ("n_head", 5, "width 32 is not a multiple of heads 5 (field n_head)"),
        ("n_positions", 0, "positions must be at least 1, got 0 (field n_positions)"),
    ],
)
def test_impossible_numbers_of_a_config_are_named(tmp_path, field, value, cause):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(CONFIGS["gpt2"] | {field: value}))
    with pytest.raises(ValueError, match=f"{re.escape(str(file))}.*{re.escape(cause)}"):
        sizes_from_config(tmp_path, "gpt2")


def test_another_kind_of_model_is_named_before_its_sizes(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    cause = "field model_type: found 'llama', but our 'gpt2' supports 'gpt2' only"
    with pytest.raises(ValueError, match=cause):
        huggingface.sizes_from_config(tmp_path, "gpt2")
