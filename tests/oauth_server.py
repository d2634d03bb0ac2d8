"""An OAuth provider of one's own on 127.0.0.1: whoever asks is signed in as `user`."""

from __future__ import annotations

import base64
import json
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from joserfc import jwt
from joserfc.jwk import RSAKey


class Provider(ThreadingHTTPServer):
    """token: the access token that it gives. scopes: those that were asked for, once they were."""

    def __init__(self, user: str, token: str, client: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.user, self.token, self.client = user, token, client
        self.key = RSAKey.generate_key(2048, {"kid": "one", "use": "sig", "alg": "RS256"})
        self.scopes, self.nonces = "", {}
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Provider

    def log_message(self, *_) -> None:
        pass

    def answer(self, value: dict) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        asked = dict(urllib.parse.parse_qsl(query))
        if path == "/.well-known/openid-configuration":
            self.answer({
                "issuer": self.server.url,
                "authorization_endpoint": f"{self.server.url}/authorize",
                "token_endpoint": f"{self.server.url}/token",
                "jwks_uri": f"{self.server.url}/jwks",
            })  # fmt: skip
        elif path == "/jwks":
            self.answer({"keys": [self.server.key.as_dict(private=False)]})
        elif path == "/authorize":
            self.server.scopes = asked["scope"]
            self.server.nonces["code"] = asked.get("nonce")
            back = urllib.parse.urlencode({"code": "code", "state": asked["state"]})
            joint = "&" if "?" in asked["redirect_uri"] else "?"
            self.send_response(302)
            self.send_header("Location", asked["redirect_uri"] + joint + back)
            self.send_header("Content-Length", "0")
            self.end_headers()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        now, user = int(time.time()), self.server.user
        client = base64.b64decode(self.headers["Authorization"].split()[1]).decode().split(":")[0]
        assert client == self.server.client
        claims = {
            "iss": self.server.url, "aud": client, "sub": user, "iat": now, "exp": now + 600,
            "nonce": self.server.nonces["code"], "name": user, "preferred_username": user,
            "profile": f"{self.server.url}/{user}", "picture": "",
        }  # fmt: skip
        header = {"alg": "RS256", "kid": "one"}
        self.answer({
            "access_token": self.server.token, "token_type": "bearer", "expires_in": 600,
            "scope": self.server.scopes,
            "id_token": jwt.encode(header, claims, self.server.key),
        })  # fmt: skip
