"""Configs of every kind of mistake: files, saved ones, flags of the command line.

Each is refused in one line that names file, field or flag; nothing is compiled or
written.
"""

import dataclasses
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from hostile import Outcome, check_refused, choose, run_all
from test_hostile_checkpoints import make_good

from gpt2_jax.cli import Bias, Evaluate, Features, Generate, Prepare
from gpt2_jax.config import Config

SEED = 0
START = b"from gpt2_jax.config import *\n"
FILES: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "mine.py binds `config` to NoneType; allowed: a Config"),
    "another thing": (b"config = 3", "binds `config` to int"),
    "a class": (START + b"config = Config", "binds `config` to type"),
    "a dict": (b"config = {}", "binds `config` to dict"),
    "syntax": (
        b"config = (",
        "mine.py is no config: SyntaxError: '(' was never closed",
    ),
    "tabs": (b"if 1:\n        a = 1\n\ta = 2", "TabError"),
    "not UTF-8": (b"config = '\xff'", "mine.py is no config: SyntaxError"),
    "UTF-16": ("config = 1".encode("utf-16"), "mine.py is no config: SyntaxError"),
    "another encoding": (b"# coding: nothing\nconfig = 1", "unknown encoding"),
    "NUL": (b"config = 1\0", "null bytes"),
    "a name": (b"\nconfig = Config()", "mine.py is no config: line 2 NameError"),
    "an import": (b"import nothing_such", "line 1 ModuleNotFoundError: No module"),
    "a relative import": (b"from . import base", "line 1 ImportError"),
    "an attribute": (b"import os\nos.nothing", "line 2 AttributeError"),
    "an index": (b"[][0]", "line 1 IndexError: list index out of range"),
    "a key": (b"\n\n{}['x']", "line 3 KeyError: 'x'; mend the file"),
    "a division": (b"1 / 0", "line 1 ZeroDivisionError: division by zero"),
    "an overflow": (b"2.0 ** 5000", "line 1 OverflowError"),
    "a value": (b"int('x')", "line 1 ValueError: invalid literal"),
    "lines of text": (b"raise ValueError('a\\nb\\x1b[2J')", "ValueError: a b\\x1b[2J"),
    "a long text": (b"raise ValueError('a' * 10**6)", "ValueError: aaaa"),
    "an assertion": (b"assert 0, 'mine'", "line 1 AssertionError: mine"),
    "a file": (b"open('nothing.txt')", "line 1 FileNotFoundError"),
    "exit": (b"import sys\nsys.exit(0)", "line 2 SystemExit: 0"),
    "exit with text": (b"raise SystemExit('bye')", "line 1 SystemExit: bye"),
    "stop": (b"next(iter([]))", "line 1 StopIteration"),
    "recursion": (b"def f(): f()\nf()", "line 2 RecursionError"),
    "recursion of repr": (b"a = []\na.append(a)\nint(str(a))", "line 3 ValueError"),
    "parentheses": (b"(" * 500 + b")" * 500, "SyntaxError: too many nested"),
    "a misspelt field": (START + b"config = Config(modle=1)", "argument 'modle'"),
    "a misspelt group": (
        START + b"config = Config(model=ModelConfig(n_lyer=1))",
        "lyer",
    ),
    "a group of another kind": (
        START + b"config = Config(model=DataConfig())",
        "model is",
    ),
    "a wrong type": (START + b"TrainConfig(steps='5')", "line 2 train.steps is '5'"),
    "a float": (START + b"TrainConfig(steps=5.0)", "train.steps is 5.0; allowed: int"),
    "not a number": (START + b"OptimizerConfig(grad_clip=float('nan'))", "clip is nan"),
    "infinity": (
        START + b"OptimizerConfig(learning_rate=1e400)",
        "rate is inf; allowed",
    ),
    "more than float32": (START + b"OptimizerConfig(weight_decay=1e39)", "<= 3.4e+38"),
    "an int beyond floats": (
        START + b"OptimizerConfig(beta1=10**400)",
        "beta1 is an int",
    ),
    "a huge int": (
        START + b"TrainConfig(steps=10**5000)",
        "steps is an integer of 16610",
    ),
    "more than int32": (START + b"TrainConfig(steps=2**31)", "and <= 2147483647"),
    "a huge string": (START + b"ModelConfig(dtype='x' * 10**7)", "model.dtype is 'xxx"),
    "a huge tuple": (
        START + b"DataConfig(source=(1,) * 10**7)",
        "data.source is (1, 1",
    ),
    "a deep tuple": (
        START + b"a = ()\nfor _ in range(10**5): a = (a,)\nDataConfig(source=a)",
        "data.source is (((",
    ),
    "text with NUL": (START + b"DataConfig(source=('a\\0',))", "text without NUL"),
}
# Saved beside a checkpoint as JSON, and read back by `from_dict`.
SAVED: dict[str, tuple[str, str]] = {
    "a list": ("[]", "config is []; allowed: an object"),
    "a number": ("3", "config is 3; allowed: an object"),
    "an unknown group": (
        '{"modle": {}}',
        "config has no 'modle'; did you mean 'model'?",
    ),
    "an unknown field": ('{"model": {"n_lyer": 3}}', "did you mean 'n_layer'?"),
    "a field of no letters": ('{"model": {"": 3}}', "model has no ''"),
    "a field with NUL": ('{"model": {"\\u0000": 3}}', "model has no '\\x00'"),
    "a field of 10**6 letters": (f'{{"data": {{"{"s" * 10**6}": 3}}}}', "has no 'sss"),
    "a private field": ('{"model": {"__class__": 3}}', "model has no '__class__'"),
    "a group null": ('{"model": null}', "config.model is None; allowed: an object"),
    "a group a list": ('{"model": [1]}', "config.model is [1]; allowed: an object"),
    "a field null": ('{"model": {"n_layer": null}}', "n_layer is None; allowed: int"),
    "a field a list": ('{"model": {"n_layer": [1]}}', "n_layer is (1,); allowed: int"),
    "a field an object": ('{"model": {"n_layer": {"a": 1}}}', "n_layer is {'a': 1}"),
    "a field true": ('{"train": {"steps": true}}', "train.steps is True; allowed: int"),
    "a field text": ('{"train": {"steps": "5"}}', "train.steps is '5'; allowed: int"),
    "a switch 1": ('{"data": {"verify": 1}}', "data.verify is 1; allowed: bool"),
    "a choice": ('{"optimizer": {"name": "sgd"}}', "allowed: adamw, muon"),
    "a choice a list": ('{"optimizer": {"name": [[]]}}', "optimizer.name is ([],)"),
    "not a number": ('{"train": {"spike_sigmas": NaN}}', "spike_sigmas is nan"),
    "1e400": ('{"optimizer": {"epsilon": 1e400}}', "optimizer.epsilon is inf"),
    "a huge int": (
        '{"train": {"steps": 1' + "0" * 4000 + "}}",
        "steps is an integer of",
    ),
    "900 deep": (
        '{"data": {"source": ' + "[" * 900 + "]" * 900 + "}}",
        "data.source is",
    ),
    "no source": (
        '{"data": {"source": []}}',
        "data.source is (); allowed: at least one",
    ),
    "a source a number": ('{"data": {"source": [3]}}', "data.source is (3,)"),
    "a bucket": ('{"run_dir": "gs://a/b"}', "run_dir is 'gs://a/b'; allowed: a path"),
    "a long path": (json.dumps({"run_dir": "a" * 10**6}), "run_dir is 'aaa"),
    "a context of 0": ('{"model": {"n_ctx": 0}}', "model.n_ctx is 0; allowed"),
}
# CF2: what contradicts itself, the machine or the data. The first one warms up.
CROSSED: dict[str, tuple[list[str], str]] = {
    "more devices than here": (["--mesh.data=7"], "is not the 1 device"),
    "width and heads": (["--model.n-head=5"], "model.n_head is 5; allowed: a divisor"),
    "no context": (["--model.n-ctx=0"], "model.n_ctx is 0"),
    "no vocabulary": (["--model.n-vocab=1"], "model.n_vocab is 1"),
    "negative rate": (["--optimizer.learning-rate=-1e-3"], "learning_rate is -0.001"),
    "dropout of all": (
        ["--model.embd-pdrop=1"],
        "embd_pdrop is 1.0; allowed: 0 <= rate",
    ),
    "long warm-up": (
        ["--train.steps=5", "--optimizer.warmup-steps=6"],
        "<= train.steps",
    ),
    "ragged batch": (["--train.batch-tokens=129"], "a multiple of model.n_ctx = 16"),
    "ragged chunk": (["--train.loss-chunk=3"], "0 or a divisor of model.n_ctx = 16"),
    "two free axes": (["--mesh.data=-1", "--mesh.fsdp=-1"], "at most one axis of -1"),
    "no held-out text": (["--data.val-fraction=0"], "data.val_fraction is 0.0"),
    "all text held out": (["--data.val-fraction=1"], "data.val_fraction is 1.0"),
    "another vocabulary": (["--model.n-vocab=300"], "set --model.n-vocab 257"),
    "long prompt": (["--evaluate.prompt", "a" * 99], "fewer than n_ctx tokens"),
    "unknown task": (["--evaluate.tasks=lambda_acc"], "did you mean 'lambada_acc'?"),
    "kernel of another device": (["--model.attention=cudnn"], "model.attention is"),
    "unknown tokenizer": (["--data.tokenizer=gtp2"], "did you mean 'gpt2'?"),
    "bucket": (["--run-dir=gs://a/b"], "run_dir is 'gs://a/b'"),
    "empty run directory": (["--run-dir="], "run_dir is ''"),
    "no source": (["--data.source", "absent"], "source absent does not exist"),
}
TRAIN = [
    "train",
    "shakespeare",
    "--data.source=in",
    "--run-dir=run",
    "--model.n-ctx=16",
    "--model.n-embd=16",
    "--model.n-layer=1",
    "--model.n-head=2",
    "--train.batch-tokens=128",
    "--train.steps=4",
    "--optimizer.warmup-steps=1",
]
SHORT = ["--templates={group}:", "--pairs=man/woman", "--max-new-tokens=1"]
VERBS = {
    "train": (Config, TRAIN),
    "plan": (Config, ["plan", "gpt2_124m", "--topology=v3-8"]),
    "prepare": (Prepare, ["prepare", "in", "--out=out", "--tokenizer=bytes"]),
    "generate": (Generate, ["generate", "model", "he"]),
    "features": (Features, ["features", "model", "he", "--out=f.npz"]),
    "eval": (Evaluate, ["eval", "model"]),
    "bias": (Bias, ["bias", "model", *SHORT]),
}
LATE = [("bias", flag) for flag in ("temperature", "top-k", "seed")]
WRONG = ["nan", "inf", "-1", "1e400", "five", ""]
# A negative number means something here.
SIGNED = ("mesh.data", "mesh.fsdp", "mesh.tensor", "layer", "length-penalty")


def leaves(kind: Any, prefix: str = "") -> dict[str, Any]:
    """Return flag -> type, of every flag."""
    found = {}
    for item in dataclasses.fields(kind):
        name = prefix + item.name.replace("_", "-")
        inner = dataclasses.is_dataclass(item.type)
        found |= leaves(item.type, f"{name}.") if inner else {name: item.type}
    return found


def is_numeric(kind: Any) -> bool:
    return bool({int, float} & {kind, *get_args(kind)})


def misspelt(flag: str, draw: random.Random) -> str:
    """Return the flag with one letter dropped, doubled or changed."""
    letters = [i for i, c in enumerate(flag) if c.isalpha()]
    i = draw.choice(letters)
    return flag[:i] + draw.choice(["", flag[i] * 2, "q"]) + flag[i + 1 :]


FLAGS = [(verb, flag) for verb, (kind, _) in VERBS.items() for flag in leaves(kind)]
NUMBERS = [
    (verb, flag, value)
    for verb, (kind, _) in VERBS.items()
    for flag, form in leaves(kind).items()
    for value in WRONG
    if is_numeric(form) and not (value == "-1" and flag in SIGNED)
    # The probe draws after its likelihoods, and looks at these only then.
    if (verb, flag) not in LATE or value in ("five", "")
]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a text, a model, the config files and a run directory."""
    place = tmp_path_factory.mktemp("configs") / "here"
    place.mkdir()
    (place / "in").mkdir()
    (place / "run").mkdir()  # else the run makes it before it looks at the rest
    (place / "in" / "text.txt").write_text("to be or not to be\n" * 40)
    (place / "folder.py").mkdir()
    (place / "notes.txt").write_text("to be")
    (place / "link.py").symlink_to("gone.py")
    make_good(place / "model")
    for name, (text, _) in FILES.items():
        folder = place / name.replace(" ", "_")
        folder.mkdir()
        (folder / "mine.py").write_bytes(text)
    return place


def run_in(place: Path, commands: list[list[str]]) -> list[Outcome]:
    home = place.parent / "home"
    return run_all(home, [(place, command) for command in commands])


@pytest.fixture(scope="module")
def of_files(request, place) -> dict[str, Outcome]:
    chosen = choose(request, FILES)
    files = [f"{name.replace(' ', '_')}/mine.py" for name in chosen]
    commands = [["train", file, "--run-dir=run"] for file in files]
    return dict(zip(chosen, run_in(place, commands), strict=True))


@pytest.mark.parametrize("name", FILES)
def test_a_config_file_with_a_mistake_is_refused(name, of_files):
    check_refused(of_files[name], FILES[name][1])
    assert "mine.py" in of_files[name].err


def test_what_is_no_config_file_is_refused(place):
    names = ["folder.py", "notes.txt", "link.py", "../work", "", "x" * 10**5, "a\0.py"]
    for outcome in run_in(place, [["train", name] for name in names]):
        check_refused(
            outcome, "name too long" if "xxx" in outcome.err else "no .py file"
        )


PROGRAM = """
import json, sys
from gpt2_jax.config import ConfigError, from_dict
for text in json.load(sys.stdin):
    try:
        from_dict(json.loads(text))
        print("accepted")
    except ConfigError as error:
        print(error)
    except BaseException as error:
        print("raised", type(error))
