"""PyTorch's own files: tensors are read, code never runs; layouts are transformers'."""

import json
import pickle
from pathlib import Path

import make_golden
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers

from gpt2_jax.config import ConfigError
from gpt2_jax.weights import open_tensors, write_tensors

BIN, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64,
    torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def save_zip(values, path):
    torch.save(values, path)


def save_legacy(values, path):
    torch.save(values, path, _use_new_zipfile_serialization=False)


def save_pickle(values, path):
    path.write_bytes(pickle.dumps(values, protocol=2))


def refusal(directory: Path) -> str:
    with pytest.raises(ConfigError) as refused:
        open_tensors(directory, allow_pickle=True)
    assert str(refused.value).isprintable()
    return str(refused.value)


@pytest.mark.parametrize("save", [save_zip, save_legacy, save_pickle])
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_code_in_a_pickle_never_runs(save, allow_pickle, tmp_path):
    canary = tmp_path / "canary"
    save({"w": Canary(canary)}, tmp_path / BIN)
    with pytest.raises(ConfigError):
        open_tensors(tmp_path, allow_pickle=allow_pickle)
    assert not canary.exists()
    if save is save_pickle:
        pickle.loads((tmp_path / BIN).read_bytes())
    else:
        torch.load(tmp_path / BIN, weights_only=False)
    assert canary.exists()  # it would have


@pytest.mark.parametrize("save", [save_zip, save_legacy])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_read_to_the_bit(save, dtype, tmp_path):
    square = torch.arange(6).reshape(2, 3).to(dtype)
    parameter = torch.nn.Parameter(square, requires_grad=dtype.is_floating_point)
    empty = torch.zeros((0, 3), dtype=dtype)
    tensors = {"w": parameter, "t": square.T, "s": square[1, 1], "z": empty}
    save(tensors, tmp_path / BIN)
    back = open_tensors(tmp_path, allow_pickle=True)
    assert back.keys() == tensors.keys()
    name = str(dtype).removeprefix("torch.")
    for key, tensor in tensors.items():
        assert back[key].dtype == np.dtype(getattr(ml_dtypes, name, name))
        expected = tensor.detach().to(torch.float64).numpy()
        np.testing.assert_array_equal(np.asarray(back[key], np.float64), expected)


@pytest.mark.parametrize(
    "values, fault",
    [
        ([torch.ones(1)], "it holds a list; allowed: a dict"),
        ({"w": 3, "v": {"w": 1}}, "'v' is dict of no dtype; allowed: plain names"),
        ({"../w": torch.ones(1)}, "'../w' is Tensor of torch.float32"),
        ({3: torch.ones(1)}, "3 is Tensor of torch.float32"),
        ({"w": torch.ones(1, dtype=torch.complex64)}, "'w' is Tensor of torch.compl"),
        ({"w": torch.ones(1).to(torch.float8_e5m2)}, "'w' is Tensor of torch.float8_"),
        ({"w": torch.ones(2, 2).to_sparse()}, "'w' is Tensor of torch.float32"),
        ({"w": torch.ones(1, device="meta")}, "'w' is Tensor of torch.float32"),
    ],
)
def test_what_is_no_dense_tensor_is_refused(values, fault, tmp_path):
    torch.save(values, tmp_path / BIN)
    assert fault in refusal(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of damage
@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_a_damaged_file_is_refused(save, tmp_path):
    save({"w": torch.arange(99.0)}, tmp_path / BIN)
    good = (tmp_path / BIN).read_bytes()
    cuts = [b"", b"hello", *(good[:n] for n in range(1, len(good) - 1, 7))]
    for damaged in cuts:
        (tmp_path / BIN).write_bytes(damaged)
        assert f"{tmp_path / BIN} cannot be read: torch's weights" in refusal(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of damage
@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_altered_bytes_are_read_or_refused(save, tmp_path):
    save({"w": torch.arange(9.0), "v": torch.ones(2, 3)}, tmp_path / BIN)
    good = (tmp_path / BIN).read_bytes()
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(500):
        damaged = bytearray(good)
        damaged[random.integers(len(good))] = random.integers(256)
        (tmp_path / BIN).write_bytes(damaged)
        try:
            open_tensors(tmp_path, allow_pickle=True)
        except ConfigError:
            refused += 1
    assert refused > 50


def test_an_older_torch_is_refused(tmp_path, monkeypatch):
    save_zip({"w": torch.ones(1)}, tmp_path / BIN)
    for version in ("2.9.1", "2.5"):
        older = torch.torch_version.TorchVersion(version)
        monkeypatch.setattr(torch, "__version__", older)
        assert f"the version of torch is '{version}'" in refusal(tmp_path)


def test_shards_are_read_through_their_index(tmp_path):
    files = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin"}
    for name, file in files.items():
        torch.save({name: torch.ones(2)}, tmp_path / file)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    back = open_tensors(tmp_path, allow_pickle=True)
    assert back.keys() == {"a", "b"}
    files["c"] = "../outside.bin"
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    assert "'c' is in '../outside.bin'; allowed: a plain name" in refusal(tmp_path)
    files["c"] = files["a"]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": files}))
    assert "'c' is in no shard" in refusal(tmp_path)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
def test_torch_reads_what_is_written(dtype, tmp_path):
    values = np.random.default_rng(0).standard_normal((5, 7)).astype(np.float32)
    tensors = {"w": values.T, "s": np.asarray(3.0, np.float32)}
    write_tensors(tmp_path, tensors, dtype=np.dtype(dtype))
    back = safetensors.torch.load_file(tmp_path / "model.safetensors")
    kind = getattr(torch, np.dtype(dtype).name)
    for name, tensor in tensors.items():
        expected = torch.from_numpy(tensor.copy()).to(kind)
        assert back[name].dtype == kind
        assert torch.equal(back[name], expected)


@pytest.mark.parametrize("shard_bytes", [1_000, 5_000, 10**9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_files_are_those_of_save_pretrained(shard_bytes, dtype, tmp_path):
    config = transformers.GPT2Config(**make_golden.TINY)
    model = transformers.GPT2LMHeadModel(config)
    names = [name for name in model.state_dict() if name != "lm_head.weight"]
    tensors = {name: model.state_dict()[name].numpy() for name in names}
    cast = model.to(dtype)
    cast.save_pretrained(tmp_path / "theirs", max_shard_size=shard_bytes)
    kind = np.dtype(getattr(ml_dtypes, str(dtype).removeprefix("torch."), np.float32))
    write_tensors(tmp_path / "ours", tensors, dtype=kind, shard_bytes=shard_bytes)
    ours = {path.name: path for path in (tmp_path / "ours").iterdir()}
    theirs = {path.name for path in (tmp_path / "theirs").glob("model*")}
    assert ours.keys() == theirs
    assert (len(ours) == 1) == (shard_bytes == 10**9)
    for name, path in ours.items():
        assert path.read_bytes() == (tmp_path / "theirs" / name).read_bytes(), name
