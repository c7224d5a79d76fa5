"""Write a model: a directory in Hugging Face layout, or one of our run directories."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from gpt2_jax import model
from gpt2_jax.checkpoint import Checkpoints
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
from gpt2_jax.tokenizer import Tokenizer, tokenizer_files
from gpt2_jax.weights import write_tensors

DTYPES = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
BUILT_IN = ("gpt2", "bytes")  # tokenizers that need no files
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
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"OUT {str(directory)!r} is no model, it lacks config.json; choose "
            "another, or delete it yourself: --force replaces only models"
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
    kept = keep_tokenizer(tokenizer, directory)
    run = Config(
        run_dir=name,
        model=dataclasses.replace(config, dtype="auto", attention="auto"),
        # `directory` may move: loading finds the folder where it is then.
        data=DataConfig(source=("unknown",), tokenizer=Path(kept).name),
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
    """Return what loads the tokenizer, after writing its files if it is not built in.

    That is its name, or the folder `tokenizer` within `directory`.
    """
    if tokenizer.name in BUILT_IN:
        return tokenizer.name
    folder = directory / "tokenizer"
    folder.mkdir(exist_ok=True)
    for name, text in tokenizer_files(tokenizer).items():
        (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
