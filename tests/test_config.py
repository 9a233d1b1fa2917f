"""Errors about a config name the wrong key or value, and the right one."""

import re
import runpy
import subprocess
import sys

import jax
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from rmjax import command_line
from rmjax import config as config_lib
from rmjax.command_line import check_flags
from rmjax.config import SCHEMA, Recorder, base, flatten, options, validate
from tests import ROOT


def changed(names, values):
    """The defaults with another value for one key, or for several: "a.b, a.c" and a tuple."""
    config, names = base(), names.split(", ")
    for name, value in zip(names, values if len(names) > 1 else [values], strict=True):
        *sections, key = name.split(".")
        section = config
        for part in sections:
            section = section[part]
        with section.ignore_type():
            section[key] = value
    return config


def test_the_defaults_are_valid():
    validate(base())
    assert base().train.learning_rate == 1e-3 and base().data.movielens.every == 10


def test_every_field_is_documented():
    assert all(field.doc and field.check.text for field in SCHEMA.values())


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("train.bach_size", "train.batch_size"),
        ("trian.batch_size", "train.batch_size"),
        ("batch_size", "train.batch_size"),
        ("data.simulated.visits", "data.simulated.visit"),
        ("train.learning-rate", "train.learning_rate"),
        ("sed", "seed"),
    ],
)
def test_the_error_of_an_unknown_key_suggests_the_right_one(wrong, right):
    config = base().to_dict()
    *sections, key = wrong.split(".")
    section = config
    for part in sections:
        section = section.setdefault(part, {})
    section[key] = 3
    message = f"config.{wrong}: no such key; did you mean config.{right}?"
    with pytest.raises(ValueError) as error:
        validate(ConfigDict(config))
    assert str(error.value) == message
    for argument in (f"--config.{wrong}=3", f"-config.{wrong}", f"--noconfig.{wrong}"):
        with pytest.raises(SystemExit) as end:
            check_flags(["main.py", argument])
        assert end.value.code == message


def test_the_error_of_an_unknown_key_unlike_any_other_lists_its_section():
    keys = "no such key; there are config.reason.weight, config.reason.hops,"
    with pytest.raises(SystemExit, match=keys):
        check_flags(["--config.reason.zzzzzzzzzzzzzzzzz=1"])


def test_right_flags_pass():
    line = ["--config=configs/x.py:local", "--workdir=config.foo", "--config.train.batch_size", "3"]
    check_flags(["main.py", *line])
    check_flags(["bench.py", "--nostreaming", "--nodistributed", "--config=configs/x.py"])
    sections = ["--config.train={}", "--noconfig.machine.remat"]
    check_flags([*(f"--config.{name}=1" for name in SCHEMA), *sections])


COUNT, RATE, SEED = "a whole number, at least 1", "a number, above 0", "from 0 to 4294967295"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("train.batch_size", 0, COUNT),
        ("train.batch_size", 3.5, COUNT),
        ("train.batch_size", True, COUNT),
        ("train.batch_size", "3", COUNT),
        ("train.learning_rate", 0.0, RATE),
        ("train.learning_rate", float("nan"), RATE),
        ("train.clip", float("inf"), RATE),
        ("machine.dropout", 1.0, "a number, from 0 to just below 1"),
        ("rehearsal.mask_ratio", 1.1, "a number, from 0 to 1"),
        ("machine.kind", "gur", "a string, one of rehearsal, continual, gru"),
        ("model.kind", "gpt", "a string, one of transformer, transformer_xl, compressive"),
        ("model.kind", "gru", "a string, one of transformer, transformer_xl, compressive"),
        ("machine.remat", 1, "True or False"),
        ("data.dir", None, "a string"),
        ("seed", 2**32, f"a whole number, {SEED}"),
        ("data.seed", 2**63, f"a whole number, {SEED}"),
        ("data.simulated.world_seed", -1, f"a whole number, {SEED}"),
    ],
)
def test_the_error_of_a_wrong_value_gives_the_range(name, value, words):
    with pytest.raises(ValueError) as error:
        validate(changed(name, value))
    assert str(error.value).startswith(f"config.{name} = {value!r}: must be {words}")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("machine.heads", 5, "config.machine.heads = 5 must divide config.machine.dim = 64"),
        ("teacher.share_items, teacher.dim", (True, 8),
         "needs config.teacher.dim = 8 to be config.machine.dim = 64"),
        ("teacher.share_items, data.vectors", (True, "glove.txt"), "no table can be shared"),
        ("teacher.share_items, data.name", (True, "activitynet"), "no table can be shared"),
        ("teacher.share_items, train.start_from", (True, "runs/a"),
         "set config.teacher.dir to that run's teacher"),
        ("machine.kind, machine.subspaces", ("continual", 5),
         "config.machine.subspaces = 5 must divide"),
        ("machine.kind, machine.item_dim", ("continual", 6),
         "heads = 4 must divide config.machine.item_dim = 6"),
        ("data.name, machine.heads, machine.dim", ("babi", 5, 65),
         "config.machine.dim = 65: must be even"),
        ("data.name, machine.heads, machine.dim", ("tvqa", 5, 65), "dim = 65: must be even"),
        ("data.name, machine.heads, machine.dim", ("narrativeqa", 5, 65), "dim = 65: must be even"),
        ("data.name, machine.heads, machine.dim", ("activitynet", 5, 65), "dim = 65: must be even"),
        ("train.sparse_items, data.name", (True, "activitynet"), "activitynet has no item table"),
        ("train.sparse_items, data.name", (True, "sorting"), "sorting has no item table"),
        ("data.simulated.labelled", 0.5, "needs config.rehearsal.sampler = 'uniform', since"),
        ("data.simulated.clicks_min", 2000,
         "must be at most config.data.simulated.clicks_max = 1000"),
        ("data.movielens.test_fraction", 0.9, "test_fraction + valid_fraction: must be below 1"),
        ("data.table.valid_fraction", 0.8, "table.test_fraction + valid_fraction: must be below 1"),
        ("data.dir", "gs://b/x",
         "config.data.dir=gs://b/x is an address, and only folders of this machine"),
        ("data.text.tokenizer", "hf://gpt2", "config.data.text.tokenizer=hf://gpt2 is an address"),
        ("train.start_from", "runs/lr[1]",
         "config.train.start_from=runs/lr[1] has '[' in its whole path"),
        ("train.model_devices", 2,
         "config.train.model_devices = 2: needs config.train.mapping = 'mesh'"),
        ("data.name, model.kind, model.layers", ("hyperpartisan", "memoria_bert", 1),
         "layers = 1: two are needed"),
        ("data.name, model.kind, memoria.layer", ("hyperpartisan", "memoria_bert", 99),
         "memoria.layer = 99: must be"),
        ("data.name, model.kind", ("books", "bert"), "'bert': for books there are transformer, "),
    ],
)  # fmt: skip
def test_the_error_of_a_conflict_names_the_keys(name, value, words):
    with pytest.raises(ValueError) as error:
        validate(changed(name, value))
    assert words in str(error.value)


