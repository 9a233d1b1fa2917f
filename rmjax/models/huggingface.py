"""Reads and writes Hugging Face checkpoints: model.safetensors or its shards, and config.json.

Paths are local; nothing is downloaded. Checkpoints store the kernel of a linear layer as [out, in],
as we do; only those of GPT-2 store it as [in, out].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from rmjax.io import atomic, paths
from rmjax.io import text as text_files
from rmjax.models import bert, gpt2
from rmjax.types import Array, Params

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
POSITIONS = ("wpe", "embeddings/position_embeddings")
WORDS = ("wte", "embeddings/word_embeddings")
TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
FLOATS = ("F64", "F32", "F16", "BF16")  # the types of weights, by their names in safetensors


class Kind(NamedTuple):
    """The names that a family of checkpoints gives to our modules and sizes.

    Attributes:
      prefix: of the names in the body; files of the body alone leave it out.
      names: {our module or table: their name}; # stands for the number of a layer.
      ignored: regex of their tensors that are no parameters, or belong to the pretraining task.
      stored_by_inputs: kernels are [in, out].
      make: makes our sizes of their fields.
      sizes: {our field: their field in config.json}.
      dropouts: their dropout fields; our layers share the first one.
      defaults: {their field: the value of transformers where it is left out}.
      only: our sizes -> {their field: the values that we support}.
      aliases: {another name that transformers reads: their field}.
    """

    prefix: str
    names: dict[str, str]
    ignored: str
    stored_by_inputs: bool
    make: Callable[..., gpt2.Sizes]
    sizes: dict[str, str]
    dropouts: tuple[str, ...]
    defaults: dict[str, Any]
    only: Callable[[Any], dict[str, tuple]]
    aliases: dict[str, str] = {}


_LAYERS = {
    "embeddings/word_embeddings": "embeddings.word_embeddings",
    "embeddings/position_embeddings": "embeddings.position_embeddings",
    "embeddings/token_type_embeddings": "embeddings.token_type_embeddings",
    "embeddings/LayerNorm": "embeddings.LayerNorm",
    "layer_#/attention/query": "encoder.layer.#.attention.self.query",
    "layer_#/attention/key": "encoder.layer.#.attention.self.key",
    "layer_#/attention/value": "encoder.layer.#.attention.self.value",
    "layer_#/attention/output": "encoder.layer.#.attention.output.dense",
    "layer_#/attention/LayerNorm": "encoder.layer.#.attention.output.LayerNorm",
    "layer_#/intermediate": "encoder.layer.#.intermediate.dense",
    "layer_#/output": "encoder.layer.#.output.dense",
    "layer_#/LayerNorm": "encoder.layer.#.output.LayerNorm",
}
_HEADS = {
    "bert": {"pooler": "bert.pooler.dense", "classifier": "classifier"},
    "roberta": {"pooler": "classifier.dense", "classifier": "classifier.out_proj"},
}
_ENCODER_SIZES = {
    "vocabulary": "vocab_size",
    "positions": "max_position_embeddings",
    "types": "type_vocab_size",
    "dim": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "dropout": "hidden_dropout_prob",
    "epsilon": "layer_norm_eps",
}
_ENCODER_DEFAULTS = dict(
    vocab_size=30522,
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    hidden_act="gelu",
    hidden_dropout_prob=0.1,
    attention_probs_dropout_prob=0.1,
    classifier_dropout=None,
    max_position_embeddings=512,
    type_vocab_size=2,
    layer_norm_eps=1e-12,
    position_embedding_type="absolute",
    is_decoder=False,
    add_cross_attention=False,
)


def _encoder(
    kind: str, ignored: str, make: Callable[..., bert.Sizes], defaults: dict[str, Any], **sizes: str
) -> Kind:
    """The kind of an encoder; `sizes` are its fields beside those of all encoders."""
    defaults = _ENCODER_DEFAULTS | defaults | {"model_type": kind}

    def only(s: bert.Sizes) -> dict[str, tuple]:
        return {
            "model_type": (kind,),
            "hidden_act": ("gelu", "gelu_python"),
            "intermediate_size": (4 * s.dim,),
            "position_embedding_type": ("absolute",),
            "is_decoder": (False,),
            "add_cross_attention": (False,),
        }

    names = {ours: f"{kind}.{theirs}" for ours, theirs in _LAYERS.items()} | _HEADS[kind]
    ignored = rf"embeddings\.position_ids|{ignored}"
    dropouts = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
    fields = _ENCODER_SIZES | sizes
    return Kind(f"{kind}.", names, ignored, False, make, fields, dropouts, defaults, only)


KINDS = {
    "gpt2": Kind(
        prefix="transformer.",
        names={
            "wte": "transformer.wte",
            "wpe": "transformer.wpe",
            "h_#/ln_1": "transformer.h.#.ln_1",
            "h_#/attn/c_attn": "transformer.h.#.attn.c_attn",
            "h_#/attn_c_proj": "transformer.h.#.attn.c_proj",
            "h_#/ln_2": "transformer.h.#.ln_2",
            "h_#/mlp/c_fc": "transformer.h.#.mlp.c_fc",
            "h_#/mlp/c_proj": "transformer.h.#.mlp.c_proj",
            "ln_f": "transformer.ln_f",
        },
        ignored=r"h\.\d+\.attn\.(masked_)?bias",
        stored_by_inputs=True,
        make=gpt2.Sizes,
        sizes=dict(
            vocabulary="vocab_size",
            positions="n_positions",
            dim="n_embd",
            layers="n_layer",
            heads="n_head",
        )
        | {"dropout": "resid_pdrop"},
        dropouts=("resid_pdrop", "embd_pdrop", "attn_pdrop"),
        defaults=dict(
            model_type="gpt2",
            vocab_size=50257,
            n_positions=1024,
            n_embd=768,
            n_layer=12,
            n_head=12,
            n_inner=None,
            activation_function="gelu_new",
            resid_pdrop=0.1,
            embd_pdrop=0.1,
            attn_pdrop=0.1,
            layer_norm_epsilon=1e-5,
            scale_attn_weights=True,
            scale_attn_by_inverse_layer_idx=False,
            add_cross_attention=False,
            tie_word_embeddings=True,
        ),
        aliases=dict(
            hidden_size="n_embd",
            max_position_embeddings="n_positions",
            num_attention_heads="n_head",
            num_hidden_layers="n_layer",
        ),
        only=lambda s: {
            "model_type": ("gpt2",),
            "activation_function": TANH,
            "n_inner": (None, 4 * s.dim),
            "layer_norm_epsilon": (1e-5,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "tie_word_embeddings": (True,),
        },
    ),
    "bert": _encoder("bert", r"cls\..*", bert.Sizes, {}),
    "roberta": _encoder(
        "roberta",
        r"lm_head\..*|pooler\.dense\..*",
        bert.roberta_sizes,
        {"vocab_size": 50265, "pad_token_id": 1},
        padding="pad_token_id",
    ),
}


def read(path: str | Path, like: Params, kind: str, fresh: Iterable[str] = ()) -> Params:
    """Reads parameters from a checkpoint.

    A model of shorter segments takes the first rows of a table of positions. A model of fewer words
    takes the first rows of a table of words, with a warning. Released tables are often padded to a
    round number, so this is common. The model then has no rows for the padded ids: it gives them no
    probability, and its softmax is over the tokenizer's words alone.

    Tensors of the file that have no place in `like` are logged.

    Args:
      path: a folder, a .safetensors file or an index of shards.
      like: tree of arrays, or `jax.eval_shape` of an init; gives the shapes and dtypes.
      kind: 'gpt2', 'bert' or 'roberta'.
      fresh: modules that keep the values of `like`, such as 'classifier' or 'h_#/memory_attn'; #
        stands for any layer.

    Returns:
      A tree like `like`.

    Raises:
      FileNotFoundError: the file does not exist.
      ValueError: a file is damaged; an index names files outside its folder; a tensor is missing,
        has another shape, has no floating point type, or holds NaN or infinity.
    """
    how, kept = _kind(kind), tuple(f"{module}/" for module in fresh)
    checkpoint = _Checkpoint.open(_file(paths.resolve(path, "path")), how)
    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    values = {_path(keys): leaf for keys, leaf in leaves}
    wanted = {ours: _theirs(ours, how) for ours in values if not _within(ours, kept)}
    plain = {ours: _plain(theirs, how) for ours, theirs in wanted.items()}
    if missing := [ours for ours in wanted if plain[ours] not in checkpoint.names]:
        some = _some(f"{ours} ({wanted[ours] or 'has no name in them'})" for ours in missing)
        raise ValueError(
            f"{checkpoint.path} as {kind!r} has no tensors for {some}. Set kind to the "
            "checkpoint's, and fresh to the modules that keep their initial values."
        )
    _report_unused(checkpoint, how, values, {*plain.values()})
    for ours, name in plain.items():
        values[ours] = _value(checkpoint, name, ours, values[ours], kind)
    return jax.tree.unflatten(tree, values.values())


class _Checkpoint(NamedTuple):
    """An open checkpoint."""

    path: Path
    names: dict[str, str]  # {name without prefix: name of the tensor}
    files: dict[str, tuple[Path, Any]]  # {name of the tensor: its file, and the open file}

    @classmethod
    def open(cls, path: Path, how: Kind) -> _Checkpoint:
        files = _open(path)
        return cls(path, {_plain(name, how): name for name in files}, files)

    def tensor(self, plain: str) -> np.ndarray:
        """The tensor of a name without prefix."""
        name = self.names[plain]
        file, opened = self.files[name]
        dtype = opened.get_slice(name).get_dtype()
        if dtype not in FLOATS:
            raise ValueError(
                f"{file}: {name} is of type {dtype}, and weights are {', '.join(FLOATS)}: "
                "fetch it again, or save the model anew in float32"
            )
        return opened.get_tensor(name)


def _report_unused(checkpoint: _Checkpoint, how: Kind, ours: Iterable[str], used: set[str]) -> None:
    """Logs the tensors that no parameter uses; refuses a checkpoint of more layers than ours."""
    path, names = checkpoint.path, checkpoint.names
    head, words = "lm_head.weight", "wte.weight"
    tied = names.keys() >= {head, words}
    if tied and np.array_equal(checkpoint.tensor(head), checkpoint.tensor(words)):
        used = used | {head}
    unused = {*names} - used
    extra = sorted(names[name] for name in unused if not re.fullmatch(how.ignored, name))
    if not extra:
        return
    layers = [int(m[1]) for name in ours if (m := re.match(r"(?:h|layer)_(\d+)/", name))]
    depth = 1 + max(layers, default=-1)
    numbered = [(m, name) for name in extra if (m := re.search(r"\b(?:h|layer)\.(\d+)\.", name))]
    if deeper := [name for match, name in numbered if int(match[1]) >= depth]:
        raise ValueError(
            f"{path} has more than the {depth} layers of the model: {', '.join(deeper[:3])}"
        )
    logging.warning(
        "%s: %d tensors have no place in the model: %s", path, len(extra), ", ".join(extra)
    )


def _value(checkpoint: _Checkpoint, name: str, ours: str, like: Array, kind: str) -> Array:
    """One parameter in the shape and dtype of `like`, from the tensor of a name without prefix."""
    value, shape, flipped = checkpoint.tensor(name), like.shape, _flipped(ours, KINDS[kind])
    needed = shape[::-1] if flipped else shape
    stored = checkpoint.names[name]
    file = checkpoint.files[stored][0]
    if ours in WORDS and len(value) > shape[0]:
        logging.warning(
            "%s: %s has %d rows, and the tokenizer %d words: the last %d rows are left out. This "
            "is right for a padded table, and wrong for a tokenizer of another model.",
            *(file, stored, len(value), shape[0], len(value) - shape[0]),
        )
    if ours in WORDS + POSITIONS:
        value = value[: shape[0]]
    if value.shape != needed:
        cure = (
            f"Give the model the checkpoint's sizes (sizes_from_config(path, {kind!r})), or name "
            "the module in fresh."
        )
        if ours in POSITIONS and value.shape[1:] == needed[1:]:
            cure = f"Use segments that are {needed[0] - len(value)} tokens shorter."
        if ours in WORDS and value.shape[1:] == needed[1:]:
            cure = f"Use the checkpoint's own tokenizer, or one of at most {len(value)} tokens."
        raise ValueError(
            f"{file}: {stored} has shape {value.shape}, but the model's {ours} needs {needed}. "
            f"{cure}"
        )
    value = value.T if flipped else value
    with np.errstate(over="ignore"):
        value = value.astype(like.dtype)
    if wrong := value.size - np.count_nonzero(np.isfinite(value)):
        raise ValueError(
            f"{file}: {stored} has {wrong} values of {value.size} that are NaN or infinite in "
            f"{value.dtype}: fetch it again, or take an earlier checkpoint"
        )
    return jnp.asarray(value)


def _some(names: Iterable[str]) -> str:
    """The first five names, and the number of the others."""
    names = list(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def names(path: str | Path) -> list[str]:
    """The sorted names of a checkpoint's tensors; `path` as for `read`."""
    return sorted(_open(_file(paths.resolve(path, "path"))))


