"""The files of the zero-shot columns: names, sizes, checksums, where people get them.

Nothing is downloaded. A person puts the files into one folder, plainly or each in the
sub-folder named here; WikiText-2 and WikiText-103 share a name and need theirs.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

from gpt2_jax.config import ConfigError


class DataFile(NamedTuple):
    """One file: what it is called, how it is recognised, where it comes from."""

    name: str
    folder: str  # sub-folder that it may also lie in
    size: int | None  # bytes; None: not known
    sha256: str | None  # None: no canonical one is known
    where: str  # one line for the person who gets it


WIKITEXT = "https://s3.amazonaws.com/research.metamind.io/wikitext"
PTB = (
    "data/ of http://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz; "
    "text under the LDC's licence: never pass it on"
)
CBT = "CBTest/data/ of http://www.thespermwhale.com/jaseweston/babi/CBTest.tgz"

# Sizes and checksums are those that several public copies agree on.
FILES = {
    "lambada": DataFile(
        "lambada_test.jsonl",
        "lambada",
        1_819_752,
        "4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226",
        "https://openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl",
    ),
    "wikitext2": DataFile(
        "wiki.test.tokens",
        "wikitext2_tokens",
        1_256_449,
        "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        f"{WIKITEXT}/wikitext-2-v1.zip; also test.txt of "
        "github.com/pytorch/examples, word_language_model/data/wikitext-2",
    ),
    "wikitext2_raw": DataFile(
        "wiki.test.raw",
        "wikitext2_raw",
        1_290_590,
        "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
        f"{WIKITEXT}/wikitext-2-raw-v1.zip",
    ),
    "wikitext103": DataFile(
        "wiki.test.tokens",
        "wikitext103_tokens",
        1_281_077,
        "56db52eb157b1ab5c89646eef70510c1eca6e12a3bfdb99f0d6b05b4eacb75b9",
        f"{WIKITEXT}/wikitext-103-v1.zip; the checksum is that of a rebuilt copy: "
        "if the archive's own differs, pass --any-data",
    ),
    "ptb": DataFile(
        "ptb.test.txt",
        "ptb",
        449_945,
        "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",
        PTB,
    ),
    "ptb_valid": DataFile(
        "ptb.valid.txt",
        "ptb",
        399_782,
        "c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",
        PTB,
    ),
    "enwik8": DataFile(
        "enwik8",
        "enwik8",
        100_000_000,
        "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
        "http://mattmahoney.net/dc/enwik8.zip",
    ),
    "text8": DataFile(
        "text8", "text8", 100_000_000, None, "http://mattmahoney.net/dc/text8.zip"
    ),
    "cbt_cn": DataFile("cbtest_CN_valid_2000ex.txt", "cbt", None, None, CBT),
    "cbt_ne": DataFile("cbtest_NE_valid_2000ex.txt", "cbt", None, None, CBT),
    "cbt_cn_test": DataFile("cbtest_CN_test_2500ex.txt", "cbt", None, None, CBT),
    "cbt_ne_test": DataFile("cbtest_NE_test_2500ex.txt", "cbt", None, None, CBT),
    "lm1b": DataFile(
        "news.en.heldout-00000-of-00050",
        "lm1b",
        None,
        None,
        "heldout-monolingual.tokenized.shuffled/ of http://www.statmt.org/"
        "lm-benchmark/1-billion-word-language-modeling-benchmark-r13output.tar.gz",
    ),
}


def find(data_dir: Path, file: DataFile) -> Path | None:
    """Return where `file` lies, in the folder or in its sub-folder; None: nowhere.

    Where both have the name, the one of the right size is taken, else the sub-folder's.
    """
    paths = [data_dir / file.folder / file.name, data_dir / file.name]
    paths = [path for path in paths if path.is_file()]
    right = [path for path in paths if path.stat().st_size == file.size]
    return next(iter(right + paths), None)


def fingerprint(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal, read in pieces."""
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def verify(path: Path, file: DataFile, any_data: bool) -> str:
    """Return "" for the very file, else the mark that its results carry.

    Raises
    ------
    ConfigError
        If the file is empty; if it is another and not `any_data`.
    """
    size = path.stat().st_size
    cure = f"get {file.name} again ({file.where}), or pass --any-data"
    if not size:
        raise ConfigError(f"{path} is empty: it has no line 1; {cure}")
    if file.size not in (None, size) and not any_data:
        found = f"{path} has {size:,} bytes and ends in line {_count_lines(path):,}"
        raise ConfigError(f"{found}; allowed: {file.size:,} bytes; {cure}")
    found = fingerprint(path)
    if file.sha256 is None:
        known = file.size in (None, size)
        return "checksum not known" if known else f"other data: sha256 {found[:8]}.."
    if found == file.sha256:
        return ""
    if not any_data:
        wrong = f"{path} has sha256 {found}; allowed: {file.sha256}"
        raise ConfigError(f"{wrong}; {cure}")
    return f"other data: sha256 {found[:8]}.."


def read_utf8(path: Path) -> str:
    """Return the text of a file.

    Raises
    ------
    ConfigError
        If it is empty or a line is not UTF-8; the message says which.
    """
    data = path.read_bytes()
    if not data:
        raise ConfigError(f"{path} is empty: it has no line 1; get the file again")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = 1 + data.count(b"\n", 0, error.start)
        wrong = f"{path}, line {line:,} is not UTF-8"
        raise ConfigError(f"{wrong}; get the file again") from None


def _count_lines(path: Path) -> int:
    """Return the number of the line that a file ends in."""
    with path.open("rb") as opened:
        return sum(1 for _ in opened)