def test_a_batch_size_may_be_any_whole_number():
    validate(changed("train.eval_batch_size", 3))


def test_a_missing_key_is_named():
    config = base()
    del config.train["clip"]
    with pytest.raises(ValueError, match="config.train.clip: missing; its default is 5.0"):
        validate(config)


def test_a_float_key_takes_an_int():
    validate(changed("train.clip", 5))


def test_options_combine():
    assert options(None, ["long", "local"]) == options("", ["long", "local"]) == frozenset()
    assert options("long,local", ["long", "local"]) == {"long", "local"}
    unknown = "config option 'lcal': no such option; there are long, local"
    with pytest.raises(flags.Error, match=unknown):
        options("long,lcal", ["long", "local"])


MAIN = """
import sys
from absl import app
from ml_collections import config_flags
from rmjax import command_line
from absl import flags
CONFIG = config_flags.DEFINE_config_file("config", None, "The card.")
flags.DEFINE_integer("count", 1, "")
if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.check_flags(sys.argv)
    run = lambda _: print(CONFIG.value.train.batch_size, CONFIG.value.train.steps)
    app.run(run, flags_parser=command_line.parse_flags)
"""
CARD = """
from rmjax import config
def get_config(arg=None):
    card = config.base()
    if "local" in config.options(arg, ["local"]):
        card.train.steps = 7
    return card
"""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config={card}:local", "--config.train.batch_size=3"], "3 7"),
        (["--config={card}", "--config.train.bach_size=3"],
         "did you mean config.train.batch_size?"),
        (["--config={card}:lcal"], "config option 'lcal': no such option; there are local"),
        (["--config={card}", "--config.train.batch_size=many"],
         "config.train.batch_size = 'many': must be a whole number"),
        (["--config={card}", "--config.train.steps=1e3"],
         "config.train.steps = '1e3': must be a whole number, at"),
        (["--config={card}", "--config.train.clip", "=", "5"],
         "config.train.clip = '=': must be a number, above 0"),
        (["--config={card}", "--config.machine.remat=maybe"],
         "config.machine.remat = 'maybe': must be True or False"),
        (["--config={card}", "--steps=3"],
         "--steps: no such flag; did you mean --config.probe.steps or --config."),
        (["--config={card}", "--count=x"],
         "flag --count=x: must be a whole number; --help shows all flags"),
        (["--config={card}", "--confg=3"], "--confg: no such flag; did you mean --config?"),
        (["--config={card}", "train"],
         "unexpected arguments: train; options are flags, such as --mode=eval"),
        (["--import", "no_such_module"], "--import=no_such_module: No module named"),
        ([], "--config is missing: The card."),
    ],
)  # fmt: skip
def test_the_command_line_answers_in_words(tmp_path, arguments, words):
    (tmp_path / "main.py").write_text(MAIN)
    (tmp_path / "card.py").write_text(CARD)
    arguments = [argument.format(card=tmp_path / "card.py") for argument in arguments]
    command = [sys.executable, str(tmp_path / "main.py"), *arguments]
    env = {"PYTHONPATH": config_lib.__file__.rsplit("/rmjax/", 1)[0]}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


