"""A stand-in of the Hub: as much of its API as huggingface_hub calls to create, compare, upload and load a repository.

Files go the way of Git LFS, which the client takes where `HF_HUB_DISABLE_XET` is set; branches and pull requests are
separate lists of files. The rules for tokens and the error codes are those of the Hub.
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
from urllib.parse import parse_qs, unquote, urlsplit

import yaml
from huggingface_hub.repocard_data import model_index_to_eval_results


WRITER = "hf_" + "w" * 34  # of the user `me`
READER = "hf_" + "r" * 34  # of a user who may write nowhere
LARGE = (".safetensors", ".onnx", ".bin")


@dataclass
class Repo:
    private: bool = False
    owner_only: bool = False  # no one else can see it, not even that it exists
    sdk: str | None = None
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {".gitattributes": b"*.bin lfs\n"}})
    commits: list[dict[str, Any]] = field(default_factory=list)

    def commit_of(self, branch: str) -> str:
        content = repr(sorted((name, hashlib.sha1(data).hexdigest()) for name, data in self.branches[branch].items()))
        return hashlib.sha1(content.encode()).hexdigest()

    def resolve(self, revision: str) -> str | None:
        return next((name for name in self.branches if revision in (name, self.commit_of(name))), None)


@dataclass
class Hub:
    """Repositories by `models/OWNER/NAME` or `spaces/OWNER/NAME`, and all requests."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def files(self, repo_id: str, branch: str = "main", kind: str = "models") -> dict[str, bytes]:
        return self.repos[f"{kind}/{repo_id}"].branches[branch]

    @property
    def changes(self) -> list[str]:
        return [f"{method} {path}" for method, path in self.requests if method in ("POST", "PUT")]


