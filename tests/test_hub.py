import errno
import json
import socket
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import TOKEN, Hub
from huggingface_hub import constants, file_download, snapshot_download, utils

from gpt2_jax import hub as module
from gpt2_jax.config import ConfigError
from gpt2_jax.hub import download, is_name, split_name, upload

TEXTS = ["config.json", "generation_config.json", "vocab.json", "merges.txt"]
TEXTS += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
TEXTS += ["added_tokens.json"]
OTHERS = ["README.md", "onnx/config.json", "onnx/model.safetensors", "64.tflite"]
OTHERS += ["tf_model.h5", "flax_model.msgpack", "rust_model.ot", "other.json"]
OTHERS += [
    "model-0000a-of-00002.safetensors",
    "coreml/model-00001-of-00002.safetensors",
]
INDEX = "model.safetensors.index.json"
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
WHOLE = "model.safetensors"
PICKLE = "pytorch_model.bin"


def files(*names: str) -> dict[str, str | bytes]:
    index = json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1]}})
    return {n: index if n == INDEX else f"{n} " * 501 for n in names}


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "home")
        yield hub


@pytest.fixture
def refuses():
    """Return a function: `download` with these arguments fails in one line of these."""

    def refuse(*parts: str, name: str = "org/name", **options) -> str:
        with pytest.raises(ConfigError) as caught:
            download(name, **options)
        message = str(caught.value)
        assert "\n" not in message
        assert [part for part in parts if part not in message] == [], message
        return message

    return refuse


@pytest.mark.parametrize(
    ("name", "repo", "revision"),
    [
        ("gpt2", "gpt2", None),
        ("org/name@v1", "org/name", "v1"),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
        ("gpt2@a@b", "gpt2", "a@b"),
    ],
)
def test_names_are_split_at_the_first_at(name, repo, revision):
    assert split_name(name) == (repo, revision)
    assert is_name(name)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "./runs", "/tmp/x", "a/b/c", "runs/", "~/x", "a b", "gpt2@"]
)
def test_paths_are_no_names(name, refuses):
    assert not is_name(name)
    refuses(f"MODEL is {name!r}; allowed: a directory", name=name)


@pytest.mark.parametrize("weights", [[WHOLE], [INDEX, *SHARDS]], ids=["one", "shards"])
@pytest.mark.parametrize("allow_pickle", [False, True])
def test_only_what_is_read_is_fetched(hub, weights, allow_pickle):
    commit = hub.add("org/name", files(*TEXTS, *weights, *OTHERS, PICKLE))
    folder = download("org/name", allow_pickle=allow_pickle)
    assert names(folder) == {*TEXTS, *weights}
    assert hub.fetched() == sorted([*TEXTS, *weights])
    assert folder.name == commit
    assert folder.is_relative_to(constants.HF_HUB_CACHE)
    assert (folder / weights[-1]).read_bytes() == files(weights[-1])[
        weights[-1]
    ].encode()


def test_what_is_cached_is_not_fetched_again(hub):
    hub.add("org/name", files("config.json", WHOLE))
    folder = download("org/name")
    hub.requests.clear()
    (folder / WHOLE).write_text("altered")  # nor read again, to check it
    assert download("org/name") == folder
    assert hub.fetched() == []


def test_a_new_commit_is_noticed(hub):
    hub.add("org/name", files("config.json", WHOLE))
    old = download("org/name")
    hub.add("org/name", {**files("config.json"), WHOLE: "new"})
    assert (download("org/name") / WHOLE).read_text() == "new"
    assert download("org/name", revision=old.name) == old


def test_revisions(hub, refuses):
    main = hub.add("org/name", files("config.json", WHOLE))
    hub.add("org/name", {"config.json": "{}", WHOLE: "x"}, revision="refs/pr/1")
    assert download("org/name").name == main
    for folder in (
        download("org/name@refs/pr/1"),
        download("org/name", revision="refs/pr/1"),
        download("org/name@refs/pr/1", revision="refs/pr/1"),
    ):
        assert (folder / WHOLE).read_text() == "x"
    refuses(
        "revision is 'main'; allowed: refs/pr/1",
        name="org/name@refs/pr/1",
        revision="main",
    )
    refuses("'org/name@v9' is no", "Invalid rev id: v9", name="org/name@v9")


