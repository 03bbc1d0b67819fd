"""A Hugging Face Hub on loopback, with the routes that huggingface_hub, transformers and diffusers use.

    with FakeHub(tmp_path) as hub:
        sha = hub.add("owner/name", directory)                  # a commit on main; add again for the next one
        run_script(code, env=hub.env(tmp_path / "home"))        # in a child, since constants are read at import
        assert ("GET", "/owner/name/resolve/main/config.json", None, "Bearer x") in hub.log

Files are kept by their SHA-256 below the given directory, so that older commits stay readable.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

# What a token may do. "x" is the owner's; an unknown token is refused, as on the Hub.
TOKENS = {"x": "write", "reader": "read", "stranger": ""}
LFS = (".safetensors", ".bs", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".zip")
CHUNK = 1 << 16


class Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        self.status, self.code, self.message = status, code, message


class Repo:
    def __init__(self, private: bool, gated: bool) -> None:
        self.private, self.gated = private, gated
        self.commits: dict[str, dict[str, Path]] = {}  # sha -> path in the repo -> blob
        self.refs = {"main": ""}


class FakeHub:
    """`log` has (method, path with query, Range header, Authorization header) of every request, in order of arrival,
    but for /api/agent-harnesses, which newer clients ask for once a day on their own account.

    delay    : seconds that every answer waits
    redirect : files of LFS are answered by a redirect to another host, as the Hub does
    """

    def __init__(self, directory: Path) -> None:
        self.repos: dict[str, Repo] = {}
        self.log: list[tuple[str, str, str | None, str | None]] = []
        self.delay = 0.0
        self.redirect = False
        self._cuts: list[int] = []
        self._lock = threading.Lock()
        self._blobs = directory / "fakehub"
        self._blobs.mkdir(parents=True)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.storage_url = f"http://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def add(
        self, repo_id: str, directory: Path, *, private: bool = False, gated: bool = False, revision: str = "main"
    ) -> str:
        """Commits the directory as it is now, links followed, to the branch `revision`; returns the commit's sha."""
        repo = self.repos.setdefault(repo_id, Repo(private, gated))
        names = [os.path.join(at, name) for at, _, names in os.walk(directory, followlinks=True) for name in names]
        files = {os.path.relpath(name, directory).replace(os.sep, "/"): Path(name) for name in names}
        return self.commit(repo, {name: self.store(path.read_bytes()) for name, path in files.items()}, revision)

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Every file of a commit and its bytes."""
        repo = self.repos[repo_id]
        return {name: path.read_bytes() for name, path in repo.commits[repo.refs.get(revision, revision)].items()}

    def cut(self, times: int, after: int) -> None:
        """The next `times` answers that carry more than `after` bytes of a file lose their connection after them."""
        self._cuts = [after] * times

    @property
    def cuts_left(self) -> int:
        return len(self._cuts)

    def env(self, home: Path, token: str = "x") -> dict[str, str]:
        """The environment for a child process; `token` "" for none. The child's cache is below `home`."""
        own = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
        own.update({f"HF_HUB_DISABLE_{name}": "1" for name in ("XET", "TELEMETRY", "PROGRESS_BARS")})
        own.update(dict.fromkeys(("http_proxy", "https_proxy", "all_proxy", "HUGGING_FACE_HUB_TOKEN"), ""))
        own.update(dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "HF_HUB_CACHE", "HF_TOKEN_PATH"), ""))
        own.update(HF_HUB_CACHE=str(home / "hub"), HF_TOKEN_PATH=str(home / "token"), no_proxy="*", NO_PROXY="*")
        return {**os.environ, **own}

    # ---- for the handler ----

    def store(self, data: bytes) -> Path:
        path = self._blobs / hashlib.sha256(data).hexdigest()
        if not path.exists():
            path.write_bytes(data)
        return path

    def blob(self, oid: str) -> Path:
        return self._blobs / oid

    def commit(self, repo: Repo, files: dict[str, Path], revision: str) -> str:
        text = f"{len(repo.commits)}{sorted((name, blob.name) for name, blob in files.items())}"
        sha = hashlib.sha1(text.encode()).hexdigest()
        repo.commits[sha] = files
        repo.refs[revision] = sha
        return sha

    def next_cut(self, size: int) -> int | None:
        with self._lock:
            return self._cuts.pop() if self._cuts and size > self._cuts[-1] else None


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    hub: FakeHub

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients may hang up
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.server.hub
        if self.path != "/api/agent-harnesses":
            hub.log.append((self.command, self.path, self.headers["Range"], self.headers["Authorization"]))
        self.body = b"".join(self._read_body())
        time.sleep(hub.delay)
        try:
            self._route(hub)
        except Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            text = {"error": refused.message or refused.code}
            self._json(text, refused.status, {name: value for name, value in headers.items() if value})

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815

    def _read_body(self) -> Iterator[bytes]:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            yield self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- rights ----

    def _rights(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        if given.removeprefix("Bearer ") not in TOKENS:
            raise Refused(401, "", "Invalid credentials in Authorization header")
        return TOKENS[given.removeprefix("Bearer ")]

    def _may_write(self) -> None:
        rights = self._rights()
        if rights is None:
            raise Refused(401, "", "Invalid username or password.")
        if rights != "write":
            raise Refused(403, "", "Forbidden: pass a token with write permission")

    def _repo(self, repo_id: str, files: bool = False) -> Repo:
        rights, repo = self._rights(), self.server.hub.repos.get(repo_id)
        if repo is None or (repo.private and not rights):
            raise Refused(401 if rights is None else 404, "RepoNotFound", "Repository not found")
        if files and repo.gated and rights != "write":
            raise Refused(401 if rights is None else 403, "GatedRepo", "Access to this model is restricted")
        return repo

    def _commit(self, repo: Repo, revision: str) -> tuple[str, dict[str, Path]]:
        sha = repo.refs.get(revision, revision)
        if sha == "":
            return sha, {}  # a repo without a commit
        if sha not in repo.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha, repo.commits[sha]

    # ---- routes ----

    def _route(self, hub: FakeHub) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        repo = r"/(?P<repo>[^/]+/[^/]+)"
        for method, pattern, action in (
            ("GET", r"/api/agent-harnesses", self._harnesses),
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/repos/create", self._create),
            ("POST", r"/api/validate-yaml", self._validate),
            ("GET", rf"/api/models{repo}", self._info),
            ("GET", rf"/api/models{repo}/revision/(?P<revision>[^/]+)", self._info),
            ("GET", rf"/api/models{repo}/refs", self._refs),
            ("GET", rf"/api/models{repo}/tree/(?P<revision>[^/]+)(?:/(?P<path>.*))?", self._tree),
            ("POST", rf"/api/models{repo}/paths-info/(?P<revision>[^/]+)", self._paths_info),
            ("POST", rf"/api/models{repo}/branch/(?P<branch>[^/]+)", self._branch),
            ("POST", rf"/api/models{repo}/preupload/(?P<revision>[^/]+)", self._preupload),
            ("POST", rf"{repo}\.git/info/lfs/objects/batch", self._batch),
            ("PUT", r"/upload/(?P<oid>[0-9a-f]{64})", self._put),
            ("POST", rf"/api/models{repo}/commit/(?P<revision>[^/]+)", self._post_commit),
            ("GET", rf"{repo}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self._resolve),
            ("GET", r"/storage/(?P<oid>[0-9a-f]{64})", self._storage),
        ):
            match = re.fullmatch(pattern, url.path)
            if match and (self.command == method or (self.command == "HEAD" and method == "GET")):
                action(hub, **{name: unquote(text) for name, text in match.groupdict(default="").items()})
                return
        raise Refused(404, "", f"no such route: {self.command} {self.path}")

    def _harnesses(self, hub: FakeHub) -> None:
        self._json({"harnesses": {}, "standardEnvVars": []})

    def _whoami(self, hub: FakeHub) -> None:
        rights = self._rights()
        if rights is None:
            raise Refused(401, "", "Invalid username or password.")
        self._json({"type": "user", "name": "owner", "orgs": [], "auth": {"accessToken": {"role": rights}}})

    def _create(self, hub: FakeHub) -> None:
        self._may_write()
        wanted = json.loads(self.body)
        repo_id = f"{wanted.get('organization') or 'owner'}/{wanted['name']}"
        answer = {"url": f"{hub.url}/{repo_id}"}
        if repo_id in hub.repos:
            self._json({"error": "You already created this model repo", **answer}, 409)
            return
        private = wanted.get("private", False) or wanted.get("visibility") == "private"
        hub.commit(hub.repos.setdefault(repo_id, Repo(private, False)), {}, "main")
        self._json(answer)

    def _validate(self, hub: FakeHub) -> None:
        import yaml

        content = json.loads(self.body)["content"]
        match = re.match(r"---\r?\n(.*?)\r?\n---", content, re.DOTALL)
        if match and not isinstance(yaml.safe_load(match[1]), dict):
            self._json({"errors": [{"message": "the front matter is no mapping"}], "warnings": []}, 400)
        else:
            self._json({"errors": [], "warnings": [] if match else [{"message": "empty or missing yaml metadata"}]})

    def _info(self, hub: FakeHub, repo: str, revision: str = "main") -> None:
        found = self._repo(repo)
        sha, files = self._commit(found, revision)
        siblings = [{"rfilename": name, **self._size(name, blob, "blobId")} for name, blob in sorted(files.items())]
        named = {"id": repo, "modelId": repo, "author": repo.split("/", maxsplit=1)[0], "sha": sha}
        self._json({**named, "private": found.private, "gated": found.gated, "tags": [], "siblings": siblings})

    def _refs(self, hub: FakeHub, repo: str) -> None:
        refs = self._repo(repo).refs.items()
        branches = [{"name": name, "ref": f"refs/heads/{name}", "targetCommit": sha} for name, sha in refs]
        self._json({"branches": branches, "converts": [], "tags": []})

    def _size(self, name: str, blob: Path, key: str = "oid") -> dict[str, Any]:
        size, git = blob.stat().st_size, self._etag(name, blob, git=True)
        lfs = {"lfs": {"oid": blob.name, "sha256": blob.name, "size": size, "pointerSize": 134}}
        return {"size": size, key: git, **(lfs if name.endswith(LFS) else {})}

    def _etag(self, name: str, blob: Path, git: bool = False) -> str:
        if name.endswith(LFS) and not git:
            return blob.name
        data = blob.read_bytes()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def _entries(self, files: dict[str, Path]) -> dict[str, dict[str, Any]]:
        """Every file and folder of a commit, as the Hub describes them."""
        entries = {name: {"type": "file", "path": name, **self._size(name, blob)} for name, blob in files.items()}
        for name in files:
            for parent in list(Path(name).parents)[:-1]:
                oid = hashlib.sha1(str(parent).encode()).hexdigest()
                entries[str(parent)] = {"type": "directory", "path": str(parent), "oid": oid, "size": 0}
        return dict(sorted(entries.items()))

    def _tree(self, hub: FakeHub, repo: str, revision: str, path: str) -> None:
        entries = self._entries(self._commit(self._repo(repo), revision)[1])
        if path and entries.get(path, {}).get("type") != "directory":
            raise Refused(404, "EntryNotFound", f"{path} does not exist on {revision}")
        prefix = f"{path}/" if path else ""
        below = {name: entry for name, entry in entries.items() if name.startswith(prefix)}
        if self.query.get("recursive", [""])[0].lower() not in ("true", "1"):
            below = {name: entry for name, entry in below.items() if "/" not in name[len(prefix) :]}
        self._json(list(below.values()))

    def _paths_info(self, hub: FakeHub, repo: str, revision: str) -> None:
        entries = self._entries(self._commit(self._repo(repo), revision)[1])
        json_body = "json" in self.headers.get("Content-Type", "")
        wanted = json.loads(self.body)["paths"] if json_body else parse_qs(self.body.decode()).get("paths", [])
        self._json([entries[name] for name in wanted if name in entries])

    def _branch(self, hub: FakeHub, repo: str, branch: str) -> None:
        found = self._repo(repo)
        self._may_write()
        if branch in found.refs:
            raise Refused(409, "", f"Reference already exists: refs/heads/{branch}")
        start = json.loads(self.body or b"{}").get("startingPoint", "main")
        found.refs[branch] = self._commit(found, start)[0]
        self._json({}, 201)

    def _preupload(self, hub: FakeHub, repo: str, revision: str) -> None:
        there = self._commit(self._repo(repo), revision)[1]
        self._may_write()
        answers = []
        for name in (file["path"] for file in json.loads(self.body)["files"]):
            mode = "lfs" if name.endswith(LFS) else "regular"
            known = {"oid": self._etag(name, there[name])} if name in there else {}
            answers.append({"path": name, "uploadMode": mode, "shouldIgnore": False, **known})
        self._json({"files": answers})

    def _batch(self, hub: FakeHub, repo: str) -> None:
        self._repo(repo)
        self._may_write()
        objects = [{"oid": wanted["oid"], "size": wanted["size"]} for wanted in json.loads(self.body)["objects"]]
        for wanted in objects:
            if not hub.blob(wanted["oid"]).exists():
                wanted["actions"] = {"upload": {"href": f"{hub.url}/upload/{wanted['oid']}"}}
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, hub: FakeHub, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "", "the bytes are not those of the announced SHA-256")
        hub.store(self.body)
        self._json({})

    def _post_commit(self, hub: FakeHub, repo: str, revision: str) -> None:
        found = self._repo(repo)
        self._may_write()
        files = dict(self._commit(found, revision)[1])
        for line in self.body.splitlines():
            key, value = json.loads(line)["key"], json.loads(line)["value"]
            if key == "file":
                files[value["path"]] = hub.store(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                if not hub.blob(value["oid"]).exists():
                    raise Refused(400, "", f"the LFS object of {value['path']} was not uploaded")
                files[value["path"]] = hub.blob(value["oid"])
            elif key == "deletedFile":
                del files[value["path"]]
            elif key == "deletedFolder":
                files = {name: blob for name, blob in files.items() if not name.startswith(value["path"])}
        pull = "create_pr" in self.query
        sha = hub.commit(found, files, f"refs/pr/{len(found.commits)}" if pull else revision)
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{repo}/commit/{sha}"}
        self._json({**answer, "pullRequestUrl": f"{hub.url}/{repo}/discussions/{len(found.commits) - 1}"})

    def _resolve(self, hub: FakeHub, repo: str, revision: str, path: str) -> None:
        sha, files = self._commit(self._repo(repo, files=True), revision)
        if path not in files:
            raise Refused(404, "EntryNotFound", "Entry not found")
        blob = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{self._etag(path, blob)}"'}
        if not (hub.redirect and path.endswith(LFS)):
            self._send_file(blob, headers)
            return
        headers.update({"X-Linked-Size": str(blob.stat().st_size), "X-Linked-ETag": headers["ETag"]})
        headers["Location"] = f"{hub.storage_url}/storage/{blob.name}?name={quote(path, safe='')}"
        self._json({}, 302, headers)

    def _storage(self, hub: FakeHub, oid: str) -> None:
        if self.headers.get("Authorization"):
            raise Refused(400, "", "the token must not leave the Hub")
        self._send_file(hub.blob(oid), {"ETag": f'"{oid}"'})

    def _send_file(self, blob: Path, headers: dict[str, str]) -> None:
        size = blob.stat().st_size
        first, end, status = 0, size, 200
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range") or "")
        if wanted and any(wanted.groups()):
            first, end = (int(wanted[1]), size) if wanted[1] else (max(size - int(wanted[2]), 0), size)
            end = min(int(wanted[2]) + 1, size) if wanted[1] and wanted[2] else end
            status = 206
            if first >= end:
                self._json({}, 416, {"Content-Range": f"bytes */{size}"})
                return
            headers["Content-Range"] = f"bytes {first}-{end - 1}/{size}"
        self.send_response(status)
        for name, text in {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(end - first))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.server.hub.next_cut(end - first)
        with blob.open("rb") as file:
            file.seek(first)
            if cut is not None:
                self.wfile.write(file.read(cut))
                self.close_connection = True
            else:
                shutil.copyfileobj(_Limited(file, end - first), self.wfile, CHUNK)


class _Limited:
    """The next `left` bytes of a file."""

    def __init__(self, file: Any, left: int) -> None:
        self.file, self.left = file, left

    def read(self, size: int) -> bytes:
        data: bytes = self.file.read(min(size, self.left))
        self.left -= len(data)
        return data