class HubError(Exception):
    def __init__(self, status: int, code: str = "", message: str = "", **body: Any):
        self.status, self.code, self.message, self.body = status, code, message, body


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubHandler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("GET", r"/api/(models|spaces)/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
        ("POST", r"/api/(models|spaces)/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
        ("POST", r"/api/(models|spaces)/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/(models|spaces)/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/(spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/objects/(\w+)", "put"),
        ("HEAD|GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    def answer(self) -> None:
        split = urlsplit(self.path)
        self.query, body = parse_qs(split.query), self.read_body()
        self.hub.requests.append((self.command, split.path))
        try:
            if (token := (self.headers["Authorization"] or "").removeprefix("Bearer ")) not in ("", WRITER, READER):
                raise HubError(401, message="Invalid credentials in Authorization header", error=f"{token}: invalid")
            self.user = {WRITER: "me", READER: "reader"}.get(token)
            for methods, pattern, name in self.ROUTES:
                if self.command in methods.split("|") and (match := re.fullmatch(pattern, split.path)):
                    return getattr(self, name)(body, *(part and unquote(part) for part in match.groups()))
            raise HubError(404, "EntryNotFound", "not found")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            self.send(error.status, error.body or {"error": error.message}, **headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer  # noqa: N815, names of the base class

    def read_body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"] or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def send(self, status: int, content: Any = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def find(self, kind: str, repo_id: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get(f"{kind}/{repo_id}")
        owns = self.user == repo_id.split("/")[0]
        if repo is None or (repo.private and not owns):
            raise HubError(404 if self.user else 401, "RepoNotFound", "Repository not found")
        if write and not owns:
            raise HubError(403, message=f"{self.user} has no write access")
        return repo

    def create(self, body: bytes) -> None:
        wanted = json.loads(body)
        key = f"{wanted.get('type') or 'model'}s/{wanted['organization']}/{wanted['name']}"
        url = f"{self.hub.url}/{key.removeprefix('models/')}"
        if key in self.hub.repos:
            raise HubError(409, message="You already created this repo", url=url, error="taken")
        if self.user != wanted["organization"]:
            raise HubError(403, message=f"{self.user} cannot create in {wanted['organization']}")
        self.hub.repos[key] = Repo(private=wanted.get("visibility") == "private", sdk=wanted.get("sdk"))
        self.send(200, {"url": url})

    def validate(self, body: bytes) -> None:
        """Check the metadata of a card; the Hub has the same rules for `model-index`."""
        text = json.loads(body)["content"]
        try:
            data = yaml.safe_load(text.split("---\n")[1])
            if "model-index" in data:
                model_index_to_eval_results(data["model-index"])
        except (yaml.YAMLError, LookupError, TypeError) as error:
            raise HubError(400, errors=[{"message": repr(error)}], warnings=[]) from None
        self.send(200, {"errors": [], "warnings": []})

    def info(self, body: bytes, kind: str, repo_id: str, revision: str | None) -> None:
        repo = self.find(kind, repo_id)
        if (branch := repo.resolve(revision or "main")) is None:
            raise HubError(404, "RevisionNotFound", "Invalid rev id")
        siblings = []
        for name, data in repo.branches[branch].items():
            lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
            is_large = name.endswith(LARGE)
            # of a large file, git has a pointer
            blob = git_hash(lfs["sha256"].encode() if is_large else data)
            siblings.append(
                {"rfilename": name, "size": len(data), "blobId": blob} | ({"lfs": lfs} if is_large else {})
            )
        facts = {"id": repo_id, "sha": repo.commit_of(branch), "private": repo.private, "siblings": siblings}
        self.send(200, {**facts, "tags": [], "downloads": 0, "likes": 0})

    def branch(self, body: bytes, kind: str, repo_id: str, name: str) -> None:
        repo = self.find(kind, repo_id, write=True)
        repo.branches[name] = dict(repo.branches["main"])
        self.send(200, {})

    def preupload(self, body: bytes, kind: str, repo_id: str, revision: str) -> None:
        there = self.find(kind, repo_id, write=True).branches[revision]
        answers = []
        for file in json.loads(body)["files"]:
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            data = there.get(file["path"])
            oid = data and (hashlib.sha256(data).hexdigest() if mode == "lfs" else git_hash(data))
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.send(200, {"files": answers})

    def batch(self, body: bytes, kind: str | None, repo_id: str) -> None:
        self.find((kind or "models/")[:-1], repo_id, write=True)
        objects = [
            {"oid": each["oid"], "size": each["size"]}
            | {"actions": {"upload": {"href": f"{self.hub.url}/objects/{each['oid']}"}}}
            for each in json.loads(body)["objects"]
        ]
        self.send(200, {"transfer": "basic", "objects": objects})

    def put(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, message="the content does not have this hash")
        self.hub.objects[oid] = body
        self.send(200)

    def commit(self, body: bytes, kind: str, repo_id: str, revision: str) -> None:
        repo = self.find(kind, repo_id, write=True)
        lines = [json.loads(line) for line in body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, repo.commit_of(revision)):
            raise HubError(412, message="The commit you are trying to apply is outdated")
        files = dict(repo.branches[revision])
        for line in lines[1:]:
            value = line["value"]
            large = line["key"] == "lfsFile"
            files[value["path"]] = self.hub.objects[value["oid"]] if large else base64.b64decode(value["content"])
        branch = f"refs/pr/{len(repo.branches)}" if self.query.get("create_pr") else revision
        repo.branches[branch] = files
        repo.commits.append(
            {"branch": branch, "message": header["summary"], "paths": [x["value"].get("path") for x in lines[1:]]}
        )
        url = f"{self.hub.url}/{repo_id}"
        oid = repo.commit_of(branch)
        self.send(
            200, {"commitUrl": f"{url}/commit/{oid}", "commitOid": oid, "pullRequestUrl": f"{url}/discussions/1"}
        )

    def resolve(self, body: bytes, repo_id: str, revision: str, path: str) -> None:
        repo = self.find("models", repo_id)
        branch = repo.resolve(revision)
        if branch is None:
            raise HubError(404, "RevisionNotFound", "Invalid rev id")
        headers = {"X-Repo-Commit": repo.commit_of(branch)}
        data = repo.branches[branch].get(path)
        if data is None:
            return self.send(404, b"", X_Error_Code="EntryNotFound", X_Error_Message="Entry not found", **headers)
        return self.send(200, data, ETag=f'"{git_hash(data)}"', **headers)

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """Run an empty Hub in a thread."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("ThisHubHandler", (HubHandler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
