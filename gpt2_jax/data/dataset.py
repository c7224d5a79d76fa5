"""The two splits of a run: prepared shards, `.bin` files, or text prepared here."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gpt2_jax.config import ConfigError, DataConfig
from gpt2_jax.data.prepare import prepare
from gpt2_jax.data.shards import (
    TokenShards,
    digest_bin,
    find_bin_shards,
    open_bin,
    open_split,
    read_manifest,
)
from gpt2_jax.tokenizer import Tokenizer


class Dataset(NamedTuple):
    """What a run trains on, what it holds out, and a digest that names both."""

    train: TokenShards
    val: TokenShards
    digest: str


def open_dataset(
    config: DataConfig, tokenizer: Tokenizer, cache: Path, say: Callable[[str], None]
) -> Dataset:
    """Return the splits of `config.source`; text is first made into shards in `cache`.

    Raises
    ------
    ConfigError
        If a source is missing or empty, shards are not what their manifest says, or
        were made by another tokenizer.
    """
    first = Path(config.source[0])
    prepared = (first / "manifest.json").is_file()
    files = find_bin_shards(first) if first.exists() and not prepared else {}
    more = [*config.source[1:], *config.val_source]
    if (prepared or files) and more:
        raise ConfigError(
            f"{first} holds both splits, so {', '.join(more)} would be left out; "
            "allowed: one folder of shards in --data.source and no --data.val-source"
        )
    if prepared:
        return _open_prepared(first, config, tokenizer)
    if files:
        return _open_bins(first, files, tokenizer)
    prepare(
        config.source,
        cache,
        tokenizer,
        val_sources=config.val_source,
        val_fraction=config.val_fraction,
        text_field=config.text_field,
        skip_binary=config.skip_binary,
        report=say,
    )
    return _open_prepared(cache, config, tokenizer)


def _open_prepared(
    directory: Path, config: DataConfig, tokenizer: Tokenizer
) -> Dataset:
    manifest = read_manifest(directory)
    manifest.check_tokenizer(tokenizer.name, tokenizer.fingerprint)
    train, val = (
        open_split(directory, split, n_vocab=tokenizer.n_vocab, verify=config.verify)
        for split in ("train", "val")
    )
    return Dataset(train, val, manifest.digest)


def _open_bins(
    source: Path, files: dict[str, tuple[Path, ...]], tokenizer: Tokenizer
) -> Dataset:
    if set(files) != {"train", "val"}:
        found = ", ".join(files)
        raise ConfigError(
            f"{source} holds only a {found} split; allowed: a folder with train.bin "
            "and val.bin, or *_train_*.bin and *_val_*.bin"
        )
    train, val = (
        open_bin(files[s], n_vocab=tokenizer.n_vocab) for s in ("train", "val")
    )
    both = [*files["train"], *files["val"]]
    return Dataset(train, val, digest_bin(both, n_vocab=tokenizer.n_vocab))
