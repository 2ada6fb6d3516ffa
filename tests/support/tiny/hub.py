"""A Hugging Face hub with one dataset, `org/name`, on this machine: the requests that reading a dataset makes."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "a" * 40
_API, _FILES = "/api/datasets/org/name", "/datasets/org/name/resolve/"


class _Handler(BaseHTTPRequestHandler):
    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        address, _, query = self.path.partition("?")
        path = unquote(address)
        if path.startswith(_FILES):
            self._file(path.removeprefix(_FILES).partition("/")[2])
        elif "/tree/" in path and path.startswith(_API):
            self._tree(path.split("/tree/")[1].partition("/")[2], "recursive=true" in query)
        elif path == _API or path.startswith(f"{_API}/revision/"):
            self._json({"id": "org/name", "sha": COMMIT, "siblings": [], "tags": [], "private": False})
        else:
            self._reply(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _file(self, name: str) -> None:
        path = self.folder / name
        if not path.is_file():
            self._reply(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            return
        if self.command == "GET":
            self.asked.append(name)
        content = path.read_bytes()
        self._reply(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'})

    def _tree(self, below: str, recursive: bool) -> None:
        base = self.folder / below
        if not base.is_dir():
            self._reply(404, b"{}", {"X-Error-Code": "EntryNotFound"})
            return
        kind = {True: "file", False: "directory"}
        paths = sorted(base.rglob("*") if recursive else base.iterdir())
        names = {path: path.relative_to(self.folder).as_posix() for path in paths}
        self._json(
            [{"type": kind[path.is_file()], "path": names[path], "size": 1, "oid": COMMIT} for path in paths],
        )

    def _json(self, value: Any) -> None:
        self._reply(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _reply(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def tiny_hub(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve a folder as the repository; yield the hub's address and the files downloaded so far."""
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"folder": folder, "asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()
