import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.config import ConfigError
from gpt2_jax.data.shards import (
    Manifest,
    ShardWriter,
    SplitManifest,
    digest_bin,
    find_bin_shards,
    open_bin,
    open_split,
    read_manifest,
    write_manifest,
)

TOKENS = np.arange(1, 26, dtype=np.uint16)


@pytest.fixture
def directory(tmp_path) -> Path:
    splits = {}
    for split, tokens in (("train", TOKENS), ("val", TOKENS[:5] + 30)):
        writer = ShardWriter(tmp_path, split, 10)
        writer.write(tokens)
        size = len(tokens)
        splits[split] = SplitManifest(size, 2, 40, writer.finish())
    manifest = Manifest(1, "bytes", "f" * 64, 257, ("x.txt",), {"a": 1}, splits)
    write_manifest(tmp_path, manifest)
    return tmp_path


def change(directory: Path, edit) -> None:
    path = directory / "manifest.json"
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def open_train(directory, verify=True, n_vocab=257):
    return open_split(directory, "train", n_vocab=n_vocab, verify=verify)


def test_shards_read_as_one_array(directory):
    tokens = open_train(directory)
    assert (tokens.n_tokens, tokens.n_vocab) == (25, 257)
    for start in range(26):
        for count in range(26 - start):
            found = tokens.read(start, count)
            np.testing.assert_array_equal(found, TOKENS[start : start + count])
    assert found.dtype == np.int32


@pytest.mark.parametrize("start, count", [(-1, 2), (24, 2), (0, -1), (26, 0)])
def test_reading_outside_is_refused(directory, start, count):
    with pytest.raises(ValueError, match="leave 0..25"):
        open_train(directory).read(start, count)


def test_shards_pickle_without_their_maps(directory):
    tokens = open_train(directory)
    tokens.read(0, 25)
    packed = pickle.dumps(tokens)
    assert len(packed) < 2000 and b"memmap" not in packed
    np.testing.assert_array_equal(pickle.loads(packed).read(5, 10), TOKENS[5:15])


def test_manifest_comes_back(directory):
    manifest = read_manifest(directory)
    assert manifest.source == ("x.txt",)
    assert [s.tokens for s in manifest.splits["train"].shards] == [10, 10, 5]
    before = manifest.digest
    change(directory, lambda m: m.update(source=["elsewhere"]))
    assert read_manifest(directory).digest == before
    change(directory, lambda m: m.update(fingerprint="0" * 64))
    assert read_manifest(directory).digest != before


def test_another_tokenizer_is_refused(directory):
    manifest = read_manifest(directory)
    manifest.check_tokenizer("bytes", "f" * 64)
    with pytest.raises(ConfigError, match="tokenizer of the shards is 'bytes'"):
        manifest.check_tokenizer("gpt2", "f" * 64)
    with pytest.raises(ConfigError, match="allowed: data.tokenizer"):
        manifest.check_tokenizer("bytes", "0" * 64)


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda m: m.pop("splits"), "malformed .KeyError: 'splits'"),
        (lambda m: m.update(splits=3), "malformed"),
        (lambda m: m.update(n_vocab="many"), "malformed"),
        (lambda m: m["splits"]["train"].update(tokens=24), "not the sum"),
        (
            lambda m: m["splits"]["val"]["shards"][0].update(file="../x"),
            "file is '../x'",
        ),
        (lambda m: m.update(version=2), "version 2; allowed: 1"),
        (lambda m: m["splits"].update(val=m["splits"]["train"]), "splits apart"),
    ],
)
def test_bad_manifests_are_refused(directory, edit, message):
    change(directory, edit)
    with pytest.raises(ConfigError, match=message):
        read_manifest(directory)


def test_absent_manifest_and_split_are_named(directory):
    with pytest.raises(ConfigError, match="no split 'test'; allowed: train, val"):
        open_split(directory, "test", n_vocab=257, verify=False)
    (directory / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match="malformed"):
        read_manifest(directory)
    (directory / "manifest.json").rename(directory / "progress.json")
    with pytest.raises(ConfigError, match="did not finish: run it again"):
        read_manifest(directory)
    with pytest.raises(ConfigError, match="unfinished"):
        find_bin_shards(directory)
    (directory / "progress.json").unlink()
    with pytest.raises(ConfigError, match="holds no manifest.json; run prepare"):
        read_manifest(directory)


def test_smaller_vocabulary_is_refused(directory):
    with pytest.raises(ConfigError, match="at most model.n_vocab = 256"):
        open_train(directory, n_vocab=256)


def test_damaged_shards_are_named(directory):
    path = directory / "train_00001.bin"
    good = path.read_bytes()
    path.write_bytes(good[:-1])
    with pytest.raises(ConfigError, match="train_00001.bin has 19 bytes; 10 tokens"):
        open_train(directory)
    path.unlink()
    with pytest.raises(ConfigError, match="train_00001.bin is missing"):
        open_train(directory)


