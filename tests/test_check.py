"""Verify a run directory: what is good, what is damaged, what is none."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt2_jax import check, cli, model
from gpt2_jax.check import check_run
from gpt2_jax.checkpoint import Checkpoints, DamagedError
from gpt2_jax.config import (
    CheckpointConfig,
    Config,
    ConfigError,
    DataConfig,
    EvaluateConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
)
from gpt2_jax.convert import convert
from gpt2_jax.digest import state_digest
from gpt2_jax.pretrained import GPT2
from gpt2_jax.step import make_program, settle
from gpt2_jax.tokenizer import load_tokenizer
from gpt2_jax.tokenizer_files import ALPHABET
from gpt2_jax.train import train

SHAPE = ModelConfig(
    n_vocab=257, n_ctx=16, n_embd=16, n_layer=1, n_head=2, vocab_multiple=8
)


def small_config(folder: Path) -> Config:
    source = folder / "text.txt"
    source.write_text("".join(f"{n} green bottles on the wall,\n" for n in range(200)))
    return Config(
        run_dir=str(folder / "run"),
        model=SHAPE,
        data=DataConfig(source=(str(source),), tokenizer="bytes"),
        optimizer=OptimizerConfig(warmup_steps=1),
        train=TrainConfig(steps=4, batch_tokens=8 * 16),
        evaluate=EvaluateConfig(samples=0),
        checkpoint=CheckpointConfig(interval=2),
        log=LogConfig(interval=1),
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Config:
    config = small_config(tmp_path_factory.mktemp("check"))
    train(config, say=lambda line: None)
    return config


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """Return a copy of a run with steps 2 and 4."""
    return Path(shutil.copytree(trained.run_dir, tmp_path / "run"))


def silent(line: str) -> None:
    pass


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def empty_arrays(step_directory: Path) -> None:
    for path in step_directory.rglob("d/*"):
        path.write_bytes(b"")


def problems(run: Path) -> dict[str, str]:
    """Return name -> problem of all that is not good."""
    report = check_run(run, say=silent)
    found = {f"step {s.step}": s.problem for s in report.steps if not s.ok}
    found |= {part.name: part.problem for part in report.parts if part.problem}
    assert report.good == (not found)
    if found:
        assert all(name in report.remedy() for name in found)
    return {name: problem or "" for name, problem in found.items()}


def test_a_good_run_is_told_step_by_step_and_left_alone(run, trained, capsys):
    before = contents(run)
    assert cli.run(["check", str(run)]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert contents(run) == before and printed.err == ""
    assert [line.rsplit(" ", 1)[0] for line in lines[:2]] == [
        "step 2  ok  sha256",
        "step 4  ok  sha256",
    ]
    assert lines[2:] == ["config.json  ok", "metrics.jsonl  ok", "data  ok"]
    config, mesh, _ = settle(trained, jax.devices())
    target = make_program(config, mesh).abstract_state
    with Checkpoints(run / "checkpoints", interval=1, keep=9, keep_every=0) as saved:
        found = saved.restore(4, target.params, target.opt_state)
    assert lines[1].endswith(state_digest(4, found.params, found.opt_state))


def test_json_is_one_object_on_stdout_alone(run, capsys):
    assert cli.run(["check", str(run), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    keys = "run steps config metrics tokenizer data converted_from good newest_good"
    assert list(found) == keys.split()
    assert (found["run"], found["good"], found["newest_good"]) == (str(run), True, 4)
    assert [list(step) for step in found["steps"]] == [
        ["step", "ok", "sha256", "problem"]
    ] * 2
    assert found["data"] == {"ok": True, "problem": None}
    assert found["tokenizer"] is None and found["converted_from"] is None


def test_a_damaged_step_is_named_and_the_status_is_2(run, capsys):
    empty_arrays(run / "checkpoints/4")
    before = contents(run)
    assert cli.run(["check", str(run), "--json"]) == 2
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert contents(run) == before
    assert (found["good"], found["newest_good"]) == (False, 2)
    assert [step["ok"] for step in found["steps"]] == [True, False]
    assert found["steps"][1]["sha256"] is None and found["steps"][1]["problem"]
    last = printed.err.splitlines()[-1]
    assert (
        last.startswith("error: ") and "step 4; the newest good checkpoint is" in last
    )


def test_all_damaged_says_what_is_left_to_do(run, capsys):
    empty_arrays(run / "checkpoints/2")
    shutil.rmtree(run / "checkpoints/4")
    (run / "checkpoints/4").mkdir()
    assert cli.run(["check", str(run)]) == 2
    assert "no checkpoint is good: begin again in another" in capsys.readouterr().err


def change_config(run):
    path = run / "config.json"
    path.write_text(path.read_text().replace('"n_embd": 16', '"n_embd": 17'))


def swap_records(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:1] + lines[2:3] + lines[1:2] + lines[3:]))


def cut_records(run):
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"step": 4' not in line))


def change_token(run):
    path = run / "data/val_00000.bin"
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)


def other_data(run):
    path = run / "data/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["fingerprint"] = "0" * 64
    path.write_text(json.dumps(manifest))


def newer_format(run):
    """Seal a meta of a later version."""
    from gpt2_jax import checkpoint

    path = run / "checkpoints/4/meta/metadata"
    meta = json.loads(path.read_text())["meta"] | {"format_version": 9}
    path.write_text(json.dumps(checkpoint._seal(meta)))


@pytest.mark.parametrize(
    ("damage", "name", "wanted"),
    [
        (change_config, "config.json", "model.n_head is 2; allowed: a divisor of"),
        (lambda run: (run / "config.json").write_text("{"), "config.json", "no config"),
        (
            lambda run: (run / "config.json").write_text("[]"),
            "config.json",
            "it is 'list'",
        ),
        (lambda run: (run / "config.json").unlink(), "config.json", "No such file"),
        (swap_records, "metrics.jsonl", "has step 2 after step 3"),
        (cut_records, "metrics.jsonl", "ends at step 3; written was step 4"),
        (
            lambda run: (run / "metrics.jsonl").write_text("{}\nx\n"),
            "metrics.jsonl",
            "line 2 is 'x'",
        ),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl", "No such file"),
        (change_token, "data", "val_00000.bin has sha256"),
        (other_data, "data", "has fingerprint .*; the run is on"),
        (
            lambda run: (run / "data/manifest.json").unlink(),
            "data",
            "holds no manifest",
        ),
        (newer_format, "step 4", "has format version 9, this gpt2_jax reads up to 1"),
        (
            lambda run: (run / "checkpoints/2/meta/metadata").write_text("{}"),
            "step 2",
            "SHA-256",
        ),
    ],
)
def test_each_damage_is_named_alone(run, damage, name, wanted):
    damage(run)
    found = problems(run)
    assert set(found) == {name}
    assert re.search(wanted, found[name]), found


def test_a_torn_last_record_is_no_damage(run):
    """A run that was killed leaves one; the next session writes it again."""
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "train_')
    assert problems(run) == {}


def test_a_tokenizer_of_its_own_is_compared(tmp_path):
    config = small_config(tmp_path)
    letters = {c: i for i, c in enumerate(ALPHABET)}
    vocabulary = {"<|endoftext|>": 256, "ee": 257, **letters}
    folder = tmp_path / "own"
    shape = ModelConfig(**{**vars(SHAPE), "n_vocab": 258})
    GPT2(shape, model.init(shape, jax.random.key(0)), None).save(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\ne e\n")
    how = TrainConfig(steps=1, batch_tokens=8 * 16, init_from=str(folder))
    train(Config(**{**vars(config), "train": how}), say=silent)
    run = Path(config.run_dir)
    assert problems(run) == {}
    assert "tokenizer" in {part.name for part in check_run(run, say=silent).parts}
    path = run / "tokenizer/merges.txt"
    path.write_text(path.read_text().replace("e e", "g r"))
    for name in ("tokenizer.json", "vocab.json"):
        there = run / "tokenizer" / name
        if there.is_file():
            there.write_text(there.read_text().replace('"ee"', '"gr"'))
    assert "tokenizer" in problems(run)


def test_a_converted_model_is_verified_and_called_one(tmp_path, capsys):
    GPT2(SHAPE, model.init(SHAPE, jax.random.key(0)), load_tokenizer("bytes")).save(
        tmp_path / "hf"
    )
    convert(str(tmp_path / "hf"), tmp_path / "run", to="gpt2_jax", say=silent)
    assert cli.run(["check", str(tmp_path / "run")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 0  ok  sha256 ")
    assert lines[-1].endswith("hf: parameters alone, no run to resume")
    with pytest.raises(ConfigError, match="no run directory: it holds no checkpoints/"):
        check_run(tmp_path / "hf", say=silent)


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda run: run.write_text(""), "is a file; allowed: a directory that"),
        (lambda run: run.mkdir(), "is no run directory: it holds no checkpoints/"),
        (
            lambda run: (run / "checkpoints").mkdir(parents=True),
            "holds no checkpoint; its metrics.jsonl ends at step 0",
        ),
        (
            lambda run: (run / "checkpoints/5.damaged").mkdir(parents=True),
            "holds no checkpoint; all of them were damaged and set aside: 5.damaged",
        ),
        (
            lambda run: (run / "checkpoints/5.orbax-checkpoint-tmp").mkdir(
                parents=True
            ),
            "holds no checkpoint",
        ),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path, capsys, make, wanted):
    make(tmp_path / "run")
    assert cli.run(["check", str(tmp_path / "run"), "--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and wanted in printed.err


def test_a_run_without_a_checkpoint_says_how_far_it_came(run):
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(ConfigError, match="holds no checkpoint; .* ends at step 4"):
        check_run(run, say=silent)


def test_a_step_deleted_while_it_is_read_is_left_out(run, monkeypatch):
    original = check.verify

    def slow(directory, step):
        if step == 2:
            shutil.rmtree(directory / "2")
            raise DamagedError("gone")
        return original(directory, step)

    monkeypatch.setattr(check, "verify", slow)
    report = check_run(run, say=silent)
    assert [step.step for step in report.steps] == [4] and report.good


SAVER = """
import sys
from pathlib import Path
import jax
from gpt2_jax.checkpoint import Checkpoints

