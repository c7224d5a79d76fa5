"""The whole main path on a small text: train, stop, resume, finish, refuse."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from quick import xla_flags

from gpt2_jax import lock, model
from gpt2_jax import train as program
from gpt2_jax.checkpoint import CheckpointError, Checkpoints
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
    to_dict,
)
from gpt2_jax.convert import convert
from gpt2_jax.measure import Measures
from gpt2_jax.metrics import read_metrics
from gpt2_jax.pretrained import GPT2, load
from gpt2_jax.report import TrainingError
from gpt2_jax.tokenizer import load_tokenizer
from gpt2_jax.tokenizer_files import ALPHABET
from gpt2_jax.train import train

TEXT = "".join(f"{n} green bottles hanging on the wall,\n" for n in range(300))
SHAPE = ModelConfig(
    n_vocab=257,
    n_ctx=16,
    n_embd=16,
    n_layer=2,
    n_head=2,
    vocab_multiple=8,
    embd_pdrop=0.1,
    attn_pdrop=0.1,
    resid_pdrop=0.1,
)


@pytest.fixture
def config(tmp_path) -> Config:
    source = tmp_path / "text.txt"
    source.write_text(TEXT)
    return Config(
        run_dir=str(tmp_path / "run"),
        model=SHAPE,
        data=DataConfig(source=(str(source),), tokenizer="bytes"),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        train=TrainConfig(steps=12, batch_tokens=8 * 16),
        evaluate=EvaluateConfig(interval=6, samples=2, sample_tokens=8),
        checkpoint=CheckpointConfig(interval=4),
        log=LogConfig(interval=1),
    )


def parameters(run_dir: str):
    return jax.device_get(load(run_dir).params)


def assert_same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_a_long_wait_for_data_is_told_once(config, monkeypatch, capsys):
    read = program.train_batches

    def slow(*args, **how):
        for index, batch in enumerate(read(*args, **how)):
            time.sleep(1.0 if index == 2 else 0.0)
            yield batch

    monkeypatch.setattr(program, "train_batches", slow)
    monkeypatch.setattr(program, "SLOW_SECONDS", 0.9)
    assert train(config, say=lambda line: None).done
    told = capsys.readouterr().err
    assert told == (
        "process 0 waited 1 s for the batch of step 3; put the data on a faster disk "
        "or raise --data.prefetch\n"
    )


def test_a_run_leaves_what_it_promises(config):
    lines = []
    outcome = train(config, say=lines.append)
    assert outcome.done and outcome.step == 12
    run_dir = Path(config.run_dir)
    records = read_metrics(run_dir / "metrics.jsonl")
    done, samples = records.pop(), records.pop()
    keys = "event step val_loss val_bits_per_byte gzip_bits_per_byte xz_bits_per_byte"
    assert set(keys.split()) | {"train_seconds"} == set(done)
    assert done["event"] == "done" and done["step"] == 12
    # 1 token is 1 byte here, but for <|endoftext|>, which the bits must pay too.
    assert done["val_bits_per_byte"] >= done["val_loss"] / np.log(2)
    assert done["val_bits_per_byte"] == pytest.approx(
        done["val_loss"] / np.log(2), rel=1e-2
    )
    for record in records:
        assert {"step", "tokens_per_second"} <= set(record)
        assert ("train_loss" in record) != ("val_loss" in record)
    assert samples == dict(
        event="samples",
        step=12,
        samples_bytes=(run_dir / "samples.txt").stat().st_size,
    )
    assert [r["step"] for r in records if "train_loss" in r] == list(range(1, 13))
    assert records[-1]["val_loss"] < records[0]["train_loss"] - 0.5
    assert (run_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (run_dir / "samples.txt").read_text().count("--- step 12") == 2
    assert json.loads((run_dir / "config.json").read_text())["train"]["steps"] == 12
    assert "gpt2-jax generate" in lines[-1] and "gzip -9" in lines[-1]


def test_zero_shot_tasks_are_run_on_the_way(config, tmp_path):
    (tmp_path / "text8").write_text("green bottles hanging on the wall " * 4)
    where = dict(tasks_dir=str(tmp_path), tasks_any_data=True)
    how = dict(tasks="text8,ptb", tasks_interval=4, **where)
    asked = dataclasses.replace(config.evaluate, **how)
    lines = []
    train(dataclasses.replace(config, evaluate=asked), say=lines.append)
    found = [
        (record["step"], record["zero_shot/text8"])
        for record in read_metrics(Path(config.run_dir) / "metrics.jsonl")
        if "zero_shot/text8" in record
    ]
    assert [step for step, _ in found] == [4, 8, 12] and found[-1][1] < found[0][1]
    assert any("ptb (not run: put ptb.test.txt" in line for line in lines)


def test_an_unknown_zero_shot_task_is_refused_at_the_door(config):
    asked = dataclasses.replace(config.evaluate, tasks="txt8")
    with pytest.raises(ConfigError, match="no 'txt8'; did you mean 'text8'"):
        train(dataclasses.replace(config, evaluate=asked))


def test_a_finished_run_is_not_trained_again(config):
    train(config)
    before = parameters(config.run_dir)
    lines = []
    assert train(config, say=lines.append).done
    assert any("resumed" in line and "step 12" in line for line in lines)
    assert not any(line.startswith("step  1/") for line in lines)
    assert_same_bits(before, parameters(config.run_dir))


WORKER = """
import json, sys
from gpt2_jax.config import from_dict
from gpt2_jax.train import train
def say(line):
    print(line, flush=True)