@pytest.mark.parametrize("bit", [0, 37, 159])
def test_one_flipped_bit_is_detected(directory, bit):
    path = directory / "train_00000.bin"
    contents = bytearray(path.read_bytes())
    contents[bit // 8] ^= 1 << bit % 8
    path.write_bytes(contents)
    open_train(directory, verify=False)
    with pytest.raises(ConfigError, match="train_00000.bin has sha256 .* altered"):
        open_train(directory)


def test_uint32_in_a_shard_is_refused(directory):
    TOKENS[:5].astype("<u4").tofile(directory / "train_00000.bin")
    with pytest.raises(ConfigError, match="train_00000.bin holds uint32"):
        open_train(directory, verify=False)


@pytest.mark.parametrize("bad", [257, 65535])
def test_id_beyond_the_vocabulary_is_named(directory, bad):
    path = directory / "train_00001.bin"
    tokens = np.fromfile(path, np.uint16)
    tokens[3] = bad
    tokens.tofile(path)
    shards = open_train(directory, verify=False)
    shards.read(0, 13)
    message = f"train_00001.bin at token 3 holds id {bad}; allowed: 0 <= id < 257"
    with pytest.raises(ConfigError, match=message):
        shards.read(5, 15)


@pytest.mark.parametrize("cut", [0, 5, 10, 13, 20])
def test_writer_continues_where_it_was_cut_off(tmp_path, cut):
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = ShardWriter(tmp_path / "whole", "train", 10)
    whole.write(TOKENS)
    first = ShardWriter(tmp_path / "cut", "train", 10)
    first.write(TOKENS[:cut])
    first.write(TOKENS[::-1])  # not recorded, so dropped
    second = ShardWriter(tmp_path / "cut", "train", 10, tokens=cut)
    second.write(TOKENS[cut:])
    assert second.finish() == whole.finish()


def test_writer_refuses_lost_tokens(tmp_path):
    ShardWriter(tmp_path, "train", 10).write(TOKENS[:4])
    with pytest.raises(ConfigError, match="lost tokens"):
        ShardWriter(tmp_path, "train", 10, tokens=5)


def write_llm_c(path: Path, tokens, magic=20240520, version=1, count=None):
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.tobytes())


def test_nanogpt_folder_opens(tmp_path):
    TOKENS.tofile(tmp_path / "train.bin")
    TOKENS[:9].tofile(tmp_path / "val.bin")
    (tmp_path / "meta.pkl").write_bytes(b"cos\nabort\n(tR.")  # kills who unpickles it
    found = find_bin_shards(tmp_path)
    assert {k: [p.name for p in v] for k, v in found.items()} == {
        "train": ["train.bin"],
        "val": ["val.bin"],
    }
    np.testing.assert_array_equal(
        open_bin(found["train"], n_vocab=99).read(0, 25), TOKENS
    )
    digests = [digest_bin(found[s], n_vocab=257) for s in ("train", "val")]
    assert digests[0] != digests[1]
    assert find_bin_shards(tmp_path / "val.bin") == {"train": (tmp_path / "val.bin",)}
    assert find_bin_shards(tmp_path / "meta.pkl") == {}


def test_llm_c_shards_open_in_order(tmp_path):
    write_llm_c(tmp_path / "edu_train_000002.bin", TOKENS[10:])
    write_llm_c(tmp_path / "edu_train_000001.bin", TOKENS[:10])
    write_llm_c(tmp_path / "edu_val_000000.bin", TOKENS[:3])
    found = find_bin_shards(tmp_path)
    np.testing.assert_array_equal(
        open_bin(found["train"], n_vocab=99).read(0, 25), TOKENS
    )
    assert open_bin(found["val"], n_vocab=99).n_tokens == 3


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda p: p.write_bytes(b"abc"), "odd length 3"),
        (lambda p: p.write_bytes(b""), "holds no tokens"),
        (lambda p: TOKENS.astype(np.uint32).tofile(p), "holds uint32"),
        (lambda p: write_llm_c(p, TOKENS, magic=20240801), "Llama 3"),
        (lambda p: write_llm_c(p, TOKENS, version=2), "version 2; allowed: 1"),
        (lambda p: write_llm_c(p, TOKENS, count=26), "26 tokens take 1076"),
        (lambda p: write_llm_c(p, TOKENS[:0]), "holds no tokens"),
        (lambda p: None, "is not there"),
    ],
)
def test_bad_bin_files_are_refused(tmp_path, write, message):
    path = tmp_path / "train.bin"
    write(path)
    with pytest.raises(ConfigError, match=message):
        open_bin([path], n_vocab=50257)


def test_big_endian_ids_leave_the_vocabulary(tmp_path):
    np.array([1, 2, 255], ">u2").tofile(tmp_path / "train.bin")
    with pytest.raises(ConfigError, match="at token 2 holds id 65280"):
        open_bin([tmp_path / "train.bin"], n_vocab=50257).read(0, 3)
