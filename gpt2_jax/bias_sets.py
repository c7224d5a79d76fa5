"""Three public bias sets: Winogender, WinoBias, CrowS-Pairs; read, check, score.

Files lie in DIR/bias/NAME or DIR/NAME, unchanged but for a set's name before theirs:
`FILES` says where each comes from. Every score compares total log-likelihoods of
sentences that differ in few words; a tie counts for neither side.
"""

import csv
import hashlib
import io
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from gpt2_jax.config import ConfigError, check

# Give the total log-likelihood of each text from the start of a document, in nats.
Scorer = Callable[[Sequence[str]], Sequence[float]]


class Source(NamedTuple):
    """Where a file comes from, and what is in it."""

    origin: str
    sha256: str


_WINOGENDER = "of github.com/rudinger/winogender-schemas"
_WINOBIAS = "of github.com/uclanlp/corefBias"
_CROWS_PAIRS = "of github.com/nyu-mll/crows-pairs"
_SENTENCES = "winogender_all_sentences.tsv"
_STATS = "winogender_occupations-stats.tsv"
_PAIRS = "crows_pairs_anonymized.csv"
_TWINS = {  # WinoBias: side, type, split; a twin follows the other
    "pro 1 dev": "dd55a0d220fe4c0ceb63dd4648223fb4fe1a58d5ad95c116a002ad24b0e292a5",
    "anti 1 dev": "a4e0ebae344e78b56f657a42e8ae684b9db7747d177c5e7149c0907ebb7f3bf6",
    "pro 1 test": "db7838907238a758eeb5779e48f38c013b892910d6fe864456c59f04245c6689",
    "anti 1 test": "331db5bd74bfefebf146a60b67645152a4a1991570d2a56f57154103ac361dd2",
    "pro 2 dev": "8f0250de723cea9328e3eaf7169e07936f01aa5909ce7aa580db66eb803f4e86",
    "anti 2 dev": "763ad829ad724f9a85ead689ba8ca69072020cb1238def6210f0fc6a47b97e59",
    "pro 2 test": "ea1c1fd94fa612e3cc44d7fa3cc4cb76021bb63fdf94f9826f430051e9052438",
    "anti 2 test": "336571ac1ea8c06cd2aba8e5dd2bd98e00acc0c48da3e4ec5ec7e54eb2633a8f",
}


def _twin(name: str) -> str:
    side, kind, split = name.split()
    return f"{side}_stereotyped_type{kind}.txt.{split}"


FILES = {
    _SENTENCES: Source(
        f"data/all_sentences.tsv {_WINOGENDER}",
        "bd69da16bf228cb8df63fd0843aec2d8b5c36a7f21bf8c7b168bcc83932556c8",
    ),
    _STATS: Source(
        f"data/occupations-stats.tsv {_WINOGENDER}",
        "3f7f37c16381a70571356982ea7fe613ac700ad04a6d3b19b9f2be18248df567",
    ),
    **{
        f"winobias_{_twin(name)}": Source(
            f"WinoBias/wino/data/{_twin(name)} {_WINOBIAS}", sha256
        )
        for name, sha256 in _TWINS.items()
    },
    _PAIRS: Source(
        f"data/crows_pairs_anonymized.csv {_CROWS_PAIRS}",
        "dfb36986ce0502abbaf7055b9176da3d08d48e07df1251991b5dfbcbceab9d0c",
    ),
}
# What is scored together, and the files it needs.
PARTS = {
    ("winogender", ""): (_SENTENCES, _STATS),
    **{
        ("winobias", f"type {kind}"): tuple(
            f"winobias_{_twin(name)}" for name in _TWINS if f" {kind} " in name
        )
        for kind in (1, 2)
    },
    ("crows_pairs", ""): (_PAIRS,),
}
GENDERS = ("female", "male", "neutral")
TABS: dict[str, Any] = dict(delimiter="\t", quoting=csv.QUOTE_NONE)
OWN = "pronoun of the occupation"
MORE = {
    "winobias": "share where pro-stereotyped",
    "crows_pairs": "share where more stereotypical",
}


