import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt2_jax.config import ConfigError
from gpt2_jax.data import sources as module
from gpt2_jax.data.sources import (
    cut_pieces,
    is_single_text,
    open_source,
    source_bytes,
)
from gpt2_jax.tokenizer import load_tokenizer

GPT2 = load_tokenizer("gpt2")
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}
PACKED = pytest.mark.parametrize("suffix", PACK)


def write(path: Path, text: str | bytes) -> Path:
    contents = text.encode() if isinstance(text, str) else text
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(PACK[path.suffix if path.suffix in PACK else ""](contents))
    return path


def read(path: Path | str, **options) -> dict[str, str]:
    texts = {}
    for key, text, _ in open_source(str(path), **options):
        texts[key] = texts.get(key, "") + text
    return texts


WORDS = st.text("aé1'.-数s_", min_size=1, max_size=5)
BLANKS = st.sampled_from([" ", "\n", "\n\n\n", "    ", "\r\n", " \x1c ", "\u3000\x85"])


@given(
    parts=st.lists(st.tuples(WORDS, BLANKS), max_size=30),
    most=st.integers(9, 30),  # any 9 characters hold the end of a word
    block=st.integers(1, 40),
)
@settings(max_examples=150, deadline=None)
def test_pieces_encode_as_the_whole(parts, most, block):
    text = "".join(word + blanks for word, blanks in parts)
    blocks = [text[i : i + block] for i in range(0, len(text), block)]
    pieces = list(cut_pieces("key", blocks, most))
    assert "".join(piece.text for piece in pieces) == text
    assert all(0 < len(piece.text) <= most for piece in pieces)
    assert [piece.last for piece in pieces[:-1]] == [False] * (len(pieces) - 1)
    assert not pieces or pieces[-1].last
    ids = [GPT2.encode(piece.text) for piece in pieces]
    whole = GPT2.encode(text)
    np.testing.assert_array_equal(np.concatenate([*ids, whole[:0]]), whole)


def test_text_without_blanks_is_cut_at_the_limit():
    pieces = [piece.text for piece in cut_pieces("key", ["x" * 25], 10)]
    assert pieces == ["x" * 10, "x" * 10, "x" * 5]


@PACKED
def test_text_stays_as_it_is(tmp_path, suffix):
    text = "\ufeffone\r\ntwo\n\rthree <|endoftext|> é数🙂\n"
    path = write(tmp_path / f"a.txt{suffix}", text)
    assert read(path) == {path.name: text}
    assert is_single_text(str(path))


