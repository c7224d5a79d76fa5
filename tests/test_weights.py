"""Files of every kind of damage, and what is written read back to the bit."""

import gc
import json
import mmap
import os
import pickle
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gpt2_jax import weights
from gpt2_jax.config import ConfigError
from gpt2_jax.weights import StoredTensor, open_tensors, write_tensors

SAFE, INDEX = "model.safetensors", "model.safetensors.index.json"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def entry(begin=0, end=8, dtype="F32", shape=(2,)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def encode(header, data=bytes(8), length=None) -> bytes:
    """Return a safetensors file; `header` is JSON values or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    return size.to_bytes(8, "little") + text + data


def refusal(directory: Path, **options) -> str:
    with pytest.raises(ConfigError) as refused:
        open_tensors(directory, **options)
    message = str(refused.value)
    assert "\n" not in message and message.isprintable()
    return message


W = json.dumps(entry()).encode()
DAMAGED = {
    # The vectors of shared/reference/reliability.md, section 6.
    "empty file": (b"", "it has 0 bytes; allowed: 10 or more"),
    "short file": (b"\2\0\0", "it has 3 bytes"),
    "header length only": (bytes(8), "it has 8 bytes"),
    "header of no bytes": (encode(b""), "header has 0 bytes; allowed: 2 to 8"),
    "header of 2**56 bytes": (encode({}, length=2**56), f"has {2**56} bytes"),
    "header beyond the file": (encode({}, length=11), "11 bytes; allowed: 2 to 10"),
    "not UTF-8": (encode(b'{"\xff":1}'), "no JSON in UTF-8"),
    "UTF-16": (encode("{}".encode("utf-16")), "no JSON in UTF-8"),
    "not JSON": (encode(b"hello world"), "no JSON in UTF-8"),
    "a number of 5000 digits": (encode(b'{"w":' + b"1" * 5000 + b"}"), "no JSON"),
    "not an object": (encode([1, 2]), "its JSON is [1, 2]; allowed: an object"),
    "100,000 deep": (encode(b'{"w":' + b"[" * 100_000), "no JSON in UTF-8"),
    "truncated data": (
        encode({"w": entry()}, bytes(7)),
        "'w' has data_offsets [0, 8]; allowed: 8 bytes inside of [0, 7]",
    ),
    "trailing data": (encode({"w": entry()}, bytes(9)), "the tensors' end"),
    "data without tensors": (encode({}), "the tensors' end"),
    "shape is not offsets": (encode({"w": entry(shape=[3])}), "allowed: 12 bytes"),
    "5 GB in 1 KB": (
        encode({"w": entry(0, 5 * 10**9, shape=[1250, 10**6])}, bytes(1000)),
        "'w' has data_offsets [0, 5000000000]",
    ),
    "shape overflows": (encode({"w": entry(shape=[2**32, 2**32])}), "'w' has shape"),
    "shape wraps around to 8 bytes": (
        encode({"w": entry(shape=[2**62 + 1, 2, 4], dtype="U8")}),
        "'w' has shape [4611686018427387905, 2, 4]",
    ),
    "shape overflows beside a zero": (
        encode({"w": entry(0, 0, shape=[2**62, 2**62, 0])}, b""),
        "'w' has shape",
    ),
    "65 axes": (encode({"w": entry(shape=[2] + [1] * 64)}), "up to 64 integers >= 0"),
    "negative shape": (encode({"w": entry(shape=[-2])}), "'w' has shape [-2]"),
    "shape of floats": (encode({"w": entry(shape=[2.0])}), "'w' has shape [2.0]"),
    "shape of booleans": (
        encode({"w": entry(0, 4, shape=[True])}, bytes(4)),
        "'w' has shape [True]",
    ),
    "shape is a number": (encode({"w": entry() | {"shape": 2}}), "'w' has shape 2"),
    "no shape": (encode({"w": {"dtype": "F32"}}), "'w' has shape None"),
    "negative offset": (encode({"w": entry(-8, 0)}), "'w' has data_offsets [-8, 0]"),
    "begin behind end": (encode({"w": entry(8, 0)}), "'w' has data_offsets [8, 0]"),
    "offset is a float": (encode({"w": entry(0.0, 8)}), "'w' has data_offsets [0.0"),
    "three offsets": (
        encode({"w": entry() | {"data_offsets": [0, 8, 8]}}),
        "'w' has data_offsets [0, 8, 8]",
    ),
    "overlap": (
        encode({"v": entry(), "w": entry(4, 12)}, bytes(12)),
        "'w' overlaps another",
    ),
    "the same bytes": (encode({"v": entry(), "w": entry()}), "'w' overlaps another"),
    "hole": (encode({"w": entry(4, 12)}, bytes(12)), "'w' is behind a hole"),
    "empty tensor inside another": (
        encode({"w": entry(), "z": entry(4, 4, shape=[0])}),
        "'z' overlaps another",
    ),
    "duplicate key": (
        encode(b'{"w":' + W + b',"w":' + W + b"}"),
        "'w' more than once",
    ),
    "duplicate key in an entry": (
        encode(b'{"w":' + W[:-1] + b',"dtype":"F16"}}'),
        "'dtype' more than once",
    ),
    "unknown dtype": (encode({"w": entry(dtype="F31")}), "'w' has dtype 'F31'"),
    "F8": (
        encode({"w": entry(0, 2, "F8_E4M3")}, bytes(2)),
        "'w' has dtype 'F8_E4M3'; allowed: F64, ",
    ),
    "dtype is a list": (encode({"w": entry(dtype=["F32"])}), "dtype ['F32']"),
    "entry is no object": (encode({"w": 3}), "'w' is 3; allowed: an object"),
    "metadata is no object": (encode({"__metadata__": []}), "__metadata__ is []"),
    "metadata is no string": (
        encode({"__metadata__": {"format": 1}, "w": entry()}),
        "__metadata__ is {'format': 1}; allowed: name -> string",
    ),
    "key that climbs": (encode({"../w": entry()}), "'../w' is a name; allowed:"),
    "key of dots": (encode({"..": entry()}), "'..' is a name"),
    "key with a slash": (encode({"a/w": entry()}), "'a/w' is a name"),
    "key with a backslash": (encode({"a\\w": entry()}), "is a name"),
    "key with NUL": (encode({"w\0": entry()}), "'w\\x00' is a name"),
    "key with a new line": (encode({"w\nw": entry()}), "'w\\nw' is a name"),
    "key that is half a character": (encode({"\ud800": entry()}), "surrogates"),
    "key of no letters": (encode({"": entry()}), "'' is a name"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(case, tmp_path):
    data, expected = DAMAGED[case]
    (tmp_path / SAFE).write_bytes(data)
    message = refusal(tmp_path)
    assert expected in message
    assert f"{tmp_path / SAFE} cannot be read: " in message
    assert message.endswith("; download or export the model again")


def test_a_header_above_the_limit_is_refused_unread(tmp_path):
    with (tmp_path / SAFE).open("wb") as file:
        file.write((2_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)  # sparse
    assert "header has 2000001 bytes; allowed: 2 to 2000000" in refusal(tmp_path)


def test_all_faults_of_a_file_are_named_together(tmp_path):
    header = {"a": entry(dtype="F8_E5M2"), "b": entry(shape=[-1]), "c": entry(0, 9)}
    (tmp_path / SAFE).write_bytes(encode(header | {"d": entry()}))
    message = refusal(tmp_path)
    for fault in ("'a' has dtype", "'b' has shape", "'c' has data_offsets"):
        assert fault in message
    assert "'d'" not in message
    layout = {"a": entry(), "b": entry(4, 12), "c": entry(16, 24)}
    (tmp_path / SAFE).write_bytes(encode(layout, bytes(30)))
    message = refusal(tmp_path)
    for fault in ("'b' overlaps", "'c' is behind a hole", "the tensors' end"):
        assert fault in message


GOOD = {
    "no metadata": encode({"w": entry()}),
    "metadata": encode({"__metadata__": {"format": "pt"}, "w": entry()}),
    "padded header": encode(json.dumps({"w": entry()}).encode() + b"   "),
    "unaligned": encode({"v": entry(0, 1, "U8", [1]), "w": entry(1, 9)}, bytes(9)),
    "empty tensors": encode(
        {"y": entry(0, 0, shape=[0]), "w": entry(), "z": entry(8, 8, shape=[3, 0])}
    ),
    "not a number": encode({"w": entry()}, np.full(2, np.nan, "<f4").tobytes()),
    "unicode": encode({"w": entry(), "größe": entry(8, 8, shape=[0])}),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_is_legal_is_read(case, tmp_path):
    (tmp_path / SAFE).write_bytes(GOOD[case])
    tensors = open_tensors(tmp_path)
    theirs = safetensors.numpy.load(GOOD[case])
    assert tensors.keys() == theirs.keys()
    for name, tensor in tensors.items():
        assert isinstance(tensor, StoredTensor)
        assert tensor.shape == theirs[name].shape
        np.testing.assert_array_equal(np.asarray(tensor), theirs[name])


def test_altered_bytes_are_refused_or_read_as_safetensors_does(tmp_path):
    tensors = {"w": np.ones((2, 3), "f4"), "b": np.arange(3), "z": np.ones((0, 2))}
    good = safetensors.numpy.save(tensors, metadata={"format": "pt"})
    draw = np.random.default_rng(0).integers
    alphabet = b'0123456789[]{},":- FIU\xff'
    accepted = 0
    for _ in range(2000):
        data = bytearray(good)
        data[draw(len(good))] = alphabet[draw(len(alphabet))]
        (tmp_path / SAFE).write_bytes(data)
        try:
            ours = open_tensors(tmp_path)
        except ConfigError:
            continue
        accepted += 1
        theirs = safetensors.numpy.load(bytes(data))
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert np.asarray(ours[name]).tobytes() == theirs[name].tobytes()
    assert 100 < accepted < 1900


def test_a_file_of_no_tensors_is_legal(tmp_path):
    (tmp_path / SAFE).write_bytes(encode({}, b""))
    assert open_tensors(tmp_path) == {}


@pytest.mark.parametrize("name", weights.DTYPES)
def test_every_dtype_is_read(name, tmp_path):
    dtype = weights.DTYPES[name]
    values = np.array([[0, 1, 1], [1, 0, 1]]).astype(dtype)
    header = {"w": entry(0, values.nbytes, name, (2, 3))}
    (tmp_path / SAFE).write_bytes(encode(header, values.tobytes()))
    tensor = open_tensors(tmp_path)["w"]
    assert (tensor.dtype, tensor.shape, tensor.nbytes) == (dtype, (2, 3), values.nbytes)
    assert np.asarray(tensor).dtype == dtype
    np.testing.assert_array_equal(np.asarray(tensor), values)
    np.testing.assert_array_equal(np.asarray(tensor, np.float32), values.astype("f4"))


def test_an_array_maps_one_tensor_and_no_more(tmp_path):
    tensors = {name: np.full((300, 1000), i, "f4") for i, name in enumerate("abc")}
    write_tensors(tmp_path, tensors, dtype=None)
    array = np.asarray(open_tensors(tmp_path)["b"])
    assert type(array) is np.ndarray and not array.flags.writeable
    np.testing.assert_array_equal(array, tensors["b"])
    base = array
    while not isinstance(base, mmap.mmap):
        base = base.base
    assert len(base) < array.nbytes + mmap.ALLOCATIONGRANULARITY
    copy = np.array(open_tensors(tmp_path)["b"])
    assert copy.flags.writeable


maps = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")


@maps
def test_a_dropped_array_is_unmapped(tmp_path):
    write_tensors(tmp_path, {"w": np.ones(100_000, "f4")}, dtype=None)
    array = np.asarray(open_tensors(tmp_path)["w"])
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    del array
    gc.collect()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()


MEASURE = """
import resource, sys
from pathlib import Path
import numpy as np
from gpt2_jax.config import ConfigError
from gpt2_jax.weights import open_tensors
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try:
    last = np.asarray(open_tensors(Path(sys.argv[1]))["w"])[-1]
except ConfigError as error:
    last = error
print((peak() - before) // 1024, last)
"""


def measure(directory: Path) -> tuple[int, str]:
    """Return the MB by which a fresh process grows to read one number of w."""
    command = [sys.executable, "-c", MEASURE, str(directory)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    grown, _, last = run.stdout.partition(" ")
    return int(grown), last


@maps
def test_five_gigabytes_declared_in_one_kilobyte_cost_nothing(tmp_path):
    (tmp_path / SAFE).write_bytes(DAMAGED["5 GB in 1 KB"][0])
    grown, message = measure(tmp_path)
    assert "'w' has data_offsets" in message
    assert grown < 50


@maps
def test_five_real_gigabytes_cost_the_pages_that_are_touched(tmp_path):
    header = {"w": entry(0, 5 * 10**9, shape=[1_250_000_000])}
    with (tmp_path / SAFE).open("wb") as file:
        file.write(encode(header, b""))
        file.truncate(file.tell() + 5 * 10**9)  # sparse
    grown, last = measure(tmp_path)
    assert float(last) == 0
    assert grown < 50


# Shards and their index.

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def write_sharded(directory: Path, weight_map, **shards) -> None:
    for name, tensors in shards.items():
        header = {t: entry(8 * i, 8 * i + 8) for i, t in enumerate(tensors)}
        file = {"one": ONE, "two": TWO}[name]
        (directory / file).write_bytes(encode(header, bytes(8 * len(tensors))))
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def test_shards_are_read_through_their_index(tmp_path):
    files = {"a": ONE, "b": TWO, "c": ONE}
    write_sharded(tmp_path, files, one=["a", "c"], two=["b"])
    tensors = open_tensors(tmp_path)
    assert {name: t.path.name for name, t in tensors.items()} == files


def test_one_file_comes_before_an_index(tmp_path):
    write_sharded(tmp_path, {"a": ONE}, one=["a"])
    (tmp_path / SAFE).write_bytes(encode({"w": entry()}))
    assert open_tensors(tmp_path).keys() == {"w"}


OUTSIDE = "canary.safetensors"


@pytest.mark.parametrize(
    "file",
    [
        f"../{OUTSIDE}", f"..\\{OUTSIDE}", f"sub/../../{OUTSIDE}", f"./{ONE}", "..",
        ".", "", "/etc/passwd", "C:\\w", "C:w", "https://example.com/w.safetensors",
        "file:w", f"{ONE}\0", f"{ONE}\n", "sub/w.safetensors", 7, None, [ONE],
    ],
)  # fmt: skip
def test_an_index_holds_plain_file_names_only(file, tmp_path):
    (tmp_path / OUTSIDE).write_bytes(encode({"a": entry()}))
    directory = tmp_path / "model"
    (directory / "sub").mkdir(parents=True)
    write_sharded(directory, {"a": file, "b": ONE}, one=["b"])
    message = refusal(directory)
    assert f"'a' is in {file!r}; allowed: a plain name beside" in message
    assert "'b'" not in message


@pytest.mark.parametrize(
    "weight_map, shards, faults",
    [
        (
            {"a": ONE, "b": TWO, "c": "three.safetensors"},
            dict(one=["a"]),
            [f"{TWO} is missing", "three.safetensors is missing"],
        ),
        (
            {"a": ONE, "b": ONE, "c": ONE},
            dict(one=["a"]),
            [f"'b' is in no shard; allowed: in {ONE} alone", "'c' is in no shard"],
        ),
        (
            {"a": ONE},
            dict(one=["a", "b", "c"]),
            [f"'b' is in {ONE}; allowed: in none", f"'c' is in {ONE}"],
        ),
        (
            {"a": ONE, "b": TWO},
            dict(one=["a", "b"], two=["b"]),
            [f"'b' is in {ONE} and {TWO}; allowed: in {TWO} alone"],
        ),
        (
            {"a": TWO, "b": ONE},
            dict(one=["a"], two=["b"]),
            [f"'a' is in {ONE}; allowed: in {TWO}", f"'b' is in {TWO}"],
        ),
        ({}, {}, ["weight_map is {}; allowed: tensor -> file name"]),
        ([ONE], {}, ["weight_map is ['model"]),
    ],
    ids=["no shard", "not in it", "not in index", "twice", "swapped", "empty", "list"],
)
def test_an_index_and_its_shards_agree(weight_map, shards, faults, tmp_path):
    write_sharded(tmp_path, weight_map, **shards)
    message = refusal(tmp_path)
    for fault in faults:
        assert fault in message


def test_a_damaged_shard_or_index_is_named(tmp_path):
    write_sharded(tmp_path, {"a": ONE}, one=["a"])
    (tmp_path / ONE).write_bytes(b"")
    assert f"{tmp_path / ONE} cannot be read: it has 0 bytes" in refusal(tmp_path)
    (tmp_path / INDEX).write_text('{"weight_map": {"a": 1, "a": 2}}')
    assert f"{tmp_path / INDEX} cannot be read" in refusal(tmp_path)
    assert "'a' more than once" in refusal(tmp_path)
    (tmp_path / INDEX).write_text("{}")
    assert "weight_map is None" in refusal(tmp_path)
    (tmp_path / INDEX).write_bytes(b" " * 99)
    os.truncate(tmp_path / INDEX, 100_000_001)
    assert "it has 100000001 bytes; allowed: at most" in refusal(tmp_path)


# Links.


@pytest.fixture
def cache(tmp_path) -> Path:
    """Return a snapshot as huggingface_hub keeps it: links to files in blobs."""
    snapshot = tmp_path / "models--gpt2" / "snapshots" / "607a30d"
    blobs = tmp_path / "models--gpt2" / "blobs"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "248df").write_bytes(encode({"a": entry()}))
    return snapshot


@pytest.mark.parametrize("through", ["snapshot", "link to it"])
def test_a_file_of_the_hubs_cache_is_read(through, cache, tmp_path):
    (cache / SAFE).symlink_to("../../blobs/248df")
    directory = tmp_path / "link"
    directory.symlink_to(cache)
    tensor = open_tensors(cache if through == "snapshot" else directory)["a"]
    assert np.asarray(tensor).shape == (2,)


def test_shards_of_the_hubs_cache_are_read(cache):
    write_sharded(cache, {"a": ONE})
    (cache / INDEX).rename(cache.parents[1] / "blobs" / "aaaaa")
    (cache / INDEX).symlink_to("../../blobs/aaaaa")
    (cache / ONE).symlink_to("../../blobs/248df")
    assert open_tensors(cache).keys() == {"a"}


def test_a_link_inside_the_directory_is_read(tmp_path):
    (tmp_path / "other").write_bytes(encode({"a": entry()}))
    (tmp_path / SAFE).symlink_to("other")
    assert open_tensors(tmp_path).keys() == {"a"}


@pytest.mark.parametrize("kind", ["one file", "index", "shard"])
@pytest.mark.parametrize("place", ["beside blobs", "blobs elsewhere", "no cache"])
def test_a_link_that_leads_out_is_refused(kind, place, cache, tmp_path):
    outside = tmp_path / "outside"
    outside.write_bytes(encode({"a": entry()}))
    directory = cache
    if place == "blobs elsewhere":  # blobs itself is a link
        blobs = cache.parents[1] / "blobs"
        blobs.rename(tmp_path / "blobs")
        blobs.symlink_to(tmp_path / "blobs")
        outside = blobs / "248df"
    elif place == "no cache":
        directory = tmp_path / "models--gpt2" / "other" / "607a30d"
        directory.mkdir(parents=True)
        outside = cache.parents[1] / "blobs" / "248df"
    if kind == "index":
        outside.write_text(json.dumps({"weight_map": {"a": ONE}}))
    elif kind == "shard":
        write_sharded(directory, {"a": ONE})
    name = {"one file": SAFE, "index": INDEX, "shard": ONE}[kind]
    (directory / name).symlink_to(outside)
    message = refusal(directory)
    assert f"{name} is a link to {outside.resolve()}; allowed: a file in" in message


@pytest.mark.parametrize("kind", ["broken link", "loop", "directory", "pipe"])
def test_what_is_no_file_is_refused(kind, tmp_path):
    path = tmp_path / SAFE
    if kind == "broken link":
        path.symlink_to("nothing")
    elif kind == "loop":
        path.symlink_to(SAFE)
    elif kind == "directory":
        path.mkdir()
    else:
        os.mkfifo(path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")  # is not looked at instead
    assert f"{SAFE} is missing, or no regular file" in refusal(tmp_path)


# Pickles.


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


BIN = ["pytorch_model.bin", "pytorch_model.bin.index.json"]


@pytest.mark.parametrize("name", BIN)
def test_a_pickle_is_refused_and_never_runs(name, tmp_path):
    canary = tmp_path / "canary"
    attack = pickle.dumps({"w": Canary(canary)}, protocol=2)
    (tmp_path / name).write_bytes(attack)
    assert refusal(tmp_path) == (
        f"{tmp_path} holds its weights as {name}, a pickle, and pickle files can run "
        "code; allowed: model.safetensors; --allow-pickle (allow_pickle=True) reads it "
        "with torch's weights_only"
    )
    assert not canary.exists()
    pickle.loads(attack)
    assert canary.exists()  # it would have


def test_safetensors_wins_over_a_pickle(tmp_path):
    (tmp_path / SAFE).write_bytes(encode({"w": entry()}))
    (tmp_path / "pytorch_model.bin").write_bytes(b"not looked at")
    assert open_tensors(tmp_path, allow_pickle=True).keys() == {"w"}


def test_without_torch_the_remedy_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pip install torch" in refusal(tmp_path, allow_pickle=True)


@pytest.mark.parametrize("directory", ["", "nothing"])
def test_a_directory_without_weights_is_refused(directory, tmp_path):
    message = refusal(tmp_path / directory)
    assert "holds no weights; allowed: a directory with model.safetensors" in message


# Writing.


@pytest.fixture
def tensors() -> dict[str, np.ndarray]:
    """Return tensors of 40, 400, 8, 24 and 4 bytes."""
    draw = np.random.default_rng(0).standard_normal
    shapes = {"c": (2, 5), "a": (4, 25), "b": (2,), "e": (3, 2), "d": ()}
    return {name: np.asarray(draw(shape), np.float32) for name, shape in shapes.items()}


def read(directory: Path) -> dict[str, np.ndarray]:
    """Return what safetensors itself reads of the files of `directory`."""
    found = {}
    for path in directory.glob("*.safetensors"):
        found |= safetensors.numpy.load_file(path)
    return found


@pytest.mark.parametrize("shard_bytes", [1, 60, 10_000])
def test_what_is_written_is_read_back_to_the_bit(shard_bytes, tensors, tmp_path):
    write_tensors(tmp_path, tensors, dtype=None, shard_bytes=shard_bytes)
    for back in (open_tensors(tmp_path), read(tmp_path)):
        assert back.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert back[name].shape == tensor.shape
            np.testing.assert_array_equal(np.asarray(back[name]), tensor)


def test_one_file_has_its_format_and_no_index(tensors, tmp_path):
    write_tensors(tmp_path / "new" / "model", tensors, dtype=None, shard_bytes=476)
    assert os.listdir(tmp_path / "new" / "model") == [SAFE]
    with safetensors.safe_open(tmp_path / "new" / "model" / SAFE, "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_are_cut_and_indexed_as_transformers_does(tensors, tmp_path):
    write_tensors(tmp_path, tensors, dtype=None, shard_bytes=60)
    # What is too large for a shard is put before the one that is being filled.
    names = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    shards = {name: names[i] for name, i in dict(c=1, a=0, b=1, e=2, d=2).items()}
    assert json.loads((tmp_path / INDEX).read_text()) == {
        "metadata": {"total_parameters": 119, "total_size": 476},
        "weight_map": shards,
    }
    assert sorted(os.listdir(tmp_path)) == [*names, INDEX]


@pytest.mark.parametrize("layout", ["transposed", "sliced", "reversed", "broadcast"])
@pytest.mark.parametrize("dtype", [None, np.dtype(np.float16)])
def test_other_memory_layouts_are_written_right(layout, dtype, tmp_path):
    values = np.arange(24, dtype="f4").reshape(4, 6)
    view = {
        "transposed": values.T,
        "sliced": values[:, 1:4],
        "reversed": values[::-1],
        "broadcast": np.broadcast_to(values[0], (3, 6)),
    }[layout]
    assert not view.flags.c_contiguous
    write_tensors(tmp_path, {"w": view}, dtype=dtype)
    np.testing.assert_array_equal(np.asarray(open_tensors(tmp_path)["w"]), view)
    np.testing.assert_array_equal(read(tmp_path)["w"], view)


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BFLOAT16], ids=str)
@pytest.mark.parametrize("shard_bytes", [60, 10_000])
def test_a_cast_halves_the_file_and_rounds_once(dtype, shard_bytes, tensors, tmp_path):
    write_tensors(tmp_path, tensors, dtype=dtype, shard_bytes=shard_bytes)
    back = open_tensors(tmp_path)
    assert sum(tensor.nbytes for tensor in back.values()) == 476 // 2
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype
        np.testing.assert_array_equal(np.asarray(back[name]), tensor.astype(dtype))
    if shard_bytes == 60:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["metadata"]["total_size"] == 476 // 2


def test_numbers_too_large_for_the_cast_are_refused(tensors, tmp_path):
    tensors["a"][1, 2] = 65_520  # the least that rounds to infinity in float16
    tensors["b"][0] = -1e30
    tensors["c"][0] = 65_519
    tensors["e"][0] = np.inf, np.nan  # as they were
    with pytest.raises(ConfigError) as refused:
        write_tensors(tmp_path, tensors, dtype=np.dtype(np.float16))
    message = str(refused.value)
    assert "'a' has numbers too large for float16; write bfloat16 or flo" in message
    assert "'b' has numbers too large" in message
    assert not any(f"{name!r}" in message for name in "cde")
    assert os.listdir(tmp_path) == []
    write_tensors(tmp_path, tensors, dtype=BFLOAT16)


@pytest.mark.parametrize(
    "tensors, dtype, fault",
    [
        ({"../w": np.ones(1)}, None, "'../w' is a name; allowed: printable"),
        ({"__metadata__": np.ones(1)}, None, "'__metadata__' is a name"),
        ({"w": np.ones(1, complex)}, None, "'w' has dtype complex128; allowed: fl"),
        ({"w": np.array(["a"], object)}, None, "'w' has dtype object"),
        ({"w": np.ones(1, ">f4")}, None, "'w' has dtype >f4"),
        ({"w": np.ones(1)}, np.dtype(ml_dtypes.float8_e4m3fn), "dtype float8_e4m3fn"),
    ],
)
def test_what_cannot_be_stored_is_refused(tensors, dtype, fault, tmp_path):
    with pytest.raises(ConfigError) as refused:
        write_tensors(tmp_path, tensors, dtype=dtype)
    assert fault in str(refused.value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", [SAFE, INDEX, ONE])
def test_older_files_are_neither_overwritten_nor_left_beside(name, tensors, tmp_path):
    (tmp_path / name).write_text("older")
    with pytest.raises(ConfigError, match=f"holds {name}; allowed: a directory with"):
        write_tensors(tmp_path, tensors, dtype=None)
    assert (tmp_path / name).read_text() == "older"


def test_no_half_file_is_left_by_a_write_that_fails(tensors, tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(OSError, match="no space"):
        write_tensors(tmp_path, tensors, dtype=None)
    assert os.listdir(tmp_path) == []


def test_shard_bytes_is_checked(tensors, tmp_path):
    with pytest.raises(ConfigError, match="shard_bytes is 0; allowed: >= 1"):
        write_tensors(tmp_path, tensors, dtype=None, shard_bytes=0)


def test_one_shard_is_copied_at_a_time(tmp_path):
    tensors = {f"w{i}": np.ones(50_000, np.float32) for i in range(80)}
    shard_bytes = 20 * 100_000
    tracemalloc.start()
    half = np.dtype(np.float16)
    write_tensors(tmp_path, tensors, dtype=half, shard_bytes=shard_bytes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(list(tmp_path.glob("*-of-00004.safetensors"))) == 4
    assert shard_bytes < peak < 1.5 * shard_bytes
