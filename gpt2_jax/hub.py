"""Models on the Hugging Face Hub: download to its cache, upload.

`huggingface_hub` fetches, caches and reads the environment (HF_HOME, HF_TOKEN, ...).
Here stand which files are wanted, and one line for whatever goes wrong.
"""

import hashlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from huggingface_hub import HfApi, constants, errors, snapshot_download, utils
from huggingface_hub.file_download import try_to_load_from_cache

from gpt2_jax import tokenizer_files
from gpt2_jax.config import ConfigError, check

NAMES = "gpt2, org/name or org/name@revision"
OPENAI = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")  # in openai-community/

# Patterns of fnmatch, whose * would match folders as well: onnx/config.json.
FILES = ["config.json", "generation_config.json", *tokenizer_files.FILES]
SHARDS = f"-{'[0-9]' * 5}-of-{'[0-9]' * 5}"
SAFETENSORS = ["model.safetensors", "model.safetensors.index.json"]
SAFETENSORS += [f"model{SHARDS}.safetensors"]
PICKLES = ["pytorch_model.bin", "pytorch_model.bin.index.json"]
PICKLES += [f"pytorch_model{SHARDS}.bin"]

TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT  # seconds; else one question may last for ever
NETWORK = errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]  httpx's or 2's
FAILURES = (NETWORK, OSError, ValueError, RuntimeError)  # no JSON; from hf_xet


class _AbsentError(ConfigError):
    """The model is neither in the cache nor, as far as one can see, on the Hub."""


def split_name(name: str) -> tuple[str, str | None]:
    """Return repository and revision of `org/name@revision`; without @, None."""
    repo, at, revision = name.partition("@")
    return repo, revision if at else None


def is_name(name: str) -> bool:
    """Say whether `name` could be on the Hub: `gpt2`, `org/name`, `org/name@v1`."""
    repo, revision = split_name(name)
    try:
        utils.validate_repo_id(repo)
    except errors.HFValidationError:
        return False
    return revision != ""


def download(
    name: str, *, revision: str | None = None, allow_pickle: bool = False
) -> Path:
    """Return the directory in the Hub's cache that holds the model `name`.

    Only config, tokenizer and safetensors are fetched; with `allow_pickle`, and where
    there are no safetensors, pickles. A complete snapshot in the cache serves while
    the Hub does not. Raises `ConfigError` if the model cannot be had, saying how to
    get it, and `OSError` if the cache cannot be written.
    """
    check(is_name(name), "MODEL", name, f"a directory, or on the Hub {NAMES}")
    repo, named = split_name(name)
    agree = named is None or revision in (None, named)
    check(agree, "revision", revision, f"{named}, as MODEL {name} says, or none")
    with _quiet():
        try:
            return _fetch(repo, named or revision, allow_pickle)
        except _AbsentError:
            if repo not in OPENAI:
                raise
        return _fetch(f"openai-community/{repo}", named or revision, allow_pickle)


def upload(directory: Path, name: str, *, message: str) -> str:
    """Commit the files of `directory` to the repository `name`; return its URL.

    The repository is made, public, where it is absent; other files in it stay.
    Raises `ConfigError` if the Hub refuses or cannot be reached.
    """
    repo, revision = split_name(name)
    check(is_name(repo) and revision is None, "MODEL", name, "on the Hub, org/name")
    check(directory.is_dir(), "directory", str(directory), "one of an exported model")
    try:
        with _quiet():
            url = HfApi().create_repo(repo, exist_ok=True)
            HfApi().upload_folder(
                repo_id=url.repo_id,
                folder_path=directory,
                commit_message=message,
                # Or weights of before, in other files, would be read first.
                delete_patterns=["model*.safetensors", "model.safetensors.index.json"],
            )
    except FAILURES as error:
        what = f"{repo} is not uploaded"
        raise ConfigError(_explain(repo, error, what, "try again")) from error
    return str(url)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the library's warnings to itself, and its bars to terminals."""
    level, hidden = utils.logging.get_verbosity(), utils.are_progress_bars_disabled()
    with warnings.catch_warnings(action="ignore"):
        utils.logging.set_verbosity_error()
        if not sys.stderr.isatty():
            utils.disable_progress_bars()
        try:
            yield
        finally:
            utils.logging.set_verbosity(level)
            if not hidden:
                utils.enable_progress_bars()