def test_openai_models_are_found_where_they_moved(hub, refuses):
    hub.add("openai-community/gpt2", files("config.json", WHOLE))
    assert WHOLE in names(download("gpt2"))
    assert "GET /api/models/gpt2" in hub.requests
    refuses("openai-community/gpt2-xl' is no directory", name="gpt2-xl")
    refuses("'other' is no directory", name="other")
    assert not any("openai-community/other" in request for request in hub.requests)


def test_openai_models_follow_the_redirect(hub):
    hub.add("openai-community/gpt2", files("config.json", WHOLE))
    hub.redirects["gpt2"] = "openai-community/gpt2"
    folder = download("gpt2")
    assert names(folder) == {"config.json", WHOLE}
    assert "models--gpt2" in str(folder)


@pytest.mark.parametrize("cached_as", ["gpt2", "openai-community/gpt2"])
def test_openai_models_are_found_in_the_cache(hub, cached_as):
    hub.add(cached_as, files("config.json", WHOLE))
    folder = download(cached_as)
    hub.stop()
    assert download("gpt2") == folder


def test_pickles_alone_are_refused(hub, refuses):
    hub.add("org/name", files("config.json", PICKLE))
    refuses("only pickle files (pytorch_model.bin)", "--allow-pickle")
    assert hub.fetched() == []
    assert not Path(constants.HF_HUB_CACHE).exists()


def test_pickles_alone_can_be_allowed(hub, refuses):
    shards = [name.replace("model", "pytorch_model", 1) for name in SHARDS]
    shards = [name.replace("safetensors", "bin") for name in shards]
    hub.add("org/name", files("config.json", *shards, "onnx/config.json"))
    folder = download("org/name", allow_pickle=True)
    assert names(folder) == {"config.json", *shards}
    hub.stop()
    assert download("org/name", allow_pickle=True) == folder
    refuses("only pickle files", "--allow-pickle")


def test_a_repository_without_weights_is_refused(hub, refuses):
    hub.add("org/name", files("config.json", "tf_model.h5"))
    refuses("org/name holds no weights to read", "model.safetensors")


@pytest.mark.parametrize("how", ["away", "offline", "broken"])
def test_a_complete_snapshot_serves_without_the_hub(hub, monkeypatch, how):
    commit = hub.add("org/name", files(*TEXTS, INDEX, *SHARDS, *OTHERS))
    folder = download("org/name")
    hub.fail("/api/", 503) if how == "broken" else hub.stop()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "offline")
    assert download("org/name") == download(f"org/name@{commit}") == folder


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
@pytest.mark.parametrize("lost", [SHARDS[1], WHOLE, "vocab.json"])
def test_an_interrupted_download_names_what_is_missing(hub, refuses, name, lost):
    weights = [WHOLE] if lost == WHOLE else [INDEX, *SHARDS]
    hub.add(name, files("config.json", "vocab.json", *weights))
    folder = download(name)
    (folder / lost).resolve().unlink()
    hub.stop()
    message = refuses("incomplete", lost, "copy what `hf download", name="gpt2")
    assert SHARDS[0] not in message
    for path in folder.iterdir():
        path.resolve().unlink(missing_ok=True)
    refuses("config.json", "); http", name="gpt2")


def test_an_interrupted_download_is_completed(hub):
    hub.add("org/name", files("config.json", INDEX, *SHARDS))
    folder = download("org/name")
    (folder / SHARDS[1]).resolve().unlink()
    hub.requests.clear()
    assert SHARDS[1] in names(download("org/name"))
    assert hub.fetched() == [SHARDS[1]]


def test_what_is_nowhere_says_how_to_get_it(hub, refuses, monkeypatch):
    ways = ["'runs/quikstart' is no directory", constants.HF_HUB_CACHE]
    refuses(*ways, "answers 401", "check the spelling", name="runs/quikstart")
    hub.fail("/api/", 404)
    refuses(*ways, "answers 404", "check the spelling", name="runs/quikstart")
    hub.stop()
    ways += ["hf download runs/quikstart", "HF_ENDPOINT"]
    refuses(*ways, hub.url, "refused", name="runs/quikstart")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refuses(*ways, "HF_HUB_OFFLINE", name="runs/quikstart")
    refuses("is no directory", "hf download openai-community/gpt2", name="gpt2")