class Schema(NamedTuple):
    """A Winogender sentence with she and with he."""

    occupation: str
    of_occupation: bool  # the pronoun's person; else the other participant
    female: str
    male: str


class Pair(NamedTuple):
    """Two sentences, the stereotyped one first."""

    kind: str  # type 1 of WinoBias, or CrowS-Pairs' bias type
    more: str
    less: str


class Row(NamedTuple):
    """One score, or why there is none."""

    set: str
    part: str
    measure: str = ""
    value: float | None = None  # None: not run, or not defined
    items: int = 0  # pairs or occupations it is of
    note: str = ""  # "not run: ..", other data


class Part(NamedTuple):
    """What is scored together: pairs or schemas, or why there are none."""

    set: str
    name: str
    pairs: list[Pair]
    schemas: list[Schema]
    women: dict[str, float]  # an occupation's share of them, in percent
    note: str  # says which files are other data
    missing: list[str]  # what to put where; empty: all files are there


class Scores(NamedTuple):
    """What a model makes of the sets."""

    rows: list[Row]
    winogender: dict[str, float]  # by occupation: mean log p(she) - log p(he), in nats


def read_sets(directory: Path | None, *, any_data: bool = False) -> list[Part]:
    """Return the sets that lie in `directory`; what is missing has a note instead.

    Raises
    ------
    ConfigError
        If a file is empty, cut off or malformed (the message names the line), or has
        another sha256 and `any_data` is off; with it, the part's note says so.
    """
    if directory is not None and not directory.is_dir():
        found = f"--data-dir {str(directory)!r} is no directory"
        raise ConfigError(f"{found}; allowed: a folder with the files of docs/bias.md")
    return [
        _read_part(directory, *key, names, any_data) for key, names in PARTS.items()
    ]


def score_sets(parts: Sequence[Part], score: Scorer) -> Scores:
    """Return every part's rows, in order, and Winogender's differences.

    A sentence that `score` refuses, such as one beyond the context, makes its part's
    row "not run".
    """
    scores = Scores([], {})
    for part in parts:
        totals, notes = [], part.missing
        try:
            totals = totals if part.missing else score(_sentences(part))
        except ConfigError as error:
            notes = [str(error)]
        if notes:
            rows = [Row(part.set, part.name, note=f"not run: {x}") for x in notes]
            scores.rows.extend(rows)
            continue
        firsts, seconds = np.asarray(totals, np.float64).reshape(-1, 2).T
        differences = firsts - seconds
        if part.schemas:
            scores.winogender.update(_by_occupation(part.schemas, differences))
            scores.rows.extend(_score_schemas(part, differences))
        else:
            scores.rows.extend(_score_pairs(part, differences))
    return scores


def read_winogender(sentences: Path, stats: Path) -> tuple[list[Schema], dict]:
    """Return the schemas, and each occupation's share of women (BLS) in percent."""
    women = _read_women(stats)
    forms: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    lines: dict[tuple[str, ...], int] = {}
    for number, (name, sentence) in _read_table(
        sentences, ["sentid", "sentence"], **TABS
    ):
        where = f"{sentences} line {number}"
        *key, gender, end = name.split(".") if name.count(".") == 4 else [""] * 5
        good = gender in GENDERS and key[-1] in ("0", "1") and end == "txt"
        form = "OCCUPATION.PARTICIPANT.0|1.female|male|neutral.txt"
        check(good, f"{where}: sentid", name, form)
        check(key[0] in women, f"{where}: occupation", key[0], f"those of {stats}")
        check(gender not in forms[tuple(key)], where, name, "each sentid once")
        check(bool(sentence.strip()), f"{where}: sentence", sentence, "a sentence")
        forms[tuple(key)][gender] = sentence
        lines[tuple(key)] = number
    for key, found in forms.items():
        where, wanted = f"{sentences} line {lines[key]}", "female and male, once each"
        check({"female", "male"} <= set(found), where, ".".join(key), wanted)
    schemas = [
        Schema(key[0], key[2] == "0", found["female"], found["male"])
        for key, found in forms.items()
    ]
    return schemas, women


