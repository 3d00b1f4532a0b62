"""A W&B server of the few answers wandb 0.31 needs, which writes down what it is asked.

It stands for the protocol only, as read from real requests: it is no proof of how the W&B cloud
shows a run.
"""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

R = TypeVar("R", bound="Recorder")

MANIFEST_FILE = {"id": "f", "name": "m", "displayName": "m", "uploadHeaders": []}


class Recorder(ThreadingHTTPServer):
    """The server, with `queries` (name and variables) and `uploads` (name and bytes)."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.queries: list[tuple[str, dict[str, Any]]] = []
        self.uploads: dict[str, bytes] = {}
        self.rows: list[dict[str, Any]] = []

    def asked(self, name: str) -> list[dict[str, Any]]:
        """Variables of every query of that name."""
        return [variables for query, variables in self.queries if query == name]

    def answer(self, name: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        """The data for a query, or None for one this server does not know."""
        self.queries.append((name, variables))
        artifact = {"id": "QXJ0aWZhY3Q6MQ==", "digest": "x"}
        manifest = {"id": "m", "file": {**MANIFEST_FILE, "uploadUrl": f"{self.url}/up/manifest"}}
        fixed: dict[str, dict[str, Any]] = {
            "RunResumeStatus": {"model": None},
            "ServerFeaturesQuery": {"serverInfo": {"features": []}},
            "Viewer": {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}"}},
            "ArtifactType": {"project": None},
            "UseArtifact": {"useArtifact": {"artifact": artifact}},
            "CommitArtifact": {"commitArtifact": {"artifact": artifact}},
            "CreateArtifactManifest": {"createArtifactManifest": {"artifactManifest": manifest}},
        }
        if name in fixed:
            return fixed[name]
        if name == "UpsertBucket":
            return self._bucket(variables)
        if name == "CreateArtifact":
            return {"createArtifact": {"artifact": self._artifact(variables["input"])}}
        if name == "CreateArtifactFiles":
            return self._artifact_files(variables["input"]["artifactFiles"])
        if name == "CreateRunFiles":
            files = [{"name": f, "uploadUrl": f"{self.url}/up/{f}"} for f in variables["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return None

    def _bucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}
        bucket = {"id": "b", "name": variables["name"], "displayName": "", "config": "{}"}
        bucket |= {"project": project, "historyLineCount": 0, "sweepName": None}
        return {"upsertBucket": {"bucket": bucket, "inserted": True}}

    def _artifact(self, wanted: dict[str, Any]) -> dict[str, Any]:
        sequence = {"id": "s", "latestArtifact": None}
        # The id says which collection it is, so that a use can be told from another.
        name = wanted["artifactCollectionName"]
        return {"id": name, "state": "PENDING", "artifactSequence": sequence}

    def _artifact_files(self, wanted: list[dict[str, Any]]) -> dict[str, Any]:
        nodes = []
        for file in wanted:
            name = f"{file['artifactID']}/{file['name']}"
            node = {"id": name, "name": file["name"], "displayName": file["name"]}
            node |= {"uploadUrl": f"{self.url}/up/{name}", "uploadHeaders": []}
            node |= {"storagePath": name, "uploadMultipartUrls": None}
            nodes.append({"node": node | {"artifact": {"id": file["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": nodes}}}

    def stream(self, run: str, message: dict[str, Any]) -> None:
        """What a run sends while it is open."""
        lines = message.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
        self.rows.extend(json.loads(line) for line in lines)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are no news."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Recorder

    def log_message(self, *_: object) -> None:
        pass

    def _body(self) -> bytes:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(data) if self.headers.get("Content-Encoding") == "gzip" else data

    def _reply(self, answer: object) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self) -> None:
        self.server.uploads[self.path.removeprefix("/up/")] = self._body()
        self._reply({})

    def do_POST(self) -> None:
        message = json.loads(self._body())
        if not self.path.endswith("/graphql"):
            self.server.stream(self.path.split("/")[-2], message)
            return self._reply({"exitcode": None, "limits": {}})
        found = re.search(r"(?:mutation|query)\s+(\w+)", message["query"])
        name = found.group(1) if found else ""
        data = self.server.answer(name, message.get("variables") or {})
        if data is None:
            return self._reply({"errors": [{"message": f"unknown query {name}"}]})
        return self._reply({"data": data})


@contextmanager
def serving(server: R) -> Iterator[R]:
    """A server that answers for the length of a `with` block."""
    with server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def wandb_server() -> AbstractContextManager[Recorder]:
    """A server on a free port of this machine, for the length of a `with` block."""
    return serving(Recorder())
