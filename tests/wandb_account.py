"""A W&B server that remembers: runs, artifacts and reports of one account.

As `wandb_server.py`, it stands for the protocol only, as read from real requests of wandb 0.31 and
wandb-workspaces 0.4.13.
"""

from __future__ import annotations

import json
import threading
from typing import Any

from wandb_server import Recorder

FORMAT = "2026-01-01T00:00:00Z"


class Account(Recorder):
    """Remembers what it is told.

    Attributes:
        runs: Summary, config and more of every run, by id.
        artifacts: By id: name, type, digest, run that made it.
        uses: Run and id of the artifact it uses.
        reports: By id.
        opened: Ids of runs in the order in which they were opened or gone on with.
        refuse: Names of queries that are answered by an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self.runs: dict[str, dict[str, Any]] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.uses: set[tuple[str, str]] = set()
        self.reports: dict[str, dict[str, Any]] = {}
        self.opened: list[str] = []
        self.refuse: set[str] = set()
        self.lock = threading.RLock()

    def answer(self, name: str, variables: dict[str, Any]) -> dict[str, Any] | None:
        with self.lock:
            known = getattr(self, f"_{name}", None)
            if name in self.refuse:
                return None
            if known is None:
                return super().answer(name, variables)
            self.queries.append((name, variables))
            return known(variables)

    def stream(self, run: str, message: dict[str, Any]) -> None:
        with self.lock:
            super().stream(run, message)
            files = message.get("files", {})
            for line in files.get("wandb-summary.json", {}).get("content", []):
                self.runs[run]["summary"] = json.loads(line)
            self.runs[run]["history"] += files.get("wandb-history.jsonl", {}).get("content", [])
            if message.get("complete"):
                self.runs[run]["exitcode"] = message.get("exitcode")

    def used(self, run: str) -> set[str]:
        """Names of the artifacts that a run uses."""
        return {self.artifacts[artifact]["name"] for by, artifact in self.uses if by == run}

    def made(self, run: str) -> set[str]:
        """Names of the artifacts that a run made."""
        return {a["name"] for a in self.artifacts.values() if run in a["runs"]}

    def _GetDefaultEntity(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "u", "entity": "me"}}

    def _RunResumeStatus(self, variables: dict[str, Any]) -> dict[str, Any]:
        run = self.runs.get(variables["name"])
        if run is None:
            return {"model": None}
        lines = run["history"]
        bucket = {
            "id": variables["name"], "name": variables["name"], "displayName": run["displayName"],
            "summaryMetrics": json.dumps(run["summary"]), "config": json.dumps(run["config"]),
            "logLineCount": 0, "historyLineCount": len(lines), "eventsLineCount": 0,
            "historyTail": json.dumps(lines[-1:]), "eventsTail": "[]", "tags": run["tags"],
            "notes": run["notes"], "wandbConfig": "{}",
        }  # fmt: skip
        entity = {"id": "e", "name": "me"}
        return {"model": {"id": "p", "name": run["project"], "entity": entity, "bucket": bucket}}

    def _UpsertBucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        name = variables["name"]
        new = name not in self.runs
        blank = {"summary": {}, "config": {}, "history": [], "exitcode": None}
        run = self.runs.setdefault(name, blank)
        self.opened.append(name)
        run["config"] |= json.loads(variables.get("config") or "{}")
        for key in ("groupName", "jobType", "tags", "notes", "displayName", "project"):
            if variables.get(key) is not None or key not in run:
                run[key] = variables.get(key)
        project = {"id": "p", "name": run["project"], "entity": {"id": "e", "name": "me"}}
        bucket = {"id": name, "name": name, "displayName": run["displayName"] or "", "config": "{}"}
        bucket |= {"project": project, "historyLineCount": len(run["history"]), "sweepName": None}
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def _CreateArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        wanted = variables["input"]
        name, digest = wanted["artifactCollectionName"], wanted["digest"]
        artifact = f"{name}@{digest}"
        known = self.artifacts.get(artifact)
        if known is None:
            known = {"name": name, "digest": digest, "type": wanted["artifactTypeName"]}
            known |= {"state": "PENDING", "runs": set(), "metadata": wanted["metadata"]}
            self.artifacts[artifact] = known
        known["runs"].add(wanted["runName"])
        sequence = {"id": name, "latestArtifact": None}
        found = {"id": artifact, "state": known["state"], "artifactSequence": sequence}
        return {"createArtifact": {"artifact": found}}

    def _CommitArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        artifact = variables["artifactID"]
        self.artifacts[artifact]["state"] = "COMMITTED"
        digest = self.artifacts[artifact]["digest"]
        return {"commitArtifact": {"artifact": {"id": artifact, "digest": digest}}}

    def _UseArtifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        use = variables["input"]
        self.uses.add((use["runName"], use["artifactID"]))
        # Who only uses it did not make it, though it was sent along.
        self.artifacts[use["artifactID"]]["runs"].discard(use["runName"])
        return {"useArtifact": {"artifact": {"id": use["artifactID"]}}}

    def _ArtifactByID(self, variables: dict[str, Any]) -> dict[str, Any]:
        known = self.artifacts[variables["id"]]
        project = {"__typename": "Project", "id": "p", "internalId": "1", "name": "proof"}
        project["entity"] = {"name": "me"}
        collection = {"__typename": "ArtifactSequence", "name": known["name"], "project": project}
        return {
            "artifact": {
                "__typename": "Artifact", "id": variables["id"], "artifactSequence": collection,
                "versionIndex": 0, "artifactType": {"name": known["type"]}, "description": None,
                "metadata": known["metadata"], "ttlDurationSeconds": -2, "ttlIsInherited": False,
                "tags": [], "historyStep": None, "state": known["state"], "size": 1,
                "digest": known["digest"], "commitHash": "0", "fileCount": 1,
                "createdAt": FORMAT, "updatedAt": FORMAT, "aliases": [],
            }
        }  # fmt: skip

    def _Runs(self, variables: dict[str, Any]) -> dict[str, Any]:
        if not self.runs:
            return {"project": None}
        wanted = json.loads(variables["filters"])
        edges = [
            {"cursor": name, "node": self._run_node(name, run)}
            for name, run in self.runs.items()
            if run["groupName"] in wanted["group"]["$in"]
            and run["jobType"] in wanted["jobType"]["$in"]
        ]
        info = {"endCursor": None, "hasNextPage": False}
        found = {"internalId": "1", "runCount": len(edges), "readOnly": False}
        return {"project": {**found, "runs": {"edges": edges, "pageInfo": info}}}

    def _run_node(self, name: str, run: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": name, "projectId": "1", "tags": run["tags"] or [], "name": name,
            "displayName": run["displayName"], "sweepName": None, "state": "finished",
            "config": json.dumps(run["config"]), "group": run["groupName"],
            "jobType": run["jobType"], "commit": None, "readOnly": False, "createdAt": FORMAT,
            "heartbeatAt": FORMAT, "description": None, "notes": run["notes"],
            "systemMetrics": "{}", "summaryMetrics": json.dumps(run["summary"]),
            "historyLineCount": len(run["history"]), "user": {"name": "me", "username": "me"},
            "historyKeys": None,
        }  # fmt: skip

    def _ProjectViews(self, variables: dict[str, Any]) -> dict[str, Any]:
        edges = [{"cursor": view["id"], "node": view} for view in self.reports.values()]
        info = {"endCursor": None, "hasNextPage": False}
        return {"project": {"allViews": {"edges": edges, "pageInfo": info}}}

    def _ProjectInternalId(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"id": "p", "internalId": "1"}}

    def _GetProjects(self, _: dict[str, Any]) -> dict[str, Any]:
        names = {run["project"] for run in self.runs.values()}
        user = {"id": "u", "name": "me", "username": "me", "email": "", "admin": False}
        user |= {"flags": "{}", "entity": "me", "deletedAt": None}
        user |= {"apiKeys": {"edges": []}, "teams": {"edges": []}}
        edges = [
            {"cursor": n, "node": {"id": n, "internalId": "1", "name": n, "entityName": "me",
             "createdAt": FORMAT, "isBenchmark": False, "user": user}}
            for n in names
        ]  # fmt: skip
        info = {"endCursor": None, "hasNextPage": False}
        return {"models": {"edges": edges, "pageInfo": info}}

    def _upsertView(self, variables: dict[str, Any]) -> dict[str, Any]:
        view = variables["id"] or f"view{len(self.reports) + 1}"
        new = view not in self.reports
        self.reports[view] = {
            "id": view, "name": variables["name"], "displayName": variables["displayName"],
            "description": variables["description"], "spec": variables["spec"],
            "user": {"username": "me", "photoUrl": "", "email": ""},
            "createdAt": FORMAT, "updatedAt": FORMAT, "type": variables["type"],
            "project": {"id": "p", "name": variables["projectName"], "entityName": "me"},
        }  # fmt: skip
        return {"upsertView": {"view": self.reports[view], "inserted": new}}
