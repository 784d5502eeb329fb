"""A Hub on loopback: models and datasets in memory, for the real huggingface_hub client to talk to.

    with Hub() as hub:                                    in a test (the fixture `hub`), one thread a request
        hub.run(tmp_path, [sys.executable, "-c", code])   a process that knows no other Hub, with an empty cache
        hub.fail("/commit/", 500, times=1)                the next request whose path matches gets this status

    python tests/support/hub.py [--port 8080]              a process of its own, until it is interrupted

Tokens: `hf_alice` and `hf_bob` may write to their own repositories, and alice's `hf_alice_reads` may only read.
"""

import argparse
import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

TOKENS = {"hf_alice": ("alice", "write"), "hf_alice_reads": ("alice", "read"), "hf_bob": ("bob", "write")}
LARGE = (".safetensors", ".bin", ".pt", ".pth", ".parquet", ".arrow", ".npz", ".npy", ".gz", ".zst")


class Answer(Exception):
    """An answer that is not a success. It is raised at the place that finds the reason."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers):
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {}) | headers


@dataclass
class Stored:
    """A file of a commit; large ones go through the LFS routes."""

    content: bytes
    large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.large else self.git_oid

    def listed(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": len(self.content), "oid": self.git_oid}
        if self.large:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": 134}
        return entry


@dataclass
class Commit:
    sha: str
    title: str
    files: dict[str, Stored]
    date: str = "2026-01-01T00:00:00.000Z"


@dataclass
class Repository:
    kind: str  # models or datasets
    name: str  # owner/name
    private: bool
    commits: list[Commit] = field(default_factory=list)  # of all branches, as they came
    names: dict[str, str] = field(default_factory=dict)  # branch or tag -> sha

    def __post_init__(self):
        self.add("main", "initial commit", {})

    def add(self, branch: str, title: str, files: dict[str, Stored]) -> Commit:
        sha = hashlib.sha1(f"{self.kind}/{self.name} {len(self.commits)} {title}".encode()).hexdigest()
        self.commits.append(Commit(sha, title, files))
        self.names[branch] = sha
        return self.commits[-1]

    def find(self, revision: str) -> Commit:
        sha = self.names.get(revision, revision)
        for commit in self.commits:
            if len(sha) >= 7 and commit.sha.startswith(sha):
                return commit
        raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    @property
    def files(self) -> dict[str, bytes]:
        """What main holds now."""
        return {path: stored.content for path, stored in self.find("main").files.items()}

    @property
    def titles(self) -> list[str]:
        return [commit.title for commit in self.commits]


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD /path" matches."""

    pattern: str
    times: int
    status: int | None = None  # None: the connection is dropped in the middle of the request's body
    headers: dict = field(default_factory=dict)
    seconds: float = 0.0  # waited before anything else
    only_wait: bool = False


