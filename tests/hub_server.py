"""A hub on loopback: as much of its HTTP interface as the real client needs to upload, look and download."""

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

import yaml

WRITER, READER = "hf_may_write", "hf_may_read"
USER = "ann"
LICENSES = ("openrail++", "creativeml-openrail-m", "apache-2.0", "other")


@dataclass
class Repo:
    private: bool
    files: dict[str, bytes] = field(default_factory=dict[str, bytes])
    commits: list[str] = field(default_factory=list[str])
    card: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def sha(self) -> str:
        return hashlib.sha1(repr([*self.commits, sorted(self.files)]).encode()).hexdigest()


@dataclass
class HubServer:
    """The state of the hub; ``failing`` maps a piece of a path to statuses that its next requests get instead."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict[str, Repo])
    large: dict[str, bytes] = field(default_factory=dict[str, bytes])
    failing: dict[str, list[int]] = field(default_factory=dict[str, list[int]])
    requests: list[str] = field(default_factory=list[str])


@contextmanager
def hub_server() -> Iterator[HubServer]:
    state = HubServer()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": state}))
    state.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        self.hub.requests.append(f"{self.command} {path}")
        for piece, statuses in self.hub.failing.items():
            if piece in path and statuses:
                return self._answer(statuses.pop(0), {"error": "not today"})
        routes = (
            (r"/api/whoami-v2", self._whoami),
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate),
            (r"/api/models/([^/]+/[^/]+)/auth-check/write", self._auth_check),
            (r"/api/models/([^/]+/[^/]+)/preupload/main", self._preupload),
            (r"/api/models/([^/]+/[^/]+)/commit/main", self._commit),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/\w+)?", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/\w+", self._tree),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/lfs/(\w+)", self._store),
            (r"/([^/]+/[^/]+)/resolve/\w+/(.+)", self._resolve),
        )
        for pattern, route in routes:
            if match := re.fullmatch(pattern, path):
                return route(body, *match.groups())
        return self._answer(404, {"error": f"no such path: {path}"})

    def _answer(self, status: int, content: Any = None, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _may(self, repo_id: str, write: bool = False) -> bool:
        """Whether the caller may; if not, it has been answered as the hub answers."""
        repo = self.hub.repos.get(repo_id)
        known = self._token in (WRITER, READER) and repo_id.startswith(f"{USER}/")
        if repo is None or (repo.private and not known):
            self._answer(404 if known else 401, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return False
        if write and not (known and self._token == WRITER):
            self._answer(403, {"error": "You may not write here"})
            return False
        return True

    def _whoami(self, _: bytes) -> None:
        if self._token not in (WRITER, READER):
            return self._answer(401, {"error": "Invalid credentials"})
        return self._answer(200, {"name": USER, "type": "user", "orgs": []})

    def _create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        answer = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if self._token != WRITER or not repo_id.startswith(f"{USER}/"):
            return self._answer(403, {"error": f"You may not create {repo_id}"})
        if repo_id in self.hub.repos:
            return self._answer(409, answer | {"error": "You already created this model repo"})
        self.hub.repos[repo_id] = Repo(private=asked.get("visibility") == "private")
        return self._answer(200, answer)

    def _auth_check(self, _: bytes, repo_id: str) -> None:
        if self._may(repo_id, write=True):
            self._answer(200, {})

    def _validate(self, body: bytes) -> None:
        data = yaml.safe_load(json.loads(body)["content"].split("---")[1])
        errors: list[str] = []
        if "base_model" in data and not re.fullmatch(r"[\w.-]+/[\w.-]+", data["base_model"]):
            errors.append('"base_model" must be a model of the hub')
        if "license" in data and data["license"] not in LICENSES:
            errors.append('"license" must be one of the list')
        if data.get("pipeline_tag") != "text-to-image" or not isinstance(data.get("tags"), list):
            errors.append("tags are wrong")
        told = {"errors": [{"message": error} for error in errors], "warnings": []}
        self._answer(400 if errors else 200, told)

    def _preupload(self, body: bytes, repo_id: str) -> None:
        if self._may(repo_id, write=True):
            files = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith((".safetensors", ".png")) else "regular" for path in files}
            self._answer(
                200, {"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]}
            )

    def _batch(self, body: bytes, repo_id: str) -> None:
        if self._may(repo_id, write=True):
            objects = [
                {**wanted, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{wanted['oid']}"}}}
                for wanted in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})

    def _store(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._answer(400, {"error": "another content"})
        self.hub.large[oid] = body
        return self._answer(200, {})

    def _commit(self, body: bytes, repo_id: str) -> None:
        if not self._may(repo_id, write=True):
            return
        repo = self.hub.repos[repo_id]
        for line in map(json.loads, body.splitlines()):
            match line["key"], line["value"]:
                case "header", value:
                    repo.commits.append(value["summary"])
                case "file", value:
                    repo.files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile", value:
                    repo.files[value["path"]] = self.hub.large[value["oid"]]
                case _:
                    raise AssertionError(line)
        self._answer(200, {"commitUrl": f"{self.hub.url}/{repo_id}/commit/{repo.sha}", "commitOid": repo.sha})

    def _info(self, _: bytes, repo_id: str) -> None:
        if self._may(repo_id):
            repo = self.hub.repos[repo_id]
            siblings = [{"rfilename": path} for path in repo.files]
            facts = {"id": repo_id, "sha": repo.sha, "private": repo.private, "cardData": repo.card}
            self._answer(200, {**facts, "siblings": siblings, "tags": [], "downloads": 0})

    def _tree(self, _: bytes, repo_id: str) -> None:
        if self._may(repo_id):
            files = self.hub.repos[repo_id].files.items()
            self._answer(
                200,
                [{"type": "file", "path": path, "size": len(data), "oid": _digest(data)} for path, data in files],
            )

    def _resolve(self, _: bytes, repo_id: str, path: str) -> None:
        if not self._may(repo_id):
            return
        repo = self.hub.repos[repo_id]
        if path not in repo.files:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=repo.sha)
            return
        self._answer(200, repo.files[path], ETag=f'"{_digest(repo.files[path])}"', X_Repo_Commit=repo.sha)


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
