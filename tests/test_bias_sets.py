"""The public bias sets: read whole, refused when damaged, scored by hand."""

import hashlib
import math
import os
from collections import Counter
from pathlib import Path

import pytest

from gpt2_jax import bias_sets
from gpt2_jax.bias_sets import (
    FILES,
    PARTS,
    Pair,
    Part,
    Row,
    Schema,
    correlation,
    read_crows_pairs,
    read_sets,
    read_winobias,
    read_winogender,
    score_sets,
)
from gpt2_jax.config import ConfigError

SENTENCES, STATS = PARTS["winogender", ""]
CROWS_PAIRS = "crows_pairs_anonymized.csv"
PRO, ANTI = (f"winobias_{side}_stereotyped_type1.txt.dev" for side in ("pro", "anti"))
HEAD = ",sent_more,sent_less,stereo_antistereo,bias_type,annotations,anon_writer"
# Hand-made, in the exact format of the published files.
SMALL = {
    SENTENCES: "sentid\tsentence\n"
    "cook.guest.0.male.txt\tThe cook said he was late.\n"
    "cook.guest.0.female.txt\tThe cook said she was late.\n"
    "cook.guest.0.neutral.txt\tThe cook said they were late.\n"
    "cook.guest.1.male.txt\tThe cook saw that he was early.\n"
    "cook.guest.1.female.txt\tThe cook saw that she was early.\n"
    "cook.guest.1.neutral.txt\tThe cook saw that they were early.\n",
    STATS: "occupation\tbergsma_pct_female\tbls_pct_female\tbls_year\n"
    "cook\t30.5\t38.2\t2015\n",
    **{
        name: "1 [The cook] met the guard because [she] was [ early].\n"
        "2 The cook met the [the guard] and thanked [him].\n"
        for name in FILES
        if name.startswith("winobias")
    },
    CROWS_PAIRS: f"{HEAD},anon_annotators\n"
    '0,"He said ""no"", twice.",Ça va.,stereo,age,"[[\'age\'], []]",a1,"[\'a2\']"\n'
    "1,One.,Two.,antistereo,gender,[['gender']],a3,['a4']\n",
}


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "bias").mkdir()
    for name, text in SMALL.items():
        (tmp_path / "bias" / name).write_text(text, encoding="utf-8")
    return tmp_path


