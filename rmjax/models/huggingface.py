"""Parameters from and to Hugging Face checkpoints: model.safetensors, whole or in shards, and config.json beside it.

Paths are local; nothing is fetched. A linear layer is stored [out, in] there as here, GPT-2's [in, out].
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rmjax.models import bert, gpt2
from rmjax.types import Params

WHOLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
POSITIONS = ("wpe", "embeddings/position_embeddings")


class Kind(NamedTuple):
    """What a family of checkpoints calls our modules and sizes."""

    prefix: str  # of names of the body; files of the body alone leave it out
    names: dict[str, str]  # {our module or table: theirs}, # being the number of a layer
    ignored: str  # their tensors that are no parameters, or of the task they were pre-trained on
    stored_by_inputs: bool  # kernels are [in, out]
    make: Callable[..., gpt2.Sizes]
    sizes: dict[str, str]  # {our field: theirs, in config.json}
    only: Callable[[Any], dict[str, tuple]]  # {their field: the values we have, the first where it is left out}


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


def _encoder(kind: str, ignored: str, make: Callable[..., bert.Sizes], **sizes: str) -> Kind:
    def only(s: bert.Sizes) -> dict[str, tuple]:
        return {
            "model_type": (kind,),
            "hidden_act": ("gelu",),
            "intermediate_size": (4 * s.dim,),
            "position_embedding_type": ("absolute",),
            "attention_probs_dropout_prob": (s.dropout,),
            "classifier_dropout": (None, s.dropout),
            "is_decoder": (False,),
            "add_cross_attention": (False,),
        }

    names = {ours: f"{kind}.{theirs}" for ours, theirs in _LAYERS.items()} | _HEADS[kind]
    ignored = rf"embeddings\.position_ids|{ignored}"
    return Kind(f"{kind}.", names, ignored, False, make, _ENCODER_SIZES | sizes, only)


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
        sizes=dict(vocabulary="vocab_size", positions="n_positions", dim="n_embd", layers="n_layer", heads="n_head")
        | {"dropout": "resid_pdrop"},
        only=lambda s: {
            "model_type": ("gpt2",),
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "n_inner": (None, 4 * s.dim),
            "layer_norm_epsilon": (1e-5,),
            "embd_pdrop": (s.dropout,),
            "attn_pdrop": (s.dropout,),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "tie_word_embeddings": (True,),
        },
    ),
    "bert": _encoder("bert", r"cls\..*", bert.Sizes),
    "roberta": _encoder("roberta", r"lm_head\..*|pooler\.dense\..*", bert.roberta, padding="pad_token_id"),
}


def read(path: str | Path, like: Params, kind: str, fresh: Iterable[str] = ()) -> Params:
    """Parameters of the tree, shapes and dtypes of `like` (arrays, or `jax.eval_shape` of an init) from a checkpoint.
    A model of shorter segments takes the first rows of a table of positions.

    path: a folder, a .safetensors file or an index of shards. kind: 'gpt2', 'bert' or 'roberta'. fresh: modules that
    keep the values of `like`, such as 'classifier' or 'h_#/memory_attn', # being any layer. Tensors of the file that
    have no place in `like` are logged.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a file is damaged, a tensor is missing or of another shape.
    """
    how, files, kept = _kind(kind), _open(Path(path)), tuple(f"{module}/" for module in fresh)
    stored = {_plain(name, how): name for name in files}
    tensor = lambda plain: files[stored[plain]].get_tensor(stored[plain])  # noqa: E731
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
    if stored.keys() >= {*tied} and np.array_equal(*map(tensor, tied)):
        used.add(tied[0])
    if extra := [stored[name] for name in stored if name not in used and not re.fullmatch(how.ignored, name)]:
        depth = 1 + max(
            (int(layer[1]) for ours in values if (layer := re.match(r"(?:h|layer)_(\d+)/", ours))), default=-1
        )
        found = ((int(layer[1]), name) for name in extra if (layer := re.search(r"\b(?:h|layer)\.(\d+)\.", name)))
        if deeper := [name for number, name in found if number >= depth]:
            raise ValueError(f"{path} has more than the {depth} layers of the model: {', '.join(sorted(deeper)[:3])}")
        logging.warning("%s: %d tensors have no place in the model: %s", path, len(extra), ", ".join(sorted(extra)))
    for ours, name in plain.items():
        value, shape = tensor(name), values[ours].shape
        needed = shape[::-1] if _flipped(ours, how) else shape
        if ours in POSITIONS:
            value = value[: len(values[ours])]
        if value.shape != needed:
            cure = f"Give it the checkpoint's sizes (sizes_from_config(path, {kind!r})), or name the module in fresh."
            if ours in POSITIONS and value.shape[1:] == needed[1:]:
                cure = f"Use segments of {needed[0] - len(value)} tokens fewer."
            raise ValueError(
                f"{path}: {stored[name]} has shape {value.shape}, the model's {ours} is made for {needed}. {cure}"
            )
        value = value.T if _flipped(ours, how) else value
        values[ours] = jnp.asarray(value.astype(values[ours].dtype))
    return jax.tree.unflatten(tree, values.values())


def names(path: str | Path) -> list[str]:
    """Of a checkpoint's tensors; `path` as for `read`."""
    return sorted(_open(Path(path)))


