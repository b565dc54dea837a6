"""A small Hugging Face Hub on loopback: repositories, commits, LFS, tokens, and what goes wrong with them.

Endpoints and headers are those that huggingface_hub and datasets use (seen with 2.4 and 5.2).
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

_LFS_SUFFIXES = (".safetensors", ".onnx", ".bin", ".png")
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES = [
    (re.compile(pattern.replace("REPO", _REPO)), name)
    for pattern, name in (
        (r"/", "root"),
        (r"/api/validate-yaml", "validate_yaml"),
        (r"/api/repos/create", "create_repo"),
        (r"/api/collections/(?P<slug>[^/]+/[^/]+)(?P<items>/items)?", "collection"),
        (r"/api/(?P<kind>models|datasets)/REPO(/revision/(?P<revision>[^/]+))?", "info"),
        (r"/api/(?P<kind>models|datasets)/REPO/tree/(?P<revision>[^/]+)(/(?P<path>.*))?", "tree"),
        (r"/api/(?P<kind>models|datasets)/REPO/paths-info/(?P<revision>[^/]+)", "paths_info"),
        (r"/api/(?P<kind>models)/REPO/preupload/(?P<revision>[^/]+)", "preupload"),
        (r"/api/(?P<kind>models)/REPO/commit/(?P<revision>[^/]+)", "commit"),
        (r"/api/(?P<kind>models)/REPO/branch/(?P<branch>[^/]+)", "branch"),
        (r"/REPO\.git/info/lfs/objects/batch", "lfs_batch"),
        (r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs_upload"),
        (r"/(?P<kind>datasets)/REPO/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
        (r"/REPO/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )
]


@dataclass
class Repository:
    """Branches of commits; a commit is its files."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        sha = hashlib.sha1(f"{id(self)} {len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, branch: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches[branch]]