def read_winobias(pro: Path, anti: Path, kind: str) -> list[Pair]:
    """Return the pairs of two files, one sentence a line, without numbers and brackets.

    Line n of one file is the twin of line n of the other.
    """
    firsts, seconds = _read_numbered(pro), _read_numbered(anti)
    if len(firsts) != len(seconds):
        short, long = sorted((len(firsts), len(seconds)))
        name = pro if len(firsts) == short else anti
        raise ConfigError(
            f"{name} ends after line {short}, its twin after line {long}; allowed: as "
            "many lines in both; download it again"
        )
    return [Pair(kind, *both) for both in zip(firsts, seconds, strict=True)]


def read_crows_pairs(path: Path) -> list[Pair]:
    """Return the pairs, the more stereotypical sentence first."""
    head = ["", "sent_more", "sent_less", "stereo_antistereo", "bias_type"]
    head += ["annotations", "anon_writer", "anon_annotators"]
    pairs = []
    for number, values in _read_table(path, head):
        _, more, less, direction, kind, *_ = values
        where = f"{path} line {number}"
        allowed = "stereo or antistereo"
        check(direction in allowed.split(" or "), where, direction, allowed)
        good = all(text.strip() for text in (more, less, kind))
        check(good, where, values[1:5], "two sentences and a bias type")
        pairs.append(Pair(kind, more, less))
    return pairs


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Return Pearson's r; None where one of the two does not vary."""
    x, y = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    return float(np.corrcoef(x, y)[0, 1])


def _read_part(
    directory: Path | None, set_name: str, name: str, files: Sequence[str], any_data
) -> Part:
    found = {file: _find(directory, file) for file in files}
    where = directory or "a folder and name it with --data-dir"
    missing = [
        f"put {file} from {FILES[file].origin} into {where}"
        for file, path in found.items()
        if path is None
    ]
    if missing:
        return Part(set_name, name, [], [], {}, "", missing)
    schemas, pairs, women = [], [], {}
    paths = [path for path in found.values() if path is not None]
    if set_name == "winogender":
        schemas, women = read_winogender(*paths)
    elif set_name == "winobias":
        for pro, anti in zip(paths[::2], paths[1::2], strict=True):
            pairs += read_winobias(pro, anti, name)
    else:
        pairs = read_crows_pairs(*paths)
    others = [path.name for path in paths if _is_other(path, any_data=any_data)]
    note = f"other data: {', '.join(others)}" if others else ""
    return Part(set_name, name, pairs, schemas, women, note, [])


def _find(directory: Path | None, name: str) -> Path | None:
    if directory is None:
        return None
    places = [directory / "bias" / name, directory / name]
    return next((path for path in places if path.is_file()), None)


def _is_other(path: Path, *, any_data: bool) -> bool:
    """Return whether a file is not the published one; refuse it without `any_data`."""
    source = FILES[path.name]
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != source.sha256 and not any_data:
        raise ConfigError(
            f"{path} has sha256 {found}; allowed: {source.sha256}; take "
            f"{source.origin}, or score this one with --any-data"
        )
    return found != source.sha256


def _read_text(path: Path) -> str:
    """Return a file's text with plain line ends; it is neither empty nor cut off."""
    contents = path.read_bytes()
    last = contents.count(b"\n") + 1
    remedy = "download it again"
    if not contents.strip():
        raise ConfigError(f"{path} line 1: the file is empty; {remedy}")
    try:
        text = contents.decode()
    except UnicodeDecodeError as error:
        number = contents.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path} line {number} is not UTF-8; {remedy}") from None
    if not text.endswith("\n"):
        found = "has no line end: the file is cut off"
        raise ConfigError(f"{path} line {last} {found}; {remedy}, or end the line")
    return text.replace("\r\n", "\n")


