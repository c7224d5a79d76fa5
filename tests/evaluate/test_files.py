import hashlib
import os
from pathlib import Path

import pytest

from gpt2_jax.config import ConfigError
from gpt2_jax.evaluate.files import FILES, DataFile, find, fingerprint, verify

DATA = Path(os.environ.get("GPT2_JAX_DATA", Path(__file__).parents[3] / "shared/data"))
TEXT = b"one\ntwo\n"
SHA256 = hashlib.sha256(TEXT).hexdigest()


def a_file(size: int | None = len(TEXT), sha256: str | None = SHA256) -> DataFile:
    return DataFile("a.txt", "sub", size, sha256, "the shop")


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / "a.txt"
    path.write_bytes(TEXT)
    return path


def test_every_column_has_its_file():
    columns = "lambada wikitext2 wikitext2_raw wikitext103 ptb ptb_valid enwik8 text8"
    assert set(FILES) >= {*columns.split(), "cbt_cn", "cbt_ne", "lm1b"}
    assert all("\n" not in file.where for file in FILES.values())
    assert all(f.sha256 is None or len(f.sha256) == 64 for f in FILES.values())
    assert "LDC" in FILES["ptb"].where


def test_a_file_is_found_in_the_folder_or_in_its_own(tmp_path: Path):
    assert find(tmp_path, a_file()) is None
    (tmp_path / "a.txt").write_bytes(TEXT)
    assert find(tmp_path, a_file()) == tmp_path / "a.txt"
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_bytes(TEXT)
    assert find(tmp_path, a_file()) == tmp_path / "sub" / "a.txt"


def test_of_two_files_of_one_name_that_of_the_right_size_is_found(tmp_path: Path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_bytes(b"another text\n")
    (tmp_path / "a.txt").write_bytes(TEXT)
    assert find(tmp_path, a_file()) == tmp_path / "a.txt"


def test_a_folder_of_the_files_name_is_no_file(tmp_path: Path):
    (tmp_path / "enwik8").mkdir()
    assert find(tmp_path, FILES["enwik8"]) is None


def test_the_very_file_carries_no_mark(written: Path):
    assert fingerprint(written) == SHA256
    assert verify(written, a_file(), any_data=False) == ""


def test_another_checksum_is_refused_and_marked_with_any_data(written: Path):
    other = a_file(sha256="ab" * 32)
    with pytest.raises(ConfigError, match=f"{SHA256}.*allowed: abab.*--any-data"):
        verify(written, other, any_data=False)
    assert verify(written, other, any_data=True) == f"other data: sha256 {SHA256[:8]}.."


def test_a_truncated_file_is_refused_by_its_size_and_last_line(written: Path):
    with pytest.raises(ConfigError, match="8 bytes and ends in line 2.*the shop"):
        verify(written, a_file(size=100), any_data=False)
    mark = verify(written, a_file(size=100, sha256=None), any_data=True)
    assert mark == f"other data: sha256 {SHA256[:8]}.."


def test_a_file_without_a_canonical_checksum_is_accepted_and_marked(written: Path):
    mark = verify(written, a_file(size=None, sha256=None), any_data=False)
    assert mark == "checksum not known"


@pytest.mark.parametrize("any_data", [True, False])
def test_an_empty_file_is_refused_in_any_case(tmp_path: Path, any_data: bool):
    (tmp_path / "a.txt").touch()
    with pytest.raises(ConfigError, match="empty: it has no line 1"):
        verify(tmp_path / "a.txt", a_file(), any_data)


@pytest.mark.parametrize("name", FILES)
def test_the_real_file_is_the_one_named(name: str):
    path = find(DATA, FILES[name])
    if path is None:
        pytest.skip("the file is not there")
    known = FILES[name].sha256 is not None
    assert verify(path, FILES[name], any_data=False) == (
        "" if known else "checksum not known"
    )
