"""A byte-level BPE vocabulary and the files that OpenAI and Hugging Face keep it in.

What GPT-2's tokenizer does not do is refused by name, for it would change ids.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from gpt2_jax.config import ConfigError

ENDOFTEXT = "<|endoftext|>"
FILES = ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json")
FILES += ("special_tokens_map.json", "added_tokens.json")  # what Hugging Face writes
PAIRS = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # HF's, OpenAI's
WHOLE = "tokenizer.json"
CONFIG = "tokenizer_config.json"
ADDED = "added_tokens.json"
SPECIAL = "special_tokens_map.json"
HEADER = "#version: 0.2"
# Classes of transformers that do what the files say, and nothing else.
GPT2_CLASSES = ("GPT2Tokenizer", "GPT2TokenizerFast")
CLASSES = (None, *GPT2_CLASSES, "PreTrainedTokenizerFast", "TokenizersBackend")
# What the files name besides eos_token, which is `Vocabulary.eot`.
ROLES = tuple(f"{role}_token" for role in ("bos", "unk", "pad", "sep", "cls", "mask"))
EXTRA = ("additional_special_tokens", "extra_special_tokens")  # transformers 4, 5
# Of tokenizer.json's model; the unknown token is never met, for no byte is unknown.
MODEL_KEYS = ("type", "vocab", "merges", "unk_token", "fuse_unk")
AGAIN = "download or save the tokenizer again"
FILE_BYTES = 20_000_000  # 10 times GPT-2's tokenizer.json
ID = re.compile("[0-9]{1,9}")
# SHA-256 of GPT-2's own merges, lines of two tokens: they need not be proven again.
GPT2_MERGES = "04e3597d7996f292ca9b8b7285ca4d58a6ae171ac47d73fc7140ceb0c7a6bbc0"
TOKEN_LETTERS = 1000  # GPT-2's longest has 128; finding its parts takes their square

# GPT-2 writes each byte as a printable character (openai/gpt-2 src/encoder.py).
_PLAIN = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
_OTHER = [b for b in range(256) if b not in _PLAIN]
ALPHABET = "".join(chr(b if b in _PLAIN else 256 + _OTHER.index(b)) for b in range(256))
_BYTE_OF = {ord(character): b for b, character in enumerate(ALPHABET)}


class Added(NamedTuple):
    """How Hugging Face recognises an added token in text; tokenizer.json's words."""

    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False  # looked for where those that are not left text
    special: bool = True  # data in text, unless it is asked for

    @property
    def moves(self) -> str | None:
        """The flag that takes more or less than the token's name, which is not done."""
        flags = zip(self._fields[:3], self[:3], strict=True)
        return next((flag for flag, value in flags if value), None)


@dataclass(frozen=True)
class Vocabulary:
    """Every token and its id; the ids are all numbers from 0, each once."""

    ordinary: dict[bytes, int]  # by rank: the 256 bytes, then the merges in order
    special: dict[str, int]  # made by no merge, decoded to their names
    eot: int  # one of the special
    added: dict[str, Added]  # of the special, those Hugging Face recognises, with eot
    roles: dict[str, str]  # of ROLES, those the model's files name -> one of the added

    def fingerprint(self) -> str:
        """Return a sha256 of all tokens, ids, merges in their order, and `eot`.

        Where text holds added tokens without being asked, their flags count as well.
        """
        tokens = sorted((i, token.hex()) for token, i in self.ordinary.items())
        lines = [f"{i} {token}\n" for i, token in tokens]
        merged = list(self.ordinary.values())[256:]
        if merged != sorted(merged):
            lines.append(f"merges {merged}\n")
        for name in sorted(self.special, key=self._eot_first):
            shown = name if name == ENDOFTEXT else json.dumps(name)
            lines.append(f"{self.special[name]} {shown}\n")
        if not all(flags.special for flags in self.added.values()):
            found = sorted((self.special[n], flags) for n, flags in self.added.items())
            lines += [f"added {i} {list(map(int, flags))}\n" for i, flags in found]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _eot_first(self, name: str) -> tuple[bool, int]:
        return self.special[name] != self.eot, self.special[name]


