"""The graph of the store as W&B runs and artifacts: teacher, stages, bundle, measurement.

Each node is one run that uses the artifacts it was made from and logs its own. An artifact is named
by the store's key; its content is the record of the store, so that equal results are one version.
Weights and graphs are many times larger and go along only if they are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from smskd_export.judging import JUDGED, Judged, read_judged
from smskd_export.manifest import MANIFEST
from smskd_export.report import BUNDLE

from smskd.errors import StoreError
from smskd_bench.measurements import measurement_folder
from smskd_bench.plan import Plan
from smskd_bench.publishing.documents import ArtifactDocument, RunDocument, measured, sha256_of
from smskd_bench.publishing.names import TAG_CHARS, shortened, stable_id
from smskd_bench.spec import StageSpec
from smskd_bench.store import RESULT, SPEC, WEIGHTS, Store
from smskd_bench.tracking_exports import files_below, measurement_key
from smskd_bench.wandb_mirror import artifact_name

GROUP = "lineage"
"""In W&B, of all nodes: matrices share stage runs, so none of them can be their group."""


@dataclass(frozen=True)
class _Bundle:
    """An exported student of the matrix: its id, and where it is."""

    id: str
    key: str
    folder: Path


@dataclass(frozen=True)
class Lineage:
    """Nodes of one matrix.

    Attributes:
        plan: The matrix.
        store: Holds the nodes.
        weights: Whether weights and bundles go along.
    """

    plan: Plan
    store: Store
    weights: bool = False

    def runs(self) -> Iterator[RunDocument]:
        """One run a finished node, each after those it builds on."""
        for spec in self.plan.nodes.values():
            if self.store.is_done(spec.key):
                yield self._stage_run(spec)
        for bundle in self._bundles:
            yield self._bundle_run(bundle)
        for bundle in self._bundles:
            for folder, judged in _measurements(self.store.root, bundle):
                yield self._measurement_run(bundle, folder, judged)

    def stage(self, key: str) -> ArtifactDocument:
        """The record of a stage run: specification and result, which names all its files."""
        folder = self.store.folder(key)
        digest = sha256_of(folder / RESULT)
        metadata = {"key": key, "sha256": digest, "model": self.plan.nodes[key].model}
        return ArtifactDocument(
            f"stage-{key}", "stage", str(folder), _plainly(SPEC, RESULT), metadata
        )

    def measurements(self, keys: tuple[str, ...]) -> tuple[ArtifactDocument, ...]:
        """What devices brought back of some stage runs."""
        wanted = [bundle for bundle in self._bundles if bundle.key in keys]
        return tuple(
            _measurement(folder, judged)
            for bundle in wanted
            for folder, judged in _measurements(self.store.root, bundle)
        )

    @cached_property
    def _bundles(self) -> tuple[_Bundle, ...]:
        """Whole bundles of finished stage runs; one that is being made has no manifest yet."""
        exports = self.store.root / "exports"
        found = []
        for key in self.plan.nodes:
            for manifest in sorted((exports / key).glob(f"*/{BUNDLE}/{MANIFEST}")):
                if self.store.is_done(key):
                    found.append(_Bundle(sha256_of(manifest), key, manifest.parent))
        return tuple(found)

    def _stage_run(self, spec: StageSpec) -> RunDocument:
        result = self.store.result(spec.key)
        if result is None:  # it went away while we looked
            raise StoreError(f"the result of {spec.key} is gone", "publish again")
        used = [*spec.teachers, *([spec.parent] if spec.parent else [])]
        test = {f"test/{name}": value for name, value in result["test"].items()}
        lineage = {"key": spec.key, "parent_key": spec.parent, "teacher_keys": [*spec.teachers]}
        return RunDocument(
            id=stable_id("stage", spec.key),
            name=shortened(spec.label),
            job_type="stage",
            group=GROUP,
            tags=_tags(spec.model, spec.dataset.name, f"stage-{spec.number}", *_methods(spec)),
            config={**spec.document(), **lineage},
            summary=measured({**test, "train_seconds": result.get("train_seconds")}),
            uses=tuple(self.stage(key) for key in used if self.store.is_done(key)),
            logs=(self.stage(spec.key), *self._weights_of(spec.key)),
        )

    def _weights_of(self, key: str) -> tuple[ArtifactDocument, ...]:
        """The weights, under the name that ``run`` gives them: one artifact, whoever sends it."""
        folder = self.store.folder(key)
        if not self.weights or not (folder / WEIGHTS).exists():
            return ()
        files = ((WEIGHTS, f"weights{Path(WEIGHTS).suffix}"),)
        return (ArtifactDocument(artifact_name(key), "model", str(folder), files, {"key": key}),)

    def _bundle(self, bundle: _Bundle) -> ArtifactDocument:
        """The manifest, whose SHA-256 is the id of the bundle."""
        metadata = {"key": bundle.id, "sha256": bundle.id, "student_key": bundle.key}
        return ArtifactDocument(
            f"bundle-{bundle.id}", "bundle", str(bundle.folder), _plainly(MANIFEST), metadata
        )

    def _files_of(self, bundle: _Bundle) -> tuple[ArtifactDocument, ...]:
        """All that travels to a device, under the name that ``export`` gives it."""
        if not self.weights:
            return ()
        name = f"bundle-{bundle.id[:16]}"
        files = _plainly(*files_below(bundle.folder))
        return (ArtifactDocument(name, "bundle", str(bundle.folder), files, {}),)

    def _bundle_run(self, bundle: _Bundle) -> RunDocument:
        target, spec = bundle.folder.parent.name, self.plan.nodes[bundle.key]
        return RunDocument(
            id=stable_id("export", bundle.id),
            name=shortened(f"{spec.label} for {target}"),
            job_type="export",
            group=GROUP,
            tags=_tags(target, spec.model),
            config={"key": bundle.id, "student_key": bundle.key, "target": target},
            summary={},
            uses=(self.stage(bundle.key),),
            logs=(self._bundle(bundle), *self._files_of(bundle)),
        )

    def _measurement_run(self, bundle: _Bundle, folder: Path, judged: Judged) -> RunDocument:
        return RunDocument(
            id=stable_id("measurement", measurement_key(judged)),
            name=shortened(f"{judged.name} on {judged.target}"),
            job_type="measurement",
            group=GROUP,
            tags=_tags(judged.target, judged.protocol),
            config={
                "key": measurement_key(judged), "bundle_id": bundle.id, "student_key": bundle.key,
                "target": judged.target, "device": judged.device, "board": judged.board,
                "runtime": judged.runtime, "threads": judged.threads, "protocol": judged.protocol,
            },
            summary={"rankable": judged.rankable},
            uses=(self._bundle(bundle),),
            logs=(_measurement(folder, judged),),
        )  # fmt: skip


def _measurements(root: Path, bundle: _Bundle) -> Iterator[tuple[Path, Judged]]:
    """Complete measurements of this very bundle that a leaderboard may show."""
    parent = measurement_folder(root, bundle.key, bundle.folder.parent.name)
    for path in sorted(parent.glob(f"*/{JUDGED}")):
        judged = read_judged(path.parent)
        if judged is not None and judged.rankable and judged.bundle_id == bundle.id:
            yield path.parent, judged


def _measurement(folder: Path, judged: Judged) -> ArtifactDocument:
    key = measurement_key(judged)
    metadata = {"key": key, "sha256": sha256_of(folder / JUDGED), "bundle_id": judged.bundle_id}
    return ArtifactDocument(
        f"measurement-{key}", "measurement", str(folder), _plainly(JUDGED), metadata
    )


def _plainly(*names: str) -> tuple[tuple[str, str], ...]:
    """Files that keep their names."""
    return tuple((name, name) for name in names)


def _methods(spec: StageSpec) -> Iterator[str]:
    return (method.name for method in spec.methods)


def _tags(*names: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(shortened(name, TAG_CHARS) for name in names))
