"""A stand-in for the hub on this machine: repositories are folders, and every request is noted.

`Hub(folder)` serves `folder/OWNER/NAME`, each with one commit, `main`. `manners` says by the name of a repository what
the hub does when it is asked for it, or for its files.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ANSWERS = {"gated": (403, "GatedRepo"), "missing": (404, "RepoNotFound"), "private": (401, "RepoNotFound"),
           "limited": (429, ""), "down": (503, ""), "disabled": (403, "")}  # fmt: skip
"""The status and the code of a refusal."""


class Hub(ThreadingHTTPServer):
    """The server; `asked` are the files that were sent, in order."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.asked = folder, list[str]()
        self.manners: dict[str, str] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """Answers as the hub does: what a repository is, the list of its files, and the files."""

    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        api = parts[:2] == ["api", "models"]
        parts = parts[2:] if api else parts
        words = [index for index, part in enumerate(parts) if part in ("revision", "tree", "resolve")]
        repository, rest = "/".join(parts[: (words or [2])[0]]), parts[(words or [2])[0] :]
        manner = self.server.manners.get(repository, "")
        files_only = manner in ("gated", "cut")  # what these are can be looked up
        if manner in ANSWERS and not (api and files_only):
            return self.refuse(*ANSWERS[manner])
        if not (self.server.folder / repository).is_dir():
            return self.refuse(401, "RepoNotFound")
        if (rest[1] if len(rest) > 1 else "main") not in ("main", COMMIT, "refs/pr/1"):
            return self.refuse(404, "RevisionNotFound")
        if not api:
            return self.file(repository, "/".join(rest[2:]), cut=manner == "cut")
        return self.json(self.tree(repository) if rest[:1] == ["tree"] else {"id": repository, "sha": COMMIT})

    def tree(self, repository: str) -> list[dict[str, Any]]:
        folder = self.server.folder / repository
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return [{"type": "file", "oid": hashlib.sha1(file.read_bytes()).hexdigest(), "size": file.stat().st_size,
                 "path": file.relative_to(folder).as_posix()} for file in files]  # fmt: skip

    def file(self, repository: str, name: str, *, cut: bool) -> None:
        file = self.server.folder / repository / name
        if not file.is_file():
            return self.refuse(404, "EntryNotFound")
        data, start = file.read_bytes(), 0
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").partition("-")[0])
        self.send_response(206 if wanted else 200)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "GET":
            self.server.asked.append(f"{repository}/{name}")
            short = cut and name.endswith(".safetensors")
            self.wfile.write(data[start : start + 100] if short else data[start:])
            self.close_connection = short
        return None

    def json(self, value: object) -> None:
        self.send(200, json.dumps(value).encode())

    def refuse(self, status: int, code: str) -> None:
        self.send(status, b"{}", code)

    def send(self, status: int, body: bytes, code: str = "") -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@contextmanager
def serving(folder: Path, cache: Path) -> Iterator[Hub]:
    """A hub that runs while this is open, and that this process takes for the real one, with a cache of its own."""
    hub = Hub(folder)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    settings = {
        "ENDPOINT": hub.url, "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
    }  # fmt: skip
    try:
        with patch.multiple(constants, **settings):
            yield hub
    finally:
        hub.shutdown()
        hub.server_close()