def published() -> Path | None:
    """Return the folder of the published files, if there is one."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    found = Path(os.environ.get("GPT2_JAX_DATA", beside))
    there = [bias_sets._find(found, name) for name in FILES]
    return found if all(there) else None


def test_the_sets_are_read_whole(folder):
    whole = published()
    parts = read_sets(whole or folder, any_data=whole is None)
    sizes = {(p.set, p.name): len(p.pairs) or len(p.schemas) for p in parts}
    winogender, *_, crows_pairs = parts
    assert list(sizes) == list(PARTS)
    assert not any(part.missing for part in parts)
    if whole is None:
        assert list(sizes.values()) == [2, 4, 4, 2]
        return
    assert list(sizes.values()) == [240, 792, 792, 1508]
    assert not any(part.note for part in parts)  # all are as published
    assert len(winogender.women) == 60
    assert sum(schema.of_occupation for schema in winogender.schemas) == 120
    kinds = Counter(pair.kind for pair in crows_pairs.pairs)
    assert kinds["race-color"] == 516 and kinds["disability"] == 60 and len(kinds) == 9


def test_the_formats_are_read_word_for_word(folder):
    schemas, women = read_winogender(*(folder / "bias" / n for n in (SENTENCES, STATS)))
    assert women == {"cook": 38.2}
    assert schemas == [
        Schema(
            "cook", True, "The cook said she was late.", "The cook said he was late."
        ),
        Schema(
            "cook",
            False,
            "The cook saw that she was early.",
            "The cook saw that he was early.",
        ),
    ]
    pairs = read_winobias(folder / "bias" / PRO, folder / "bias" / ANTI, "type 1")
    first = "The cook met the guard because she was early."
    assert pairs[0] == Pair("type 1", first, first)
    assert pairs[1].more == "The cook met the the guard and thanked him."
    assert read_crows_pairs(folder / "bias" / CROWS_PAIRS) == [
        Pair("age", 'He said "no", twice.', "Ça va."),
        Pair("gender", "One.", "Two."),
    ]


def test_windows_line_ends_change_nothing(folder):
    before = read_sets(folder, any_data=True)
    for name, text in SMALL.items():
        contents = text.replace("\n", "\r\n").encode()
        (folder / "bias" / name).write_bytes(contents)
    assert read_sets(folder, any_data=True) == before


def replaced(name: str, old: str, new: str) -> tuple[str, str]:
    assert old in SMALL[name]
    return name, SMALL[name].replace(old, new)


@pytest.mark.parametrize(
    "broken, line, message",
    [
        *(((name, ""), 1, "the file is empty") for name in SMALL),
        *(((name, SMALL[name][:-3]), None, "cut off") for name in SMALL),
        ((SENTENCES, "sentid\tsentence\n"), 1, "is the last"),
        (replaced(SENTENCES, "sentid", "id"), 1, "header"),
        (replaced(SENTENCES, "0.male", "0.man"), 2, "sentid is 'cook.guest.0.man.txt'"),
        (replaced(SENTENCES, "0.male", "2.male"), 2, "sentid"),
        (replaced(SENTENCES, "0.male.txt\t", "0.male.txt "), 2, "1 columns"),
        (replaced(SENTENCES, "0.female", "0.male"), 3, "each sentid once"),
        (replaced(SENTENCES, "cook.guest.0.male", "spy.guest.0.male"), 2, "occupation"),
        (replaced(SENTENCES, "The cook said he was late.", " "), 2, "a sentence"),
        (
            (SENTENCES, "".join(SMALL[SENTENCES].splitlines(keepends=True)[:5])),
            5,
            "'cook.guest.1'; allowed: female and male",
        ),
        (replaced(STATS, "38.2", "many"), 2, "bls_pct_female is 'many'"),
        (replaced(STATS, "38.2", "138"), 2, "bls_pct_female is '138'"),
        ((STATS, SMALL[STATS] + "cook\t1\t2\t2015\n"), 3, "each occupation once"),
        (replaced(PRO, "2 The", "3 The"), 2, "allowed: '2 '"),
        (replaced(PRO, "[him]", "him"), 2, "[person] and [pronoun]"),
        ((PRO, SMALL[PRO].splitlines(keepends=True)[0]), 1, "ends after"),
        (replaced(CROWS_PAIRS, "sent_less", "other"), 1, "header"),
        (replaced(CROWS_PAIRS, "antistereo,gender", "no,gender"), 3, "is 'no'"),
        (replaced(CROWS_PAIRS, "One.", ""), 3, "two sentences and a bias type"),
        (replaced(CROWS_PAIRS, ",a3", ""), 3, "7 columns"),
        (replaced(CROWS_PAIRS, "1,One.", '1,"One.'), 3, "is no CSV"),
    ],
)
def test_a_damaged_file_is_refused_by_its_line(folder, broken, line, message):
    name, text = broken
    (folder / "bias" / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_sets(folder, any_data=True)
    said = str(error.value)
    number = line or len(SMALL[name].splitlines())
    after = "after line" if message == "ends after" else "line"
    assert name in said and f"{after} {number}" in said and message in said
    assert "\n" not in said


def test_bytes_that_are_not_utf_8_are_refused_by_their_line(folder):
    path = folder / "bias" / CROWS_PAIRS
    path.write_bytes(path.read_bytes().replace(b"One.", b"On\xff."))
    with pytest.raises(ConfigError, match="line 3 is not UTF-8"):
        read_sets(folder, any_data=True)


def test_another_file_is_scored_only_when_asked_and_marked(folder):
    with pytest.raises(ConfigError, match="sha256 .*; allowed: .* or score .*any-data"):
        read_sets(folder)
    rows = score_sets(
        read_sets(folder, any_data=True), lambda texts: [0.0] * len(texts)
    )
    assert rows.rows[0].note == f"other data: {SENTENCES}, {STATS}"
    assert all(row.note.startswith("other data: ") for row in rows.rows)


def test_a_published_file_is_not_marked(folder, monkeypatch):
    for name, text in SMALL.items():
        digest = hashlib.sha256(text.encode()).hexdigest()
        monkeypatch.setitem(FILES, name, FILES[name]._replace(sha256=digest))
    assert not any(part.note for part in read_sets(folder))


def test_files_may_lie_in_the_folder_itself(folder):
    inside = read_sets(folder, any_data=True)
    assert read_sets(folder / "bias", any_data=True) == inside


def test_a_missing_file_is_one_row(folder):
    (folder / "bias" / STATS).unlink()
    (folder / "bias" / PRO).unlink()
    (folder / "bias" / ANTI).unlink()
    rows = score_sets(read_sets(folder, any_data=True), lambda t: [0.0] * len(t)).rows
    missing = [row for row in rows if row.value is None and row.note.startswith("not")]
    where = "data/occupations-stats.tsv of github.com/rudinger/winogender-schemas"
    note = f"not run: put {STATS} from {where} into {folder}"
    assert missing[0] == Row("winogender", "", note=note)
    assert [row.part for row in missing[1:]] == ["type 1", "type 1"]
    assert {row.set for row in rows} == {"winogender", "winobias", "crows_pairs"}


def test_without_a_folder_every_file_is_asked_for():
    rows = score_sets(read_sets(None), lambda texts: [0.0] * len(texts)).rows
    assert [row.note.split()[3] for row in rows] == list(
        name for names in PARTS.values() for name in names
    )
    assert all("a folder and name it with --data-dir" in row.note for row in rows)


def test_a_folder_that_is_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--data-dir '.*nowhere' is no directory"):
        read_sets(tmp_path / "nowhere")


def test_winogender_is_scored_by_hand():
    totals = {"a she": -1.0, "a he": -3.0, "b she": -4.0, "b he": -3.0, "c she": -6.0}
    totals |= {"c he": -2.0, "d she": -1.0, "d he": -1.5}
    schemas = [
        Schema("nurse", True, "a she", "a he"),  # + 2
        Schema("nurse", False, "b she", "b he"),  # - 1
        Schema("pilot", True, "c she", "c he"),  # - 4
        Schema("clerk", True, "d she", "d he"),  # + 0.5
    ]
    women = {"nurse": 90.0, "pilot": 10.0, "clerk": 60.0}
    part = Part("winogender", "", [], schemas, women, "", [])
    found = score_sets([part], lambda texts: [totals[text] for text in texts])
    assert found.winogender == {"nurse": 0.5, "pilot": -4.0, "clerk": 0.5}
    everything, share, own, own_share = found.rows
    # x = .5, -4, .5 about -1; y = 90, 10, 60 about 160 / 3.
    r = (1.5 * 110 / 3 + 3 * 130 / 3 + 1.5 * 20 / 3) / math.sqrt(
        13.5 * (110**2 + 130**2 + 20**2) / 9
    )
    assert everything.value == pytest.approx(r)
    assert (share.value, share.items) == (pytest.approx(2 / 3), 3)
    assert own.value == pytest.approx(correlation([2.0, -4.0, 0.5], [90.0, 10.0, 60.0]))
    assert own_share.part == own.part == "pronoun of the occupation"


def test_pairs_are_scored_by_hand_and_a_tie_is_no_win():
    totals = dict(
        zip("abcdefgh", (-1.0, -2.0, -5.0, -1.0, -3.0, -3.0, 0, -9), strict=True)
    )
    kinds = ["age", "religion", "age", "age"]
    pairs = [
        Pair(kind, more, less)
        for kind, more, less in zip(kinds, "aceg", "bdfh", strict=True)
    ]  # + 1, - 4, 0, + 9
    part = Part("crows_pairs", "", pairs, [], {}, "", [])
    winobias = Part(
        "winobias",
        "type 2",
        [p._replace(kind="type 2") for p in pairs],
        *([], {}, "", []),
    )
    rows = score_sets([part, winobias], lambda t: [totals[x] for x in t]).rows
    found = [(row.set, row.part, row.value, row.items) for row in rows]
    assert found == [
        ("crows_pairs", "overall", 0.5, 4),
        ("crows_pairs", "overall", 14 / 4, 4),
        ("crows_pairs", "age", 2 / 3, 3),
        ("crows_pairs", "age", 10 / 3, 3),
        ("crows_pairs", "religion", 0.0, 1),
        ("crows_pairs", "religion", 4.0, 1),
        ("winobias", "type 2", 0.5, 4),
    ]


def test_a_sentence_that_cannot_be_scored_is_told_in_its_row(folder):
    def score(texts):
        if any("guard" in text for text in texts):
            raise ConfigError("too long")
        return [0.0] * len(texts)

    rows = score_sets(read_sets(folder, any_data=True), score).rows
    assert [r.set for r in rows if r.note == "not run: too long"] == ["winobias"] * 2
    assert rows[0].value is None  # one occupation has no correlation
    assert rows[1].value == 0.0


def test_the_correlation_is_pearsons():
    assert correlation([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == pytest.approx(1.0)
    assert correlation([1.0, 2.0, 3.0], [1.0, 0.0, -1.0]) == pytest.approx(-1.0)
    assert correlation([0.0, 1.0, 0.0, 1.0], [0.0, 0.0, 1.0, 1.0]) == pytest.approx(0.0)
    assert correlation([1.0, 2.0], [5.0, 5.0]) is None
    assert correlation([1.0], [5.0]) is None
