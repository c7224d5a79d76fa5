import dataclasses
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from gpt2_jax.config import ConfigError
from gpt2_jax.data import prepare as module
from gpt2_jax.data.prepare import prepare
from gpt2_jax.data.shards import open_split, read_manifest
from gpt2_jax.tokenizer import load_tokenizer

GPT2 = load_tokenizer("gpt2")
BYTES = load_tokenizer("bytes")
BOTH = pytest.mark.parametrize("tokenizer", [GPT2, BYTES], ids=["gpt2", "bytes"])
TEXT = "".join(f"Line {i}: naïve café №{i * i}\r\n\n" for i in range(400))


def quiet(_: str) -> None:
    pass


def run(source, out: Path, tokenizer=BYTES, **options):
    sources = source if isinstance(source, list) else [source]
    options = {"report": quiet} | options
    return prepare([str(s) for s in sources], out, tokenizer, **options)


def tokens(out: Path, split: str) -> np.ndarray:
    shards = open_split(out, split, n_vocab=2**16, verify=True)
    return shards.read(0, shards.n_tokens)


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT.encode())
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "texts"
    path.mkdir()
    for i in range(60):
        (path / f"{i:02d}.txt").write_text(f"document {i} <|endoftext|>\n" * (i + 1))
    return path


@BOTH
@pytest.mark.parametrize("fraction", [0.1, 0.333, 0.5])
def test_one_file_is_split_by_characters_like_nanogpt(
    tmp_path, file, tokenizer, fraction
):
    manifest = run(file, tmp_path / "out", tokenizer, val_fraction=fraction)
    n = len(TEXT)
    train, val = TEXT[: int(n * (1 - fraction))], TEXT[int(n * (1 - fraction)) :]
    eot = [tokenizer.eot]
    np.testing.assert_array_equal(
        tokens(tmp_path / "out", "train"), tokenizer.encode(train)
    )
    np.testing.assert_array_equal(
        tokens(tmp_path / "out", "val"), [*tokenizer.encode(val), *eot]
    )
    for split, text in (("train", train), ("val", val)):
        held = manifest.splits[split]
        assert (held.documents, held.bytes) == (1, len(text.encode()))
        assert held.tokens == len(tokens(tmp_path / "out", split))


@BOTH
def test_documents_are_split_whole(tmp_path, folder, tokenizer):
    manifest = run(folder, tmp_path / "out", tokenizer)
    texts = {path.name: path.read_text() for path in sorted(folder.iterdir())}
    held = {}
    for split in ("train", "val"):
        ids = tokens(tmp_path / "out", split)
        ends = np.flatnonzero(ids == tokenizer.eot)
        assert ends[-1] == len(ids) - 1
        found = np.split(ids, ends + 1)[:-1]
        held[split] = [tokenizer.decode(document[:-1]) for document in found]
        assert manifest.splits[split].documents == len(held[split])
        assert held[split] == [t for t in texts.values() if t in held[split]]
    assert sorted(held["train"] + held["val"]) == sorted(texts.values())
    assert 1 <= len(held["val"]) <= 15  # of 60, at 0.1


def test_split_does_not_depend_on_other_documents(tmp_path, folder):
    run(folder, tmp_path / "all")
    before = BYTES.decode(tokens(tmp_path / "all", "val"))
    for path in sorted(folder.iterdir())[::2]:
        path.unlink()
    run(folder, tmp_path / "half")
    for document in BYTES.decode(tokens(tmp_path / "half", "val")).splitlines():
        assert document in before


def test_named_held_out_text_is_the_val_split(tmp_path, file, folder):
    manifest = run(folder, tmp_path / "out", val_sources=[str(file)])
    expected = [*BYTES.encode(TEXT), BYTES.eot]
    np.testing.assert_array_equal(tokens(tmp_path / "out", "val"), expected)
    assert manifest.splits["train"].documents == 60
    assert manifest.settings["val_fraction"] is None


@pytest.mark.parametrize("batch", [1, 100, 10**6])
@pytest.mark.parametrize("threads", [1, 3])
def test_shards_do_not_depend_on_the_machine(
    tmp_path, folder, monkeypatch, batch, threads
):
    run(folder, tmp_path / "one", GPT2, shard_tokens=500)
    monkeypatch.setattr(module, "BATCH_CHARACTERS", batch)
    monkeypatch.setattr(module, "SYNC_TOKENS", batch)
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    run(folder, tmp_path / "two", GPT2, shard_tokens=500)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) > 10


