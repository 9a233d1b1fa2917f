"""A key or a value that is wrong is named, with what would have been right."""

import re
import subprocess
import sys

import jax
import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from rmjax import config as config_lib
from rmjax.config import SCHEMA, Recorder, base, check_flags, options, validate


def changed(names, values):
    """The defaults but for one key, or for several: "a.b, a.c" and a tuple."""
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
def test_an_unknown_key_is_told_the_right_one(wrong, right):
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


def test_an_unknown_key_like_no_other_is_told_its_neighbours():
    with pytest.raises(
        SystemExit, match="no such key; there are config.reason.weight, config.reason.hops,"
    ):
        check_flags(["--config.reason.zzzzzzzzzzzzzzzzz=1"])


def test_right_flags_pass():
    check_flags(
        [
            "main.py",
            "--config=configs/x.py:local",
            "--workdir=config.foo",
            "--config.train.batch_size",
            "3",
        ]
    )
    check_flags(["bench.py", "--nostreaming", "--nodistributed", "--config=configs/x.py"])
    check_flags(
        [f"--config.{name}=1" for name in SCHEMA]
        + ["--config.train={}", "--noconfig.machine.remat"]
    )


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("train.batch_size", 0, "config.train.batch_size = 0: must be a whole number, at least 1"),
        ("train.batch_size", 3.5, "config.train.batch_size = 3.5: must be a whole number, at least 1"),
        ("train.batch_size", True, "config.train.batch_size = True: must be a whole number, at least 1"),
        ("train.batch_size", "3", "config.train.batch_size = '3': must be a whole number, at least 1"),
        ("train.learning_rate", 0.0, "config.train.learning_rate = 0.0: must be a number, above 0"),
        ("train.learning_rate", float("nan"), "config.train.learning_rate = nan: must be a number, above 0"),
        ("train.clip", float("inf"), "config.train.clip = inf: must be a number, above 0"),
        ("machine.dropout", 1.0, "config.machine.dropout = 1.0: must be a number, from 0 to just below 1"),
        ("rehearsal.mask_ratio", 1.1, "config.rehearsal.mask_ratio = 1.1: must be a number, from 0 to 1"),
        ("machine.kind", "gur", "config.machine.kind = 'gur': must be a string, one of rehearsal, continual, gru"),
        ("machine.remat", 1, "config.machine.remat = 1: must be True or False"),
        ("data.dir", None, "config.data.dir = None: must be a string"),
        ("machine.heads", 5, "config.machine.heads = 5 must divide config.machine.dim = 64"),
        ("teacher.share_items, teacher.dim", (True, 8), "teacher.dim = 8 to be machine.dim = 64"),
        ("teacher.share_items, data.vectors", (True, "glove.txt"), "there is no table to share"),
        ("teacher.share_items, data.name", (True, "activitynet"), "there is no table to share"),
        ("teacher.share_items, train.start_from", (True, "runs/a"), "set config.teacher.dir to the teacher"),
        ("machine.kind, machine.subspaces", ("continual", 5), "config.machine.subspaces = 5 must divide"),
        ("machine.kind, machine.item_dim", ("continual", 6), "heads = 4 must divide config.machine.item_dim = 6"),
        ("data.name, machine.heads, machine.dim", ("babi", 5, 65), "config.machine.dim = 65 must be even"),
        ("data.simulated.clicks_min", 2000, "must be at most config.data.simulated.clicks_max = 1000"),
        ("data.movielens.test_fraction", 0.9, "test_fraction + valid_fraction must be below 1"),
        ("seed", 2**32, "config.seed = 4294967296: must be a whole number, from 0 to 4294967295"),
        ("data.seed", 2**63, "config.data.seed = 9223372036854775808: must be a whole number, from 0 to"),
        ("data.simulated.world_seed", -1, "config.data.simulated.world_seed = -1: must be a whole number, from 0 to"),
        ("data.dir", "gs://b/x", "config.data.dir=gs://b/x is an address, and only folders of this machine"),
        ("data.text.tokenizer", "hf://gpt2", "config.data.text.tokenizer=hf://gpt2 is an address"),
        ("train.start_from", "runs/lr[1]", "config.train.start_from=runs/lr[1] has '[' in its whole path"),
        ("train.model_devices", 2, "config.train.model_devices = 2 needs config.train.mapping = 'mesh'"),
        ("data.name, model.kind, model.layers", ("hyperpartisan", "memoria_bert", 1), "layers = 1: two are needed"),
        ("data.name, model.kind, memoria.layer", ("hyperpartisan", "memoria_bert", 99), "memoria.layer = 99: must be"),
        ("train.eval_batch_size", 3, None),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_its_range(name, value, words):
    if words is None:
        return validate(changed(name, value))
    with pytest.raises(ValueError) as error:
        validate(changed(name, value))
    assert words in str(error.value)
    return None


