"""A Hub of one's own: the routes that huggingface_hub speaks, on 127.0.0.1, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import yaml

ERRORS = {404: "RepoNotFound"}


class Hub(ThreadingHTTPServer):
    """tokens: user names by token. repos: files by path, by repository. faults: what the next
    request whose path holds the key is answered with: a status, a status and the Hub's own name
    for it ("403 GatedRepo"), or "drop" to hang up."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens: dict[str, dict[str, Any]] = {}
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: dict[str, int] = {}
        self.faults: dict[str, int | str] = {}
        self.requests: list[tuple[str, str]] = []
        self.wishes: list[dict[str, Any]] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, address: Any) -> None:
        """A client that hung up is none of the tests' business."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, value: Any = None, **headers: str) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value or {}).encode()
        self.send_response(status)
        for name, content in headers.items():
            self.send_header(name.replace("_", "-"), content)
        if status in ERRORS and "X_Error_Code" not in headers:
            self.send_header("X-Error-Code", ERRORS[status])
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def user(self) -> dict[str, Any] | None:
        return self.server.tokens.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def handle_any(self) -> None:
        path = self.path.split("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.command, path))
        for part, fault in self.server.faults.items():
            if part in path:
                if fault == "drop":
                    self.close_connection = True
                    self.connection.close()
                    return
                status, *code = str(fault).split()
                headers = {"X_Error_Code": code[0]} if code else {}
                self.answer(int(status), {"error": "as the test wants it"}, **headers)
                return
        for pattern, method in ROUTES.items():
            if match := re.fullmatch(pattern, path):
                method(self, body, *match.groups())
                return
        self.answer(404, {"error": f"no route {path}"})

    do_GET = do_POST = do_HEAD = handle_any

    def whoami(self, _: bytes) -> None:
        user = self.user()
        self.answer(200, {"type": "user", **user}) if user else self.answer(401)

    def create(self, body: bytes) -> None:
        wish, user = json.loads(body), self.user()
        self.server.wishes.append(wish)
        owner = wish.get("organization") or (user or {}).get("name")
        repo = f"{owner}/{wish['name']}"
        if not user:
            self.answer(401)
        elif "write" not in user["rights"]:
            self.answer(403, {"error": "no right to write"})
        elif repo in self.server.repos:
            self.answer(409, {"url": f"{self.server.url}/{repo}", "error": "exists"})
        else:
            self.server.repos[repo] = {".gitattributes": b""}
            self.server.private[repo] = wish.get("visibility") == "private" or wish.get("private")
            self.answer(200, {"url": f"{self.server.url}/{repo}", "id": repo})

    def info(self, _: bytes, repo: str) -> None:
        files = self.server.repos.get(repo)
        if files is None:
            self.answer(404, {"error": "Repository not found"})
            return
        card = files.get("README.md", b"").decode()
        tags = (yaml.safe_load(card.split("---")[1]) or {}).get("tags", []) if "---" in card else []
        siblings = [{"rfilename": name} for name in files]
        private = bool(self.server.private.get(repo))
        answer = {"id": repo, "sha": "0" * 40, "private": private, "tags": tags}
        self.answer(200, {**answer, "siblings": siblings})

    def preupload(self, body: bytes, repo: str) -> None:
        files = json.loads(body)["files"]
        modes = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
        self.answer(200 if repo in self.server.repos else 404, {"files": modes})

    def validate(self, _: bytes) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def commit(self, body: bytes, repo: str) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
        self.server.commits[repo] = self.server.commits.get(repo, 0) + 1
        url = f"{self.server.url}/{repo}/commit/{'1' * 40}"
        self.answer(200, {"success": True, "commitOid": "1" * 40, "commitUrl": url})

    def resolve(self, _: bytes, repo: str, path: str) -> None:
        content = self.server.repos.get(repo, {}).get(path)
        if content is None:
            known = repo in self.server.repos
            self.answer(404, X_Error_Code="EntryNotFound" if known else "RepoNotFound")
            return
        tag = hashlib.sha256(content).hexdigest()
        self.answer(200, content, ETag=f'"{tag}"', X_Repo_Commit="1" * 40)


ID = r"([\w.-]+/[\w.-]+)"
ROUTES = {
    r"/api/whoami-v2": Handler.whoami,
    r"/api/repos/create": Handler.create,
    r"/api/validate-yaml": Handler.validate,
    rf"/api/(?:models|spaces)/{ID}/preupload/main": Handler.preupload,
    rf"/api/(?:models|spaces)/{ID}/commit/main": Handler.commit,
    rf"/api/(?:models|spaces)/{ID}(?:/revision/\w+)?": Handler.info,
    rf"/{ID}/resolve/\w+/(.+)": Handler.resolve,
}