def test_no_more_than_a_few_batches_wait(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    taken = []
    items = (taken.append(i) or [i] for i in range(100))
    results = module._in_order(lambda item: module._Batch(item[0], {}), items)
    for index, batch in enumerate(results):
        assert batch.pieces == index
        assert len(taken) - index <= 5


CHILD = """
import sys
from pathlib import Path
from gpt2_jax.data import prepare
from gpt2_jax.tokenizer import load_tokenizer
prepare.BATCH_CHARACTERS = prepare.SYNC_TOKENS = 1000
prepare.prepare([sys.argv[1]], Path(sys.argv[2]), load_tokenizer("bytes"),
                shard_tokens=7001)
"""


@pytest.mark.parametrize("kind, enough", [("folder", 100), ("file", 3)])
def test_killed_and_run_again_gives_the_same_bytes(tmp_path, folder, kind, enough):
    for i in range(300):
        (folder / f"more{i}.txt").write_text(f"{i} once upon a time\n" * 200)
    source = folder if kind == "folder" else tmp_path / "long.txt"
    if kind == "file":
        source.write_bytes(TEXT.encode() * 400)
    out = tmp_path / "killed"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(source), str(out)])
    pieces = 0
    while child.poll() is None and pieces < enough:
        time.sleep(0.002)
        if (out / "progress.json").is_file():
            pieces = json.loads((out / "progress.json").read_text())["pieces"]
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    with (out / "train_00000.bin").open("ab") as shard:
        shard.write(b"written, not recorded")
    said = []
    run(source, out, shard_tokens=7001, report=said.append)
    assert "continuing after" in said[0]
    run(source, tmp_path / "alone", shard_tokens=7001)
    assert contents(out) == contents(tmp_path / "alone")


def test_finished_directory_is_used_again(tmp_path, file):
    manifest = run(file, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    said = []
    assert run(file, tmp_path / "out", report=said.append) == manifest
    assert "prepared already" in said[0]
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").iterdir()}
    assert read_manifest(tmp_path / "out") == manifest


@pytest.mark.parametrize(
    "options, message",
    [
        ({"val_fraction": 0.2}, "val_fraction was 0.1, now 0.2"),
        ({"tokenizer": GPT2}, "tokenizer was 'bytes', now 'gpt2'"),
        ({"shard_tokens": 9}, "shard_tokens was 100000000, now 9"),
        ({"skip_binary": True}, "skip_binary was False, now True"),
    ],
)
def test_other_settings_are_refused(tmp_path, file, options, message):
    run(file, tmp_path / "out")
    with pytest.raises(ConfigError, match=f"prepared otherwise: {message}"):
        run(file, tmp_path / "out", **options)


def test_changed_source_is_noticed(tmp_path, file):
    run(file, tmp_path / "out")
    file.write_bytes(TEXT.encode() + b"!")
    with pytest.raises(ConfigError, match="source_bytes was"):
        run(file, tmp_path / "out")


def test_unfinished_work_of_another_recipe_is_kept(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARACTERS", 100)
    monkeypatch.setattr(module, "SYNC_TOKENS", 100)
    (folder / "zz.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"zz.txt is no text"):
        run(folder, tmp_path / "out")
    with pytest.raises(ConfigError, match="skip_binary was False, now True"):
        run(folder, tmp_path / "out", skip_binary=True)
    path = tmp_path / "out" / "progress.json"
    path.write_text(path.read_text().replace('characters": ', 'characters": 1'))
    with pytest.raises(ConfigError, match="piece_characters is 1.*; delete"):
        run(folder, tmp_path / "out")
    path.write_text("{}")
    with pytest.raises(ConfigError, match="progress.json is malformed"):
        run(folder, tmp_path / "out")


def test_too_little_text_leaves_nothing_in_the_way(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("ab")
    with pytest.raises(ConfigError, match="split train has 1 tokens.* at least 2"):
        run(path, tmp_path / "out", val_fraction=0.5)
    path.write_text("abcd")
    run(path, tmp_path / "out", val_fraction=0.5)


def test_a_folder_that_leaves_a_split_empty_says_so(tmp_path, folder):
    with pytest.raises(ConfigError, match="split val has 0 tokens, of 60 documents"):
        run(folder, tmp_path / "out", val_fraction=1e-6)


def test_every_source_is_looked_for_first(tmp_path, file):
    with pytest.raises(ConfigError, match="nowhere does not exist"):
        run([file, tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(ConfigError, match="data.source is .*at least one source"):
        run([], tmp_path / "out")


def test_tokens_beyond_uint16_are_refused(tmp_path, file):
    large = dataclasses.replace(BYTES, name="large", n_vocab=2**16 + 1)
    message = "n_vocab of tokenizer large is 65537; allowed: at most 65536"
    with pytest.raises(ConfigError, match=message):
        run(file, tmp_path / "out", large)
    assert not (tmp_path / "out").exists()
    run(file, tmp_path / "out", dataclasses.replace(large, n_vocab=2**16))


def test_foreign_directories_stay_untouched(tmp_path, folder):
    before = contents(folder)
    with pytest.raises(ConfigError, match=r"holds other files \(00.txt\)"):
        run(folder, folder)
    assert contents(folder) == before


def test_two_writers_do_not_mix(tmp_path, file):
    out = tmp_path / "out"
    out.mkdir()
    other = os.open(out, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="is being written by another run"):
        run(file, out)
    os.close(other)
    run(file, out)


def test_full_disk_is_one_line_and_can_continue(tmp_path, file, monkeypatch):
    def refuse(*_):
        raise OSError(28, "No space left on device", "train_00000.bin")

    with monkeypatch.context() as patch:
        patch.setattr(module.ShardWriter, "write", refuse)
        with pytest.raises(ConfigError, match="train_00000.bin: No space left"):
            run(file, tmp_path / "out")
    run(file, tmp_path / "out")


def test_default_report_goes_to_stderr(tmp_path, file, capsys):
    prepare([str(file)], tmp_path / "out", BYTES)
    said = capsys.readouterr()
    assert "train:" in said.err and said.out == ""
