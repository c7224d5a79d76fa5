"""Hugging Face directories of every kind of damage, through `gpt2-jax convert`.

Each is refused in one line that says what is wrong; nothing of it runs, nothing is
written and little memory is taken.
"""

import importlib.util
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import Outcome, check_refused, choose, run_all
from safetensors.numpy import load_file, save_file

from gpt2_jax.tokenizer_files import ALPHABET

SAFE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
WTE, QKV = "transformer.wte.weight", "transformer.h.0.attn.c_attn.weight"
D, F, T, V, LAYERS = 8, 32, 16, 259, 2
EOT = "<|endoftext|>"
VALUES = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "vocab_size": V,
    "n_positions": T,
    "n_embd": D,
    "n_layer": LAYERS,
    "n_head": 2,
    "bos_token_id": V - 1,
    "eos_token_id": V - 1,
}
SIZES = {
    "ln_1.weight": (D,), "ln_1.bias": (D,), "ln_2.weight": (D,), "ln_2.bias": (D,),
    "attn.c_attn.weight": (D, 3 * D), "attn.c_attn.bias": (3 * D,),
    "attn.c_proj.weight": (D, D), "attn.c_proj.bias": (D,),
    "mlp.c_fc.weight": (D, F), "mlp.c_fc.bias": (F,),
    "mlp.c_proj.weight": (F, D), "mlp.c_proj.bias": (D,),
}  # fmt: skip

Damage = Callable[[Path], object]


def make_good(place: Path) -> None:
    """Write a small GPT-2 as transformers does, with both forms of its tokenizer."""
    place.mkdir()
    draw = np.random.default_rng(0).standard_normal
    sizes = {f"h.{i}.{name}": s for i in range(LAYERS) for name, s in SIZES.items()}
    sizes |= {"wte.weight": (V, D), "wpe.weight": (T, D)}
    sizes |= {"ln_f.weight": (D,), "ln_f.bias": (D,)}
    tensors = {f"transformer.{n}": draw(s).astype("f4") for n, s in sizes.items()}
    save_file(tensors, place / SAFE, metadata={"format": "pt"})
    names = [*ALPHABET, "he", "hel", EOT]
    vocab = {name: i for i, name in enumerate(names)}
    level = {"type": "ByteLevel", "add_prefix_space": False}
    write_json(place / CONFIG, VALUES)
    write_json(place / "vocab.json", vocab)
    (place / "merges.txt").write_text("#version: 0.2\nh e\nhe l\n")
    write_json(
        place / "tokenizer.json",
        {
            "added_tokens": [{"id": V - 1, "content": EOT, "special": True}],
            "normalizer": None,
            "pre_tokenizer": level,
            "post_processor": None,
            "decoder": level,
            "model": {"type": "BPE", "vocab": vocab, "merges": ["h e", "he l"]},
        },
    )
    write_json(
        place / "tokenizer_config.json",
        {"eos_token": EOT, "tokenizer_class": "GPT2Tokenizer"},
    )


def write_json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(values))


def edit(name: str, change: Callable[[Any], Any]) -> Damage:
    """Return what replaces the JSON of a file by what `change` makes of it."""

    def damage(place: Path) -> None:
        values = json.loads((place / name).read_text())
        write_json(place / name, change(values))

    return damage


def config(**changes: Any) -> Damage:
    return edit(CONFIG, lambda values: values | changes)


def write(name: str, data: bytes) -> Damage:
    return lambda place: (place / name).write_bytes(data)


def grow(name: str, size: int, start: bytes = b"") -> Damage:
    """Return what makes a file `size` bytes long, without a byte of disk."""

    def damage(place: Path) -> None:
        with (place / name).open("wb") as file:
            file.write(start)
            file.truncate(size)

    return damage


def cut(name: str, size: int) -> Damage:
    return lambda place: os.truncate(place / name, size)


def tensors(change: Callable[[dict[str, np.ndarray]], Any]) -> Damage:
    """Return what lets `change` loose on the dict of tensors."""

    def damage(place: Path) -> None:
        found = load_file(place / SAFE)
        found = change(found) or found
        save_file(found, place / SAFE, metadata={"format": "pt"})

    return damage