def write(path: str | Path, params: Params, kind: str) -> Path:
    """Writes parameters as f32 where `read` finds them; returns the file. It writes no config.json, which transformers
    needs beside.

    path: a .safetensors file, or a folder for model.safetensors; the file is written whole or not at all.

    Raises:
      ValueError: a parameter has no name in checkpoints of this kind.
    """
    how, path = _kind(kind), Path(path)
    values = {_path(where): leaf for where, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}
    if unknown := [ours for ours in values if not _theirs(ours, how)]:
        some = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise ValueError(f"checkpoints of {kind!r} have no names for {some}; leave them out of params")
    tensors = {}
    for ours, value in values.items():
        value = np.asarray(value, np.float32)
        tensors[_theirs(ours, how)] = np.ascontiguousarray(value.T if _flipped(ours, how) else value)
    file = path if path.suffix == ".safetensors" else path / WHOLE
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f"{file.name}.tmp")
    save_file(tensors, part, metadata={"format": "pt"})
    return part.replace(file)


def sizes_from_config(path: str | Path, kind: str) -> gpt2.Sizes:
    """Sizes (`gpt2.Sizes`, or `bert.Sizes`) of config.json in a folder, or beside a file of weights.

    Raises:
      FileNotFoundError: there is no config.json.
      ValueError: the field it names is missing, or has a value that our model does not implement.
    """
    how, path = _kind(kind), Path(path)
    file = path if path.name == CONFIG else (path if path.is_dir() else path.parent) / CONFIG
    config = _json(file)
    if absent := [theirs for theirs in how.sizes.values() if theirs not in config]:
        raise ValueError(f"{file} has no field {', '.join(absent)}; is it of a {kind!r} model?")
    try:
        sizes = how.make(**{ours: config[theirs] for ours, theirs in how.sizes.items()})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    for field, allowed in how.only(sizes).items():
        if (found := config.get(field, allowed[0])) not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ValueError(f"{file}, field {field}: found {found!r}, but our {kind!r} is made for {expected} alone")
    return sizes


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
    return re.sub(r"\.beta$", ".bias", re.sub(r"\.gamma$", ".weight", theirs.removeprefix(how.prefix)))


def _open(path: Path) -> dict[str, Any]:
    """{name of a tensor: the open file that has it}."""
    files = [path]
    if path.is_dir():
        files = [file for file in (path / WHOLE, path / INDEX) if file.is_file()][:1]
        if not files:
            there = ", ".join(sorted(file.name for file in path.iterdir())) or "nothing"
            raise FileNotFoundError(
                f"{path} has {there}, but neither {WHOLE} nor {INDEX}; transformers' save_pretrained makes one of "
                "other formats"
            )
    if files[0].suffix == ".json":
        files = sorted({files[0].parent / shard for shard in _json(files[0])["weight_map"].values()})
    found: dict[str, Any] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} not found; fetch it, or save the model there")
        try:
            opened = safe_open(file, "numpy")
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or cut short ({error}); fetch it again") from error
        found |= dict.fromkeys(opened.keys(), opened)
    return found


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found; a checkpoint's folder has it")
    try:
        return json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); fetch it again") from error