def write(path: str | Path, params: Params, kind: str) -> Path:
    """Writes parameters as f32, in the form that `read` takes.

    The file is written completely or not at all. No config.json is written, which transformers
    needs beside the file.

    Args:
      path: a .safetensors file, or a folder for model.safetensors.
      params: tree of arrays.
      kind: 'gpt2', 'bert' or 'roberta'.

    Returns:
      The path of the file.

    Raises:
      ValueError: a parameter has no name in checkpoints of this kind.
    """
    how, path = _kind(kind), paths.resolve(path, "path")
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    values = {_path(keys): np.asarray(leaf, np.float32) for keys, leaf in leaves}
    if unknown := [ours for ours in values if not _theirs(ours, how)]:
        raise ValueError(
            f"checkpoints of {kind!r} have no names for {_some(unknown)}; leave them out of params"
        )
    tensors = {}
    for ours, value in values.items():
        value = value.T if _flipped(ours, how) else value
        tensors[_theirs(ours, how)] = np.ascontiguousarray(value)
    file = path if path.suffix == ".safetensors" else path / WEIGHTS
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(file, save(tensors, metadata={"format": "pt"}))
    return file


def sizes_from_config(path: str | Path, kind: str) -> gpt2.Sizes:
    """Reads the sizes of a model from config.json.

    A missing field has transformers' default. Our layers share one dropout, their residual or
    hidden one; a warning is logged where their other dropouts differ.

    Args:
      path: config.json, its folder, or a file of weights in the same folder.
      kind: 'gpt2', 'bert' or 'roberta'.

    Returns:
      `gpt2.Sizes`, or `bert.Sizes` for encoders.

    Raises:
      FileNotFoundError: config.json does not exist.
      ValueError: a field has a wrong type or a value that our model does not support; the error
        names it.
    """
    how, path = _kind(kind), paths.resolve(path, "path")
    file = path if path.name == CONFIG else (path if path.is_dir() else path.parent) / CONFIG
    stated = {how.aliases.get(field, field): value for field, value in _json(file).items()}
    if not stated.keys() & {"model_type", *how.sizes.values()}:
        fields = ", ".join(how.sizes.values())
        raise ValueError(f"{file} has none of the fields {fields}: is it of a {kind!r} model?")
    config = how.defaults | stated

    def refused(field: str, expected: str) -> ValueError:
        origin = "found" if field in stated else "missing, and transformers takes"
        return ValueError(f"{file}, field {field}: {origin} {config[field]!r}, but {expected}")

    if config["model_type"] != kind:  # first, since the sizes of another kind have other names
        raise refused("model_type", f"our {kind!r} supports {kind!r} only")
    for field in (*how.sizes.values(), *how.dropouts):
        value, default = config[field], how.defaults[field]
        if isinstance(default, int) and type(value) is not int:
            raise refused(field, "a whole number is expected")
        if not isinstance(default, int) and not (value is None is default or _fraction(value)):
            raise refused(field, "a number from 0 to just below 1 is expected")
    try:
        sizes = how.make(**{ours: config[theirs] for ours, theirs in how.sizes.items()})
    except ValueError as error:
        named = [
            field for ours, field in how.sizes.items() if re.search(rf"\b{ours}\b", str(error))
        ]
        raise ValueError(f"{file}: {error} (field {', '.join(named)})") from error
    for field, allowed in how.only(sizes).items():
        if config[field] not in allowed:
            values = " or ".join(map(repr, allowed))
            raise refused(field, f"our {kind!r} supports {values} only")
    dropouts = {field: config[field] for field in how.dropouts if config[field] is not None}
    if len({*dropouts.values()}) > 1:
        some = ", ".join(f"{field} = {value}" for field, value in dropouts.items())
        logging.warning(
            "%s: %s, but our layers share one dropout: %s in training.", file, some, sizes.dropout
        )
    return sizes