class Hub(ThreadingHTTPServer):
    """The server; its fields may be read and changed while it runs."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.owners: dict[str, set[str]] = {}
        """For each token the names under which it may write."""
        self.collections: dict[str, list[str]] = {}
        self.seen: Counter[str] = Counter()
        """How often each kind of request came."""
        self.fail_next: dict[str, int] = {}
        """For a kind of request, the status of the next answer."""
        self.before_commit = lambda: None

    def add(self, repo_id: str, files: dict[str, bytes], *, kind: str = "models", **settings: bool) -> Repository:
        repository = Repository(**settings)
        repository.commit({".gitattributes": b"", **files})
        self.repositories[kind, repo_id] = repository
        return repository

    def model(self, repo_id: str) -> Repository:
        return self.repositories["models", repo_id]


@contextmanager
def running_hub():
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()


class _Refused(Exception):
    def __init__(self, status: int, code: str | None = None, message: str = ""):
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.body = self._read_body()
        matches = [(match, name) for pattern, name in _ROUTES if (match := pattern.fullmatch(url.path))]
        if not matches:
            return self._send(404, {"error": "no such endpoint"})
        match, name = matches[0]
        self.server.seen[name] += 1
        arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
        try:
            if name in self.server.fail_next:
                raise _Refused(self.server.fail_next.pop(name), message="told to fail")
            answer = getattr(self, f"_{name}")(**arguments)
        except _Refused as refused:
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            return self._send(refused.status, {"error": refused.message}, headers)
        if isinstance(answer, tuple):
            return self._send(200, *answer)
        return self._send(200, answer)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _send(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # --- who asks, and for what -------------------------------------------------------------------------------------

    @property
    def _owned(self) -> set[str] | None:
        """The names under which the request's token may write; None without one."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in self.server.owners:
            raise _Refused(401, message="Invalid credentials in Authorization header")
        return self.server.owners[token]

    def _found(self, kind: str, repo: str) -> Repository:
        owned, repository = self._owned, self.server.repositories.get((kind, repo))
        mine = repo.partition("/")[0] in (owned or ())
        if repository is None or (repository.private and not mine):
            raise _Refused(404 if owned is not None else 401, "RepoNotFound", "Repository not found")
        return repository

    def _readable(self, kind: str, repo: str) -> Repository:
        repository = self._found(kind, repo)
        if repository.gated and repo.partition("/")[0] not in (self._owned or ()):
            raise _Refused(401 if self._owned is None else 403, "GatedRepo", f"Access to {repo} is restricted")
        return repository

    def _writable(self, kind: str, repo: str) -> Repository:
        repository = self._found(kind, repo)
        if self._owned is None:
            raise _Refused(401, message="Invalid username or password.")
        if repo.partition("/")[0] not in self._owned:
            raise _Refused(403, message="You don't have the required permissions")
        return repository

    def _files(self, repository: Repository, revision: str) -> tuple[str, dict[str, bytes]]:
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repository.commits[sha]

    # --- endpoints --------------------------------------------------------------------------------------------------

    def _root(self) -> object:
        return {}

    def _validate_yaml(self) -> object:
        content = json.loads(self.body)["content"]
        metadata = yaml.safe_load(content.split("---")[1])
        wrong = [key for key in ("datasets", "tags") if not isinstance(metadata.get(key, []), list)]
        if wrong or not re.fullmatch(r"[a-z0-9.-]+", metadata.get("license", "mit")):
            raise _Refused(400, message="Invalid metadata")
        return {"errors": [], "warnings": []}

    def _create_repo(self) -> object:
        given = json.loads(self.body)
        if self._owned is None:
            raise _Refused(401, message="Invalid username or password.")
        if given["organization"] not in self._owned:
            raise _Refused(403, message="You don't have the rights to create a model under this namespace")
        repo_id = f"{given['organization']}/{given['name']}"
        if ("models", repo_id) in self.server.repositories:
            raise _Refused(409, message="You already created this model repo")
        self.server.add(repo_id, {}, private=given.get("visibility") == "private" or bool(given.get("private")))
        return {"url": f"{self.server.endpoint}/{repo_id}", "name": repo_id, "id": "1"}

    def _collection(self, slug: str, items: str = "") -> object:
        if slug not in self.server.collections:
            raise _Refused(404, message="Collection not found")
        if items:
            self.server.collections[slug].append(json.loads(self.body)["item"]["id"])
        when = "2026-01-01T00:00:00.000Z"
        found = {"slug": slug, "title": slug, "owner": {"name": "me"}, "items": [], "lastUpdated": when}
        return {**found, "position": 0, "private": False, "theme": "blue", "upvotes": 0}

    def _info(self, kind: str, repo: str, revision: str = "main") -> object:
        repository = self._found(kind, repo)
        sha, files = self._files(repository, revision)
        card = files.get("README.md", b"").decode()
        data = yaml.safe_load(card.split("---")[1]) if card.startswith("---") else None
        found = {"id": repo, "sha": sha, "private": repository.private, "gated": repository.gated, "disabled": False}
        siblings = [{"rfilename": name} for name in files]
        return {**found, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings, "cardData": data}

    def _tree(self, kind: str, repo: str, revision: str, path: str = "") -> object:
        _, files = self._files(self._found(kind, repo), revision)
        if path and not any(name.startswith(f"{path}/") for name in files):
            raise _Refused(404, "EntryNotFound", "no such folder")
        return [_entry(name, files[name]) for name in files if name.startswith(path)]

    def _paths_info(self, kind: str, repo: str, revision: str) -> object:
        _, files = self._files(self._found(kind, repo), revision)
        try:
            wanted = json.loads(self.body)["paths"]
        except json.JSONDecodeError:
            wanted = parse_qs(self.body.decode())["paths"]
        return [_entry(name, files[name]) for name in wanted if name in files]

    def _resolve(self, repo: str, revision: str, path: str, kind: str = "models") -> object:
        sha, files = self._files(self._readable(kind, repo), revision)
        if path not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        content = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_entry(path, content)["oid"]}"', "Accept-Ranges": "bytes"}
        return content, headers

    def _preupload(self, kind: str, repo: str, revision: str) -> object:
        _, files = self._files(self._writable(kind, repo), revision)
        answers = []
        for given in json.loads(self.body)["files"]:
            path = given["path"]
            answer = {"path": path, "uploadMode": _mode(path), "shouldIgnore": False}
            if path in files:
                entry = _entry(path, files[path])
                answer["oid"] = entry.get("lfs", entry)["oid"]
            answers.append(answer)
        return {"files": answers}

    def _lfs_batch(self, repo: str) -> object:
        self._writable("models", repo)
        answers = []
        for given in json.loads(self.body)["objects"]:
            answer = {"oid": given["oid"], "size": given["size"]}
            if given["oid"] not in self.server.lfs:
                answer["actions"] = {"upload": {"href": f"{self.server.endpoint}/lfs/{given['oid']}"}}
            answers.append(answer)
        return {"transfer": "basic", "objects": answers}

    def _lfs_upload(self, oid: str) -> object:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, message="another content")
        self.server.lfs[oid] = self.body
        return {}

    def _commit(self, kind: str, repo: str, revision: str) -> object:
        repository = self._writable(kind, repo)
        self.server.before_commit()
        sha, files = self._files(repository, revision)
        files = dict(files)
        for line in self.body.splitlines():
            given = json.loads(line)
            value = given["value"]
            if given["key"] == "header" and value.get("parentCommit", sha) != sha:
                raise _Refused(412, message="A commit has happened since")
            if given["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif given["key"] == "lfsFile":
                files[value["path"]] = self.server.lfs[value["oid"]]
            elif given["key"] == "deletedFile":
                del files[value["path"]]
        made = repository.commit(files, revision)
        return {"success": True, "commitOid": made, "commitUrl": f"{self.server.endpoint}/{repo}/commit/{made}"}

    def _branch(self, kind: str, repo: str, branch: str) -> object:
        repository = self._writable(kind, repo)
        repository.branches[branch] = repository.branches["main"]
        return {}


def _mode(path: str) -> str:
    return "lfs" if path.endswith(_LFS_SUFFIXES) else "regular"


def _entry(path: str, content: bytes) -> dict:
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    entry: dict = {"type": "file", "path": path, "size": len(content), "oid": blob}
    if _mode(path) == "lfs":
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry
