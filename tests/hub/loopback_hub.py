"""A Hub on this machine: what the real `huggingface_hub` client needs to create, push and load repositories.

Parquet files go to its LFS storage, all others are sent inside the commit. There is no Xet storage.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

OWNER = "tester"
TOKEN = "hf_loopbackTokenThatMustNotLeak"
LICENCES = ["apache-2.0", "mit", "openrail++", "other"]


def git_oid(content: bytes) -> str:
    """The name that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repository:
    """One repository: every commit is a whole set of files."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self):
        self.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        names = "".join(f"{name} {git_oid(content)}\n" for name, content in sorted(files.items()))
        oid = hashlib.sha1(f"{len(self.commits)} {self.branches.get(branch)} {message}\n{names}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]

    def oid(self, revision: str) -> str | None:
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None


class LoopbackHub:
    """Use as a context manager; `url` is its endpoint.

    Attributes:
        repositories: ("model" | "dataset" | "space", id) → repository.
        requests: (method, path) of every request, in order.
        uploads: paths of the files that commits brought, in order.
        objects: the LFS storage, SHA-256 → content; also of what no commit has.
        object_uploads: SHA-256 of all that was sent there, in order.
        large: endings of the files that belong there.
        room: how many objects it takes; None is any number.
        cut_commits: break the connection in the middle of every commit.
        refusal: the body of the answer 400 to every card; None looks at them.
    """

    def __init__(self):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[str] = []
        self.objects: dict[str, bytes] = {}
        self.object_uploads: list[str] = []
        self.large: tuple[str, ...] = (".parquet",)
        self.room: int | None = None
        self.cut_commits = False
        self.refusal: bytes | None = None
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        return self.repositories[kind, repo_id].files(revision)


class _Refusal(Exception):
    """An answer that is no success: status, the Hub's error code, and words."""


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _answer(self):
        url = urlsplit(self.path)
        path, self.query = unquote(url.path), parse_qs(url.query)
        self.hub.requests.append((self.command, path))
        self.signed_in = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        try:
            if path == "/api/validate-yaml":
                return self._validate_card()
            if path == "/api/whoami-v2":
                self._need(self.signed_in, 401, "", "Invalid credentials in Authorization header")
                return self._json({"type": "user", "name": OWNER, "orgs": []})
            if path == "/api/repos/create":
                return self._create()
            if path.startswith("/lfs/"):  # the address is the permission
                return self._store(path.removeprefix("/lfs/"))
            batch = re.fullmatch(r"/(datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path)
            if batch:
                self._repository((batch[1] or "models/")[:-2], batch[2])
                return self._lfs_batch()
            api = re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/([a-z-]+)(?:/(.*))?)?", path)
            if api:
                # A revision is one part of the path, its slashes quoted; what comes after it is a path.
                tail = url.path.split("/", 6)[6] if url.path.count("/") > 5 else ""
                revision, _, below = tail.partition("/")
                kind, repo_id, action, _ = api.groups()
                handle = getattr(self, f"_api_{(action or 'info').replace('-', '_')}", None)
                self._need(handle is not None, 404, "", f"no such endpoint: {path}")
                return handle(self._repository(kind, repo_id), repo_id, unquote(revision), unquote(below))
            file = re.fullmatch(r"/(datasets/|spaces/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", url.path)
            if file:
                kind = (file[1] or "models/")[:-2]
                return self._resolve(self._repository(kind, file[2]), unquote(file[3]), unquote(file[4]))
            raise _Refusal(404, "", f"no such endpoint: {path}")
        except _Refusal as refusal:
            status, code, words = refusal.args
            self._send(status, json.dumps({"error": words}).encode(), {"X-Error-Code": code, "X-Error-Message": words})

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _send(self, status: int, body: bytes, headers: dict[str, str]):
        unread = int(self.headers.get("Content-Length", 0)) - getattr(self, "_read", 0)
        if unread > 0:
            self.rfile.read(unread)
        self._read = 0
        self.send_response(status)
        for name, value in ({"Content-Type": "application/json", "Content-Length": str(len(body))} | headers).items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value, status: int = 200):
        self._send(status, json.dumps(value).encode(), {})

    def _body(self) -> bytes:
        self._read = int(self.headers["Content-Length"])
        return self.rfile.read(self._read)

    def _need(self, condition, status: int, code: str, words: str):
        if not condition:
            raise _Refusal(status, code, words)

    def _repository(self, kind: str, repo_id: str) -> Repository:
        repository = self.hub.repositories.get((kind, repo_id))
        # Who may not see a repository learns no more than that.
        seen = repository is not None and (self.signed_in or not repository.private)
        self._need(seen, 404 if self.signed_in else 401, "RepoNotFound", "Repository not found")
        return repository

    def _commit_of(self, repository: Repository, revision: str) -> str:
        oid = repository.oid(revision)
        self._need(oid, 404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    def _create(self):
        request = json.loads(self._body())
        self._need(self.signed_in, 401, "", "Invalid credentials in Authorization header")
        owner = request.get("organization") or OWNER
        self._need(owner == OWNER, 403, "", f"You don't have the rights to create a model under {owner}")
        kind, repo_id = request.get("type", "model"), f"{owner}/{request['name']}"
        prefix = "" if kind == "model" else f"{kind}s/"
        known = (kind, repo_id) in self.hub.repositories
        if not known:
            self.hub.repositories[kind, repo_id] = Repository(private=request.get("visibility") == "private")
        self._json({"url": f"{self.hub.url}/{prefix}{repo_id}", "name": repo_id}, 409 if known else 200)

    def _validate_card(self):
        if self.hub.refusal is not None:
            return self._send(400, self.hub.refusal, {"Content-Type": ""})
        header = re.match(r"---\r?\n(.*?)\r?\n---", json.loads(self._body())["content"], re.DOTALL)
        try:
            valid = header is not None and isinstance(yaml.safe_load(header[1]), dict)
        except yaml.YAMLError:
            valid = False
        errors = [] if valid else [{"message": "the metadata are no YAML mapping"}]
        if valid and yaml.safe_load(header[1]).get("license", "mit") not in LICENCES:
            errors = [{"message": f'"license" must be one of [{", ".join(LICENCES)}]'}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _api_info(self, repository: Repository, repo_id: str, revision: str = "main", _below: str = ""):
        oid = self._commit_of(repository, revision or "main")
        files = repository.commits[oid]
        header = re.match(rb"---\n(.*?)\n---", files.get("README.md", b""), re.DOTALL)
        card = yaml.safe_load(header[1]) if header else {}
        siblings = [{"rfilename": name, "size": len(content)} for name, content in files.items()]
        info = {"id": repo_id, "sha": oid, "private": repository.private, "siblings": siblings, "cardData": card}
        info |= {key: card[key] for key in ("pipeline_tag", "library_name") if key in card}
        self._json(info | {"downloads": 0, "likes": 0, "tags": card.get("tags", []), "disabled": False})

    _api_revision = _api_info

    def _api_refs(self, repository: Repository, *_):
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid}
            for name, oid in repository.branches.items()
        ]
        self._json({"branches": branches, "converts": [], "tags": []})

    def _api_branch(self, repository: Repository, repo_id: str, branch: str, _below: str):
        start = json.loads(self._body()).get("startingPoint", "main")
        self._need(self.signed_in, 401, "", "Invalid credentials in Authorization header")
        self._need(branch not in repository.branches, 409, "", f"Reference already exists: {branch}")
        repository.branches[branch] = self._commit_of(repository, start)
        self._json({})

    def _api_tree(self, repository: Repository, _repo_id: str, revision: str, below: str):
        files = repository.commits[self._commit_of(repository, revision)]
        recursive = self.query.get("recursive", ["false"])[0].lower() == "true"
        prefix = f"{below}/" if below else ""
        listed = {name: content for name, content in files.items() if name.startswith(prefix)}
        self._need(listed or not below, 404, "EntryNotFound", f"{below} does not exist on {revision}")
        self._json(_entries(listed, prefix, recursive))

    def _api_paths_info(self, repository: Repository, _repo_id: str, revision: str, _below: str):
        request = self._body()
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(request)["paths"]
        else:
            paths = parse_qs(request.decode())["paths"]
        files = repository.commits[self._commit_of(repository, revision)]
        entries = _entries(files, "", recursive=True)
        self._json([entry for entry in entries if entry["path"] in paths])

    def _api_preupload(self, repository: Repository, _repo_id: str, revision: str, _below: str):
        wanted = json.loads(self._body())["files"]
        self._need(self.signed_in, 401, "", "Invalid credentials in Authorization header")
        held = repository.commits[self._commit_of(repository, revision)]
        answers = []
        for name in (file["path"] for file in wanted):
            is_large = name.endswith(self.hub.large)
            answer = {"path": name, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": None}
            if name in held:
                answer["oid"] = hashlib.sha256(held[name]).hexdigest() if is_large else git_oid(held[name])
            answers.append(answer)
        self._json({"files": answers})

    def _lfs_batch(self):
        wanted = json.loads(self._body())["objects"]
        self._need(self.signed_in, 401, "", "Invalid credentials in Authorization header")
        for entry in wanted:
            if entry["oid"] not in self.hub.objects:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}"}}
        self._json({"transfer": "basic", "objects": wanted})

    def _store(self, oid: str):
        content = self._body()
        self._need(len(self.hub.objects) != self.hub.room, 507, "", "no room is left")
        self._need(hashlib.sha256(content).hexdigest() == oid, 400, "", "other content than was announced")
        self.hub.object_uploads.append(oid)
        self.hub.objects[oid] = content
        self._json({})

    def _api_commit(self, repository: Repository, repo_id: str, revision: str, _below: str):
        if self.hub.cut_commits:
            self.rfile.read(int(self.headers["Content-Length"]) // 2)
            self.close_connection = True
            return self.connection.close()
        lines = [json.loads(line) for line in self._body().splitlines()]
        self._need(self.signed_in, 401, "", "Invalid credentials in Authorization header")
        held = repository.commits[self._commit_of(repository, revision)]
        files, message = dict(held), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
                parent = value.get("parentCommit")
                self._need(parent in (None, repository.oid(revision)), 412, "", "A commit has happened since.")
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                self.hub.uploads.append(value["path"])
            elif line["key"] == "lfsFile":
                self._need(value["oid"] in self.hub.objects, 400, "", f"{value['path']}: no such object")
                files[value["path"]] = self.hub.objects[value["oid"]]
                self.hub.uploads.append(value["path"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] == "deletedFolder":
                files = {name: content for name, content in files.items() if not name.startswith(value["path"])}
            else:
                raise _Refusal(400, "", f"no such operation: {line['key']}")
        oid = repository.commit(revision, files, message)
        self._json({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"})

    def _resolve(self, repository: Repository, revision: str, name: str):
        oid = self._commit_of(repository, revision)
        content = repository.commits[oid].get(name)
        if content is None:
            words = {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found", "X-Repo-Commit": oid}
            return self._send(404, b"{}", words)
        status, headers = 200, {"ETag": f'"{git_oid(content)}"', "X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        span = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if span:
            first, last = int(span[1]), min(int(span[2] or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            status, content = 206, content[first : last + 1]
        self._send(status, content, headers | {"Content-Type": "application/octet-stream"})


def _entries(files: dict[str, bytes], prefix: str, recursive: bool) -> list[dict]:
    """Files and folders as the tree endpoint lists them."""
    entries, folders = [], set()
    for name, content in sorted(files.items()):
        parts = name[len(prefix) :].split("/")
        depth = len(parts) if recursive else 2
        folders |= {prefix + "/".join(parts[:i]) for i in range(1, min(depth, len(parts)))}
        if recursive or len(parts) == 1:
            entries.append({"type": "file", "path": name, "size": len(content), "oid": git_oid(content)})
    oid = hashlib.sha1(prefix.encode()).hexdigest()
    return entries + [{"type": "directory", "path": name, "size": 0, "oid": oid} for name in sorted(folders)]