state = {"w": jax.numpy.ones((256, 256))}, {"n": jax.numpy.ones(1)}
meta = {"config": {"log": {"interval": 1000}}}
with Checkpoints(Path(sys.argv[1]), interval=1, keep=2, keep_every=0) as checkpoints:
    for step in range(1, 10_000):
        checkpoints.save(step, *state, meta)
        if step == 3:
            print("go", flush=True)
"""


def test_it_reads_while_a_run_saves(run):
    shutil.rmtree(run / "checkpoints")
    command = [sys.executable, "-c", SAVER, str(run / "checkpoints")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as saver:
        try:
            assert saver.stdout is not None and saver.stdout.readline() == "go\n"
            reports = [check_run(run, say=silent) for _ in range(6)]
            assert saver.poll() is None
        finally:
            saver.kill()
    assert all(step.ok for report in reports for step in report.steps)
    newest = [report.newest_good for report in reports if report.newest_good]
    assert newest == sorted(newest) and len(set(newest)) > 1


def test_the_digest_is_of_the_state_alone(tmp_path):
    """Runs with other names, times and texts beside the arrays have the same one."""
    found = []
    for name in ("one", "two"):
        directory = tmp_path / name / "checkpoints"
        meta = {"config": {"log": {"interval": 9}}, "data": name}
        with Checkpoints(directory, interval=1, keep=1, keep_every=0) as checkpoints:
            state = {"w": jnp.arange(6.0)}, {"mu": np.ones(3, np.float32)}
            checkpoints.save(3, *jax.device_put(state), meta)
        found.append(check_run(tmp_path / name, say=silent).steps[0].sha256)
    assert found[0] == found[1] == state_digest(3, *state)
