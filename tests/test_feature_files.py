"""Files of features: row i is text i, whatever the number of texts, whole or not."""

import dataclasses
import functools
import gzip
import io
import os
import subprocess
import sys

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax import feature_files, features, model
from gpt2_jax.config import ConfigError, ModelConfig
from gpt2_jax.data import sources
from gpt2_jax.feature_files import read_lines, write_features
from gpt2_jax.pretrained import GPT2
from gpt2_jax.tokenizer import load_tokenizer

# Sums over a padded row are formed in another order than over the row alone.
CLOSE = dict(rtol=1e-5, atol=1e-5)
BOTH = pytest.mark.parametrize("suffix", ["npz", "parquet"])


@pytest.fixture(scope="module")
def lm():
    config = ModelConfig(
        n_vocab=257,
        n_ctx=96,
        n_embd=8,
        n_layer=2,
        n_head=2,
        initializer_range=0.5,
        dtype="float32",
    )
    start = jax.jit(functools.partial(model.init, config))
    return GPT2(config, start(jax.random.key(0)), load_tokenizer("bytes"))


def random_lines(count, longest=90):
    random = np.random.default_rng(0)
    letters = np.array(list("abc xyz"))
    lengths = random.integers(0, longest + 1, count)
    return ["".join(random.choice(letters, n)) for n in lengths]


def write(lm, texts, out, **how):
    return write_features(lm, texts, out, say=lambda line: None, **how)


def read(out, pool):
    """Return the features and the number of tokens of each text."""
    if out.suffix == ".parquet":
        table = pq.read_table(out)
        assert table["index"].to_pylist() == list(range(table.num_rows))
        rows = [np.array(row, np.float32) for row in table["features"].to_pylist()]
        return rows, table["n_tokens"].to_pylist()
    with np.load(out) as file:
        arrays = dict(file)
    values = arrays.pop("features")
    assert values.dtype == np.float32
    if pool is not None:
        (n_tokens,) = arrays.values()
        assert n_tokens.dtype == np.int32
        assert len(n_tokens) == len(values)
        return list(values), arrays["n_tokens"].tolist()
    (offsets,) = arrays.values()
    assert offsets.dtype == np.int64
    assert (offsets[0], offsets[-1]) == (0, len(values))
    return np.split(values, arrays["offsets"][1:-1]), np.diff(offsets).tolist()


@BOTH
@pytest.mark.parametrize("pool, layer", [("mean", -1), ("last", 1), (None, 0)])
def test_row_i_is_what_text_i_gives_alone(lm, tmp_path, suffix, pool, layer):
    out = tmp_path / f"f.{suffix}"
    texts = ["", "a", "é" * 20, *random_lines(30), "", "end"]
    how = dict(layer=layer, pool=pool)
    # Blocks of 24 texts: the second one is not full, nor is its last batch.
    assert write(lm, iter(texts), out, batch=3, **how) == len(texts)
    rows, n_tokens = read(out, pool)
    assert n_tokens == [len(text.encode()) or 1 for text in texts]
    for text, row in zip(texts, rows, strict=True):
        np.testing.assert_allclose(row, lm.features([text], **how)[0], **CLOSE)


@pytest.mark.parametrize("pool", ["mean", None])
def test_columns_of_parquet_say_what_they_hold(lm, tmp_path, pool):
    write(lm, ["ab", "c"], tmp_path / "f.parquet", pool=pool)
    row = pa.list_(pa.float32(), 8)
    wanted = dict(index=pa.int64(), n_tokens=pa.int32())
    wanted["features"] = pa.list_(row) if pool is None else row
    schema = pq.read_schema(tmp_path / "f.parquet")
    assert schema.equals(pa.schema(list(wanted.items())))


@BOTH
@pytest.mark.parametrize("pool", ["mean", None])
def test_no_text_gives_a_file_without_rows(lm, tmp_path, suffix, pool):
    out = tmp_path / f"f.{suffix}"
    assert write(lm, [], out, pool=pool) == 0
    if suffix == "npz":
        with np.load(out) as file:
            assert file["features"].shape == (0, 8)
            numbers = [] if pool else [0]
            np.testing.assert_array_equal(file[file.files[1]], numbers)
    else:
        assert pq.read_table(out).num_rows == 0


def test_row_groups_of_parquet_hold_many_blocks(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_files, "ROW_GROUP_BYTES", 2000)
    texts = random_lines(100)
    write(lm, texts, tmp_path / "f.parquet", batch=2)
    groups = pq.ParquetFile(tmp_path / "f.parquet").num_row_groups
    assert groups == 3  # 44 bytes a row: 48 rows, 48 and 4
    rows, _ = read(tmp_path / "f.parquet", "mean")
    np.testing.assert_allclose(rows[70], lm.features(texts[70], -1, "mean")[0], **CLOSE)


