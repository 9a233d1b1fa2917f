"""Parameters from and to Hugging Face checkpoints: model.safetensors, whole or in shards, and config.json beside it.

Paths are local; nothing is fetched. A linear layer is stored [out, in] there as here, GPT-2's [in, out].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
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
from rmjax.types import Params

WHOLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
POSITIONS = ("wpe", "embeddings/position_embeddings")
WORDS = ("wte", "embeddings/word_embeddings")
TANH = ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate")
FLOATS = ("F64", "F32", "F16", "BF16")  # what safetensors calls the types that weights have


class Kind(NamedTuple):
    """What a family of checkpoints calls our modules and sizes."""

    prefix: str  # of names of the body; files of the body alone leave it out
    names: dict[str, str]  # {our module or table: theirs}, # being the number of a layer
    ignored: str  # their tensors that are no parameters, or of the task they were pre-trained on
    stored_by_inputs: bool  # kernels are [in, out]
    make: Callable[..., gpt2.Sizes]
    sizes: dict[str, str]  # {our field: theirs, in config.json}
    dropouts: tuple[str, ...]  # their fields; our layers share the first one
    defaults: dict[str, Any]  # {their field: transformers' value where it is left out}
    only: Callable[[Any], dict[str, tuple]]  # {their field: the values we have}
    aliases: dict[str, str] = {}  # {another name that transformers reads: their field}


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
    kind: str,
    ignored: str,
    make: Callable[..., bert.Sizes],
    defaults: dict[str, Any],
    **sizes: str,
) -> Kind:
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
    """Parameters of the tree, shapes and dtypes of `like` (arrays, or `jax.eval_shape` of an init) from a checkpoint.

    A model of shorter segments takes the first rows of a table of positions. A model of fewer words
    takes the first rows of a table of words, with a warning, since released tables are often padded
    to a round number. The model has no other rows: it gives padded ids no probability, and its
    softmax is over the tokenizer's words alone.

    path: a folder, a .safetensors file or an index of shards. kind: 'gpt2', 'bert' or 'roberta'. fresh: modules that
    keep the values of `like`, such as 'classifier' or 'h_#/memory_attn', # being any layer. Tensors of the file that
    have no place in `like` are logged.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file is damaged; an index names files outside its folder; a tensor is missing, of
        another shape, not of floating point, or holds NaN or infinity.
    """
    how, kept = _kind(kind), tuple(f"{module}/" for module in fresh)
    path = _file(paths.resolve(path, "path"))
    files = _open(path)
    stored = {_plain(name, how): name for name in files}

    def tensor(plain: str) -> np.ndarray:
        name = stored[plain]
        file, opened = files[name]
        dtype = opened.get_slice(name).get_dtype()
        if dtype not in FLOATS:
            raise ValueError(
                f"{file}: {name} is of type {dtype}, and weights are {', '.join(FLOATS)}: "
                "fetch it again, or save the model anew in float32"
            )
        return opened.get_tensor(name)

    leaves, tree = jax.tree_util.tree_flatten_with_path(like)
    values = {_path(where): leaf for where, leaf in leaves}
    wanted = {ours: _theirs(ours, how) for ours in values if not _within(ours, kept)}
    plain = {ours: _plain(theirs, how) for ours, theirs in wanted.items()}
    if missing := [ours for ours in wanted if plain[ours] not in stored]:
        some = ", ".join(f"{ours} ({wanted[ours] or 'has no name there'})" for ours in missing[:5])
        some += f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ValueError(
            f"{path} as {kind!r} has no tensors for {some}. Set kind to the checkpoint's, and fresh to the modules "
            "that are to keep their initial values."
        )
    tied = ("lm_head.weight", "wte.weight")
    used = {*plain.values()}
    if stored.keys() >= {*tied} and np.array_equal(tensor(tied[0]), tensor(tied[1])):
        used.add(tied[0])
    if extra := [
        stored[name] for name in stored if name not in used and not re.fullmatch(how.ignored, name)
    ]:
        depth = 1 + max(
            (int(layer[1]) for ours in values if (layer := re.match(r"(?:h|layer)_(\d+)/", ours))),
            default=-1,
        )
        numbered = (
            (int(layer[1]), name)
            for name in extra
            if (layer := re.search(r"\b(?:h|layer)\.(\d+)\.", name))
        )
        if deeper := [name for number, name in numbered if number >= depth]:
            raise ValueError(
                f"{path} has more than the {depth} layers of the model: {', '.join(sorted(deeper)[:3])}"
            )
        logging.warning(
            "%s: %d tensors have no place in the model: %s",
            path,
            len(extra),
            ", ".join(sorted(extra)),
        )
    for ours, name in plain.items():
        value, shape, file = tensor(name), values[ours].shape, files[stored[name]][0]
        needed = shape[::-1] if _flipped(ours, how) else shape
        if ours in WORDS and len(value) > shape[0]:
            logging.warning(
                "%s: %s has %d rows, and the tokenizer %d words: the last %d rows are left out. "
                "This is right for a padded table, and wrong for a tokenizer of another model.",
                *(path, stored[name], len(value), shape[0], len(value) - shape[0]),
            )
        if ours in WORDS + POSITIONS:
            value = value[: shape[0]]
        if value.shape != needed:
            cure = f"Give it the checkpoint's sizes (sizes_from_config(path, {kind!r})), or name the module in fresh."
            if ours in POSITIONS and value.shape[1:] == needed[1:]:
                cure = f"Use segments of {needed[0] - len(value)} tokens fewer."
            if ours in WORDS and value.shape[1:] == needed[1:]:
                cure = f"Use the checkpoint's own tokenizer, or one of at most {len(value)} tokens."
            raise ValueError(
                f"{file}: {stored[name]} has shape {value.shape}, the model's {ours} is made for {needed}. {cure}"
            )
        value = value.T if _flipped(ours, how) else value
        with np.errstate(over="ignore"):
            value = value.astype(values[ours].dtype)
        wrong = value.size - np.count_nonzero(np.isfinite(value))
        if wrong:
            raise ValueError(
                f"{file}: {stored[name]} has {wrong} values of {value.size} that are NaN or "
                f"infinite in {value.dtype}: fetch it again, or take an earlier checkpoint"
            )
        values[ours] = jnp.asarray(value)
    return jax.tree.unflatten(tree, values.values())


def names(path: str | Path) -> list[str]:
    """Of a checkpoint's tensors; `path` as for `read`."""
    return sorted(_open(_file(paths.resolve(path, "path"))))