train(from_dict(json.load(open(sys.argv[1]))), say=say)
"""


def start(config: Config, tmp_path: Path) -> subprocess.Popen:
    file = tmp_path / "config_for_worker.json"
    file.write_text(json.dumps(to_dict(config)))
    command = [sys.executable, "-c", WORKER, str(file)]
    environment = os.environ | {"XLA_FLAGS": xla_flags(1), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=environment,
    )  # fmt: skip


def wait_for(worker: subprocess.Popen, text: str) -> list[str]:
    lines = []
    for line in worker.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError("".join(lines))


def run_out(config: Config, tmp_path: Path) -> str:
    output, _ = start(config, tmp_path).communicate(timeout=240)
    return output


@pytest.mark.slow
def test_killed_and_resumed_equals_left_alone_bit_for_bit(config, tmp_path):
    """SIGKILL at a step after the first save, dropout on, in a real process."""
    steps = dataclasses.replace(config.train, steps=40)
    config = dataclasses.replace(config, train=steps)
    alone = dataclasses.replace(config, run_dir=str(tmp_path / "alone"))
    run_out(alone, tmp_path)
    for at in ("step  7/40", "step 23/40"):
        worker = start(config, tmp_path)
        wait_for(worker, at)
        worker.send_signal(signal.SIGKILL)
        worker.communicate()
        assert worker.returncode == -signal.SIGKILL
    output = run_out(config, tmp_path)
    assert "resumed" in output
    assert_same_bits(parameters(alone.run_dir), parameters(config.run_dir))
    losses = [
        [r["train_loss"] for r in read_metrics(Path(run_dir) / "metrics.jsonl")
         if "train_loss" in r]
        for run_dir in (alone.run_dir, config.run_dir)
    ]  # fmt: skip
    assert losses[0] == losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_current_step(config, tmp_path, number):
    steps = dataclasses.replace(config.train, steps=100_000)
    rare = CheckpointConfig(interval=100_000)
    config = dataclasses.replace(config, train=steps, checkpoint=rare)
    worker = start(config, tmp_path)
    wait_for(worker, "step     20/100000")
    worker.send_signal(number)
    output, _ = worker.communicate(timeout=60)
    stopped = int(output.split("stopped at step ")[1].split(";")[0])
    assert worker.returncode == 0 and stopped >= 20  # the library tells its caller
    saved = [int(p.name) for p in Path(config.run_dir, "checkpoints").iterdir()]
    assert saved == [stopped]


def told(run_dir: str) -> list[dict]:
    """Return the log without what the clock decides."""
    clocks = ("tokens_per_second", "seconds", "train_seconds", "mfu")
    return [
        {name: value for name, value in record.items() if name not in clocks}
        for record in read_metrics(Path(run_dir) / "metrics.jsonl")
    ]


@pytest.mark.parametrize("phase", ["save", "_loss", "_samples", "zero_shot"])
def test_an_interrupted_run_leaves_what_one_left_alone_does(config, monkeypatch, phase):
    """Stop in every call of a phase, while the run finishes too."""
    often = dict(sample_interval=4, tasks_interval=6)
    every = dataclasses.replace(config.evaluate, **often)
    config = dataclasses.replace(config, evaluate=every)
    alone = dataclasses.replace(config, run_dir=config.run_dir + "_alone")
    assert train(alone).done
    owner = Checkpoints if phase == "save" else Measures
    original, seen = getattr(owner, phase), set()

    def signalled(self, step, *others):
        if step not in seen:
            seen.add(step)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, step, *others)

    monkeypatch.setattr(owner, phase, signalled)
    steps = [train(config).step for _ in range(8)]
    times = {"save": 3, "_loss": 2, "_samples": 3, "zero_shot": 2}[phase]
    assert steps == sorted(seen) + [12] * (8 - times)
    assert len(seen) == times and max(seen) == 12
    assert_same_bits(parameters(alone.run_dir), parameters(config.run_dir))
    assert told(alone.run_dir) == told(config.run_dir)
    texts = [Path(c.run_dir, "samples.txt").read_text() for c in (alone, config)]
    assert texts[0] == texts[1]


def test_a_directory_that_another_process_trains_in_is_refused(config):
    train(config)
    before = sorted(Path(config.run_dir).rglob("*"))
    with (
        lock.hold(Path(config.run_dir)),
        pytest.raises(ConfigError, match="is in use by process .+; wait until it ends"),
    ):
        train(config)
    assert sorted(Path(config.run_dir).rglob("*")) == before


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(config):
    train(config)
    shutil.rmtree(Path(config.run_dir, "checkpoints"))
    before = sorted(Path(config.run_dir).rglob("*"))
    with pytest.raises(ConfigError, match="no checkpoint, but .+ goes to step 12: br"):
        train(config)
    rare = dataclasses.replace(config, checkpoint=CheckpointConfig(interval=1000))
    with pytest.raises(ConfigError, match="no checkpoint, but"):
        train(rare)  # what counts is what was asked when it was made
    after = [p for p in Path(config.run_dir).rglob("*") if p.name != "checkpoints"]
    assert sorted(after) == before
    Path(config.run_dir, "config.json").write_text("{")
    with pytest.raises(ConfigError, match="config.json is no config: .+; restore the"):
        train(config)


def test_more_steps_go_on_from_the_end(config):
    train(config)
    longer = dataclasses.replace(config.train, steps=14)
    lines = []
    outcome = train(dataclasses.replace(config, train=longer), say=lines.append)
    assert outcome.step == 14
    assert any("train.steps 12 -> 14" in line for line in lines)


def test_fewer_steps_than_were_taken_are_refused(config):
    train(config)
    shorter = dataclasses.replace(config.train, steps=8)
    with pytest.raises(ConfigError, match=r"train.steps is 8; allowed: >= 12"):
        train(dataclasses.replace(config, train=shorter))


def test_a_prompt_that_fills_the_context_is_refused_at_the_door(config):
    prompted = dataclasses.replace(config.evaluate, prompt="a" * 16)
    with pytest.raises(ConfigError, match=r"evaluate.prompt is 'aaaa"):
        train(dataclasses.replace(config, evaluate=prompted))
    assert not Path(config.run_dir, "checkpoints").exists()


@pytest.mark.parametrize(
    ("group", "field", "value", "message"),
    [
        ("data", "val_fraction", 0.2, r"data.val_fraction 0.1 -> 0.2"),
        ("data", "source", ("other.txt",), r"data.source \[.*\] -> \['other.txt'\]"),
        ("model", "n_embd", 32, r"model.n_embd 16 -> 32"),
        ("optimizer", "learning_rate", 2e-2, r"optimizer.learning_rate 0.01 -> 0.02"),
        ("data", "seed", 3, r"data.seed 0 -> 3"),
        ("train", "seed", 3, r"train.seed 0 -> 3"),
    ],
)
def test_a_directory_of_another_run_is_refused(config, group, field, value, message):
    train(config)
    changed = dataclasses.replace(getattr(config, group), **{field: value})
    other = dataclasses.replace(config, **{group: changed})
    with pytest.raises(ConfigError, match=message + r".*--run-dir"):
        train(other)


def test_a_model_of_another_vocabulary_is_refused(config):
    shape = dataclasses.replace(config.model, n_vocab=300)
    with pytest.raises(ConfigError, match=r"n_vocab is 300.*257.*--model.n-vocab 257"):
        train(dataclasses.replace(config, model=shape))


@pytest.mark.parametrize(
    ("text", "found"),
    [(b"", r"text.txt"), (b"ab" * 8, r"n_ctx"), (b"ab\xff\xfecd" * 50, r"text.txt.*2")],
    ids=["empty", "short", "binary"],
)
def test_a_source_that_cannot_be_used_is_refused(config, text, found):
    Path(config.data.source[0]).write_bytes(text)
    with pytest.raises(ConfigError, match=found):
        train(config)


def test_a_refused_run_leaves_no_directory_behind(config):
    missing = dataclasses.replace(config.data, source=("absent.txt",))
    config = dataclasses.replace(config, data=missing)
    for _ in range(2):
        with pytest.raises(ConfigError, match="absent.txt"):
            train(config)
        assert not Path(config.run_dir).exists()
    Path(config.run_dir).mkdir()
    with pytest.raises(ConfigError, match="absent.txt"):
        train(config)
    assert Path(config.run_dir).exists()  # it was there before


def test_a_missing_source_is_refused(config):
    data = dataclasses.replace(config.data, source=("no/such/file.txt",))
    with pytest.raises(ConfigError, match=r"no/such/file.txt"):
        train(dataclasses.replace(config, data=data))


def test_a_run_directory_that_is_a_file_is_refused(config, tmp_path):
    (tmp_path / "taken").write_text("")
    taken = str(tmp_path / "taken" / "run")
    with pytest.raises(ConfigError, match=r"run_dir cannot be written.*--run-dir"):
        train(dataclasses.replace(config, run_dir=taken))


def test_a_loss_that_is_never_finite_stops_the_run(config, monkeypatch):
    original = model.init

    def broken(shape, key):
        return jax.tree.map(lambda x: x * np.float32(np.nan), original(shape, key))

    monkeypatch.setattr(model, "init", broken)
    few = dataclasses.replace(config.train, max_bad_steps=3)
    lines = []
    with pytest.raises(TrainingError, match=r"3 steps in a row.*sequences 16 to 23"):
        train(dataclasses.replace(config, train=few), say=lines.append)
    assert sum("update skipped" in line for line in lines) == 3
    assert not list(Path(config.run_dir, "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_good_checkpoint(config, tmp_path):
    """Files may not grow beyond 4 KiB from step 5 on: the save of step 8 fails."""
    train(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=4)))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
    limit += "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    file = tmp_path / "config.json"
    file.write_text(json.dumps(to_dict(config)))
    worker = subprocess.run(
        [sys.executable, "-c", limit + WORKER, str(file)],
        env=os.environ | {"XLA_FLAGS": xla_flags(1)},
        capture_output=True,
        text=True,
    )
    assert worker.returncode != 0
    assert CheckpointError.__name__ in worker.stderr, worker.stderr
    saved = Path(config.run_dir, "checkpoints")
    assert [p.name for p in saved.iterdir() if p.name.isdigit()] == ["4"]
    assert train(config).done


def test_the_step_before_is_reported_after_the_next_is_dispatched(config, monkeypatch):
    events = []
    from gpt2_jax import report

    original = report.Reporter._report

    def note(self, step, metrics):
        events.append(("report", step))
        original(self, step, metrics)

    dispatched = report.Reporter.dispatched

    def note_dispatch(self, step, metrics):
        events.append(("dispatch", step))
        dispatched(self, step, metrics)

    monkeypatch.setattr(report.Reporter, "_report", note)
    monkeypatch.setattr(report.Reporter, "dispatched", note_dispatch)
    train(config)
    assert events[:4] == [
        ("dispatch", 1),
        ("dispatch", 2),
        ("report", 1),
        ("dispatch", 3),
    ]


def test_the_clock_of_a_resumed_run_goes_on(config):
    train(config)
    before = read_metrics(Path(config.run_dir) / "metrics.jsonl")[-1]["train_seconds"]
    time.sleep(0.1)
    more = dataclasses.replace(config.train, steps=13)
    train(dataclasses.replace(config, train=more))
    after = read_metrics(Path(config.run_dir) / "metrics.jsonl")[-1]["train_seconds"]
    assert after > before


def test_bits_per_byte_compare_the_same_bytes(config, monkeypatch):
    """Of a large split only the first tokens are compressed: the rate must not move."""
    train(config)
    whole = read_metrics(Path(config.run_dir) / "metrics.jsonl")[-1]
    monkeypatch.setattr(program, "COMPARED_TOKENS", 200)
    train(config)
    part = read_metrics(Path(config.run_dir) / "metrics.jsonl")[-1]
    assert part["val_loss"] == whole["val_loss"]
    expected = pytest.approx(whole["val_bits_per_byte"], rel=1e-2)
    assert part["val_bits_per_byte"] == expected


def test_the_package_and_the_module_are_called_alike(config):
    import gpt2_jax

    assert gpt2_jax.train is program
    assert gpt2_jax.train(config).done


@pytest.fixture
def base(tmp_path) -> str:
    """Return a small model in Hugging Face layout whose context is longer."""
    shape = dataclasses.replace(SHAPE, n_ctx=32, activation_function="relu", n_head=4)
    params = model.init(shape, jax.random.key(5))
    GPT2(shape, params, load_tokenizer("bytes")).save(tmp_path / "base")
    return str(tmp_path / "base")


def fine_tuning(config: Config, name: str, **changes) -> Config:
    how = dataclasses.replace(config.train, init_from=name, **changes)
    return dataclasses.replace(config, train=how)


def test_fine_tuning_begins_with_the_weights_shape_and_tokenizer(config, base):
    frozen = dataclasses.replace(config.optimizer, learning_rate=0.0)
    tuned = fine_tuning(config, base, steps=2)
    other = dataclasses.replace(tuned.data, tokenizer="gpt2")
    lines: list[str] = []
    train(dataclasses.replace(tuned, optimizer=frozen, data=other), say=lines.append)
    found, before = load(config.run_dir), load(base)
    assert found.config.activation_function == "relu"
    assert found.config.n_ctx == 16  # the config's, shorter than the model's 32
    assert found.tokenizer.name == "bytes"
    wanted = before.params | {
        "wpe": {"embedding": before.params["wpe"]["embedding"][:16]}
    }
    assert_same_bits(found.params, wanted)
    assert any("model.n_head 2 -> 4" in line for line in lines)


def test_fine_tuning_goes_on_without_the_model_bit_for_bit(config, base, tmp_path):
    constant = dataclasses.replace(config.optimizer, schedule="constant")
    config = dataclasses.replace(config, optimizer=constant)
    whole = dataclasses.replace(config, run_dir=str(tmp_path / "whole"))
    train(fine_tuning(whole, base), say=lambda line: None)
    train(fine_tuning(config, base, steps=4), say=lambda line: None)
    shutil.rmtree(base)
    train(fine_tuning(config, base), say=lambda line: None)
    assert_same_bits(parameters(config.run_dir), parameters(whole.run_dir))


def test_fine_tuning_keeps_a_vocabulary_of_its_own(config, tmp_path):
    letters = {c: i for i, c in enumerate(ALPHABET)}
    vocabulary = {"<s>": 256, "<|endoftext|>": 257, "ee": 258, **letters}
    folder = tmp_path / "own"
    shape = dataclasses.replace(SHAPE, n_vocab=259)
    GPT2(shape, model.init(shape, jax.random.key(0)), None).save(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\ne e\n")
    mine = load(folder).tokenizer
    assert mine is not None and 258 in mine.encode("green")
    train(fine_tuning(config, str(folder), steps=2), say=lambda line: None)
    found = load(config.run_dir)
    assert found.tokenizer.fingerprint == mine.fingerprint
    moved = Path(config.run_dir).rename(tmp_path / "moved")
    assert load(moved).tokenizer.fingerprint == mine.fingerprint
    more = fine_tuning(config, str(folder), steps=3)
    shutil.rmtree(folder)
    outcome = train(
        dataclasses.replace(more, run_dir=str(moved)), say=lambda line: None
    )
    assert outcome.step == 3


def test_a_run_directory_may_be_fine_tuned(config, tmp_path):
    train(config, say=lambda line: None)
    second = dataclasses.replace(config, run_dir=str(tmp_path / "second"))
    train(fine_tuning(second, config.run_dir, steps=2), say=lambda line: None)
    records = read_metrics(tmp_path / "second" / "metrics.jsonl")
    first = next(r["train_loss"] for r in records if "train_loss" in r)
    assert first < 0.8 * np.log(257)  # far below that of random weights


def test_resuming_what_was_fine_tuned_from_another_model_is_refused(config, base):
    train(fine_tuning(config, base, steps=2), say=lambda line: None)
    with pytest.raises(ConfigError, match=r"train.init_from .*base.* -> None"):
        train(config)


def test_a_converted_model_is_not_resumed(config, base, tmp_path):
    convert(base, tmp_path / "run", to="gpt2_jax", say=lambda line: None)
    with pytest.raises(ConfigError, match="no optimizer state.*--train.init-from"):
        train(config)