BROKEN = {  # text of a card -> words of the error
    "x = 3": "card.py: AttributeError: module 'config_config' has no attribute 'get_config': mend",
    "def get_config(arg=''): retun 3": "card.py, line 1: SyntaxError: invalid syntax: mend it",
    "x = 3\nimport no_such_module":
        "card.py, line 2: ModuleNotFoundError: No module named 'no_such_module': mend it",
    "def get_config(arg=''): return int('many')":
        "card.py, line 1: ValueError: invalid literal for int() with base",
    "def get_config(): return 3":
        "card.py: TypeError: get_config() takes 0 positional arguments but 1 was given: mend",
}  # fmt: skip


def parsed(path) -> str:
    """The error of `parse_flags` for a card."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "The card.", flag_values=values)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(flags, "FLAGS", values)
        command_line.parse_flags(["main.py", f"--config={path}"])
    return str(end.value)


@pytest.mark.parametrize("card", BROKEN)
def test_the_error_of_a_broken_card_names_the_line(tmp_path, card):
    (tmp_path / "card.py").write_text(card)
    assert BROKEN[card] in parsed(f"{tmp_path}/card.py:local")


def test_the_error_of_a_path_that_is_no_card_lists_the_cards(tmp_path):
    (tmp_path / "xlong.py").touch()
    (tmp_path / "config.json").touch()
    near = f"no such file; did you mean {tmp_path}/xlong.py?"
    assert parsed(tmp_path / "xlng.py") == f"--config={tmp_path}/xlng.py: {near}"
    (tmp_path / "synthetic.py").touch()
    assert f"did you mean {tmp_path}/xlong.py?" in parsed(tmp_path / "xlongg.py")
    (tmp_path / "synthetic.py").unlink()
    assert parsed(tmp_path) == f"--config={tmp_path}: a folder; there are {tmp_path}/xlong.py"
    no_card = f"no card, which is a .py file; there are {tmp_path}/xlong.py"
    assert parsed(tmp_path / "config.json").endswith(no_card)
    cure = "cards are in the folder configs of a clone of rmjax: go there, or give the path"
    assert parsed(tmp_path / "no" / "xlong.py").endswith(f"no such file; {cure}")


def test_a_misspelt_key_in_a_flagfile_is_an_error_too(tmp_path):
    (tmp_path / "flags").write_text("--config.sed=1\n")
    with pytest.raises(SystemExit, match="config.seed"):
        check_flags(["main.py", f"--flagfile={tmp_path / 'flags'}"])


def test_a_recorder_keeps_the_keys_that_are_read():
    config = Recorder(base())
    train = config.train
    assert config.read == set()
    assert train.steps == 2000 and config["data"]["movielens"].every == 10 and config.seed == 0
    assert config.read == {"train.steps", "data.movielens.every", "seed"}
    with pytest.raises(AttributeError):
        train.bach_size  # noqa: B018


def test_every_key_that_names_a_path_refuses_addresses():
    named = re.compile(r"folder|workdir|file of|where .* (are|go)|path|tokenizer\.json")
    for name, field in SCHEMA.items():
        if isinstance(field.default, str) and named.search(field.doc):
            with pytest.raises(ValueError, match=f"config.{name}=s3://b/x is an address"):
                validate(changed(name, "s3://b/x"))


def test_no_two_seeds_give_the_same_key():
    seeds = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    assert all(SCHEMA["seed"].check.holds(seed) for seed in seeds)
    keys = {tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in seeds}
    assert len(keys) == len(seeds)


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpshort", "-help"])
def test_help_shows_every_key_and_exits_with_zero(flag, capsys):
    with pytest.raises(SystemExit) as end:
        check_flags(["main.py", flag])
    shown = capsys.readouterr().out
    assert not end.value.code
    assert all(f"--config.{name}: " in shown for name in SCHEMA)
    clip = "--config.train.clip: largest norm of the gradient (a number, above 0; default 5.0)"
    assert clip in shown


def test_few_labels_keep_the_world_and_the_model():
    """The two options compare: they differ in labels, rehearsal, item table and training alone."""
    card = runpy.run_path(str(ROOT / "configs" / "xlong.py"))["get_config"]
    many, few = (dict(flatten(card(arg))) for arg in ("local", "local,few"))
    changes = {key for key in few if few[key] != many[key]}
    assert {key for key in changes if not key.startswith(("rehearsal.", "train."))} == {
        "data.simulated.targets",
        "teacher.share_items",
    }
    assert few["data.simulated.targets"] == 1 and few["rehearsal.recollection"] > 0
    assert card("few").train.steps == card("").train.steps  # the paper's size keeps its training
    validate(card("few"))
    validate(card("local,few"))