def test_a_missing_key_is_named():
    config = base()
    del config.train["clip"]
    with pytest.raises(ValueError, match="config.train.clip: missing; its default is 5.0"):
        validate(config)


def test_an_int_will_do_for_a_float():
    validate(changed("train.clip", 5))


def test_options_combine():
    assert options(None, ["long", "local"]) == options("", ["long", "local"]) == frozenset()
    assert options("long,local", ["long", "local"]) == {"long", "local"}
    with pytest.raises(
        flags.Error, match="config option 'lcal': no such option; there are long, local"
    ):
        options("long,lcal", ["long", "local"])


MAIN = """
import sys
from absl import app
from ml_collections import config_flags
from rmjax import config
from absl import flags
CONFIG = config_flags.DEFINE_config_file("config", None, "The card.")
flags.DEFINE_integer("count", 1, "")
if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    config.check_flags(sys.argv)
    run = lambda _: print(CONFIG.value.train.batch_size, CONFIG.value.train.steps)
    app.run(run, flags_parser=config.parse_flags)
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
        (
            ["--config={card}", "--config.train.bach_size=3"],
            "did you mean config.train.batch_size?",
        ),
        (["--config={card}:lcal"], "config option 'lcal': no such option; there are local"),
        (
            ["--config={card}", "--config.train.batch_size=many"],
            "config.train.batch_size = 'many': must be a whole number",
        ),
        (
            ["--config={card}", "--config.train.steps=1e3"],
            "config.train.steps = '1e3': must be a whole number, at",
        ),
        (
            ["--config={card}", "--config.train.clip", "=", "5"],
            "config.train.clip = '=': must be a number, above 0",
        ),
        (
            ["--config={card}", "--config.machine.remat=maybe"],
            "config.machine.remat = 'maybe': must be True or False",
        ),
        (
            ["--config={card}", "--steps=3"],
            "--steps: no such flag; did you mean --config.probe.steps or --config.",
        ),
        (
            ["--config={card}", "--count=x"],
            "flag --count=x: must be a whole number; --help shows all flags",
        ),
        (["--config={card}", "--confg=3"], "--confg: no such flag; did you mean --config?"),
        (
            ["--config={card}", "train"],
            "unexpected arguments: train; options are flags, such as --mode=eval",
        ),
        ([], "--config is missing: The card."),
    ],
)
def test_the_command_line_answers_in_words(tmp_path, arguments, words):
    (tmp_path / "main.py").write_text(MAIN)
    (tmp_path / "card.py").write_text(CARD)
    arguments = [argument.format(card=tmp_path / "card.py") for argument in arguments]
    root = config_lib.__file__.rsplit("/rmjax/", 1)[0]
    command = [sys.executable, str(tmp_path / "main.py"), *arguments]
    done = subprocess.run(
        command, capture_output=True, text=True, env={"PYTHONPATH": root}, check=False
    )
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


BROKEN = {  # what a card holds -> the words for it
    "x = 3": "card.py: AttributeError: module 'config_config' has no attribute 'get_config': mend it",
    "def get_config(arg=''): retun 3": "card.py, line 1: SyntaxError: invalid syntax: mend it",
    "x = 3\nimport no_such_module": "card.py, line 2: ModuleNotFoundError: No module named 'no_such_module': mend it",
    "def get_config(arg=''): return int('many')": "card.py, line 1: ValueError: invalid literal for int() with base",
    "def get_config(): return 3": "card.py: TypeError: get_config() takes 0 positional arguments but 1 was given: mend",
}  # fmt: skip


def parsed(path) -> str:
    """What `parse_flags` says of a card."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "The card.", flag_values=values)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(flags, "FLAGS", values)
        config_lib.parse_flags(["main.py", f"--config={path}"])
    return str(end.value)