class Hub:
    """The server with its repositories. `requests` lists all requests, as "METHOD /path"."""

    def __init__(self, port: int = 0):
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}  # sha256 -> content, as LFS keeps it
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.server = self.thread = None
        # Bound, but it never listens. So the system gives the port to nobody else while the Hub is stopped.
        self.held = socket.socket()
        self.held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.held.bind(("127.0.0.1", port))
        self.port = self.held.getsockname()[1]

    # -----------------------------------------------------------------------------------------------------------------
    # For tests

    def __enter__(self) -> "Hub":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()
        self.held.close()

    def start(self) -> None:
        """Listen, again on the same port after a stop."""
        handler = type("HubHandler", (Handler,), {"hub": self})
        self.server = Server(("127.0.0.1", self.port), handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def stop(self) -> None:
        """Refuse all connections from now on. The repositories stay as they are."""
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def environment(self, home: Path, token: str | None = "hf_alice", **more: str) -> dict[str, str]:
        """The environment of a process that knows only this Hub, with an empty cache if `home` is new."""
        ours = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("HF_", "HUGGING")) and not name.lower().endswith("_proxy")
        }
        ours |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
        ours |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return ours | ({"HF_TOKEN": token} if token else {}) | more

    def run(
        self, home: Path, command: list, token: str | None = "hf_alice", **more: str
    ) -> subprocess.CompletedProcess:
        """The CompletedProcess of a command under that environment, started in `home`, with its output as text."""
        home.mkdir(exist_ok=True)
        environment = self.environment(home, token, **more)
        return subprocess.run(command, cwd=home, env=environment, text=True, capture_output=True, timeout=600)

    def fail(self, pattern: str, status: int, times: int = 1, **headers: str) -> None:
        """Answer the next requests that match with an HTTP status."""
        self.faults.append(Fault(pattern, times, status, headers))

    def drop(self, pattern: str, times: int = 1) -> None:
        """Read half of the body of the next requests that match, and hang up."""
        self.faults.append(Fault(pattern, times))

    def delay(self, pattern: str, seconds: float, times: int = 1) -> None:
        """Let the next requests that match wait, then serve them."""
        self.faults.append(Fault(pattern, times, seconds=seconds, only_wait=True))

    def model(self, name: str) -> Repository:
        return self.repositories["models", name]

    def dataset(self, name: str) -> Repository:
        return self.repositories["datasets", name]

    def put(self, kind: str, name: str, files: dict[str, bytes], private: bool = False) -> Repository:
        """Commit to main without a request. A missing repository is made."""
        with self.lock:
            repository = self.repositories.setdefault((kind, name), Repository(kind, name, private))
            stored = {path: Stored(content, is_large(path, content)) for path, content in files.items()}
            self.large |= {file.sha256: file.content for file in stored.values() if file.large}
            repository.add("main", "put", repository.find("main").files | stored)
        return repository

    # -----------------------------------------------------------------------------------------------------------------
    # For requests

    def next_fault(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    fault.times -= 1
                    return fault
        return None


def is_large(path: str, sample: bytes) -> bool:
    return path.endswith(LARGE) or b"\0" in sample[:512] or len(sample) > 10 * 2**20


def private_in(body: dict) -> bool:
    return body.get("visibility") == "private" or bool(body.get("private"))


class Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that was killed is no error of the server
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection. Each route is a pattern of the path and the method that serves it; see ROUTES below."""

    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_) -> None:
        pass

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        request = f"{self.command} {url.path}"
        with self.hub.lock:
            self.hub.requests.append(request)
        fault = self.hub.next_fault(request)
        if fault:
            time.sleep(fault.seconds)
        if fault and not fault.only_wait and fault.status is None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self.close_connection = True
            return
        self.body = self.read_body()
        try:
            if fault and not fault.only_wait:
                raise Answer(fault.status, f"a fault of status {fault.status}", **fault.headers)
            for method, pattern, serve in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in method:
                    return serve(self, **{name: part and unquote(part) for name, part in match.groupdict().items()})
            raise Answer(404, f"no route {request}")
        except Answer as answer:
            self.respond({"error": str(answer)}, answer.status, **answer.headers)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def respond(self, content: dict | list | bytes, status: int = 200, **headers: str) -> None:
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers = {"Content-Type": "application/json"} | headers
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # -----------------------------------------------------------------------------------------------------------------
    # Who asks, and for what

    def user(self, required: bool = False) -> tuple[str | None, str]:
        """The name and the permission of the user who asks. A token that no user has is always refused."""
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        if kind == "Bearer" and token not in TOKENS:
            raise Answer(401, "Invalid credentials in Authorization header")
        if not token and required:
            raise Answer(401, "Invalid username or password.")
        return TOKENS.get(token, (None, "none"))

    def repository(self, kind: str | None, name: str, write: bool = False) -> Repository:
        """The repository that a path names, if the user may read it, or write to it."""
        user, permission = self.user()
        repository = self.hub.repositories.get(((kind or "models").strip("/"), name))
        hidden = repository is None or (repository.private and not name.startswith(f"{user}/"))
        if hidden:  # as the Hub says it: to those without a token, 401
            raise Answer(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and (permission != "write" or not name.startswith(f"{user}/")):
            raise Answer(403 if user else 401, f"you have no write access to {name}")
        return repository

    def serve_whoami(self) -> None:
        user, permission = self.user(required=True)
        token = {"displayName": "test", "role": permission}
        auth = {"type": "access_token", "accessToken": token}
        self.respond({"type": "user", "name": user, "fullname": user, "orgs": [], "auth": auth})

    def serve_create(self) -> None:
        user, permission = self.user(required=True)
        body = json.loads(self.body)
        owner, kind = body.get("organization") or user, f"{body.get('type') or 'model'}s"
        name = f"{owner}/{body['name']}"
        if owner != user or permission != "write":
            raise Answer(403, f"You don't have the rights to create a {kind[:-1]} under the namespace {owner!r}")
        url = f"{self.hub.url}/{'datasets/' if kind == 'datasets' else ''}{name}"
        with self.hub.lock:
            if (kind, name) in self.hub.repositories:
                return self.respond({"error": "You already created this repo", "url": url}, 409)
            self.hub.repositories[kind, name] = Repository(kind, name, private_in(body))
        self.respond({"url": url, "name": name, "id": name})

    def serve_delete(self) -> None:
        body = json.loads(self.body)
        kind = f"{body.get('type') or 'model'}s"
        name = f"{body.get('organization') or self.user()[0]}/{body['name']}"
        self.repository(kind, name, write=True)
        del self.hub.repositories[kind, name]
        self.respond({})

    def serve_auth_check(self, kind: str, name: str, write: str | None) -> None:
        self.repository(kind, name, bool(write))
        self.respond({})

    def serve_settings(self, kind: str, name: str) -> None:
        repository = self.repository(kind, name, write=True)
        repository.private = private_in(json.loads(self.body))
        self.respond({})

    # -----------------------------------------------------------------------------------------------------------------
    # Reading

    def serve_info(self, kind: str, name: str, revision: str | None = None) -> None:
        repository = self.repository(kind, name)
        commit = repository.find(revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        owner = name.split("/")[0]
        info = {"_id": "0", "id": name, "author": owner, "sha": commit.sha, "private": repository.private}
        info |= {"lastModified": commit.date, "createdAt": commit.date, "gated": False, "disabled": False}
        self.respond(info | {"siblings": siblings, "tags": [], "downloads": 0, "likes": 0})

    def serve_tree(self, kind: str, name: str, revision: str, folder: str | None) -> None:
        commit = self.repository(kind, name).find(revision)
        prefix, entries = f"{folder.strip('/')}/" if folder else "", {}
        for path, stored in commit.files.items():
            if not path.startswith(prefix):
                continue
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)):
                parent = prefix + "/".join(parts[:depth])
                entries[parent] = {"type": "directory", "path": parent, "size": 0, "oid": commit.sha}
            entries[path] = stored.listed(path)
        if prefix and not entries:
            raise Answer(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        if self.query.get("recursive", ["false"])[0].lower() not in ("true", "1"):
            entries = {path: entry for path, entry in entries.items() if "/" not in path.removeprefix(prefix)}
        self.respond([entries[path] for path in sorted(entries)])

    def serve_paths_info(self, kind: str, name: str, revision: str) -> None:
        files = self.repository(kind, name).find(revision).files
        if self.headers.get("Content-Type", "").startswith("application/json"):
            paths = json.loads(self.body)["paths"]
        else:
            paths = parse_qs(self.body.decode()).get("paths", [])
        found = [files[path].listed(path) for path in paths if path in files]
        folders = [path for path in paths if any(file.startswith(f"{path}/") for file in files)]
        found += [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]
        self.respond(found)

    def serve_refs(self, kind: str, name: str) -> None:
        names = self.repository(kind, name).names
        branches = [{"name": key, "ref": f"refs/heads/{key}", "targetCommit": sha} for key, sha in names.items()]
        self.respond({"branches": branches, "tags": [], "converts": []})

    def serve_commits(self, kind: str, name: str, revision: str) -> None:
        commits = reversed(self.repository(kind, name).commits)
        listed = [{"id": each.sha, "title": each.title, "message": "", "date": each.date} for each in commits]
        self.respond([entry | {"authors": []} for entry in listed])

    def serve_file(self, kind: str | None, name: str, revision: str, path: str) -> None:
        commit = self.repository(kind, name).find(revision)
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        stored = commit.files.get(path)
        if stored is None:
            raise Answer(404, "Entry not found", "EntryNotFound", **headers)
        headers["ETag"] = f'"{stored.etag}"'
        if not stored.large:
            return self.send_content(stored.content, headers)
        # another host, as the client sees it: it must not show its token there
        location = f"http://localhost:{self.hub.port}/storage/{stored.sha256}"
        headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": str(len(stored.content)), "Location": location}
        self.respond(b"", 302, **headers)

    def serve_storage(self, sha256: str) -> None:
        if "Authorization" in self.headers:
            raise Answer(400, "storage was shown a token")
        if sha256 not in self.hub.large:
            raise Answer(404, "no such object")
        self.send_content(self.hub.large[sha256], {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"})

    def send_content(self, content: bytes, headers: dict) -> None:
        """The whole content, or the bytes that a Range asks for."""
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            return self.respond(content, **headers)
        first, last = asked.groups()
        size = len(content)
        start = int(first) if first else max(size - int(last), 0)
        stop = min(int(last) + 1, size) if first and last else size
        if start >= size:
            raise Answer(416, "beyond the end", **{"Content-Range": f"bytes */{size}"})
        self.respond(content[start:stop], 206, **headers, **{"Content-Range": f"bytes {start}-{stop - 1}/{size}"})

    # -----------------------------------------------------------------------------------------------------------------
    # Writing

    def serve_validation(self) -> None:
        content = json.loads(self.body)["content"]
        header = re.match(r"\ufeff?---\r?\n(.*?)\r?\n---", content, re.S)
        try:
            data = yaml.safe_load(header[1]) if header else {}
            errors = [] if isinstance(data, dict | None) else ["the metadata must be keys and values"]
        except yaml.YAMLError as error:
            errors = [str(error).replace("\n", " ")]
        report = {"errors": [{"message": error} for error in errors], "warnings": []}
        self.respond(report, 400 if errors else 200)

    def serve_preupload(self, kind: str, name: str, revision: str) -> None:
        files = self.repository(kind, name, write=True).find(revision).files
        answers = []
        for asked in json.loads(self.body)["files"]:
            path, sample = asked["path"], base64.b64decode(asked.get("sample", ""))
            large = is_large(path, sample) or asked["size"] > 10 * 2**20
            answer = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            answers.append(answer | ({"oid": files[path].etag} if path in files else {}))
        self.respond({"files": answers})

    def serve_lfs_batch(self, kind: str | None, name: str) -> None:
        self.repository(kind, name, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.hub.url}/storage/{asked['oid']}", "header": {}},
                "verify": {"href": f"{self.hub.url}/verify", "header": {}},
            }
            objects.append(asked | ({} if asked["oid"] in self.hub.large else {"actions": actions}))
        self.respond({"transfer": "basic", "objects": objects})

    def serve_upload(self, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise Answer(400, "other content than was announced")
        self.hub.large[sha256] = self.body
        self.respond(b"", ETag=f'"{sha256}"')

    def serve_verify(self) -> None:
        asked = json.loads(self.body)
        if len(self.hub.large.get(asked["oid"], b"")) != asked["size"]:
            raise Answer(422, "not what was uploaded")
        self.respond({})

    def serve_commit(self, kind: str, name: str, revision: str) -> None:
        """Commit everything or nothing. The request has one JSON object a line, the header first."""
        with self.hub.lock:
            repository = self.repository(kind, name, write=True)
            if revision not in repository.names:
                raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            head = repository.find(revision)
            files, title = dict(head.files), ""
            for line in self.body.splitlines():
                key, value = (json.loads(line)[part] for part in ("key", "value"))
                if key == "header":
                    title = value["summary"]
                    if not head.sha.startswith(value.get("parentCommit", "")):
                        raise Answer(412, "The branch has moved since that commit")
                elif key == "file":
                    files[value["path"]] = Stored(base64.b64decode(value["content"]), large=False)
                elif key == "lfsFile" and value["oid"] in self.hub.large:
                    files[value["path"]] = Stored(self.hub.large[value["oid"]], large=True)
                elif key == "deletedFile" and value["path"] in files:
                    del files[value["path"]]
                elif key == "deletedFolder":
                    prefix = value["path"].strip("/") + "/"
                    files = {path: stored for path, stored in files.items() if not path.startswith(prefix)}
                else:
                    raise Answer(400, f"{key} {value.get('path')} is not there")
            commit = repository.add(revision, title, files)
        self.respond({"commitUrl": f"{self.hub.url}/{name}/commit/{commit.sha}", "commitOid": commit.sha})

    def serve_name(self, kind: str, name: str, revision: str) -> None:
        """A new branch or tag."""
        repository = self.repository(kind, name, write=True)
        body = json.loads(self.body or b"{}")
        is_tag = "/tag/" in self.path
        new, start = (body["tag"], revision) if is_tag else (revision, body.get("startingPoint", "main"))
        with self.hub.lock:
            if new in repository.names:
                raise Answer(409, f"{new} exists already")
            repository.names[new] = repository.find(start).sha
        self.respond({})


REPOSITORY = r"/api/(?P<kind>models|datasets)/(?P<name>[^/]+/[^/]+)"
FILES = r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+?)"
ROUTES = [  # methods, pattern of the path, what serves it
    ("GET", "/api/whoami-v2", Handler.serve_whoami),
    ("POST", "/api/validate-yaml", Handler.serve_validation),
    ("POST", "/api/repos/create", Handler.serve_create),
    ("DELETE", "/api/repos/delete", Handler.serve_delete),
    ("GET", REPOSITORY, Handler.serve_info),
    ("GET", f"{REPOSITORY}/auth-check(?P<write>/write)?", Handler.serve_auth_check),
    ("PUT", f"{REPOSITORY}/settings", Handler.serve_settings),
    ("GET", f"{REPOSITORY}/revision/(?P<revision>[^/]+)", Handler.serve_info),
    ("GET", f"{REPOSITORY}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", Handler.serve_tree),
    ("POST", f"{REPOSITORY}/paths-info/(?P<revision>[^/]+)", Handler.serve_paths_info),
    ("GET", f"{REPOSITORY}/refs", Handler.serve_refs),
    ("GET", f"{REPOSITORY}/commits/(?P<revision>[^/]+)", Handler.serve_commits),
    ("POST", f"{REPOSITORY}/preupload/(?P<revision>[^/]+)", Handler.serve_preupload),
    ("POST", f"{REPOSITORY}/commit/(?P<revision>[^/]+)", Handler.serve_commit),
    ("POST", f"{REPOSITORY}/(?:branch|tag)/(?P<revision>[^/]+)", Handler.serve_name),
    ("POST", f"{FILES}\\.git/info/lfs/objects/batch", Handler.serve_lfs_batch),
    ("PUT", "/storage/(?P<sha256>[0-9a-f]{64})", Handler.serve_upload),
    ("POST", "/verify", Handler.serve_verify),
    (("GET", "HEAD"), "/storage/(?P<sha256>[0-9a-f]{64})", Handler.serve_storage),
    (("GET", "HEAD"), f"{FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.serve_file),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--port", type=int, default=0, help="default: any that is free")
    hub = Hub(parser.parse_args().port)
    with hub:
        print(hub.url, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            hub.thread.join()


if __name__ == "__main__":
    main()