def put(name: str, value: Any) -> Damage:
    return tensors(lambda found: found.update({name: np.asarray(value)}))


def header(
    change: Callable[[dict[str, Any]], Any], data: bytes | None = None
) -> Damage:
    """Return what lets `change` loose on the header; the data stay as they are."""

    def damage(place: Path) -> None:
        old = (place / SAFE).read_bytes()
        length = int.from_bytes(old[:8], "little")
        values = json.loads(old[8 : 8 + length])
        made = change(values)
        text = made if isinstance(made, bytes) else json.dumps(made or values).encode()
        kept = old[8 + length :] if data is None else data
        (place / SAFE).write_bytes(len(text).to_bytes(8, "little") + text + kept)

    return damage


def entry(**changes: Any) -> Damage:
    return header(lambda values: values[WTE].update(changes))


def shard(change: Callable[[dict[str, Any]], Any] = lambda index: None) -> Damage:
    """Return what cuts the weights in two and lets `change` loose on their index."""

    def damage(place: Path) -> None:
        found = load_file(place / SAFE)
        (place / SAFE).unlink()
        names = sorted(found)
        halves = names[::2], names[1::2]
        for part, half in zip(PARTS, halves, strict=True):
            save_file({name: found[name] for name in half}, place / part)
        pairs = zip(PARTS, halves, strict=True)
        index = {"weight_map": {name: part for part, half in pairs for name in half}}
        write_json(place / INDEX, change(index) or index)

    return damage


def mapped(file: object) -> Damage:
    return shard(lambda index: index["weight_map"].update({WTE: file}))


def link(name: str, target: str) -> Damage:
    """Return what moves a file out of the model and leaves a link to it."""

    def damage(place: Path) -> None:
        (place / name).rename(place.parent / target)
        (place / name).symlink_to(Path("..", target))

    return damage


def pipe(name: str) -> Damage:
    def damage(place: Path) -> None:
        (place / name).unlink(missing_ok=True)
        os.mkfifo(place / name)

    return damage


def both(*damages: Damage) -> Damage:
    return lambda place: [damage(place) for damage in damages]