def _read_numbered(path: Path) -> list[str]:
    sentences = []
    for number, line in enumerate(_read_text(path).removesuffix("\n").split("\n"), 1):
        first, _, rest = line.partition(" ")
        text = " ".join(rest.replace("[", "").replace("]", "").split())
        good = first == str(number) and bool(text) and rest.count("[") >= 2
        good = good and rest.count("[") == rest.count("]")
        allowed = f"'{number} ' and a sentence with [person] and [pronoun]"
        check(good, f"{path} line {number}", line, allowed)
        sentences.append(text)
    return sentences


def _read_women(path: Path) -> dict[str, float]:
    women = {}
    head = ["occupation", "bergsma_pct_female", "bls_pct_female", "bls_year"]
    for number, (occupation, _, share, _) in _read_table(path, head, **TABS):
        where = f"{path} line {number}"
        try:
            value = float(share)
        except ValueError:
            value = math.nan
        check(0 <= value <= 100, f"{where}: bls_pct_female", share, "a number 0 .. 100")
        check(occupation not in women, where, occupation, "each occupation once")
        women[occupation] = value
    return women


def _read_table(
    path: Path, head: list[str], **dialect: Any
) -> Iterator[tuple[int, list[str]]]:
    """Yield the rows after the header, each with the number of its last line."""
    reader = csv.reader(
        io.StringIO(_read_text(path), newline=""), strict=True, **dialect
    )
    count = 0
    try:
        for count, values in enumerate(reader):
            where = f"{path} line {reader.line_num}"
            if not count:
                check(values == head, where, values, f"the header {head}")
                continue
            columns = f"{len(head)} columns"
            check(len(values) == len(head), where, f"{len(values)} columns", columns)
            yield reader.line_num, values
    except csv.Error as error:
        where = f"{path} line {reader.line_num}"
        raise ConfigError(f"{where} is no CSV: {error}; download it again") from None
    if not count:
        raise ConfigError(f"{path} line 1 is the last; download the file again")


def _sentences(part: Part) -> list[str]:
    """Return the sentences to score, two and two: she and he, or more and less."""
    twos = [pair[1:] for pair in part.pairs] + [x[2:] for x in part.schemas]
    return [text for two in twos for text in two]


def _by_occupation(
    schemas: Sequence[Schema], differences: Float[np.ndarray, " n"]
) -> dict[str, float]:
    found = defaultdict(list)
    for schema, difference in zip(schemas, differences, strict=True):
        found[schema.occupation].append(float(difference))
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


def _score_schemas(part: Part, differences: Float[np.ndarray, " n"]) -> Iterator[Row]:
    own = [schema.of_occupation for schema in part.schemas]
    for name, chosen in (("all sentences", [True] * len(own)), (OWN, own)):
        schemas = list(itertools.compress(part.schemas, chosen))
        means = _by_occupation(schemas, differences[np.array(chosen)])
        women = [part.women[occupation] for occupation in means]
        r = correlation(list(means.values()), women)
        share = _mean([value > 0 for value in means.values()])
        said = (("correlation with share of women", r), ("share where she > he", share))
        for measure, value in said:
            yield Row(part.set, name, measure, value, len(means), part.note)


def _score_pairs(part: Part, differences: Float[np.ndarray, " n"]) -> Iterator[Row]:
    kinds = [pair.kind for pair in part.pairs]
    names = [part.name] if part.name else ["overall", *sorted(set(kinds))]
    for name in names:
        chosen = np.array([name in ("overall", kind) for kind in kinds])
        some = differences[chosen]
        row = Row(part.set, name, items=len(some), note=part.note)
        yield row._replace(measure=f"{MORE[part.set]} likelier", value=_mean(some > 0))
        if part.set == "crows_pairs":
            value = _mean(np.abs(some))
            yield row._replace(
                measure="mean difference without sign, nats", value=value
            )


def _mean(values) -> float | None:
    return float(np.mean(values)) if len(values) else None