def test_closed_repositories_say_how_to_enter(hub, refuses, monkeypatch):
    hub.add("org/gated", files("config.json", WHOLE), gated=True)
    hub.add("org/private", files("config.json", WHOLE), private=True)
    terms = f"the terms at {hub.url}/org/gated"
    refuses("403", "is restricted", terms, "HF_TOKEN", name="org/gated")
    refuses("401", "HF_TOKEN", "hf auth login", name="org/private")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    refuses("401 Invalid credentials", "HF_TOKEN", name="org/private")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert WHOLE in names(download("org/gated"))
    assert WHOLE in names(download("org/private"))


@pytest.mark.parametrize(
    ("part", "method"),
    [("/api/models/org/name", ""), ("/resolve/", "HEAD"), ("/resolve/", "GET")],
)
def test_a_broken_server_is_named(hub, refuses, part, method):
    hub.add("org/name", files("config.json", WHOLE))
    hub.fail(part, 503, method=method)
    refuses("'org/name'", f"{hub.url}: it answers 503", "HF_ENDPOINT")
    hub.faults.clear()
    assert WHOLE in names(download("org/name"))


def test_an_answer_of_something_else_is_named(hub, refuses):
    hub.fail("/api/models/", 200, body=b"<html>Please log in to the WLAN</html>")
    refuses(hub.url, "HF_ENDPOINT")


def test_a_body_that_breaks_off_is_resumed(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1)  # bytes; else all anew
    hub.add("org/name", files("config.json", WHOLE))
    hub.truncate(WHOLE)
    assert (download("org/name") / WHOLE).read_text() == files(WHOLE)[WHOLE]
    assert hub.ranges == [f"bytes={len(files(WHOLE)[WHOLE]) // 2}-"]


@pytest.mark.parametrize("body", [b"", b"short", b"x" * 9000], ids=len)
def test_a_body_of_another_size_is_refused(hub, refuses, body):
    hub.add("org/name", files("config.json", WHOLE))
    hub.fail(WHOLE, 200, method="GET", body=body)
    refuses(WHOLE)
    hub.faults.clear()
    assert (download("org/name") / WHOLE).read_text() == files(WHOLE)[WHOLE]


def test_an_altered_body_is_refused_and_fetched_anew(hub, refuses):
    hub.add("org/name", files("config.json", WHOLE))
    text = files(WHOLE)[WHOLE]
    hub.fail(WHOLE, 200, method="GET", body=b"x" * len(text), times=1)
    refuses(WHOLE, "sha256", "try again")
    assert (download("org/name") / WHOLE).read_text() == text