class Canary:
    """Creates a file when it is unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("canary"),)  # where the command runs


def pickled(name: str) -> Damage:
    def damage(place: Path) -> None:
        (place / SAFE).unlink()
        (place / name).write_bytes(pickle.dumps({WTE: Canary()}, protocol=2))

    return damage


def bomb(place: Path) -> None:
    """Write an npz of 256 MB of zeros in 256 KB as the weights."""
    with (
        zipfile.ZipFile(place / SAFE, "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open("w.npy", "w", force_zip64=True) as file,
    ):
        for _ in range(16):
            file.write(bytes(2**24))


def long_token(place: Path) -> None:
    """Write a vocabulary whose merges double one token until it has 2**14 letters."""
    names = ["a" * 2**i for i in range(1, 15)]
    vocab = {name: i for i, name in enumerate([*ALPHABET, *names, EOT])}
    write_json(place / "vocab.json", vocab)
    lines = [f"{name[: len(name) // 2]} {name[: len(name) // 2]}" for name in names]
    (place / "merges.txt").write_text("\n".join(lines) + "\n")
    (place / "tokenizer.json").unlink()
    config(vocab_size=len(vocab), eos_token_id=len(vocab) - 1)(place)


def merges(text: str) -> Damage:
    def damage(place: Path) -> None:
        (place / "merges.txt").write_text(text)
        (place / "tokenizer.json").unlink()

    return damage


def vocab(change: Callable[[dict[str, Any]], Any]) -> Damage:
    whole = lambda place: (place / "tokenizer.json").unlink()  # noqa: E731
    return both(edit("vocab.json", change), whole)


def whole(change: Callable[[dict[str, Any]], Any]) -> Damage:
    return edit("tokenizer.json", lambda values: change(values) or values)


def tokenizer_config(**changes: Any) -> Damage:
    return edit("tokenizer_config.json", lambda values: values | changes)


def nest(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


HAS_TORCH = importlib.util.find_spec("torch") is not None
DEEP = b'{"n_layer":' + nest(900) + b"}"
SPELT = "no JSON in UTF-8"
REFUSED: dict[str, tuple[Damage, str]] = {
    # CV1: pickles. The first case is also what warms up: it imports torch.
    "pickle that was allowed": (
        pickled(BIN),
        "torch's weights_only finds damage" if HAS_TORCH else "pip install torch",
    ),
    "pickle": (pickled(BIN), f"holds its weights as {BIN}, a pickle"),
    "index of pickles": (pickled(BIN_INDEX), f"holds its weights as {BIN_INDEX}"),
    "pickle beside a broken link": (
        both(pickled(BIN), lambda place: (place / SAFE).symlink_to("gone")),
        f"{SAFE} is missing, or no regular file",
    ),
    "pickle named safetensors": (
        write(SAFE, pickle.dumps({WTE: Canary()})),
        "its header has",
    ),
    "pickle named config": (write(CONFIG, pickle.dumps(Canary())), SPELT),
    "pickle named vocab": (
        write("vocab.json", pickle.dumps(Canary())),
        "vocab.json: not UTF-8 at byte 0",
    ),
    # CV2, CV3, CV18: section 6 of the reference.
    "weights of no bytes": (write(SAFE, b""), "it has 0 bytes; allowed: 10 or more"),
    "header length alone": (cut(SAFE, 8), "it has 8 bytes"),
    "cut in the header": (cut(SAFE, 500), "its header has"),
    "cut in the data": (cut(SAFE, 5000), "has data_offsets"),
    "trailing data": (lambda place: os.truncate(place / SAFE, 2**20), "tensors' end"),
    "header of 2**56 bytes": (
        write(SAFE, (2**56).to_bytes(8, "little") + b"{}"),
        f"its header has {2**56} bytes",
    ),
    "header of 50 MB": (
        grow(SAFE, 10**8, (5 * 10**7).to_bytes(8, "little")),
        "its header has 50000000 bytes",
    ),
    "header not JSON": (header(lambda _: b"hello world"), SPELT),
    "header not UTF-8": (header(lambda _: b'{"\xff":1}'), SPELT),
    "header 100,000 deep": (header(lambda _: b'{"w":' + b"[" * 100_000), SPELT),
    "header of a huge number": (header(lambda _: b'{"w":' + b"9" * 5000 + b"}"), SPELT),
    "header a list": (header(lambda _: b"[1, 2]"), "allowed: an object"),
    "header key twice": (
        header(lambda v: f'{{"w":1,"w":2,{json.dumps(v)[1:]}'.encode()),
        "'w' more than once",
    ),
    "entry 900 deep": (
        header(lambda _: b'{"w":{"dtype":"F32","shape":' + nest(900) + b"}}"),
        "has shape",
    ),
    "name that climbs": (header(lambda v: v.update({"../w": v.pop(WTE)})), "is a name"),
    "name with NUL": (header(lambda v: v.update({"w\0": v.pop(WTE)})), "is a name"),
    "name of 100,000 letters": (
        header(lambda v: v.update({"\n" + "w" * 10**5: v.pop(WTE)})),
        "is a name",
    ),
    "5,000 bad names": (
        header(lambda v: v.update({f"/{i}": v[WTE] for i in range(5000)})),
        "and 4",
    ),
    "unknown dtype": (entry(dtype="F31"), "has dtype 'F31'"),
    "float8": (entry(dtype="F8_E4M3"), "has dtype 'F8_E4M3'"),
    "negative offset": (entry(data_offsets=[-8, 0]), "has data_offsets [-8, 0]"),
    "offsets of another size": (entry(shape=[V, D - 1]), "has data_offsets"),
    "shape that overflows": (entry(shape=[2**32, 2**32]), "has shape"),
    "overlap": (
        header(lambda v: v[WTE].update(data_offsets=[0, V * D * 4])),
        "overlaps another",
    ),
    "hole": (header(lambda v: v.pop(QKV) and None), "is behind a hole"),
    "metadata of numbers": (
        header(lambda v: v.update(__metadata__={"a": 1})),
        "string",
    ),
    "metadata of half a character": (
        header(lambda v: v.update(__metadata__={"a": "\ud800"})),
        SPELT,
    ),
    "5 GB declared in 1 KB": (
        header(
            lambda _: {
                WTE: {
                    "dtype": "F32",
                    "shape": [1250, 10**6],
                    "data_offsets": [0, 5 * 10**9],
                }
            },
            bytes(900),
        ),
        "has data_offsets [0, 5000000000]",
    ),
    "zip bomb": (bomb, "its header has"),
    "weights a pipe": (pipe(SAFE), "is missing, or no regular file"),
    "weights linked from elsewhere": (link(SAFE, "elsewhere"), "is a link to"),
    # CV4, CV5: shards and their index.
    "shard that climbs": (mapped("../secret.safetensors"), "a plain name beside"),
    "shard of an absolute path": (mapped("/etc/passwd"), "a plain name beside"),
    "shard behind a backslash": (mapped("..\\secret"), "a plain name beside"),
    "shard on the web": (mapped("https://evil.example/w"), "a plain name beside"),
    "shard in a folder": (mapped("a/b.safetensors"), "a plain name beside"),
    "shard of a long name": (mapped("w" * 256), "a plain name beside"),
    "shard that is a number": (mapped(3), "a plain name beside"),
    "shard linked from elsewhere": (
        both(shard(), link(PARTS[1], "elsewhere")),
        "is a link to",
    ),
    "shard missing": (
        both(shard(), lambda place: (place / PARTS[1]).unlink()),
        f"{PARTS[1]} is missing",
    ),
    "shard a directory": (mapped("folder"), "folder is missing, or no regular file"),
    "shard that is the index": (mapped(INDEX), "its header has"),
    "tensor in two shards": (
        both(shard(), lambda p: shutil.copy(p / PARTS[0], p / PARTS[1])),
        f"is in {PARTS[0]} and {PARTS[1]}",
    ),
    "tensor in no shard": (
        shard(lambda index: index["weight_map"].update(more=PARTS[0])),
        "'more' is in no shard",
    ),
    "tensor not in the index": (
        shard(lambda index: index["weight_map"].pop(QKV) and None),
        "allowed: in none alone",
    ),
    "index linked from elsewhere": (
        both(shard(), link(INDEX, "elsewhere")),
        "is a link to",
    ),
    "index not JSON": (both(shard(), cut(INDEX, 50)), SPELT),
    "index of a list": (shard(lambda _: {"weight_map": [WTE]}), "weight_map is"),
    "index of nothing": (shard(lambda _: {"weight_map": {}}), "weight_map is {}"),
    "index of 50 MB": (both(shard(), grow(INDEX, 5 * 10**7)), "it has 50000000 bytes"),
    # CV8 to CV14: names, dtypes and shapes.
    "unknown buffer": (put("transformer.h.0.attn.rotary", [1.0]), "rotary is unknown"),
    "another head": (
        put("lm_head.weight", np.ones((V, D), "f4")),
        "lm_head.weight dif",
    ),
    "prefix module.": (
        tensors(lambda t: {f"module.{name}": value for name, value in t.items()}),
        "transformer.wte.weight is missing",
    ),
    "prefix _orig_mod.": (
        tensors(lambda t: {f"_orig_mod.{name}": value for name, value in t.items()}),
        "transformer.wte.weight is missing",
    ),
    "one name with a prefix and without": (
        tensors(lambda t: t | {"wte.weight": t[WTE]}),
        f"{WTE} is there twice",
    ),
    "integers": (put(QKV, np.ones((D, 3 * D), "i1")), "has dtype int8"),
    "numbers beyond float32": (put(QKV, np.full((D, 3 * D), 1e300)), "float32"),
    "transposed": (put(QKV, np.ones((3 * D, D), "f4")), "it is transposed"),
    "layer missing": (
        tensors(lambda t: {n: v for n, v in t.items() if ".h.1." not in n}),
        "transformer.h.1.ln_1.weight is missing",
    ),
    "layer too many": (
        tensors(lambda t: t | {n.replace(".1.", ".2."): v for n, v in t.items()}),
        "transformer.h.2.ln_1.weight is unknown",
    ),
    "no tensors": (tensors(lambda t: {"w": t[WTE]}), "is missing"),
    "no weights": (lambda place: (place / SAFE).unlink(), "holds no weights"),
    # CF5 and other configs.
    "config of 24 layers": (config(n_layer=24), "n_layer 24"),
    "config of 10**9 layers": (config(n_layer=10**9), "n_layer"),
    "config of 10**15 numbers": (config(n_positions=10**15), "n_ctx"),
    "config of a width that no head divides": (config(n_head=3), "n_head is 3"),
    "config of a smaller vocabulary": (config(vocab_size=V - 1), "vocab_size 258"),
    "config of another model": (config(model_type="llama"), "model_type is 'llama'"),
    "config of another class": (config(architectures=["GPT2Classifier"]), "architec"),
    "config of cross-attention": (config(add_cross_attention=True), "cross_attention"),
    "config of quick_gelu": (config(activation_function="quick_gelu"), "quick_gelu"),
    "config quantized": (
        config(quantization_config={"bits": 4}),
        "quantization_config",
    ),
    "config of a string": (config(n_embd="8"), "n_embd is '8'"),
    "config of a long string": (config(n_embd="8" * 10**5), "n_embd is '888"),
    "config of infinity": (
        edit(CONFIG, lambda v: v | {"layer_norm_epsilon": float("inf")}),
        "layer_norm_epsilon is inf",
    ),
    "config of a huge integer": (config(n_head=10**4000), "n_head is"),
    "config of nothing": (write(CONFIG, b""), SPELT),
    "config of a list": (write(CONFIG, b"[]"), "allowed: an object"),
    "config not UTF-8": (write(CONFIG, b'{"a": "\xff"}'), SPELT),
    "config with a key twice": (write(CONFIG, b'{"n_layer":2,"n_layer":3}'), "n_layer"),
    "config 900 deep": (write(CONFIG, DEEP), "n_layer"),
    "config 100,000 deep": (write(CONFIG, b"[" * 100_000), SPELT),
    "config of 1 GB": (grow(CONFIG, 10**9), "1000000000 bytes"),
    "config linked from elsewhere": (link(CONFIG, "elsewhere"), "is a link to"),
    "config a pipe": (pipe(CONFIG), "no regular file"),
    "config missing": (lambda place: (place / CONFIG).unlink(), "config.json"),
    "end of text a string": (config(eos_token_id="x"), "eos_token_id is 'x'"),
    # Tokenizers.
    "vocab of 1 GB": (grow("vocab.json", 10**9), "1000000000 bytes"),
    "merges of 1 GB": (grow("merges.txt", 10**9), "1000000000 bytes"),
    "vocab linked from elsewhere": (link("vocab.json", "elsewhere"), "is a link to"),
    "vocab a pipe": (pipe("vocab.json"), "no regular file"),
    "vocab 100,000 deep": (write("vocab.json", b"[" * 100_000), "malformed JSON"),
    "vocab with a hole": (vocab(lambda v: v | {EOT: V}), "no token has id 258"),
    "vocab with an id twice": (vocab(lambda v: v | {EOT: 0}), "have the same id, 0"),
    "vocab with a negative id": (vocab(lambda v: v | {EOT: -1}), "is -1; allowed"),
    "vocab with half a character": (
        vocab(lambda v: v | {"\ud800": v.pop(EOT)}),
        "is not valid Unicode",
    ),
    "token of 2**14 letters": (long_token, "letters"),
    "merges of three": (merges("#version: 0.2\nh e l\n"), "line 2: merge is 'h e l'"),
    "merges of nothing": (merges(""), "merges.txt: empty"),
    "merges missing": (
        both(merges("x"), lambda place: (place / "merges.txt").unlink()),
        "merges.txt is missing beside it",
    ),
    "tokenizer of another kind": (
        whole(lambda v: v["model"].update(type="Unigram")),
        'model.type is "Unigram"',
    ),
    "tokenizer that normalizes": (
        whole(lambda v: v.update(normalizer={"type": "NFC"})),
        'normalizer is "NFC"',
    ),
    "tokenizer otherwise than the vocab": (
        whole(lambda v: v["model"].update(merges=["h e"])),
        "says otherwise than tokenizer.json",
    ),
    "tokenizer class of another model": (
        tokenizer_config(tokenizer_class="LlamaTokenizer"),
        'tokenizer_class is "LlamaTokenizer"',
    ),
    "tokenizer id of 5,000 digits": (
        tokenizer_config(added_tokens_decoder={"9" * 5000: {"content": "x"}}),
        "added_tokens_decoder",
    ),
    "tokenizer's special tokens a number": (
        tokenizer_config(additional_special_tokens=5),
        "additional_special_tokens is 5",
    ),
    "tokenizer of a null byte": (write("tokenizer.json", b"{}\0"), "malformed JSON"),
}
CODE = 'open("canary", "w")\n'
OTHER = {  # CV13: read, with a warning
    "not a number": put(QKV, np.full((D, 3 * D), np.nan, "f4")),
}
SAME: dict[str, Damage] = {
    "as it is": lambda place: None,
    # CV8: buffers of old versions.
    "known buffers": both(
        put("transformer.h.0.attn.bias", np.ones((1, 1, T, T), "u1")),
        put("transformer.h.1.attn.masked_bias", np.float32(-1e4)),
    ),
    # CV9, CV10, CV12.
    "equal head": tensors(lambda t: t | {"lm_head.weight": t[WTE].copy()}),
    "no prefix": tensors(
        lambda t: {n.removeprefix("transformer."): v for n, v in t.items()}
    ),
    "shards": shard(),
    "half precision": tensors(lambda t: {n: v.astype("f2") for n, v in t.items()}),
    "double precision": tensors(lambda t: {n: v.astype("f8") for n, v in t.items()}),
    # CV15: code that other libraries would run or render.
    "code": both(
        config(auto_map={"AutoModel": "evil.Model"}, trust_remote_code=True),
        tokenizer_config(
            auto_map={"AutoTokenizer": ["evil.Tokenizer", None]},
            chat_template="{{ ''.__class__.__mro__[1].__subclasses__() }}",
        ),
        write("evil.py", CODE.encode()),
        write("modeling_evil.py", CODE.encode()),
        write("__init__.py", CODE.encode()),
        write("conftest.py", CODE.encode()),
        write("chat_template.jinja", b"{{ 1/0 }}"),
    ),
}


def prepare(name: str, damage: Damage, root: Path) -> Path:
    """Return a directory that holds the damaged model as `model`."""
    place = root / name.replace(" ", "_").replace("/", "")
    place.mkdir()
    make_good(place / "model")
    (place / "model" / "folder").mkdir()
    damage(place / "model")
    return place


@pytest.fixture(scope="module")
def places(request, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    cases = {name: damage for name, (damage, _) in REFUSED.items()} | SAME | OTHER
    chosen = [*choose(request, REFUSED), *SAME, *OTHER]
    return {name: prepare(name, cases[name], root) for name in chosen}


@pytest.fixture(scope="module")
def outcomes(places) -> dict[str, Outcome]:
    """All models, one after the other in one process; the harmless ones come last."""
    home = places["as it is"].parent / "home"
    allowed = {"pickle that was allowed": ["--allow-pickle"]}
    requests = [
        (place, ["convert", "model", "out", *allowed.get(name, [])])
        for name, place in places.items()
    ]
    return dict(zip(places, run_all(home, requests), strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_model_is_refused(name, outcomes):
    check_refused(outcomes[name], REFUSED[name][1])


@pytest.mark.parametrize("name", SAME)
def test_a_harmless_difference_changes_nothing(name, outcomes, places):
    assert outcomes[name].status == 0, outcomes[name]
    assert not list(places[name].rglob("canary"))
    found, wanted = (
        load_file(places[case] / "out" / SAFE) for case in (name, "as it is")
    )
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        rounded = tensor.astype("f2") if name == "half precision" else tensor
        np.testing.assert_array_equal(found[key], rounded.astype("f4"))


def test_numbers_that_are_not_finite_are_warned_of(outcomes):
    found = outcomes["not a number"]
    assert found.status == 0
    assert found.err.count("\n") == 1 and "qkv/kernel holds numbers that" in found.err
