"""A Hugging Face hub on this machine: the real routes and headers, over a second server that stands for its CDN.

Both note every request, and do on demand what networks do: fail, reset, cut off, stall, damage.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

#: Entries of a page of a listing: few, so that there are several.
PAGE = 3


@dataclass
class Repo:
    """A repository: the files of each commit, and what branches and tags are."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    #: Nobody without this token sees it.
    token: str | None = None
    gated: bool = False

    def commit(self, files: dict[str, bytes], revision: str = "main") -> str:
        """Makes a commit of these files, and the revision that commit."""
        digest = hashlib.sha1(repr(sorted((k, hashlib.sha1(v).hexdigest()) for k, v in files.items())).encode())
        self.commits[digest.hexdigest()] = dict(files)
        self.revisions[revision] = digest.hexdigest()
        return digest.hexdigest()

    def resolve(self, revision: str) -> str | None:
        return self.revisions.get(revision, revision if revision in self.commits else None)


@dataclass
class Seen:
    """One request, and what was sent."""

    server: str
    method: str
    path: str
    range: str | None
    authorization: str | None
    sent: int = 0


@dataclass
class Fault:
    """What goes wrong with the next answer of a body."""

    #: ``status``, ``reset``, ``truncate``, ``slow``, ``stall`` or ``corrupt``.
    kind: str
    status: int = 500
    #: Where it happens, in bytes of the body.
    at: int = 1000
    seconds: float = 0.01