def _fetch(repo: str, revision: str | None, allow_pickle: bool) -> Path:
    patterns, sums, commit, away = FILES + SAFETENSORS, {}, None, None
    try:
        info = HfApi().model_info(
            repo, revision=revision, timeout=TIMEOUT, files_metadata=True
        )
    except FAILURES as error:
        away = error
    else:
        files, commit = {f.rfilename: f.lfs for f in info.siblings or []}, info.sha
        patterns = _choose(repo, list(files), allow_pickle)
        for name in _match(list(files), patterns):
            cached = try_to_load_from_cache(repo, name, revision=commit)
            if (lfs := files[name]) and not cached:
                sums[name] = lfs.sha256
    offline = away is not None
    try:
        folder = snapshot_download(
            repo, revision=revision, allow_patterns=patterns, local_files_only=offline
        )
    except FAILURES as error:
        raise _failure(repo, revision, away or error, str(error)) from error
    if offline:
        _choose(repo, os.listdir(folder), allow_pickle)
    elif Path(folder).name == commit:  # else another one came in between
        _check_sums(Path(folder), sums)
    return Path(folder)


def _match(names: list[str], patterns: list[str]) -> list[str]:
    return [name for name in names if any(fnmatchcase(name, p) for p in patterns)]


def _choose(repo: str, names: list[str], allow_pickle: bool) -> list[str]:
    if _match(names, SAFETENSORS):
        return FILES + SAFETENSORS
    pickles, allowed = _match(names, PICKLES), "a repository with model.safetensors"
    if not pickles:
        raise ConfigError(f"{repo} holds no weights to read; allowed: {allowed}")
    if not allow_pickle:
        found = f"{repo} holds only pickle files ({pickles[0]}), which can run any code"
        raise ConfigError(f"{found}; allowed: {allowed}, or --allow-pickle if trusted")
    return FILES + PICKLES


def _check_sums(folder: Path, sums: dict[str, str]) -> None:
    for name, expected in sums.items():
        with folder.joinpath(name).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            folder.joinpath(name).resolve().unlink()
            raise ConfigError(f"{name} had sha256 {found}, not {expected}; try again")


def _failure(repo: str, revision: str | None, error: Exception, gap: str) -> Exception:
    name = f"{repo}@{revision}" if revision else repo
    what = f"MODEL {name!r} is no directory here and not in {constants.HF_HUB_CACHE}"
    kind = _AbsentError
    if "incomplete" in gap:
        what, kind = gap.partition("). ")[0] + ")", ConfigError
    mend = (
        f"HF_ENDPOINT to a mirror, or copy what `hf download {repo}` caches elsewhere"
    )
    return kind(_explain(repo, error, what, f"try again, set {mend}"))


def _explain(repo: str, error: BaseException, what: str, mend: str) -> str:
    """Return one line; raise the error of a disk as it is, with a path."""
    if isinstance(error, errors.LocalEntryNotFoundError):
        error = error.__cause__ or error
    if isinstance(error, OSError) and error.errno:
        path = error.filename or constants.HF_HUB_CACHE
        raise OSError(error.errno, error.strerror, path) from error
    why = " ".join(str(error).split())[:200].rstrip(".")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        why = f"it answers {status} {error.server_message or ''}".rstrip(". ")
        if status in (401, 403, 404):
            mend = "check the spelling, set HF_TOKEN or run `hf auth login`, and accept"
            mend += f" the terms at {constants.ENDPOINT}/{repo} if it is gated"
    return f"{what}; {constants.ENDPOINT}: {why}; {mend}"
