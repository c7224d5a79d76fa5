"""A small Hugging Face Hub on loopback: what `huggingface_hub` asks of it, and faults.

@pytest.fixture
def hub(monkeypatch, tmp_path):
    with Hub() as hub:
        hub.use(monkeypatch, tmp_path / "home")  # this process and its children
        yield hub

hub.add("org/name", {"config.json": "{}", "model.safetensors": b"..."})
"""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

import huggingface_hub
from huggingface_hub import constants, file_download
from huggingface_hub.utils import _http

REPO = r"(?P<repo>[^/]+(?:/[^/]+)?)"
ROUTES = [
    ("GET", re.compile(rf"/api/models/{REPO}/tree/(?P<rev>[^/]+)"), "tree"),
    ("GET", re.compile(rf"/api/models/{REPO}/revision/(?P<rev>[^/]+)"), "info"),
    ("GET", re.compile(rf"/api/models/{REPO}"), "info"),
    ("GET", re.compile(rf"/{REPO}/resolve/(?P<rev>[^/]+)/(?P<file>.+)"), "resolve"),
    ("POST", re.compile(r"/api/repos/create"), "create"),
    ("POST", re.compile(r"/api/validate-yaml"), "validate"),
    ("POST", re.compile(rf"/api/models/{REPO}/preupload/(?P<rev>[^/]+)"), "preupload"),
    ("POST", re.compile(rf"/api/models/{REPO}/commit/(?P<rev>[^/]+)"), "commit"),
]
LARGE = (".safetensors", ".bin")  # known by their sha256, as files in Git LFS are
TOKEN = "hf_loopback"
UNSET = ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN"]
UNSET += ["TRANSFORMERS_OFFLINE", "HF_TOKEN_PATH", "HUGGING_FACE_HUB_TOKEN"]

Files = dict[str, bytes]


class Repo(NamedTuple):
    commits: dict[str, Files]
    refs: dict[str, str]  # branch -> commit
    messages: list[str]  # of commits that were uploaded
    gated: bool
    private: bool


class Fault(NamedTuple):
    method: str
    part: str  # of the path
    status: int  # 0: the body breaks off half-way; 200: it is `body`
    body: bytes
    times: list[int]  # one number, counted down