def write(path: str | Path, params: Params, kind: str) -> Path:
    """Writes parameters as f32 where `read` finds them; returns the file. It writes no config.json, which transformers
    needs beside.

    path: a .safetensors file, or a folder for model.safetensors; the file is written whole or not at all.

    Raises:
      ValueError: a parameter has no name in checkpoints of this kind.
    """
    how, path = _kind(kind), paths.resolve(path, "path")
    values = {_path(where): leaf for where, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    if unknown := [ours for ours in values if not _theirs(ours, how)]:
        some = ", ".join(unknown[:5]) + (
            f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        )
        raise ValueError(
            f"checkpoints of {kind!r} have no names for {some}; leave them out of params"
        )
    tensors = {}
    for ours, value in values.items():
        value = np.asarray(value, np.float32)
        tensors[_theirs(ours, how)] = np.ascontiguousarray(
            value.T if _flipped(ours, how) else value
        )
    file = path if path.suffix == ".safetensors" else path / WHOLE
    file.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(file, save(tensors, metadata={"format": "pt"}))
    return file


def sizes_from_config(path: str | Path, kind: str) -> gpt2.Sizes:
    """Sizes (`gpt2.Sizes`, or `bert.Sizes`) of config.json in a folder, or beside a file of weights.

    A field that is left out has transformers' default. Our layers share one dropout, the residual or
    hidden one. A warning says where the others differ.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: the field it names is not of its type, or our model does not implement its value.
    """
    how, path = _kind(kind), paths.resolve(path, "path")
    file = path if path.name == CONFIG else (path if path.is_dir() else path.parent) / CONFIG
    stated = _json(file)
    stated = {how.aliases.get(field, field): value for field, value in stated.items()}
    if not stated.keys() & {"model_type", *how.sizes.values()}:
        fields = ", ".join(how.sizes.values())
        raise ValueError(f"{file} has none of the fields {fields}: is it of a {kind!r} model?")
    config = how.defaults | stated

    def refused(field: str, expected: str) -> ValueError:
        origin = "found" if field in stated else "left out, and transformers takes"
        return ValueError(f"{file}, field {field}: {origin} {config[field]!r}, but {expected}")

    if config["model_type"] != kind:  # said first: the sizes of another kind have other names
        raise refused("model_type", f"our {kind!r} is made for {kind!r} alone")
    for field in (*how.sizes.values(), *how.dropouts):
        value, default = config[field], how.defaults[field]
        if isinstance(default, int) and type(value) is not int:
            raise refused(field, "a whole number is expected")
        if not isinstance(default, int) and not (value is None is default or _fraction(value)):
            raise refused(field, "a number from 0 to just below 1 is expected")
    try:
        sizes = how.make(**{ours: config[theirs] for ours, theirs in how.sizes.items()})
    except ValueError as error:
        wrong = [
            theirs for ours, theirs in how.sizes.items() if re.search(rf"\b{ours}\b", str(error))
        ]
        raise ValueError(f"{file}: {error} (field {', '.join(wrong)})") from error
    for field, allowed in how.only(sizes).items():
        if config[field] not in allowed:
            raise refused(
                field, f"our {kind!r} is made for {' or '.join(map(repr, allowed))} alone"
            )
    dropouts = {field: config[field] for field in how.dropouts if config[field] is not None}
    if len({*dropouts.values()}) > 1:
        some = ", ".join(f"{field} = {value}" for field, value in dropouts.items())
        logging.warning(
            "%s: %s, but our layers share one dropout: %s in training.", file, some, sizes.dropout
        )
    return sizes


def _fraction(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1


def _kind(kind: str) -> Kind:
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(KINDS)}")
    return KINDS[kind]


def _path(where: tuple) -> str:
    return jax.tree_util.keystr(where, simple=True, separator="/")


def _any_layer(ours: str) -> str:
    return re.sub(r"^(h|layer)_\d+/", r"\1_#/", ours)


def _within(ours: str, modules: tuple[str, ...]) -> bool:
    return any(f"{name}/".startswith(modules) for name in (ours, _any_layer(ours)))


def _theirs(ours: str, how: Kind) -> str:
    """'h_3/mlp/c_fc/kernel' -> 'transformer.h.3.mlp.c_fc.weight'; '' where the table has no such name."""
    module, _, leaf = ours.rpartition("/")
    if leaf not in ("kernel", "scale", "bias"):  # a table itself
        module = ours
    layer = re.match(r"(h|layer)_(\d+)/", ours)
    name = how.names.get(_any_layer(module), "").replace("#", layer[2] if layer else "")
    return name and name + (".bias" if leaf == "bias" else ".weight")


def _flipped(ours: str, how: Kind) -> bool:
    return how.stored_by_inputs and ours.endswith("/kernel")


def _plain(theirs: str, how: Kind) -> str:
    """Without prefix; gamma and beta are what a norm's leaves are called in early files."""
    return re.sub(
        r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", theirs.removeprefix(how.prefix))
    )


def _file(path: Path) -> Path:
    """The file of weights or the index, of a folder that has one."""
    if not path.is_dir():
        return path
    files = [file for file in (path / WHOLE, path / INDEX) if file.is_file()]
    if not files:
        names = ", ".join(file.name for file in paths.visible(path)) or "nothing"
        raise FileNotFoundError(
            f"{path} has {names}, but neither {WHOLE} nor {INDEX}; transformers' save_pretrained makes one of "
            "other formats"
        )
    return files[0]


def _open(path: Path) -> dict[str, tuple[Path, Any]]:
    """{name of a tensor: the file that has it, and the same file open}."""
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
    """-> names of its tensors, the open file. asked: who asks for it, for errors."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; fetch it, or save the model there{asked}")
    try:
        opened = safe_open(file, "numpy")
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged or cut short ({error}); fetch it again") from error
    return list(opened.keys()), opened


def _is_name(name: Any) -> bool:
    """Whether a file can have it; Linux takes 255 bytes."""
    return isinstance(name, str) and "\0" not in name and len(name.encode("utf-8", "replace")) < 256


def _inside(index: Path, shard: str) -> Path:
    """The file that an index names, which lies in the index's folder.

    In Hugging Face's cache a snapshot is a folder of links to the blobs beside the snapshots, so a link
    may go there too.
    """
    folder = index.parent.resolve()
    allowed = [
        folder,
        *([folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else []),
    ]
    file = index.parent / shard
    if Path(shard).is_absolute() or ".." in Path(shard).parts:
        raise ValueError(
            f"{index}: the file {shard!r} is outside the folder {folder}: an index names files beside it"
        )
    if not any(file.resolve().is_relative_to(place) for place in allowed):
        raise ValueError(
            f"{file} is a link to {file.resolve()}, outside the folder of its index: put the file itself there"
        )
    return file


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; a checkpoint's folder has it")
    content = text_files.read_json(file)
    if not isinstance(content, dict):
        raise ValueError(
            f"{file}: expected a JSON object, found {str(content)[:60]!r}; fetch it again"
        )
    return content
