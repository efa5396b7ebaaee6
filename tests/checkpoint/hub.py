"""A hub on a loopback port: as much of the protocol as `snapshot_download` speaks."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

COMMIT = "c0ffee" + "0" * 34


class Hub(ThreadingHTTPServer):
    """Serves folders by repository id; `requests` lists what was asked, as "METHOD path"."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path], revisions: tuple[str, ...]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories, self.revisions = repositories, revisions
        self.requests: list[str] = []

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def serve_hub(repositories: dict[str, Path], revisions: tuple[str, ...] = ("main",)) -> Iterator[Hub]:
    hub = Hub(repositories, revisions)
    thread = Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(send_body=False)

    def do_GET(self) -> None:
        self._answer(send_body=True)

    def _answer(self, send_body: bool) -> None:
        self.server.requests.append(f"{self.command} {self.path}")
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:2] == ["api", "models"] and parts[4:5] == ["tree"]:
            self._answer_tree("/".join(parts[2:4]), parts[5], send_body)
        elif parts[:2] == ["api", "models"]:
            self._answer_listing("/".join(parts[2:4]), parts[-1] if "revision" in parts else "main", send_body)
        elif len(parts) >= 5 and parts[2] == "resolve":
            self._answer_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]), send_body)
        else:
            self._send(404, b"{}", send_body)

    def _answer_listing(self, repository: str, revision: str, send_body: bool) -> None:
        folder = self._folder(repository, revision, send_body)
        if folder is None:
            return
        siblings = [{"rfilename": file.name} for file in sorted(folder.iterdir())]
        listing = {"id": repository, "sha": COMMIT, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
        self._send(200, json.dumps(listing).encode(), send_body)

    def _answer_tree(self, repository: str, revision: str, send_body: bool) -> None:
        folder = self._folder(repository, revision, send_body)
        if folder is not None:
            files = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": file.name}
                for file in sorted(folder.iterdir())
            ]
            self._send(200, json.dumps(files).encode(), send_body)

    def _answer_file(self, repository: str, revision: str, name: str, send_body: bool) -> None:
        folder = self._folder(repository, revision, send_body)
        if folder is None:
            return
        if not (folder / name).is_file():
            self._send(404, b"", send_body, {"X-Error-Code": "EntryNotFound"})
            return
        content = (folder / name).read_bytes()
        etag = hashlib.sha256(content).hexdigest()
        self._send(200, content, send_body, {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT})

    def _folder(self, repository: str, revision: str, send_body: bool) -> Path | None:
        if repository not in self.server.repositories:
            self._send(404, b"{}", send_body, {"X-Error-Code": "RepoNotFound"})
            return None
        if revision not in (*self.server.revisions, COMMIT):
            self._send(404, b"{}", send_body, {"X-Error-Code": "RevisionNotFound"})
            return None
        return self.server.repositories[repository]

    def _send(self, status: int, body: bytes, send_body: bool, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if send_body:
            self.wfile.write(body)