"""


@pytest.fixture(scope="module")
def of_saved() -> dict[str, str]:
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM],  # without the tests' hook, as users are
        input=json.dumps([text for text, _ in SAVED.values()]),
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(zip(SAVED, run.stdout.splitlines(), strict=True))


@pytest.mark.parametrize("name", SAVED)
def test_a_saved_config_with_a_mistake_is_refused(name, of_saved):
    assert SAVED[name][1] in of_saved[name]
    assert len(of_saved[name]) < 2000


@pytest.fixture(scope="module")
def of_crossed(request, place) -> dict[str, Outcome]:
    chosen = choose(request, CROSSED)
    commands = [TRAIN + CROSSED[name][0] for name in chosen]
    return dict(zip(chosen, run_in(place, commands), strict=True))


@pytest.mark.parametrize("name", CROSSED)
def test_what_contradicts_itself_is_refused_before_it_is_compiled(name, of_crossed):
    check_refused(of_crossed[name], CROSSED[name][1])


def test_every_flag_is_corrected_by_one_letter(place):
    draw = random.Random(SEED)
    wrong = [(verb, flag, misspelt(flag, draw)) for verb, flag in FLAGS]
    known = set(FLAGS)
    wrong = [(verb, flag, bad) for verb, flag, bad in wrong if (verb, bad) not in known]
    assert len(wrong) > len(FLAGS) - 5
    commands = [[*VERBS[verb][1], f"--{bad}=1"] for verb, _, bad in wrong]
    outcomes = run_in(place, commands)
    for (_, flag, _), outcome in zip(wrong, outcomes, strict=True):
        check_refused(outcome, f"did you mean '{flag}'?")


def check_numbers(place: Path, cases: list[tuple[str, str, str]]) -> None:
    commands = [[*VERBS[verb][1], f"--{flag}={value}"] for verb, flag, value in cases]
    for (_, flag, _), outcome in zip(cases, run_in(place, commands), strict=True):
        named = flag.replace("-", "_") in outcome.err.replace("-", "_")
        check_refused(outcome, "; allowed: " if named else f"{flag} in the message")


def test_some_numbers_that_are_none_are_refused_with_their_flag(place):
    check_numbers(place, random.Random(SEED).sample(NUMBERS, 30))


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_a_wrong_number_is_told_alike_in_any_encoding(encoding):
    command = [sys.executable, "-m", "gpt2_jax.start", "train", "--train.steps", "five"]
    environment = os.environ | {"PYTHONIOENCODING": encoding, "GLIBC_TUNABLES": ""}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    wrong = "--train.steps: invalid literal for int() with base 10: 'five'"
    assert run.stderr == f"error: {wrong}; allowed: INT\n"


@pytest.mark.faults
def test_many_numbers_that_are_none_are_refused_with_their_flag(place):
    check_numbers(place, random.Random(SEED + 1).sample(NUMBERS, len(NUMBERS) // 3))


def test_switches_take_no_value(place):
    flags = [f for f, kind in leaves(Config).items() if kind is bool]
    commands = [[*TRAIN, f"--{flag}=yes"] for flag in flags]
    commands += [[*TRAIN, f"--{flag}", "yes"] for flag in flags]
    outcomes = run_in(place, commands)
    for flag, outcome in zip(flags * 2, outcomes, strict=True):
        check_refused(outcome, f"--{flag} is 'yes'; allowed: --{flag} or --")


def test_a_misspelt_run_directory_is_corrected(place):
    names = ["modle", "./mdoel", "../here/moddel"]
    for outcome in run_in(place, [["generate", name, "he"] for name in names]):
        check_refused(outcome, "; did you mean ")
        assert "model'?" in outcome.err