@pytest.mark.parametrize("card", BROKEN)
def test_a_broken_card_is_answered_with_its_line(tmp_path, card):
    (tmp_path / "card.py").write_text(card)
    assert BROKEN[card] in parsed(f"{tmp_path}/card.py:local")


def test_a_path_that_is_no_card_is_answered_with_the_cards(tmp_path):
    (tmp_path / "xlong.py").touch()
    (tmp_path / "config.json").touch()
    assert (
        parsed(tmp_path / "xlng.py")
        == f"--config={tmp_path}/xlng.py: no such file; did you mean {tmp_path}/xlong.py?"
    )
    (tmp_path / "synthetic.py").touch()
    assert f"did you mean {tmp_path}/xlong.py?" in parsed(tmp_path / "xlongg.py")
    (tmp_path / "synthetic.py").unlink()
    assert parsed(tmp_path) == f"--config={tmp_path}: a folder; there are {tmp_path}/xlong.py"
    assert parsed(tmp_path / "config.json").endswith(
        f"no card, which is a .py file; there are {tmp_path}/xlong.py"
    )
    assert parsed(tmp_path / "no" / "xlong.py").endswith(
        "no such file; cards are in the folder configs of a clone of rmjax: go there, or give the path"
    )


def test_a_misspelt_key_in_a_flagfile_is_found_too(tmp_path):
    (tmp_path / "flags").write_text("--config.sed=1\n")
    with pytest.raises(SystemExit, match="config.seed"):
        check_flags(["main.py", f"--flagfile={tmp_path / 'flags'}"])


def test_recorder_remembers_what_was_read():
    config = Recorder(base())
    train = config.train
    assert config.read == set()
    assert train.steps == 2000 and config["data"]["movielens"].every == 10 and config.seed == 0
    assert config.read == {"train.steps", "data.movielens.every", "seed"}
    with pytest.raises(AttributeError):
        train.bach_size  # noqa: B018


def test_every_key_that_names_a_path_is_checked_before_anything_is_made():
    named = re.compile(r"folder|workdir|file of|where .* (are|go)|path|tokenizer\.json")
    for name, field in SCHEMA.items():
        if isinstance(field.default, str) and named.search(field.doc):
            with pytest.raises(ValueError, match=f"config.{name}=s3://b/x is an address"):
                validate(changed(name, "s3://b/x"))


def test_no_two_seeds_draw_alike():
    seeds = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    assert all(SCHEMA["seed"].check.holds(seed) for seed in seeds)
    keys = {tuple(jax.random.key_data(jax.random.key(seed)).tolist()) for seed in seeds}
    assert len(keys) == len(seeds)


@pytest.mark.parametrize("flag", ["--help", "-h", "--helpshort", "-help"])
def test_help_shows_every_key_and_is_no_mistake(flag, capsys):
    with pytest.raises(SystemExit) as end:
        check_flags(["main.py", flag])
    shown = capsys.readouterr().out
    assert not end.value.code
    assert all(f"--config.{name}: " in shown for name in SCHEMA)
    assert (
        "--config.train.clip: largest norm of the gradient (a number, above 0; default 5.0)"
        in shown
    )