@PACKED
def test_characters_across_blocks_are_whole(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_BYTES", 3)
    text = "é数🙂 " * 50
    path = write(tmp_path / f"a.txt{suffix}", text)
    assert read(path) == {path.name: text}


def test_folders_are_read_in_the_order_of_names(tmp_path):
    names = ["b.md", "a/z.txt", "a.py", "c/d/e.jsonl", "f.txt.gz", "empty.txt"]
    for name in names:
        text = json.dumps({"text": name}) if "jsonl" in name else name
        write(tmp_path / name, "" if name == "empty.txt" else text)
    write(tmp_path / ".git" / "config", "hidden")
    write(tmp_path / "a" / ".hidden", "hidden")
    wanted = ["a.py", "a/z.txt", "b.md", "c/d/e.jsonl:1", "f.txt.gz"]
    found = read(tmp_path)
    assert list(found) == wanted
    assert [text.partition(":")[0] for text in found.values()] == [
        key.partition(":")[0] for key in wanted
    ]


@PACKED
def test_json_lines_find_their_text(tmp_path, suffix):
    lines = [{"id": "1", "text": "one"}, {"id": "2", "text": "two\nlines"}]
    text = "\n".join(map(json.dumps, lines)) + "\n\n"
    path = write(tmp_path / f"a.jsonl{suffix}", text)
    assert list(read(path).values()) == ["one", "two\nlines"]
    assert list(read(path, text_field="id").values()) == ["1", "2"]
    assert not is_single_text(str(path))
    only = write(tmp_path / f"b.json{suffix}", json.dumps({"body": "x", "n": 1}))
    assert read(only) == {f"{only.name}:1": "x"}


@pytest.mark.parametrize(
    "lines, message",
    [
        (['{"text": "a"}', "{"], "line 2 is malformed"),
        (['{"text": "a"}', '["b"]'], "line 2 is a list; allowed: one JSON object"),
        (['{"text": "a"}', '{"body": "b"}'], "line 2 field 'text' is missing"),
        (['{"text": "a"}', '{"text": 3}'], "line 2 field 'text' is int"),
        (['{"a": "x", "b": "y"}'], "string fields a, b; .* --text-field"),
        (['{"a": 1}'], "string fields none"),
        ([r'{"text": "\ud800"}'], "line 1 is not valid Unicode"),
        (["\udcff"], "line 1 is malformed"),
    ],
)
def test_bad_json_lines_are_named(tmp_path, lines, message):
    text = "\n".join(lines).encode("utf-8", "surrogateescape")
    path = write(tmp_path / "a.jsonl", text)
    with pytest.raises(ConfigError, match=f"a.jsonl .*{message}"):
        read(path)


def test_an_endless_line_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LINE_BYTES", 2**17)
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n' + "x" * 2**18)
    with pytest.raises(ConfigError, match="line 2 is too long"):
        read(path)


def test_missing_and_empty_sources_fail_at_once(tmp_path):
    with pytest.raises(ConfigError, match="nowhere does not exist; allowed: stdlib"):
        open_source(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="is empty"):
        open_source(str(tmp_path))
    with pytest.raises(ConfigError, match="a.txt is empty"):
        open_source(str(write(tmp_path / "a.txt", "")))
    blank = write(tmp_path / "b.jsonl", "\n\n")
    with pytest.raises(ConfigError, match="holds no text"):
        read(blank)


BINARY = {
    "latin.txt": (b"caf\xe9 au lait", "not UTF-8 at byte 3"),
    "cut.txt": ("one 数".encode()[:-1], "not UTF-8 at byte 4"),
    "utf16.txt": ("é".encode() + "ab".encode("utf-16-le"), "NUL at byte 3"),
    "far.txt": (b"a" * 200_000 + b"\xff", "not UTF-8 at byte 200000"),
}


@PACKED
@pytest.mark.parametrize("name", BINARY)
def test_binary_files_are_named_or_left_out(tmp_path, name, suffix, capsys):
    contents, message = BINARY[name]
    path = write(tmp_path / f"{name}{suffix}", contents)
    with pytest.raises(ConfigError, match=f"{name}{suffix} is no text: {message}"):
        read(path)
    write(tmp_path / "good.txt", "good")
    assert read(tmp_path, skip_binary=True) == {"good.txt": "good"}
    assert "left out 1 files" in capsys.readouterr().err


def test_a_file_of_binary_alone_holds_no_text(tmp_path):
    path = write(tmp_path / "a.txt", b"\xff")
    with pytest.raises(ConfigError, match="holds no text"):
        read(path, skip_binary=True)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut", "altered", "not packed"])
def test_damaged_archives_are_named(tmp_path, suffix, damage):
    path = write(tmp_path / f"a.txt{suffix}", "".join(map(str, range(5000))))
    good = path.read_bytes()
    bad = {"cut": good[:-9], "altered": good[:20] + b"?" * 20, "not packed": b"text"}
    path.write_bytes(bad[damage])
    with pytest.raises(ConfigError, match=f"a.txt{suffix} cannot be unpacked"):
        read(path)


def test_archives_of_several_frames_are_whole(tmp_path):
    for suffix in (".gz", ".zst"):
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(PACK[suffix](b"one ") + PACK[suffix](b"two"))
        assert read(path) == {path.name: "one two"}


def test_stdlib_is_source_and_no_tests():
    texts = read("stdlib")
    assert {"argparse.py", "json/decoder.py"} <= set(texts)
    assert texts["json/decoder.py"] == Path(json.decoder.__file__).read_text("utf-8")
    assert list(texts) == sorted(texts)
    folders = {part for key in texts for part in key.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages"}
    assert source_bytes("stdlib") > 5e6


def test_size_of_files(tmp_path):
    write(tmp_path / "a.txt", "abc")
    write(tmp_path / "b.txt", "de")
    assert source_bytes(str(tmp_path)) == 5
    assert source_bytes("tfds:x") is None


class TinyText(tfds.core.GeneratorBasedBuilder):
    """A data set without download; its class registers itself."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "label": np.int64}
        features = tfds.features.FeaturesDict(features)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate(0, 5), "test": self._generate(5, 7)}

    def _generate(self, first, last):
        for index in range(first, last):
            yield index, {"text": f"row {index} é", "label": index}

    _generate_examples = _generate


@pytest.fixture
def tfds_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    return tmp_path


def test_tfds_needs_no_tensorflow(tfds_folder, capsys):
    train = read("tfds:tiny_text")
    assert sorted(train.values()) == [f"row {i} é" for i in range(5)]
    assert list(train)[0] == "tfds:tiny_text:0"
    again = read("tfds:tiny_text:train")
    assert list(again.values()) == list(train.values())
    assert sorted(read("tfds:tiny_text:test").values()) == ["row 5 é", "row 6 é"]
    assert len(read("tfds:tiny_text:1.0.0:train[:2]")) == 2
    assert (tfds_folder / "tiny_text" / "1.0.0").is_dir()
    assert "tensorflow" not in sys.modules
    assert capsys.readouterr().out == ""  # the command's output goes there alone


@pytest.mark.parametrize(
    "spec, options, message",
    [
        ("tfds:no_such_set", {}, "no_such_set cannot be read: .*not found"),
        ("tfds:tiny_text:nosplit", {}, "nosplit"),
        ("tfds:tiny_text", {"text_field": "label"}, "field 'label' is .*int"),
        ("tfds::", {}, "allowed: tfds:NAME"),
    ],
)
def test_bad_tfds_sources_are_named(tfds_folder, spec, options, message):
    with pytest.raises(ConfigError, match=message):
        read(spec, **options)


def test_missing_tensorflow_names_the_extra(tfds_folder, monkeypatch):
    def refuse(*_):
        raise ModuleNotFoundError("No module named 'tensorflow'", name="tensorflow")

    monkeypatch.setattr(TinyText, "_split_generators", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'gpt2_jax\[tf\]'"):
        read("tfds:tiny_text")


def test_older_text_sets_are_found_by_importing_them(tfds_folder):
    assert module._tfds_builder("c4/en").name == "c4"


def test_missing_datasets_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"pip install 'gpt2_jax\[hf\]'"):
        open_source("hf:org/name")