def to_bytes(name: str) -> bytes:
    """Return the bytes that GPT-2's files write as `name`."""
    return name.translate(_BYTE_OF).encode("latin-1")


def read_vocabulary(
    directory: Path, eos_token_id: int | None = None
) -> Vocabulary | None:
    """Return the vocabulary kept in `directory`; None without tokenizer files.

    `eos_token_id` names `eot`; when None it is <|endoftext|>, else the eos_token of
    tokenizer_config.json or special_tokens_map.json.

    Raises
    ------
    ConfigError
        If a file is malformed, the files contradict each other, or they ask for
        what GPT-2's tokenizer does not do.
    """
    paths = [directory / name for name in (WHOLE, CONFIG, ADDED, SPECIAL)]
    files = {path.name: _read_json(path) for path in paths if path.is_file()}
    entries = _find_entries(directory, files)
    added = _find_added(directory, files, entries)
    source = _read_source(directory, files, added)
    if source is None:
        return None
    names = _join(source.path, source.names, added)
    _check_ids(source.path, names)
    made = _make(source, names)
    roles = {role: n for role, n in _find_roles(files).items() if n in names}
    named = {name for name in _find_named(files, roles) if name in names}
    added |= {name: names[name] for name in named}
    special = {n: i for n, i in sorted(names.items(), key=_id) if n not in made}
    _check_special(source.path, special, added)
    eot = _find_eot(directory, files, special, eos_token_id)
    ending = next(name for name, i in special.items() if i == eot)
    flags = _find_flags(entries, added | {ending: eot}, named | {ending})
    ordinary = {to_bytes(name): names[name] for name in made}
    return Vocabulary(ordinary, special, eot, flags, roles)


def write_vocabulary(
    vocabulary: Vocabulary, model_max_length: int | None = None
) -> dict[str, str]:
    """Return file name -> contents, to be written as UTF-8, for Hugging Face.

    In them `eot` is the token of the end, and as in GPT-2's own that of beginning and
    the unknown where the model's files name no other.
    """
    names = [_to_name(token) for token in vocabulary.ordinary]
    ids = dict(zip(names, vocabulary.ordinary.values(), strict=True))
    ids = dict(sorted((ids | vocabulary.special).items(), key=_id))
    merges = [f"{left} {right}" for left, right in _find_merges(names)]
    eot = next(n for n, i in vocabulary.special.items() if i == vocabulary.eot)
    config = {
        "add_prefix_space": False,
        "bos_token": eot,
        "eos_token": eot,
        "unk_token": eot,
        **vocabulary.roles,
        "tokenizer_class": "GPT2Tokenizer",
    }
    added = _entries(vocabulary)
    if len(added) > 1:  # for readers of vocab.json; eot is an added token anyway
        config["added_tokens_decoder"] = {
            str(token.pop("id")): token for token in added
        }
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    return {
        "vocab.json": _dump(ids),
        "merges.txt": "".join(f"{line}\n" for line in [HEADER, *merges]),
        WHOLE: _dump(_whole(vocabulary, ids, merges)),
        CONFIG: _dump(config),
    }


def _whole(
    vocabulary: Vocabulary, ids: dict[str, int], merges: list[str]
) -> dict[str, Any]:
    """Return tokenizer.json as it is of GPT-2's own vocabulary."""
    level = dict(type="ByteLevel", add_prefix_space=False, use_regex=True)
    return {
        "version": "1.0",
        "added_tokens": _entries(vocabulary),
        "normalizer": None,
        "pre_tokenizer": level | {"trim_offsets": True},
        "post_processor": level | {"trim_offsets": False},
        "decoder": level | {"trim_offsets": True},
        "model": {"type": "BPE", "vocab": ids, "merges": merges},
    }


def _entries(vocabulary: Vocabulary) -> list[dict[str, Any]]:
    return [
        {"id": i, "content": name, **vocabulary.added[name]._asdict()}
        for name, i in vocabulary.special.items()
        if name in vocabulary.added
    ]


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _to_name(token: bytes) -> str:
    return token.decode("latin-1").translate(ALPHABET)


