"""Directories of models: whole or not at all, exact, without paths of this machine."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from gpt2_jax import model
from gpt2_jax.checkpoint import read_meta
from gpt2_jax.config import Config, ConfigError, DataConfig, TrainConfig
from gpt2_jax.export import (
    check_free,
    keep_tokenizer,
    open_tokenizer,
    replacing,
    write_hf,
    write_run,
)
from gpt2_jax.pretrained import load
from gpt2_jax.tokenizer import load_tokenizer, tokenizer_files
from gpt2_jax.train import train
from gpt2_jax.weights import open_tensors


@pytest.fixture
def shape(tiny):
    return dataclasses.replace(tiny, n_vocab=257)


@pytest.fixture
def params(shape):
    return model.init(shape, jax.random.key(0))


def write_model(directory: Path, word: str = "new") -> None:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(word)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def own_tokenizer(folder: Path):
    """Return one whose vocabulary is not built in: two bytes have changed places."""
    folder.mkdir()
    files = tokenizer_files(load_tokenizer("bytes"))
    vocab = json.loads(files["vocab.json"])
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text(files["merges.txt"])
    return load_tokenizer(str(folder))


def test_a_directory_appears_whole(tmp_path):
    out = tmp_path / "deep" / "out"
    with replacing(out, force=False) as partial:
        assert partial.parent == out.parent  # or the rename would be a copy
        write_model(partial)
        assert not out.exists()
    assert names(out) == ["config.json"]
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("error", [ConfigError, KeyboardInterrupt])
def test_after_an_error_all_is_as_it_was(tmp_path, error):
    write_model(tmp_path / "out", "old")
    with pytest.raises(error), replacing(tmp_path / "out", force=True) as partial:
        write_model(partial)
        raise error
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_a_killed_program_leaves_the_old_model(tmp_path):
    write_model(tmp_path / "out", "old")
    program = """
import os, signal, sys
from pathlib import Path
from gpt2_jax.export import replacing
with replacing(Path(sys.argv[1]), force=True) as partial:
    (partial / "config.json").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "out")]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "config.json").read_text() == "old"


def test_a_failed_rename_brings_the_old_model_back(tmp_path, monkeypatch):
    write_model(tmp_path / "out", "old")
    rename = Path.rename

    def fail(path, target):
        if path.suffix == ".partial":
            raise OSError(28, "No space left on device")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError), replacing(tmp_path / "out", force=True) as partial:
        write_model(partial)
    assert (tmp_path / "out" / "config.json").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_only_a_model_is_replaced_and_only_by_force(tmp_path):
    out = tmp_path / "out"
    check_free(out, force=False)
    out.mkdir()
    check_free(out, force=False)  # empty
    (out / "thesis.tex").touch()
    with pytest.raises(ConfigError, match="exists; choose another.*--force"):
        check_free(out, force=False)
    with pytest.raises(ConfigError, match="conversion writes: it holds thesis.tex"):
        check_free(out, force=True)
    (out / "thesis.tex").unlink()
    write_model(out)
    check_free(out, force=True)
    with pytest.raises(ConfigError, match="is a file"):
        check_free(out / "config.json", force=True)


def test_what_another_program_wrote_meanwhile_stays(tmp_path):
    with (
        pytest.raises(ConfigError, match="exists"),
        replacing(tmp_path / "out", force=False),
    ):
        write_model(tmp_path / "out", "another's")
    assert (tmp_path / "out" / "config.json").read_text() == "another's"


def test_what_a_link_leads_to_is_replaced(tmp_path):
    write_model(tmp_path / "real", "old")
    (tmp_path / "out").symlink_to("real")
    with replacing(tmp_path / "out", force=True) as partial:
        write_model(partial, "new")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "config.json").read_text() == "new"
    assert names(tmp_path) == ["out", "real"]


def test_where_nothing_can_be_written_one_line_says_so(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(ConfigError, match="cannot be written: .*file.*choose another"),
        replacing(tmp_path / "file" / "out", force=False),
    ):
        pass


def test_hugging_face_layout_has_no_padding_and_no_second_head(tmp_path, shape, params):
    write_hf(shape, params, load_tokenizer("bytes"), tmp_path)
    files = ["config.json", "generation_config.json", "merges.txt"]
    files += ["model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert names(tmp_path) == [*files, "vocab.json"]
    tensors = open_tensors(tmp_path)
    assert tensors["transformer.wte.weight"].shape == (257, 32)
    assert shape.n_vocab_padded > 257
    assert "lm_head.weight" not in tensors
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values["vocab_size"], values["eos_token_id"]) == (257, 256)
    tokens = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert tokens["model_max_length"] == shape.n_ctx


def test_an_unknown_dtype_is_refused(tmp_path, shape, params):
    with pytest.raises(ConfigError, match="dtype is 'int8'; allowed: float32, float16"):
        write_hf(shape, params, None, tmp_path, dtype="int8")


def test_a_run_directory_is_loaded_to_the_bit_wherever_it_moves(
    tmp_path, shape, params
):
    tokenizer = own_tokenizer(tmp_path / "own")
    with replacing(tmp_path / "run", force=False) as partial:
        write_run(shape, params, tokenizer, partial, name="run", source="org/name")
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    lm = load(tmp_path / "elsewhere")
    jax.tree.map(np.testing.assert_array_equal, lm.params, params)
    assert lm.tokenizer is not None
    assert lm.tokenizer.fingerprint == tokenizer.fingerprint
    assert lm.tokenizer.encode("ab").tolist() == [98, 97]


def test_a_run_directory_names_no_place_on_this_machine(tmp_path, shape, params):
    tokenizer = own_tokenizer(tmp_path / "own")
    with replacing(tmp_path / "run", force=False) as partial:
        write_run(shape, params, tokenizer, partial, name="run", source="org/name")
    meta = read_meta(tmp_path / "run" / "checkpoints")
    assert meta is not None and meta["converted_from"] == "org/name"
    assert meta["config"]["run_dir"] == "run"
    config = (tmp_path / "run" / "config.json").read_text()
    for text in (json.dumps(meta), config):
        assert str(tmp_path) not in text and ".partial" not in text


def test_a_converted_run_cannot_be_resumed(tmp_path, shape, params):
    (tmp_path / "run").mkdir()
    (tmp_path / "text.txt").write_text("ab" * 500)
    write_run(
        shape,
        params,
        load_tokenizer("bytes"),
        tmp_path / "run",
        name="run",
        source="org/name",
    )
    config = Config(
        run_dir=str(tmp_path / "run"),
        model=shape,
        data=DataConfig(source=(str(tmp_path / "text.txt"),), tokenizer="bytes"),
        train=TrainConfig(steps=1, batch_tokens=8 * shape.n_ctx),
    )
    with pytest.raises(ConfigError, match="no optimizer state to resume") as refused:
        train(config)
    assert "\n" not in str(refused.value)


def test_built_in_tokenizers_need_no_files(tmp_path):
    assert keep_tokenizer(load_tokenizer("bytes"), tmp_path) == "bytes"
    assert not os.listdir(tmp_path)
    kept = keep_tokenizer(own_tokenizer(tmp_path / "own"), tmp_path)
    assert kept == "tokenizer"
    assert open_tokenizer(tmp_path, kept).encode("a").tolist() == [98]
