"""What a run opens: prepared shards, .bin files, or text made into shards."""

import numpy as np
import pytest

from gpt2_jax.config import ConfigError, DataConfig
from gpt2_jax.data.dataset import open_dataset
from gpt2_jax.data.prepare import prepare
from gpt2_jax.tokenizer import load_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog\n" * 20


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def open_text(source, tmp_path, **how):
    config = DataConfig(source=(str(source),), tokenizer="bytes", **how)
    return open_dataset(config, load_tokenizer("bytes"), tmp_path / "cache", print)


def test_text_is_prepared_once_and_found_again(source, tmp_path):
    first = open_text(source, tmp_path)
    again = open_text(source, tmp_path)
    assert first.digest == again.digest
    text = bytes(first.train.read(0, first.train.n_tokens).astype(np.uint8))
    held = bytes(first.val.read(0, first.val.n_tokens - 1).astype(np.uint8))
    assert text + held == TEXT.encode()  # the last token of all is <|endoftext|>


def test_prepared_shards_are_opened_in_place(source, tmp_path):
    made = open_text(source, tmp_path)
    opened = open_text(tmp_path / "cache", tmp_path / "elsewhere")
    assert made.digest == opened.digest
    assert not (tmp_path / "elsewhere").exists()


def test_shards_of_another_tokenizer_are_refused(source, tmp_path):
    prepare([str(source)], tmp_path / "bpe", load_tokenizer("gpt2"), report=print)
    with pytest.raises(ConfigError, match=r"gpt2"):
        open_text(tmp_path / "bpe", tmp_path)


def test_a_changed_shard_is_refused(source, tmp_path):
    open_text(source, tmp_path)
    shard = next((tmp_path / "cache").glob("train*.bin"))
    data = bytearray(shard.read_bytes())
    data[10] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ConfigError, match=r"sha256"):
        open_text(tmp_path / "cache", tmp_path)
    open_text(tmp_path / "cache", tmp_path, verify=False)


def test_nanogpts_files_are_opened(tmp_path):
    for name in ("train", "val"):
        ids = np.arange(1, 101, dtype=np.uint16)
        ids.tofile(tmp_path / f"{name}.bin")
    data = open_text(tmp_path, tmp_path)
    assert data.train.n_tokens == data.val.n_tokens == 100
    (tmp_path / "val.bin").unlink()
    with pytest.raises(ConfigError, match=r"only a train split.*val.bin"):
        open_text(tmp_path, tmp_path)