def _id(item: tuple[str, int]) -> int:
    return item[1]


def _find_merges(names: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the two parts that merges of lower rank leave of each name from rank 256.

    Ends at a name of which they leave anything else. Where it does not, joining the
    neighbours whose union has the lowest rank, as tiktoken does, is joining the pair
    that stands first in the list, as GPT-2 does.
    """
    rank = {name: i for i, name in enumerate(names)}
    pairs: dict[tuple[int, int], int] = {}
    parts: list[tuple[int, int]] = [(i, i) for i in range(256)]
    for new, name in enumerate(names[256:], start=256):
        for cut in range(1, len(name)):
            a, b = rank.get(name[:cut], new), rank.get(name[cut:], new)
            if max(a, b) < new and _stay_apart(pairs, parts, (a, b), limit=new):
                break
        else:
            return
        pairs[a, b] = new
        parts.append((a, b))
        yield names[a], names[b]


def _stay_apart(
    pairs: dict[tuple[int, int], int],
    parts: list[tuple[int, int]],
    pair: tuple[int, int],
    *,
    limit: int,
) -> bool:
    """Say whether no merge below `limit` joins anything across the pair's border.

    Takes the pair's own merges back, last first; of equal ones the left came first.
    """
    a, b = pair
    while pairs.get((a, b), limit) >= limit:
        if max(a, b) < 256:
            return True
        if a > b:
            limit, a = a, parts[a][1]
        else:
            limit, b = b + 1, parts[b][0]
    return False


class _Source(NamedTuple):
    path: Path  # of the names
    names: dict[str, int]
    merges: list[tuple[str, str]]
    where: Callable[[int], str]  # a merge stands, by its index


def _read_source(
    directory: Path, files: dict[str, Any], added: dict[str, int]
) -> _Source | None:
    pairs = [(directory / v, directory / m) for v, m in PAIRS]
    read = [_read_pair(v, m) for v, m in pairs if v.is_file() and m.is_file()]
    if WHOLE in files:
        read.append(_read_whole(directory / WHOLE, files[WHOLE]))
    if not read:
        _check_no_half(pairs)
        return None
    _check_config(directory / CONFIG, files.get(CONFIG, {}))
    first = read[0]
    for other in read[1:]:
        same = first.names | added == other.names | added
        if not same or first.merges != other.merges:
            wrong = f"says otherwise than {other.path.name} beside it"
            _refuse(first.path, wrong, "delete the one that is not the model's")
    return first


def _check_no_half(pairs: list[tuple[Path, Path]]) -> None:
    for pair in pairs:
        for here, absent in (pair, pair[::-1]):
            if here.is_file():
                wrong = f"{absent.name} is missing beside it"
                _refuse(here, wrong, f"put {absent.name} or {WHOLE} there")


def _read_pair(vocab: Path, merges: Path) -> _Source:
    lines = _read_text(merges).split("\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        wrong = f"empty; a vocabulary without merges has the line {HEADER!r}"
        _refuse(merges, wrong)
    start = 1 if lines[0].startswith("#version") else 0

    def where(i: int) -> str:
        return f"{merges}: line {start + 1 + i}"

    found = _split_merges([line.rstrip("\r") for line in lines[start:]], where)
    return _Source(vocab, _numbers(vocab, _read_json(vocab)), found, where)


def _split_merges(
    merges: list[Any], where: Callable[[int], str]
) -> list[tuple[str, str]]:
    found = []
    for i, merge in enumerate(merges):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        match parts:
            case [str(left), str(right)] if left and right:
                found.append((left, right))
            case _:
                wrong = f"merge is {merge!r}; allowed: two tokens, a space between"
                _refuse(where(i), wrong)
    return found


def _read_whole(path: Path, whole: dict[str, Any]) -> _Source:
    model = whole.get("model")
    if not isinstance(model, dict):
        _refuse(path, "has no model")
    _check_pipeline(path, whole)
    _check_model(path, model)
    names, merges = model.get("vocab"), model.get("merges")
    if not isinstance(names, dict) or not isinstance(merges, list):
        _refuse(path, "model.vocab is no object or model.merges no list")

    def where(i: int) -> str:
        return f"{path}: model.merges[{i}]"

    found = _split_merges(merges, where)
    return _Source(path, _numbers(path, names), found, where)


def _check_model(path: Path, model: dict[str, Any]) -> None:
    _check(path, "model.type", model.get("type", "BPE"), ["BPE"])
    for name, value in model.items():
        if value and name not in MODEL_KEYS:
            _refuse_value(path, f"model.{name}", value, "nothing, as in GPT-2")


def _check_pipeline(path: Path, whole: dict[str, Any]) -> None:
    """Refuse steps around the model that change ids; padding, truncation are calls'."""
    _check(path, "normalizer", _kind(whole.get("normalizer")), [None])
    before = _only_step(whole.get("pre_tokenizer"))
    _check(path, "pre_tokenizer", _kind(before), ["ByteLevel"])
    space = before.get("add_prefix_space", True)  # tokenizers' own default
    _check(path, "pre_tokenizer.add_prefix_space", space, [False])
    regex = before.get("use_regex", True)
    _check(path, "pre_tokenizer.use_regex", regex, [True])
    after = _only_step(whole.get("post_processor"))
    if _kind(after) == "TemplateProcessing":
        after = _added_around(after)
    _check(path, "post_processor", _kind(after), [None, "ByteLevel"])
    decoder = _kind(_only_step(whole.get("decoder")))
    _check(path, "decoder", decoder, ["ByteLevel"])


def _added_around(template: dict[str, Any]) -> object:
    """Return None for a template that is the text alone, as transformers 5 saves."""
    match template.get("single"):
        case [{"Sequence": {"id": "A"}}]:
            return None
    return template


def _only_step(step: Any) -> Any:
    match step:
        case (
            {"type": "Sequence", "pretokenizers": [one]}
            | {"type": "Sequence", "processors": [one]}
            | {"type": "Sequence", "decoders": [one]}
        ):
            return one
    return step


def _kind(step: Any) -> str | None:
    named = isinstance(step, dict) and isinstance(step.get("type"), str)
    return step["type"] if named else None if step is None else json.dumps(step)


def _check_config(path: Path, config: dict[str, Any]) -> None:
    for name in ("add_prefix_space", "add_bos_token", "add_eos_token"):
        _check(path, name, config.get(name) or False, [False])
    _check(path, "tokenizer_class", config.get("tokenizer_class"), list(CLASSES))


class _Entry(NamedTuple):
    path: Path  # of the file it stands in
    name: str
    id: int
    flags: dict[str, Any]  # as they are written, and what else stands there


def _find_entries(directory: Path, files: dict[str, Any]) -> list[_Entry]:
    """Return the added tokens that are listed, those of tokenizer.json first."""
    listed = files.get(WHOLE, {}).get("added_tokens") or []
    listed = listed if isinstance(listed, list) else [listed]
    mapped = files.get(CONFIG, {}).get("added_tokens_decoder") or {}
    if not isinstance(mapped, dict) or not all(map(ID.fullmatch, mapped)):
        _refuse(directory / CONFIG, "added_tokens_decoder does not map ids to tokens")
    tokens = [
        (token if isinstance(token, dict) else {"content": token}) | {"id": int(i)}
        for i, token in mapped.items()
    ]
    found = [_entry(directory / WHOLE, token) for token in listed]
    return found + [_entry(directory / CONFIG, token) for token in tokens]


def _entry(path: Path, token: object) -> _Entry:
    match token:
        case {"id": int(i), "content": str(name), **flags}:
            _numbers(path, {name: i})
            return _Entry(path, name, i, flags)
    _refuse(path, f"added token is {token!r}; allowed: an id and a content")


def _find_added(
    directory: Path, files: dict[str, Any], entries: list[_Entry]
) -> dict[str, int]:
    """Return the tokens that Hugging Face's files call added."""
    added = _numbers(directory / ADDED, files.get(ADDED, {}))
    for entry in entries:
        added = _join(directory, added, {entry.name: entry.id})
    return added


def _find_roles(files: dict[str, Any]) -> dict[str, str]:
    """Return role -> token; tokenizer_config.json has the last word."""
    found = [
        (role, _content(files.get(file, {}).get(role)))
        for file in (SPECIAL, CONFIG)
        for role in ROLES
    ]
    return {role: name for role, name in found if isinstance(name, str)}


def _find_named(files: dict[str, Any], roles: dict[str, str]) -> set[str]:
    """Return the tokens that the files name as special, whatever their flags."""
    named: list[Any] = list(roles.values())
    for file in (SPECIAL, CONFIG):
        named.append(_content(files.get(file, {}).get("eos_token")))
        for key in EXTRA:
            more = files.get(file, {}).get(key) or []
            more = list(more.values()) if isinstance(more, dict) else more
            more = [more] if isinstance(more, str) else more
            if not isinstance(more, list):
                _refuse_value(Path(file), key, more, "a list of tokens")
            named += map(_content, more)
    return {name for name in named if isinstance(name, str)}


def _find_flags(
    entries: list[_Entry], added: dict[str, int], named: set[str]
) -> dict[str, Added]:
    """Return how each of the added tokens is recognised; `named` ones are special."""
    found: dict[str, Added] = {}
    for entry in entries:
        flags = _read_flags(entry, named=entry.name in named)
        known = found.setdefault(entry.name, flags)
        if known != flags and not (known.special and flags.special):
            wrong = f"flags of {entry.name!r} are not those in {WHOLE}"
            _refuse(entry.path, wrong, "make them the same")
    for name in added:
        found.setdefault(name, _default_flags(special=name in named))
    return found


def _read_flags(entry: _Entry, *, named: bool) -> Added:
    given = {flag: entry.flags[flag] for flag in Added._fields if flag in entry.flags}
    for flag, value in given.items():
        if type(value) is not bool:
            wrong = f"{flag} of {entry.name!r} is {value!r}; allowed: true, false"
            _refuse(entry.path, wrong)
    special = named or given.get("special", False)
    flags = _default_flags(special=special)._replace(**given | {"special": special})
    if flags.moves and not special:
        name = f"{flags.moves} of {entry.name!r}"
        _refuse_value(entry.path, name, True, "false")
    return flags


def _default_flags(*, special: bool) -> Added:
    return Added(normalized=not special, special=special)  # tokenizers.AddedToken


def _numbers(path: Path, ids: dict[str, Any]) -> dict[str, int]:
    for name, i in ids.items():
        if type(i) is not int or i < 0:
            _refuse(path, f"id of {name!r} is {i!r}; allowed: whole numbers >= 0")
    return ids


def _join(path: Path, names: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    for name, i in more.items():
        if names.get(name, i) != i:
            wrong = f"{name!r} has two ids, {names[name]} and {i}"
            _refuse(path, f"{wrong}, in the tokenizer's files")
    return names | more


def _check_ids(path: Path, names: dict[str, int]) -> None:
    owner: dict[int, str] = {}
    for name, i in names.items():
        if i in owner:
            _refuse(path, f"{owner[i]!r} and {name!r} have the same id, {i}")
        owner[i] = name
    hole = next((i for i in range(len(owner)) if i not in owner), None)
    if hole is not None:
        wrong = f"no token has id {hole}, but {owner[max(owner)]!r} has {max(owner)}"
        _refuse(path, f"{wrong}; allowed: ids from 0 without holes")
    absent = [b for b, character in enumerate(ALPHABET) if character not in names]
    if absent:
        shown = ", ".join(f"{ALPHABET[b]!r} (byte {b})" for b in absent[:8])
        wrong = f"{len(absent)} of the 256 bytes have no token: {shown}"
        remedy = "train it again from the whole byte alphabet"
        _refuse(path, f"{wrong}{', ..' if len(absent) > 8 else ''}", remedy)


def _make(source: _Source, names: dict[str, int]) -> dict[str, None]:
    """Return the bytes by id and what the merges make of them, in order."""
    made = dict.fromkeys(sorted(ALPHABET, key=names.__getitem__))
    for i, (left, right) in enumerate(source.merges):
        for part in (left, right):
            if part not in made:
                why = "made by no earlier merge" if part in names else "no token"
                _refuse(source.where(i), f"{part!r} is {why} of {source.path.name}")
        new = left + right
        if new in made:
            _refuse(source.where(i), f"{new!r} is made a second time")
        if new not in names:
            _refuse(source.where(i), f"{new!r} is no token of {source.path.name}")
        if len(new) > TOKEN_LETTERS:
            wrong = f"makes a token of {len(new)} letters"
            _refuse(source.where(i), f"{wrong}; allowed: at most {TOKEN_LETTERS}")
        made[new] = None
    if _sha256(source.merges) == GPT2_MERGES:
        return made
    found = _find_merges(list(made))
    for i, (merge, wanted) in enumerate(zip_longest(source.merges, found)):
        if merge != wanted:
            left, right = merge
            wrong = f"merge of {left!r} and {right!r} never happens"
            why = "earlier merges join their text otherwise"
            _refuse(source.where(i), f"{wrong}: {why}")
    return made


def _sha256(merges: list[tuple[str, str]]) -> str:
    return hashlib.sha256("\n".join(map(" ".join, merges)).encode()).hexdigest()


def _check_special(path: Path, special: dict[str, int], added: dict[str, int]) -> None:
    for name in special:
        try:
            name.encode()
        except UnicodeEncodeError:
            _refuse(path, f"token {name!r} is not valid Unicode")
    ordinary = [name for name in added if name not in special]
    if ordinary:
        wrong = f"added token {ordinary[0]!r} is a token of ordinary text as well"
        _refuse(path, wrong, "take it out of the added tokens")


def _find_eot(
    directory: Path, files: dict[str, Any], special: dict[str, int], asked: int | None
) -> int:
    known = [f"{i} {name!r}" for name, i in special.items()]
    known = ", ".join(known[:8]) + (", .." if len(known) > 8 else "") or "none"
    if asked is not None:
        if asked not in special.values():
            wrong = f"eos_token_id is {asked}; allowed: the special tokens, {known}"
            _refuse(directory, wrong, "set eos_token_id in config.json")
        return asked
    named = [files.get(file, {}).get("eos_token") for file in (CONFIG, SPECIAL)]
    for name in (ENDOFTEXT, *map(_content, named)):
        if isinstance(name, str) and name in special:
            return special[name]
    wrong = f"no token ends a text, neither {ENDOFTEXT} nor an eos_token"
    remedy = f"name one of the special tokens ({known}) as eos_token in {CONFIG}"
    _refuse(directory, wrong, remedy)


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(_read_text(path), object_pairs_hook=_unique)
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        _refuse(path, f"malformed JSON ({error})")
    if not isinstance(value, dict):
        _refuse(path, "malformed JSON (no object)")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"entry {twice!r} stands there twice")
    return values


def _read_text(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > FILE_BYTES:
            _refuse(path, f"{size} bytes; allowed: at most {FILE_BYTES}")
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse(path, f"not UTF-8 at byte {error.start}")
    except OSError as error:
        _refuse(path, f"cannot be read: {error.strerror}", "make it readable")


def _check(path: Path, name: str, value: object, allowed: list[Any]) -> None:
    if not any(value is good or value == good for good in allowed):
        names = ", ".join("null" if a is None else json.dumps(a) for a in allowed)
        _refuse_value(path, name, value, names)


def _refuse_value(path: Path, name: str, value: object, allowed: str) -> NoReturn:
    shown = json.dumps(value)
    shown = shown if len(shown) < 60 else f"{shown[:60]} .."
    remedy = "only what GPT-2's tokenizer does is read"
    _refuse(path, f"{name} is {shown}; allowed: {allowed}", remedy)


def _refuse(where: Path | str, wrong: str, remedy: str = AGAIN) -> NoReturn:
    wrong = wrong if len(wrong) <= 1000 else f"{wrong[:1000]} .."
    raise ConfigError(f"{where}: {wrong}; {remedy}")