def test_a_member_of_npz_may_exceed_4_gib(lm, tmp_path, monkeypatch):
    """Look for the field that holds 8-byte sizes: a file that large takes a minute."""
    write(lm, ["ab"], tmp_path / "f.npz")
    begin = (tmp_path / "f.npz").read_bytes()
    name = begin.index(b"features.npy") + len("features.npy")
    assert begin[name : name + 2] == b"\x01\x00"  # APPNOTE.TXT 4.5.3, Zip64


# In a process of its own: the hook that checks types makes it slow.
MEASURE = """
import sys, tracemalloc
from pathlib import Path
import jax
import pyarrow as pa
from gpt2_jax import feature_files, model
from gpt2_jax.config import ModelConfig
from gpt2_jax.pretrained import GPT2
from gpt2_jax.tokenizer import load_tokenizer

config = ModelConfig(
    n_vocab=257, n_ctx=16, n_embd=64, n_layer=1, n_head=2, dtype="float32"
)
lm = GPT2(config, model.init(config, jax.random.key(0)), load_tokenizer("bytes"))
feature_files.ROW_GROUP_BYTES = 2**18
feature_files.COPY_BYTES = 2**16

def measure(count, out, pool):
    arrow, live = [], []
    def texts():
        for i in range(count):
            yield f"line {i:5}"
        arrow.append(pa.total_allocated_bytes())
        live.append(len(jax.live_arrays()))
    tracemalloc.start()
    feature_files.write_features(
        lm, texts(), Path(sys.argv[1], out), pool=pool, batch=64, force=True, say=str
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak + arrow[0], live[0]

for out, pool in (("f.npz", "mean"), ("f.parquet", None)):
    measure(600, out, pool)  # compiles
    print(*measure(2_000, out, pool), *measure(20_000, out, pool))
"""


def test_memory_does_not_grow_with_the_number_of_texts(tmp_path):
    child = [sys.executable, "-c", MEASURE, str(tmp_path)]
    run = subprocess.run(child, capture_output=True, text=True, check=True)
    lines = [list(map(int, line.split())) for line in run.stdout.splitlines()]
    assert len(lines) == 2
    for few_bytes, few_arrays, many_bytes, many_arrays in lines:
        # The rows of 18,000 more texts are 4.6 MB with a pool, 46 MB without one.
        assert many_bytes < few_bytes + 300_000
        assert many_arrays < few_arrays + 50  # of 280 batches more


def test_a_bucket_of_lengths_is_compiled_once(lm, tmp_path):
    features._last.clear_cache()
    write(lm, random_lines(75), tmp_path / "f.npz", batch=4)
    assert features._last._cache_size() == 2  # of 64 and 96 tokens


def test_texts_of_like_length_are_computed_together(lm, tmp_path, monkeypatch):
    longest, original = [], GPT2.features

    def spy(self, texts, *rest):
        if texts:
            longest.append(max(map(len, texts)))
        return original(self, texts, *rest)

    monkeypatch.setattr(GPT2, "features", spy)
    write(lm, ["a", 90 * "b"] * 16, tmp_path / "f.npz", batch=4)
    assert longest == [90] * 4 + [1] * 4


@BOTH
def test_what_goes_wrong_leaves_no_file(lm, tmp_path, suffix):
    out = tmp_path / f"f.{suffix}"

    def stopped():
        yield from random_lines(40)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(lm, stopped(), out, batch=2)
    assert not list(tmp_path.iterdir())
    out.write_text("old")
    with pytest.raises(KeyboardInterrupt):
        write(lm, stopped(), out, batch=2, force=True)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    assert out.read_text() == "old"


def test_a_file_that_exists_is_replaced_only_by_force(lm, tmp_path):
    out = tmp_path / "new" / "f.npz"
    write(lm, ["a"], out)
    with pytest.raises(ConfigError, match=r"f.npz' exists; .* --force"):
        write(lm, ["a", "b"], out)
    assert len(read(out, "mean")[0]) == 1
    write(lm, ["a", "b"], out, force=True)
    assert len(read(out, "mean")[0]) == 2
    assert [path.name for path in out.parent.iterdir()] == ["f.npz"]
    (tmp_path / "d.npz").mkdir()
    with pytest.raises(ConfigError, match="is a directory"):
        write(lm, ["a"], tmp_path / "d.npz", force=True)


