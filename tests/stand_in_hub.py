"""A stand-in for the Hugging Face hub: what its client asks for to push and to load models, from memory, over HTTP.

It is written after the requests of huggingface_hub (`HfApi.create_repo`, `create_commit`, `model_info`, `snapshot_download`), and
keeps every commit, as git does.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "other"}
PIPELINES = {
    *("image-classification", "text-generation", "image-to-text", "automatic-speech-recognition"),
    *("zero-shot-image-classification", "text-classification"),
}
NOWHERE = "http://127.0.0.1:9"  # no program listens there
Files = dict[str, tuple[bytes, bool]]  # by path: the content, and whether it is a large file


@dataclass
class Repo:
    """private: only its owner sees it. commits: all of them, by their names. branches: the last commit of each."""

    private: bool
    commits: dict[str, Files] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: Files, message: str) -> str:
        name = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[name], self.branches[branch] = files, name
        self.messages.append(message)
        return name

    def at(self, revision: str) -> str | None:
        name = self.branches.get(revision, revision)
        return name if name in self.commits else None


@dataclass
class Hub:
    """tokens: by token, its user, and whether it may write. asked: (method, path) of every request."""

    url: str = ""
    tokens: dict[str, tuple[str, bool]] = field(default_factory=lambda: {"hf_ann": ("ann", True)})
    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)

    def files(self, name: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repos[name]
        return {path: data for path, (data, _) in repo.commits[repo.branches[revision]].items()}


@contextmanager
def served() -> Iterator[Hub]:
    """A hub at a port of this machine, until the block ends."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str = "") -> None:
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")

    def _answer(self, method: str) -> None:
        path = urlsplit(self.path).path
        self.hub.asked.append((method, path))
        body = self._body()
        try:
            for pattern, methods, function in ROUTES:
                if method in methods and (match := re.fullmatch(pattern, path)):
                    status, data, headers = function(self, body, *(unquote(part or "") for part in match.groups()))
                    break
            else:
                raise _Refused(404, f"no such page: {method} {path}")
        except _Refused as refused:
            status, data = refused.status, json.dumps({"error": refused.message}).encode()
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if method != "HEAD":
            self.wfile.write(data)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _user(self) -> tuple[str, bool]:
        """The user of the token and whether it may write; ("", False) without one."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in self.hub.tokens:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(given, ("", False))

    def _may_write(self, name: str) -> None:
        user, writes = self._user()
        if not writes or name.partition("/")[0] != user:
            raise _Refused(403, f"You don't have the rights to write to {name}")

    def _repo(self, name: str, revision: str = "main") -> tuple[Repo, str]:
        user, _ = self._user()
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and name.partition("/")[0] != user):
            raise _Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if (commit := repo.at(revision)) is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, commit

    def create(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        asked = json.loads(body)
        name = f"{asked.get('organization') or self._user()[0]}/{asked['name']}"
        self._may_write(name)
        if name in self.hub.repos:
            raise _Refused(409, "You already created this model repo")
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.hub.repos[name] = Repo(private)
        self.hub.repos[name].commit(
            "main", {".gitattributes": (b"*.safetensors filter=lfs\n", False)}, "initial commit"
        )
        return 200, json.dumps({"url": f"{self.hub.url}/{name}", "name": name}).encode(), {}

    def whoami(self, _: bytes) -> tuple[int, bytes, dict[str, str]]:
        return 200, json.dumps({"type": "user", "name": self._user()[0], "orgs": []}).encode(), {}

    def validate(self, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        errors = problems(json.loads(body)["content"])
        found = {"errors": [{"message": text} for text in errors], "warnings": []}
        return 400 if errors else 200, json.dumps(found).encode(), {}

    def preupload(self, body: bytes, name: str, revision: str) -> tuple[int, bytes, dict[str, str]]:
        self._may_write(name)
        repo, commit = self._repo(name, revision)
        files = [
            {
                "path": entry["path"],
                "uploadMode": "lfs" if entry["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
                "oid": _sum(*repo.commits[commit][entry["path"]]) if entry["path"] in repo.commits[commit] else None,
            }
            for entry in json.loads(body)["files"]
        ]
        return 200, json.dumps({"files": files}).encode(), {}

    def batch(self, body: bytes, name: str) -> tuple[int, bytes, dict[str, str]]:
        self._may_write(name)
        objects = []
        for entry in json.loads(body)["objects"]:
            action = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
            objects.append({**entry, **({} if entry["oid"] in self.hub.large else {"actions": action})})
        return 200, json.dumps({"transfer": "basic", "objects": objects}).encode(), {}

    def put(self, body: bytes, oid: str) -> tuple[int, bytes, dict[str, str]]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise _Refused(400, "the content has another checksum")
        self.hub.large[oid] = body
        return 200, b"", {}

    def commit(self, body: bytes, name: str, revision: str) -> tuple[int, bytes, dict[str, str]]:
        self._may_write(name)
        repo, before = self._repo(name, revision)
        files, message = dict(repo.commits[before]), ""
        for line in body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header":
                message = value["summary"]
                if value.get("parentCommit", before) != before:
                    raise _Refused(412, "A commit has happened since. Please refresh and try again.")
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"]), False
            elif key == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]], True
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refused(400, f"unknown operation {key}")
        oid = repo.commit(revision, files, message)
        return 200, json.dumps({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid}).encode(), {}

    def branch(self, body: bytes, name: str, branch: str) -> tuple[int, bytes, dict[str, str]]:
        self._may_write(name)
        repo, commit = self._repo(name, json.loads(body).get("startingPoint", "main"))
        repo.branches[branch] = commit
        return 200, b"{}", {}

    def info(self, _: bytes, name: str, revision: str) -> tuple[int, bytes, dict[str, str]]:
        repo, commit = self._repo(name, revision or "main")
        siblings = [{"rfilename": path} for path in repo.commits[commit]]
        found = {"_id": "1", "id": name, "modelId": name, "sha": commit, "private": repo.private, "siblings": siblings}
        return 200, json.dumps(found).encode(), {}

    def tree(self, _: bytes, name: str, revision: str) -> tuple[int, bytes, dict[str, str]]:
        repo, commit = self._repo(name, revision)
        rows: list[dict[str, Any]] = []
        for path, (data, large) in repo.commits[commit].items():
            lfs = {"oid": _sum(data, True), "size": len(data), "pointerSize": 130}
            blob = {"type": "file", "path": path, "size": len(data), "oid": _sum(data, False)}
            rows.append({**blob, **({"lfs": lfs, "oid": _sum(b"pointer", False)} if large else {})})
            if "/" in path:
                rows.append({"type": "directory", "path": path.rpartition("/")[0], "oid": "0" * 40, "size": 0})
        return 200, json.dumps(rows).encode(), {}

    def resolve(self, _: bytes, name: str, revision: str, path: str) -> tuple[int, bytes, dict[str, str]]:
        repo, commit = self._repo(name, revision)
        if path not in repo.commits[commit]:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        data, large = repo.commits[commit][path]
        headers = {
            "X-Repo-Commit": commit,
            "ETag": f'"{_sum(data, large)}"',
            "Content-Type": "application/octet-stream",
        }
        return 200, data, headers


ROUTES = (
    (r"/api/repos/create", {"POST"}, _Handler.create),
    (r"/api/whoami-v2", {"GET"}, _Handler.whoami),
    (r"/api/validate-yaml", {"POST"}, _Handler.validate),
    (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", {"POST"}, _Handler.preupload),
    (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", {"POST"}, _Handler.batch),
    (r"/lfs/(\w+)", {"PUT"}, _Handler.put),
    (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", {"POST"}, _Handler.commit),
    (r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", {"POST"}, _Handler.branch),
    (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", {"GET"}, _Handler.info),
    (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", {"GET"}, _Handler.tree),
    (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", {"GET", "HEAD"}, _Handler.resolve),
)


def _sum(data: bytes, large: bool) -> str:
    """The checksum of a large file, or that of a file in git."""
    return hashlib.sha256(data).hexdigest() if large else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def problems(readme: str) -> list[str]:
    """What the hub refuses in the metadata of a model card, by its published specification."""
    match = re.match(r"---\n(.*?\n)---\n", readme, re.DOTALL)
    if match is None:
        return ["no metadata"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [str(error)]
    found = []
    for name in ("tags", "datasets", "metrics"):
        value = data.get(name, [])
        if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
            found.append(f'"{name}" must be a list of texts')
    if "license" in data and data["license"] not in LICENSES:
        found.append(f'"license" must be one of {sorted(LICENSES)}')
    if "pipeline_tag" in data and data["pipeline_tag"] not in PIPELINES:
        found.append('"pipeline_tag" is unknown')
    if "base_model" in data and not re.fullmatch(r"[\w.-]+/[\w.-]+", data["base_model"]):
        found.append('"base_model" with a value that is no name')
    for model in data.get("model-index", []):
        for result in model["results"] if isinstance(model.get("name"), str) else [{}]:
            named = all(isinstance(result.get(one, {}).get("type"), str) for one in ("task", "dataset"))
            measured = result.get("metrics") and all(
                isinstance(m.get("type"), str) and isinstance(m.get("value"), (int, float)) for m in result["metrics"]
            )
            if not named or not measured or not isinstance(result["dataset"].get("name"), str):
                found.append(f'"model-index": {result}')
    return found