@pytest.mark.parametrize("path", [None, "/cache/blob"])
def test_a_full_disk_is_named(hub, monkeypatch, path):
    def fill(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device", path)

    hub.add("org/name", files("config.json", WHOLE))
    monkeypatch.setattr(file_download, "http_get", fill)
    with pytest.raises(OSError, match="No space left") as caught:
        download("org/name")
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == (path or constants.HF_HUB_CACHE)


def test_a_commit_during_a_download_is_no_altered_file(hub, monkeypatch):
    def commit_first(*arguments, **options):
        hub.add("org/name", {**files("config.json"), WHOLE: "new"})
        return snapshot_download(*arguments, **options)

    hub.add("org/name", files("config.json", WHOLE))
    monkeypatch.setattr(module, "snapshot_download", commit_first)
    assert (download("org/name") / WHOLE).read_text() == "new"


def test_a_hub_that_does_not_answer_is_not_waited_for(hub, monkeypatch, refuses):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host, port = silent.getsockname()
        monkeypatch.setattr(constants, "ENDPOINT", f"http://{host}:{port}")
        monkeypatch.setattr(module, "TIMEOUT", 0.2)
        end = threading.Timer(5, silent.shutdown, [socket.SHUT_RDWR])
        end.start()
        refuses("'org/name' is no directory", "timed out")
        end.cancel()


def test_the_library_keeps_quiet(hub, monkeypatch, capfd, caplog):
    hub.add("org/name", files("config.json", WHOLE))
    hub.truncate(WHOLE)  # which it logs
    full = SimpleNamespace(free=0)
    monkeypatch.setattr(file_download.shutil, "disk_usage", lambda _: full)
    utils.logging.set_verbosity_warning()
    utils.enable_progress_bars()
    download("org/name")  # a warning would be an error
    assert capfd.readouterr() == ("", "")
    assert caplog.messages == []
    assert utils.logging.get_verbosity() == utils.logging.WARNING
    assert not utils.are_progress_bars_disabled()


@pytest.fixture
def exported(tmp_path):
    folder = tmp_path / "exported"
    folder.mkdir()
    for name, text in files("config.json", "vocab.json", WHOLE, "README.md").items():
        (folder / name).write_text(text)
    return folder


def test_what_is_uploaded_can_be_downloaded(hub, monkeypatch, exported, capfd):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    url = upload(exported, "org/new", message="Add it")
    assert url == f"{hub.url}/org/new"
    assert hub.repos["org/new"].messages == ["Add it"]
    folder = download("org/new")
    assert names(folder) == {"config.json", "vocab.json", WHOLE}
    for name in names(folder):
        assert (folder / name).read_bytes() == (exported / name).read_bytes()
    (exported / "config.json").write_text("changed")
    assert upload(exported, "org/new", message="Change it") == url
    assert hub.repos["org/new"].messages == ["Add it", "Change it"]
    assert (download("org/new") / "config.json").read_text() == "changed"
    assert upload(exported, "mine", message="Add it") == f"{hub.url}/me/mine"
    assert capfd.readouterr() == ("", "")


def test_weights_in_other_files_are_replaced_not_joined(hub, monkeypatch, exported):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    upload(exported, "org/new", message="Add it")
    (exported / WHOLE).rename(exported / "model-00001-of-00001.safetensors")
    upload(exported, "org/new", message="Shard it")
    found = names(download("org/new"))
    assert WHOLE not in found and "model-00001-of-00001.safetensors" in found


@pytest.mark.parametrize(
    ("token", "name", "parts"),
    [
        ("", "org/new", ["org/new", "401", "hf auth login", "HF_TOKEN"]),
        ("hf_wrong", "org/new", ["org/new", "401 Invalid cred", "hf auth login"]),
        (TOKEN, "locked/new", ["locked/new", "403", "no rights", "hf auth login"]),
        (TOKEN, "org/new@v1", ["MODEL is 'org/new@v1'; allowed: on the Hub, org/name"]),
        (TOKEN, "a/b/c", ["MODEL is 'a/b/c'"]),
    ],
)
def test_an_upload_that_is_refused(hub, monkeypatch, exported, token, name, parts):
    hub.locked.add("locked")
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError) as caught:
        upload(exported, name, message="Add it")
    assert [part for part in parts if part not in str(caught.value)] == []
    assert "\n" not in str(caught.value)
    assert hub.repos == {}


def test_an_upload_of_nothing_or_to_nowhere(hub, exported, tmp_path):
    with pytest.raises(ConfigError, match="directory is '.*absent'"):
        upload(tmp_path / "absent", "org/new", message="Add it")
    hub.stop()
    with pytest.raises(ConfigError, match="org/new is not uploaded.*refused"):
        upload(exported, "org/new", message="Add it")


PROGRAM = """
import sys
from pathlib import Path
from gpt2_jax.hub import download, upload
folder = download(sys.argv[1])
print(folder)
if len(sys.argv) > 2:
    print(upload(folder, sys.argv[2], message="Add it"))
"""


def run(*arguments: str) -> tuple[str, str]:
    command = [sys.executable, "-W", "error", "-c", PROGRAM, *arguments]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return ended.stdout, ended.stderr


def test_a_user_sets_the_environment(hub, monkeypatch, tmp_path):
    hub.add("openai-community/gpt2", files("config.json", *SHARDS, INDEX, *OTHERS))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    out, err = run("gpt2", "org/copy")
    folder, url = out.splitlines()
    assert (url, err) == (f"{hub.url}/org/copy", "")
    assert Path(folder).is_relative_to(tmp_path / "home" / "hub")
    assert names(Path(folder)) == set(hub.repos["org/copy"].commits.popitem()[1])
    hub.stop()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert run("gpt2") == (f"{folder}\n", "")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    out, err = run("gpt2")
    assert out == ""
    assert f"not in {tmp_path / 'elsewhere'}" in err.splitlines()[-1]
