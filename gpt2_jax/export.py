"""Write a model: a directory in Hugging Face layout, or one of our run directories."""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gpt2_jax import model
from gpt2_jax.config import (
    Config,
    ConfigError,
    DataConfig,
    ModelConfig,
    TrainConfig,
    check,
    to_dict,
)
from gpt2_jax.hf import config_to_hf, params_to_hf
from gpt2_jax.tokenizer import Tokenizer, load_tokenizer, tokenizer_files
from gpt2_jax.weights import write_tensors

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
OWN = (
    "tokenizer"  # the name of the tokenizer that a run directory keeps, and its folder
)
BUILT_IN = ("gpt2", "bytes")  # tokenizers that need no files
# All that a converted model's directory holds; a training run has metrics.jsonl too.
OURS = re.compile(
    r"config\.json|eval\.json|generation_config\.json|README\.md|checkpoints|tokenizer|"
    r"vocab\.json|merges\.txt|(added_tokens|special_tokens_map)\.json|"
    r"tokenizer(_config)?\.json|model(-\d{5}-of-\d{5})?\.safetensors|"
    r"model\.safetensors\.index\.json"
)
NO_STATE = {"none": np.zeros(1, np.int8)}  # of an optimizer; Orbax saves no empty dict


@contextlib.contextmanager
def replacing(directory: Path, *, force: bool) -> Iterator[Path]:
    """Give an empty directory that becomes `directory` if the block ends well.

    Until then nothing is at `directory`, or what was there; after an error the partial
    one is gone. A link is followed: what it leads to is replaced.

    Raises
    ------
    ConfigError
        If `directory` may not be replaced (`check_free`) or cannot be written.
    """
    target = Path(os.path.realpath(directory))
    check_free(target, force=force)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.mkdir()
    except OSError as error:
        reason = f"{error.filename}: {error.strerror}"
        raise ConfigError(
            f"OUT {str(target)!r} cannot be written: {reason}; choose another"
        ) from error
    try:
        yield partial
        check_free(target, force=force)  # another program may have come in between
        _swap(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_free(directory: Path, *, force: bool) -> None:
    """Raise `ConfigError` if `directory` exists and may not be replaced.

    It may be empty, or with `force` hold a model.
    """
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ConfigError(f"OUT {str(directory)!r} is a file; choose a new directory")
    if not any(directory.iterdir()):
        return
    if not force:
        raise ConfigError(
            f"OUT {str(directory)!r} exists; choose another, or replace it with --force"
        )
    names = sorted(path.name for path in directory.iterdir())
    foreign = [name for name in names if not OURS.fullmatch(name)]
    if foreign or not (directory / "config.json").is_file():
        found = f"it holds {', '.join(foreign[:4])}" if foreign else "no model"
        raise ConfigError(
            f"OUT {str(directory)!r} is not what a conversion writes: {found}; choose "
            "another, or delete it yourself: --force replaces only converted models"
        )


def _swap(partial: Path, target: Path) -> None:
    old = partial.with_suffix(".old")
    if target.exists():
        target.rename(old)
    try:
        partial.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_hf(
    config: ModelConfig,
    params: model.Params,
    tokenizer: Tokenizer | None,
    directory: Path,
    *,
    dtype: str = "float32",
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write config.json, generation_config.json, weights and the tokenizer's files.

    Above `shard_bytes` the weights are several files and an index, as transformers
    writes them.
    """
    check(dtype in DTYPES, "dtype", dtype, ", ".join(DTYPES))
    eot = None if tokenizer is None else tokenizer.eot
    values = config_to_hf(config, eot=eot, dtype=dtype)
    _write_json(directory / "config.json", values)
    ends = dict(bos_token_id=eot, eos_token_id=eot, pad_token_id=eot)
    _write_json(
        directory / "generation_config.json", {"_from_model_config": True} | ends
    )
    if tokenizer is not None:
        texts = tokenizer_files(tokenizer, model_max_length=config.n_ctx)
        for name, text in texts.items():
            (directory / name).write_text(text, encoding="utf-8")
    tensors = params_to_hf(config, params)
    write_tensors(directory, tensors, dtype=DTYPES[dtype], shard_bytes=shard_bytes)


def write_run(
    config: ModelConfig,
    params: model.Params,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    name: str,
    source: str,
) -> None:
    """Write a run directory `name` that holds parameters only, as step 0.

    It can be loaded, or named in `train.init_from`; it cannot be resumed, for it has
    no optimizer state. `source` says where the parameters come from.
    """
    from gpt2_jax.checkpoint import Checkpoints  # Orbax: half a second

    kept = keep_tokenizer(tokenizer, directory)
    run = Config(
        run_dir=name,
        model=dataclasses.replace(config, dtype="auto", attention="auto"),
        data=DataConfig(source=("unknown",), tokenizer=kept),
        train=TrainConfig(steps=1, batch_tokens=config.n_ctx),
    )
    _write_json(directory / "config.json", to_dict(run))
    meta = dict(
        config=to_dict(run), converted_from=source, tokenizer=tokenizer.fingerprint
    )
    folder = directory / "checkpoints"
    with Checkpoints(folder, interval=1, keep=1, keep_every=0) as checkpoints:
        checkpoints.save(0, params, NO_STATE, meta)


def keep_tokenizer(tokenizer: Tokenizer, directory: Path) -> str:
    """Return its name for `open_tokenizer`, after writing its files if it has any.

    They lie in the folder `tokenizer` of the run directory, which may move.
    """
    if tokenizer.name in BUILT_IN:
        return tokenizer.name
    folder = directory / OWN
    folder.mkdir(exist_ok=True)
    for name, text in tokenizer_files(tokenizer).items():
        (folder / name).write_text(text, encoding="utf-8")
    return OWN


def open_tokenizer(directory: Path, name: str) -> Tokenizer:
    """Return the tokenizer that a run in `directory` calls `name`."""
    return load_tokenizer(str(directory / OWN) if name == OWN else name)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