def _fraction(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1


def _kind(kind: str) -> Kind:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    return KINDS[kind]


def _path(keys: tuple) -> str:
    """The path of a leaf, such as 'h_3/mlp/c_fc/kernel'."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def _any_layer(ours: str) -> str:
    """The path with # in place of the number of its layer."""
    return re.sub(r"^(h|layer)_\d+/", r"\1_#/", ours)


def _within(ours: str, modules: tuple[str, ...]) -> bool:
    """Whether the path is inside one of the modules."""
    return any(f"{name}/".startswith(modules) for name in (ours, _any_layer(ours)))


def _theirs(ours: str, how: Kind) -> str:
    """'h_3/mlp/c_fc/kernel' -> 'transformer.h.3.mlp.c_fc.weight'; '' where they have no name."""
    module, _, leaf = ours.rpartition("/")
    if leaf not in ("kernel", "scale", "bias"):  # the path is that of a table
        module = ours
    layer = re.match(r"(h|layer)_(\d+)/", ours)
    name = how.names.get(_any_layer(module), "").replace("#", layer[2] if layer else "")
    return name and name + (".bias" if leaf == "bias" else ".weight")


def _flipped(ours: str, how: Kind) -> bool:
    """Whether they store the transposed parameter."""
    return how.stored_by_inputs and ours.endswith("/kernel")


def _plain(theirs: str, how: Kind) -> str:
    """The name without prefix; early files call the leaves of a norm gamma and beta."""
    plain = re.sub(r"\.gamma$", ".weight", theirs.removeprefix(how.prefix))
    return re.sub(r"\.beta$", ".bias", plain)


def _file(path: Path) -> Path:
    """The file of weights or the index in a folder; other paths are returned as they are."""
    if not path.is_dir():
        return path
    files = [file for file in (path / WEIGHTS, path / INDEX) if file.is_file()]
    if not files:
        names = ", ".join(file.name for file in paths.visible(path)) or "nothing"
        raise FileNotFoundError(
            f"{path} has {names}, but neither {WEIGHTS} nor {INDEX}; transformers' save_pretrained "
            "converts other formats"
        )
    return files[0]


def _open(path: Path) -> dict[str, tuple[Path, Any]]:
    """{name of a tensor: (its file, the same file open)}."""
    if path.suffix != ".json":
        names, opened = _shard(path)
        return dict.fromkeys(names, (path, opened))
    shard_of = _json(path).get("weight_map")
    if not isinstance(shard_of, dict) or not all(map(_is_name, shard_of.values())):
        expected = "expected {name of a tensor: name of a file}"
        raise ValueError(f"{path}, field weight_map: {expected}; fetch it again")
    asked = f" ({path.name} names it)"
    shards = {shard: _shard(_inside(path, shard), asked) for shard in sorted({*shard_of.values()})}
    for name, shard in shard_of.items():
        if name not in shards[shard][0]:
            raise ValueError(
                f"{path}: {shard} has no tensor {name}, as the index says; fetch both again"
            )
    return {name: (path.parent / shard, shards[shard][1]) for name, shard in shard_of.items()}


def _shard(file: Path, asked: str = "") -> tuple[list[str], Any]:
    """The names of a file's tensors, and the open file; `asked` ends an error about it."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} not found; fetch it, or save the model to this path{asked}"
        )
    try:
        opened = safe_open(file, "numpy")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error}); fetch it again") from error
    return list(opened.keys()), opened


def _is_name(name: object) -> bool:
    """Whether a file can have the name; Linux allows 255 bytes."""
    return isinstance(name, str) and "\0" not in name and len(name.encode("utf-8", "replace")) < 256


def _inside(index: Path, shard: str) -> Path:
    """The file that an index names, which must lie in the index's folder.

    In Hugging Face's cache a snapshot is a folder of links to the folder of blobs beside the
    snapshots. So a link may lead to that folder too.
    """
    folder = index.parent.resolve()
    allowed = [folder]
    if folder.parent.name == "snapshots":
        allowed.append(folder.parents[1] / "blobs")
    file = index.parent / shard
    if Path(shard).is_absolute() or ".." in Path(shard).parts:
        raise ValueError(
            f"{index}: the file {shard!r} is outside the folder {folder}: an index may only name "
            "files beside it"
        )
    if not any(file.resolve().is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{file} is a link to {file.resolve()}, outside the folder of its index: put the file "
            "itself into the folder"
        )
    return file


def _json(file: Path) -> Mapping[str, Any]:
    """The object in a JSON file."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; a checkpoint's folder has it")
    content = text_files.read_json(file)
    if not isinstance(content, dict):
        raise ValueError(
            f"{file}: expected a JSON object, found {str(content)[:60]!r}; fetch it again"
        )
    return content