class Hub:
    """A Hub with repositories in memory. `token` may write anywhere but in `locked`."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.redirects: dict[str, str] = {}  # old name -> new name, with status 307
        self.locked: set[str] = set()  # organisations that take no uploads
        self.requests: list[str] = []  # "GET /path", without the query
        self.ranges: list[str] = []  # Range headers
        self.faults: list[Fault] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.hub = self  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.open = False

    def __enter__(self) -> "Hub":
        self.open = True
        poll = {"poll_interval": 0.01}
        threading.Thread(
            target=self.server.serve_forever, kwargs=poll, daemon=True
        ).start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    def stop(self) -> None:
        """Be away: from now on connections are refused."""
        if self.open:
            self.server.shutdown()
            self.server.server_close()
            huggingface_hub.close_session()  # it keeps connections alive
            self.open = False

    def add(
        self,
        name: str,
        files: dict[str, str | bytes],
        *,
        revision: str = "main",
        gated: bool = False,
        private: bool = False,
    ) -> str:
        """Commit `files`, and nothing else, to a branch; return the commit's hash."""
        empty = Repo({}, {}, [], gated, private)
        repo = self.repos.setdefault(name, empty)
        data = {k: v.encode() if isinstance(v, str) else v for k, v in files.items()}
        order = [
            name,
            len(repo.commits),
            sorted((k, digest(k, v)) for k, v in data.items()),
        ]
        commit = hashlib.sha1(json.dumps(order).encode()).hexdigest()
        repo.commits[commit] = data
        repo.refs[revision] = commit
        return commit

    def fail(
        self,
        part: str,
        status: int = 500,
        *,
        method: str = "",
        body: bytes = b"",
        times: int = 10**9,
    ) -> None:
        """Spoil the next answers whose path has `part`: see `Fault`."""
        self.faults.append(Fault(method, part, status, body, [times]))

    def truncate(self, part: str, *, times: int = 1) -> None:
        """Break the next bodies whose path has `part` off half-way."""
        self.fail(part, 0, method="GET", times=times)

    def fetched(self) -> list[str]:
        """Return the names of files whose contents were asked for, sorted."""
        asked = [r.partition("/resolve/") for r in self.requests if r.startswith("GET")]
        return sorted({path.partition("/")[2] for _, found, path in asked if found})

    def environment(self, home: Path) -> dict[str, str]:
        """Return the variables that make a process use this Hub and cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def use(self, monkeypatch: Any, home: Path) -> None:
        """Make this process and its children use this Hub and the cache `home`.

        `huggingface_hub` reads the environment when it is imported, so that its
        constants are set as well. Its pauses between attempts are skipped.
        """
        for name in UNSET:
            monkeypatch.delenv(name, raising=False)
        for name, value in self.environment(home).items():
            monkeypatch.setenv(name, value)
        for name, value in {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url
            + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }.items():
            monkeypatch.setattr(constants, name, value)
        no_pause = SimpleNamespace(sleep=lambda seconds: None)
        monkeypatch.setattr(_http, "time", no_pause)
        monkeypatch.setattr(file_download, "time", no_pause)
        huggingface_hub.close_session()  # a client of another environment


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets: 40 ms

    def log_message(self, format: str, *args: Any) -> None:
        pass

    @property
    def hub(self) -> Hub:
        return self.server.hub  # type: ignore[attr-defined]

    def do_GET(self) -> None:
        self.answer("GET")

    def do_HEAD(self) -> None:
        self.answer("GET")

    def do_POST(self) -> None:
        self.answer("POST")

    def answer(self, method: str) -> None:
        path = urlsplit(self.path).path
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.read_chunks()
        if path != "/api/agent-harnesses":  # which coding agent asks: telemetry
            self.hub.requests.append(f"{self.command} {path}")
        self.fault = self.find_fault(path)
        if self.fault and self.fault.status:
            return self.send(self.fault.status, self.fault.body)
        for verb, pattern, name in ROUTES:
            if verb == method and (match := pattern.fullmatch(path)):
                return self.route(name, **match.groupdict())
        self.send(404)

    def read_chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def find_fault(self, path: str) -> Fault | None:
        for fault in self.hub.faults:
            wanted = fault.part in path and fault.method in self.command
            if wanted and fault.times[0] > 0:
                fault.times[0] -= 1
                return fault
        return None

    def route(
        self, name: str, repo: str = "", rev: str = "main", file: str = ""
    ) -> None:
        if repo in self.hub.redirects:
            place = self.path.replace(repo, self.hub.redirects[repo], 1)
            return self.send(307, headers={"Location": place})
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", TOKEN):
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        known = token == TOKEN
        if name in ("create", "validate"):
            return self.create(known) if name == "create" else self.send_json({})
        found = self.hub.repos.get(repo)
        if found is None or found.private and not known:
            return self.refuse(401, "RepoNotFound", "Invalid username or password.")
        if found.gated and not known and name == "resolve":
            return self.refuse(
                403, "GatedRepo", f"Access to model {repo} is restricted"
            )
        rev = unquote(rev)
        commit = found.refs.get(rev, rev)
        if name in ("preupload", "commit"):
            return self.write(name, repo, found, rev, known)
        if commit not in found.commits:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        files = found.commits[commit]
        if name == "info":
            siblings = [describe(k, v, "rfilename", "blobId") for k, v in files.items()]
            return self.send_json({"id": repo, "sha": commit, "siblings": siblings})
        if name == "tree":
            rows = [describe(k, v, "path", "oid") for k, v in files.items()]
            return self.send_json([{"type": "file", **row} for row in rows])
        return self.send_file(commit, unquote(file), files)

    def create(self, known: bool) -> None:
        asked = json.loads(self.body)
        owner = asked.get("organization") or "me"
        name = f"{owner}/{asked['name']}"
        if not known:
            return self.refuse(401, "", "Invalid username or password.")
        if owner in self.hub.locked:
            return self.refuse(403, "", f"You have no rights in the namespace {owner}")
        status = 409 if name in self.hub.repos else 200
        if status == 200:
            self.hub.add(name, {})
        self.send_json({"url": f"{self.hub.url}/{name}", "name": name}, status)

    def write(self, name: str, repo: str, found: Repo, rev: str, known: bool) -> None:
        if not known:
            return self.refuse(401, "", "Invalid username or password.")
        if name == "preupload":
            asked = json.loads(self.body)["files"]
            mode = {"uploadMode": "regular", "shouldIgnore": False}
            return self.send_json(
                {"files": [{"path": f["path"], **mode} for f in asked]}
            )
        files: dict[str, str | bytes] = {**found.commits[found.refs[rev]]}
        for line in self.body.splitlines():
            row = json.loads(line)
            if row["key"] == "header":
                found.messages.append(row["value"]["summary"])
            elif row["key"] == "file":
                files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            elif row["key"] == "deletedFile":
                files.pop(row["value"]["path"])
        commit = self.hub.add(repo, files, revision=rev)
        url = f"{self.hub.url}/{repo}/commit/{commit}"
        self.send_json({"success": True, "commitOid": commit, "commitUrl": url})

    def send_file(self, commit: str, name: str, files: Files) -> None:
        if name not in files:
            return self.refuse(404, "EntryNotFound", f"no {name}")
        data, status = files[name], 200
        headers = {"ETag": f'"{digest(name, data)}"', "X-Repo-Commit": commit}
        headers["Accept-Ranges"] = "bytes"
        if asked := self.headers.get("Range"):
            self.hub.ranges.append(asked)
            start, size = int(re.findall(r"\d+", asked)[0]), len(data)
            headers["Content-Range"] = f"bytes {start}-{size - 1}/{size}"
            data, status = data[start:], 206
        self.send(status, data, headers)

    def send_json(self, values: Any, status: int = 200) -> None:
        kind = {"Content-Type": "application/json"}
        self.send(status, json.dumps(values).encode(), kind)

    def refuse(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | (
            {"X-Error-Code": code} if code else {}
        )
        self.send(status, json.dumps({"error": message}).encode(), headers)

    def send(
        self, status: int, body: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and not self.fault.status:
            body, self.close_connection = body[: len(body) // 2], True
        self.wfile.write(body)


def describe(name: str, data: bytes, key: str, blob: str) -> dict[str, Any]:
    row: dict[str, Any] = {key: name, "size": len(data), blob: digest("", data)}
    if name.endswith(LARGE):
        sha = digest(name, data)
        row["lfs"] = {"size": len(data), "pointerSize": 134, "oid": sha, "sha256": sha}
    return row


def digest(name: str, data: bytes) -> str:
    """Return what a file is known by: its git hash, or sha256 if it is large."""
    if name.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
