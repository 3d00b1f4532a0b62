"""Reading a matrix file: short forms written out, everything checked before anything runs.

Checking gathers every problem before it speaks, each with file, line, path and a suggestion.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smskd.datasets import DATASETS
from smskd.errors import ConfigError, did_you_mean
from smskd.methods import METHODS, MODIFIERS, load_plugins
from smskd.methods.base import Method, Modifier
from smskd.models import MODELS
from smskd_bench.matrix import Matrix
from smskd_bench.matrix_checks import check_values
from smskd_bench.problems import Problems
from smskd_bench.yaml_reader import DocPath, YamlDocument, read_yaml

Document = dict[str, Any]


@dataclass(frozen=True)
class LoadedMatrix:
    """A checked matrix with what its names stand for.

    Attributes:
        methods: Every name a stage may use: registered methods with their defaults, and variants.
        modifiers: Modifiers of the variants, by variant name.
        raw: The normalised document, for merging partial settings.
    """

    matrix: Matrix
    file: Path
    methods: dict[str, Method]
    modifiers: dict[str, tuple[Modifier, ...]]
    raw: Document


def load_matrix(file: Path) -> LoadedMatrix:
    """Read and check a matrix file.

    Raises:
        ConfigError: lists every problem found, one a line.
    """
    return check_matrix(read_yaml(file))


def check_matrix(document: YamlDocument) -> LoadedMatrix:
    """Check a parsed matrix document; see :func:`load_matrix`."""
    problems = Problems(document)
    if not isinstance(document.content, dict):
        problems.add((), "a matrix is a mapping with name, dataset, pairs, seeds and rows")
        raise problems.error()
    raw = normalise(document.content)
    matrix = problems.validate(Matrix, raw, ())
    methods, modifiers = _read_methods(raw, problems)
    _check_names(raw, methods, problems)
    if matrix is not None:
        check_values(matrix, problems)
    if problems.found or matrix is None:
        raise problems.error()
    return LoadedMatrix(matrix, document.file, methods, modifiers, raw)


def normalise(content: Document) -> Document:
    """Write the short forms out in full: ``stages: [kd]``, ``epochs: [240, 90]``."""
    document = dict(content)
    if isinstance(document.get("recipe"), dict):
        document["recipe"] = _with_epochs(document["recipe"])
    if isinstance(document.get("methods"), dict):
        document["methods"] = {k: _with_modifiers(v) for k, v in document["methods"].items()}
    if isinstance(document.get("rows"), list):
        document["rows"] = [_normal_row(row) for row in document["rows"]]
    return document


def _normal_row(row: Any) -> Any:
    if not isinstance(row, dict):
        return {"stages": _normal_stages(row)} if isinstance(row, list) else row
    row = _with_epochs(row)
    if "reference" in row and row["reference"] is None:
        row["reference"] = {"weight": 0.0}
    return {**row, "stages": _normal_stages(row["stages"])} if "stages" in row else row


def _normal_stages(stages: Any) -> Any:
    return [_normal_stage(stage) for stage in stages] if isinstance(stages, list) else stages


def _normal_stage(stage: Any) -> Any:
    if not isinstance(stage, dict):
        stage = {"method": stage}
    if "method" in stage and not isinstance(stage["method"], list):
        stage = {**stage, "method": [stage["method"]]}
    return stage


def _with_epochs(section: Document) -> Document:
    epochs = section.get("epochs")
    if isinstance(epochs, list):
        return {**section, "epochs": {"per_stage": epochs}}
    if isinstance(epochs, int) and not isinstance(epochs, bool):
        return {**section, "epochs": {"per_stage": [epochs]}}
    return section


def _with_modifiers(section: Any) -> Any:
    if not isinstance(section, dict) or not isinstance(section.get("modifiers"), list):
        return section
    named = [m if isinstance(m, dict) else {"name": m} for m in section["modifiers"]]
    return {**section, "modifiers": named}


def _read_methods(
    raw: Document, problems: Problems
) -> tuple[dict[str, Method], dict[str, tuple[Modifier, ...]]]:
    classes: dict[str, type[Method]] = dict(METHODS)
    plugins = raw.get("plugins")
    if isinstance(plugins, list) and all(isinstance(p, str) for p in plugins):
        try:
            classes |= load_plugins(plugins)
        except ConfigError as error:
            problems.add(("plugins",), str(error))
    methods = {name: form() for name, form in classes.items()}
    modifiers: dict[str, tuple[Modifier, ...]] = {}
    variants = raw.get("methods")
    for name, section in variants.items() if isinstance(variants, dict) else ():
        path: DocPath = ("methods", name)
        if name in classes:
            problems.add(path, f"{name!r} is a registered method; give the variant another name")
        elif isinstance(section, dict):
            method = _read_variant(section, classes, path, problems)
            methods[name] = method if method else next(iter(methods.values()))
            modifiers[name] = _read_modifiers(section.get("modifiers"), path, problems)
    return methods, modifiers


def _read_variant(
    section: Document, classes: Mapping[str, type[Method]], path: DocPath, problems: Problems
) -> Method | None:
    base = section.get("method")
    if not isinstance(base, str):
        return None
    if base not in classes:
        problems.add((*path, "method"), f"unknown method {base!r}; {did_you_mean(base, classes)}")
        return None
    return problems.validate(classes[base], section.get("settings", {}), (*path, "settings"))


def _read_modifiers(section: Any, path: DocPath, problems: Problems) -> tuple[Modifier, ...]:
    found: list[Modifier] = []
    for i, item in enumerate(section if isinstance(section, list) else ()):
        here = (*path, "modifiers", i)
        settings = {k: v for k, v in item.items() if k != "name"}
        name = item.get("name")
        if name not in MODIFIERS:
            problems.add(here, f"unknown modifier {name!r}; {did_you_mean(str(name), MODIFIERS)}")
        elif modifier := problems.validate(MODIFIERS[name], settings, here):
            found.append(modifier)
    return tuple(found)


def _check_names(raw: Document, methods: Iterable[str], problems: Problems) -> None:
    """Check names of models, data sets and methods even where other things are wrong."""
    dataset = raw.get("dataset")
    if isinstance(dataset, dict):
        _known(dataset, ("dataset",), "name", "dataset", DATASETS, problems)
    for i, pair in enumerate(_dicts(raw.get("pairs"))):
        for role in ("teacher", "student"):
            _known(pair, ("pairs", i), role, "model", MODELS, problems)
    for i, row in enumerate(_dicts(raw.get("rows"))):
        for j, stage in enumerate(_dicts(row.get("stages"))):
            for name in stage.get("method", []):
                if isinstance(name, str) and name not in methods:
                    hint = did_you_mean(name, methods)
                    problems.add(("rows", i, "stages", j), f"unknown method {name!r}; {hint}")


def _known(
    section: Document,
    path: DocPath,
    key: str,
    kind: str,
    table: Mapping[str, object],
    problems: Problems,
) -> None:
    name = section.get(key)
    if isinstance(name, str) and name not in table:
        problems.add((*path, key), f"unknown {kind} {name!r}; {did_you_mean(name, table)}")


def _dicts(value: Any) -> list[Document]:
    # Keeps positions: what is no mapping becomes an empty one.
    items = value if isinstance(value, list) else []
    return [item if isinstance(item, dict) else {} for item in items]