@pytest.mark.parametrize(
    "name, how, message",
    [
        ("f.csv", {}, r"OUT is .*f.csv'; allowed: F.npz or F.parquet"),
        ("f", {}, r"allowed: F.npz or F.parquet"),
        ("f.npz", {"layer": 3}, "layer is 3; allowed: -3 <= layer <= 2"),
        ("f.npz", {"batch": 0}, "batch is 0; allowed: >= 1"),
    ],
)
def test_options_are_checked_before_a_text_is_read(lm, tmp_path, name, how, message):
    def texts():
        raise AssertionError("a text was asked for")
        yield ""

    with pytest.raises(ConfigError, match=message):
        write(lm, texts(), tmp_path / name, **how)
    with pytest.raises(ConfigError, match="no tokenizer"):
        write(dataclasses.replace(lm, tokenizer=None), texts(), tmp_path / "f.npz")
    assert not list(tmp_path.iterdir())


def test_too_long_a_text_is_named_or_cut(lm, tmp_path):
    texts = ["a", "b" * 96, "c" * 4 + "d" * 96]
    message = r"line 3: text of 100 tokens exceeds the context of 96 by 4; .*truncate"
    with pytest.raises(ConfigError, match=message):
        write(lm, texts, tmp_path / "f.npz")
    write(lm, texts, tmp_path / "f.npz", truncate="left")
    rows, n_tokens = read(tmp_path / "f.npz", "mean")
    assert n_tokens == [1, 96, 96]
    np.testing.assert_allclose(rows[2], lm.features("d" * 96, -1, "mean")[0], **CLOSE)


def test_progress_is_told(lm, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(feature_files, "PROGRESS_SECONDS", 0.0)
    write_features(lm, ["a"] * 20, tmp_path / "f.npz", batch=2, say=lines.append)
    assert lines[0].startswith("16 texts, ")
    assert lines[-1] == f"{tmp_path / 'f.npz'}: 20 texts"


def test_lines_are_those_of_all_files_in_turn(tmp_path, monkeypatch):
    one, two = tmp_path / "one", tmp_path / "two.gz"
    one.write_text("\ufeffa\r\n\n\ufeffb\x0b\u2028c\rd", "utf-8", newline="")
    two.write_bytes(gzip.compress(b"e\n"))
    stdin = io.TextIOWrapper(io.BytesIO(b"x\ny"))
    monkeypatch.setattr(sys, "stdin", stdin)
    (tmp_path / "none").touch()
    paths = [str(one), str(tmp_path / "none"), "-", str(two)]
    wanted = ["a", "", "\ufeffb\x0b\u2028c\rd", "x", "y", "e"]
    assert list(read_lines(paths)) == wanted


LINES = st.lists(st.text(st.characters(exclude_characters="\r\n\ufeff"), max_size=9))


@settings(deadline=None, max_examples=50)
@given(LINES, st.integers(1, 7), st.sampled_from(["\n", "\r\n"]), st.booleans())
def test_lines_do_not_depend_on_how_a_file_is_read(
    tmp_path_factory, lines, block_bytes, end, ends
):
    lines = [*lines, "last"]
    path = tmp_path_factory.mktemp("lines") / "text"
    path.write_bytes((end.join(lines) + (end if ends else "")).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "BLOCK_BYTES", block_bytes)
        assert list(read_lines([str(path)])) == lines


def test_what_cannot_be_read_is_named(tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_bytes(b"good\nca\xff\n")
    lines = read_lines([str(path)])
    assert next(lines) == "good"
    with pytest.raises(ConfigError, match=r"text line 2 is not UTF-8: .* at byte 2 of"):
        next(lines)
    stdin = io.TextIOWrapper(io.BytesIO(b"\xc3"))
    monkeypatch.setattr(sys, "stdin", stdin)
    with pytest.raises(ConfigError, match="standard input line 1 is not UTF-8"):
        list(read_lines(["-"]))
    for bad in (tmp_path / "none", tmp_path):
        with pytest.raises(ConfigError, match="TEXT is .*; allowed: a file that exist"):
            read_lines([str(path), str(bad)])  # at once, not after the first file


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "text"
    path.write_bytes(b"a\n" + b"b" * 40)
    monkeypatch.setattr(sources, "BLOCK_BYTES", 8)
    monkeypatch.setattr(feature_files, "LINE_BYTES", 20)
    with pytest.raises(ConfigError, match=r"text line 2 is .*allowed: at most 20 byte"):
        list(read_lines([str(path)]))


def test_a_pipe_is_read():
    end, other = os.pipe()
    os.write(other, b"a\nb\n")
    os.close(other)
    assert list(read_lines([f"/dev/fd/{end}"])) == ["a", "b"]
    os.close(end)
