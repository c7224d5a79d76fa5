"""No damage is silent: flipped bits, files cut, emptied, gone; and what a run does."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from small_runs import contents, final_digest, left_alone, names, train

from gpt2_jax import cli
from gpt2_jax.checkpoint import CheckpointError, Checkpoints, DamagedError
from gpt2_jax.digest import state_digest

META = {"config": {"train": {"steps": 8}}, "data": "é"}
SEED = 20_260_822


def make_state():
    """Return arrays that compress and arrays that do not, of several types."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((64, 48)).astype(np.float32)
    half = rng.standard_normal((33, 7)).astype(jax.numpy.bfloat16)
    params = {"wte": noise, "bias": np.zeros(128, np.float32), "half": half}
    opt_state = {"mu": noise[::-1] * 0.1, "nu": noise**2, "count": np.int32(8)}
    return jax.device_put((params, opt_state))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Return a directory with step 8, the state, and the files of the step."""
    directory = tmp_path_factory.mktemp("flips") / "checkpoints"
    state = make_state()
    with Checkpoints(directory, interval=1, keep=2, keep_every=0) as checkpoints:
        checkpoints.save(8, *state, META)
    files = sorted(path for path in (directory / "8").rglob("*") if path.is_file())
    assert len(files) > 15
    return directory, state, files


def verdict(directory: Path, state) -> str:
    """Return what a restore makes of the step: told, same or SILENT."""
    with Checkpoints(directory, interval=1, keep=2, keep_every=0) as checkpoints:
        try:
            found = checkpoints.restore(8, *state)
        except DamagedError:
            return "told"
    same = state_digest(8, found.params, found.opt_state) == state_digest(8, *state)
    same &= {name: found.meta[name] for name in META} == META
    return "same" if same else "SILENT"


def flip_bits(saved, count: int, seed: int) -> Counter:
    directory, state, files = saved
    rng, verdicts = random.Random(seed), Counter()
    sizes = [path.stat().st_size for path in files]
    for index in range(count):
        # In turn any file, and any byte: most bytes are those of the large arrays.
        path = rng.choices(files, sizes if index % 2 else None)[0]
        good = path.read_bytes()
        bad = bytearray(good)
        place, bit = rng.randrange(len(bad)), rng.randrange(8)
        bad[place] ^= 1 << bit
        path.write_bytes(bad)
        try:
            found = verdict(directory, state)
        finally:
            path.write_bytes(good)
        where = f"seed {seed}, flip {index}: {path}, byte {place}, bit {bit}"
        assert found != "SILENT", where
        verdicts[found] += 1
    return verdicts


def test_flipped_bits_are_told_or_harmless(saved):
    assert flip_bits(saved, 40, SEED)["told"] > 20


@pytest.mark.faults
@pytest.mark.parametrize("part", range(4))  # 500 in all
def test_500_flipped_bits_are_told_or_harmless(saved, part):
    assert flip_bits(saved, 125, SEED + 1 + part)["told"] > 60


@pytest.mark.faults
@pytest.mark.parametrize(
    "damage", ["cut", "one byte less", "emptied", "zeroed", "gone"]
)
def test_no_file_can_be_cut_or_lost_in_silence(saved, damage):
    directory, state, files = saved
    told = 0
    for path in files:
        good = path.read_bytes()
        if damage == "gone":
            path.unlink()
        else:
            kept = {"cut": len(good) // 2, "one byte less": len(good) - 1}.get(
                damage, 0
            )
            path.write_bytes(bytes(len(good)) if damage == "zeroed" else good[:kept])
        try:
            found = verdict(directory, state)
        finally:
            path.write_bytes(good)
        assert found != "SILENT", path
        told += found == "told"
    assert told > 5  # half of the files say nothing of the state


@pytest.fixture
def run(tmp_path) -> Path:
    """Return a copy of a run of 8 steps, of which 6 and 8 are kept."""
    return Path(shutil.copytree(left_alone(), tmp_path / "run"))


def flip_an_array(step: Path) -> None:
    """Flip one bit in the middle of the largest file: Orbax alone hands it out."""
    path = max(step.rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def empty_arrays(step: Path) -> None:
    for path in step.rglob("d/*"):
        path.write_bytes(b"")


def lose_meta(step: Path) -> None:
    shutil.rmtree(step / "meta")


def lose_all(step: Path) -> None:
    shutil.rmtree(step)
    step.mkdir()


damages = pytest.mark.parametrize(
    "damage",
    [
        flip_an_array,
        *(pytest.param(d, marks=pytest.mark.faults) for d in (empty_arrays, lose_meta)),
        pytest.param(lose_all, marks=pytest.mark.faults),
    ],
)


@damages
def test_a_run_goes_on_from_the_newest_good_step_to_the_same_bits(run, damage, capsys):
    untouched = sha256_of_step_8(run, capsys)
    damage(run / "checkpoints/8")
    ended = train(run)
    assert ended.returncode == 0, ended.stderr
    assert f"checkpoint {run}/checkpoints/8 is damaged: " in ended.stdout
    assert f"resumed {run} at step 6\n" in ended.stdout
    assert names(run) == ["8.damaged"]
    assert sha256_of_step_8(run, capsys) == final_digest(run) == untouched


def sha256_of_step_8(run: Path, capsys) -> str:
    assert cli.run(["check", str(run), "--json"]) == 0
    step = json.loads(capsys.readouterr().out)["steps"][-1]
    assert step["step"] == 8
    return step["sha256"]


@damages
def test_a_run_with_no_good_step_is_refused_and_left_alone(run, damage):
    for step in ("6", "8"):
        damage(run / "checkpoints" / step)
    before = contents(run)
    ended = train(run)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1, ended.stderr
    assert "every checkpoint in" in ended.stderr and "8, 6; nothing" in ended.stderr
    assert "step 1/8" not in ended.stdout
    assert contents(run) == before


@pytest.mark.faults
def test_a_run_whose_steps_were_all_set_aside_is_refused(run):
    for step in ("6", "8"):
        (run / "checkpoints" / step).rename(run / "checkpoints" / f"{step}.damaged")
    before = contents(run)
    ended = train(run)
    assert ended.returncode == 2
    assert "is damaged: 6.damaged, 8.damaged; nothing was changed" in ended.stderr
    assert contents(run) == before


@pytest.mark.faults
def test_another_format_is_no_reason_to_begin_again(run):
    """A checkpoint of a newer program is refused, not taken for damaged."""
    from gpt2_jax import checkpoint

    path = run / "checkpoints/8/meta/metadata"
    meta = json.loads(path.read_text())["meta"] | {"format_version": 2}
    path.write_text(json.dumps(checkpoint._seal(meta)))
    before = contents(run)
    ended = train(run)
    assert ended.returncode == 2 and "install a newer gpt2_jax" in ended.stderr
    assert contents(run) == before
    with pytest.raises(CheckpointError, match="install a newer"):
        checkpoint.verify(run / "checkpoints", 8)