class LocalHub:
    """The two servers; use as a context manager."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.seen: list[Seen] = []
        #: Done one by one to GET requests of the CDN; the last one of `always` to all after them.
        self.faults: list[Fault] = []
        self.always: Fault | None = None
        #: The same for requests to the hub itself.
        self.hub_faults: list[Fault] = []
        self.ranges = True
        self.known_token = "hf_good"
        self._lock = threading.Lock()
        self._servers = [self._serve("hub", _Hub), self._serve("cdn", _Cdn)]
        self.url, self.cdn = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)

    def _serve(self, name: str, handler: type[_Handler]) -> ThreadingHTTPServer:
        made = type(name, (handler,), {"hub": self, "name": name})
        server = ThreadingHTTPServer(("127.0.0.1", 0), made)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return server

    def __enter__(self) -> LocalHub:
        return self

    def __exit__(self, *_: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def blob(self, sha256: str) -> bytes | None:
        for repo in self.repos.values():
            for files in repo.commits.values():
                for content in files.values():
                    if hashlib.sha256(content).hexdigest() == sha256:
                        return content
        return None

    def next_fault(self, server: str) -> Fault | None:
        with self._lock:
            queue = self.faults if server == "cdn" else self.hub_faults
            if queue:
                return queue.pop(0)
            return self.always if server == "cdn" else None

    def sent(self, server: str = "cdn") -> int:
        """Bytes of bodies that a server sent."""
        return sum(seen.sent for seen in self.seen if seen.server == server)

    def gets(self, server: str = "cdn") -> list[Seen]:
        return [seen for seen in self.seen if seen.server == server and seen.method == "GET"]


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    name: str
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def note(self) -> Seen:
        get = self.headers.get
        seen = Seen(self.name, self.command, self.path, get("Range"), get("Authorization"))
        self.hub.seen.append(seen)
        return seen

    def answer(self, status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        headers = headers or {}
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def document(self, value: object, headers: dict[str, str] | None = None) -> None:
        self.answer(200, {"Content-Type": "application/json", **(headers or {})}, json.dumps(value).encode())

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        named = {"X-Error-Code": code, "X-Error-Message": message}
        body = json.dumps({"error": message or code}).encode()
        self.answer(status, {k: v for k, v in named.items() if v}, body)

    def reset(self) -> None:
        """Ends the connection as a crashing server does."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def content(self, body: bytes, headers: dict[str, str], seen: Seen, fault: Fault | None) -> None:
        """A body or a range of it, with what goes wrong."""
        start, end = 0, len(body)
        wanted = seen.range if self.hub.ranges else None
        if wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, end = int(first), min(int(last) + 1 if last else len(body), len(body))
            if start >= len(body):
                return self.answer(416, {"Content-Range": f"bytes */{len(body)}"})
            headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(body)}"}
        if fault and fault.kind == "status":
            return self.refuse(fault.status)
        if fault and fault.kind == "corrupt":
            body = body[: fault.at] + bytes([body[fault.at] ^ 1]) + body[fault.at + 1 :]
        self.send_response(206 if wanted else 200)
        for name, value in {**headers, "Content-Length": str(end - start)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return None
        part = body[start:end]
        cut = fault.at if fault and fault.kind in ("reset", "truncate", "stall") else len(part)
        step = 1 << 12 if fault and fault.kind == "slow" else 1 << 20
        for at in range(0, min(cut, len(part)), step):
            piece = part[at : min(at + step, cut)]
            self.wfile.write(piece)
            seen.sent += len(piece)
            if fault and fault.kind == "slow":
                time.sleep(fault.seconds)
        if fault and fault.kind == "stall":
            self.wfile.flush()
            time.sleep(fault.seconds)
        if fault and fault.kind == "reset":
            self.reset()
        if fault and fault.kind in ("truncate", "stall"):
            self.close_connection = True
        return None


class _Cdn(_Handler):
    def do_GET(self) -> None:
        seen = self.note()
        body = self.hub.blob(urlsplit(self.path).path.removeprefix("/blob/"))
        if body is None:
            return self.refuse(404)
        # A signed address and another authorization at once are an error for the real one.
        if seen.authorization is not None:
            return self.refuse(400, message="two authorizations")
        fault = self.hub.next_fault("cdn") if self.command == "GET" else None
        return self.content(body, {"Accept-Ranges": "bytes"}, seen, fault)

    do_HEAD = do_GET


class _Hub(_Handler):
    def do_GET(self) -> None:
        seen = self.note()
        fault = self.hub.next_fault("hub")
        if fault:
            return self.reset() if fault.kind == "reset" else self.refuse(fault.status)
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            return self.allowed("/".join(parts[2:4]), seen) and self.api("/".join(parts[2:4]), parts[4:])
        if len(parts) > 4 and parts[2] == "resolve":
            repo = "/".join(parts[:2])
            return self.allowed(repo, seen, content=True) and self.file(repo, parts[3], "/".join(parts[4:]), seen)
        return self.refuse(404)

    do_HEAD = do_GET

    def allowed(self, name: str, seen: Seen, content: bool = False) -> bool:
        token = (seen.authorization or "").removeprefix("Bearer ")
        repo = self.hub.repos.get(name)
        if token and token != self.hub.known_token:
            self.refuse(401, message="Invalid credentials in Authorization header")
        elif repo is None or (repo.token and token != repo.token):
            # The real one does not tell the two apart, and says 401 to who is nobody.
            self.refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif content and repo.gated:
            self.refuse(403 if token else 401, "GatedRepo", f"Access to model {name} is restricted")
        else:
            return True
        return False

    def api(self, name: str, parts: list[str]) -> None:
        repo = self.hub.repos[name]
        view, revision, path = [*parts, ""][0], [*parts[1:], "main"][0], "/".join(parts[2:])
        commit = repo.resolve(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = repo.commits[commit]
        if view in ("", "revision"):
            siblings = [{"rfilename": path} for path in files]
            return self.document({"id": name, "modelId": name, "sha": commit, "private": False, "siblings": siblings})
        entries = [_entry(p, content) for p, content in sorted(files.items()) if not path or p.startswith(f"{path}/")]
        folders = {p.rpartition("/")[0] for p in files if "/" in p and p.startswith(path)} - {path}
        entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": p} for p in sorted(folders)] + entries
        if path and not entries:
            return self.refuse(404, "EntryNotFound", f"{path} does not exist on {revision}")
        query = parse_qs(urlsplit(self.path).query)
        at = int(query.get("cursor", ["0"])[0])
        more = {}
        if at + PAGE < len(entries):
            address = f"{self.hub.url}{urlsplit(self.path).path}?recursive=true&cursor={at + PAGE}"
            more["Link"] = f'<{address}>; rel="next"'
        return self.document(entries[at : at + PAGE], more)

    def file(self, name: str, revision: str, path: str, seen: Seen) -> None:
        repo = self.hub.repos[name]
        commit = repo.resolve(revision)
        if commit is None:
            return self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        content = repo.commits[commit].get(path)
        if content is None:
            return self.answer(404, {"X-Repo-Commit": commit, "X-Error-Code": "EntryNotFound"})
        headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if not path.endswith(".safetensors"):
            return self.content(content, {**headers, "ETag": f'"{_git_hash(content)}"'}, seen, None)
        sha256 = hashlib.sha256(content).hexdigest()
        linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
        return self.answer(302, {**headers, **linked, "Location": f"{self.hub.cdn}/blob/{sha256}?signature=secret"})


def _git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "oid": _git_hash(content), "size": len(content), "path": path}
    if path.endswith(".safetensors"):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry
