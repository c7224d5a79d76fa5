"""`hf:` sources through the `datasets` library, on a data set made here."""

import json
import warnings

import pytest

from gpt2_jax.config import ConfigError
from gpt2_jax.data.prepare import prepare
from gpt2_jax.data.sources import open_source
from gpt2_jax.tokenizer import load_tokenizer

pytestmark = pytest.mark.filterwarnings("default")  # other people's


@pytest.fixture
def folder(tmp_path, monkeypatch):
    with warnings.catch_warnings(action="ignore"):
        import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / "set"
    path.mkdir()
    for split, count in (("train", 40), ("test", 2)):
        rows = [{"text": f"{split} row {i} é\n", "label": i} for i in range(count)]
        (path / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


def test_rows_become_documents(folder):
    train = list(open_source(f"hf:{folder}"))
    assert [text for _, text, _ in train] == [f"train row {i} é\n" for i in range(40)]
    assert train[3].key == f"hf:{folder}:3"
    test = open_source(f"hf:{folder}:test", text_field="text")
    assert [text for _, text, _ in test] == ["test row 0 é\n", "test row 1 é\n"]


def test_rows_are_prepared(folder, tmp_path):
    manifest = prepare([f"hf:{folder}"], tmp_path / "out", load_tokenizer("bytes"))
    assert sum(split.documents for split in manifest.splits.values()) == 40


@pytest.mark.parametrize(
    "tail, options, message",
    [
        (":nosplit", {}, "cannot be read: .*nosplit"),
        ("-absent", {}, "cannot be read"),
        ("", {"text_field": "label"}, "field 'label' is int"),
        ("", {"text_field": "body"}, "field 'body' is missing"),
    ],
)
def test_bad_sources_are_named(folder, tail, options, message):
    with pytest.raises(ConfigError, match=message):
        list(open_source(f"hf:{folder}{tail}", **options))
