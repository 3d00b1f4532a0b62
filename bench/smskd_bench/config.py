"""Reading a matrix file: short forms written out, everything checked before anything runs.

Checking gathers every problem before it speaks, each with file, line, path and a suggestion.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smskd_export.yaml_reader import DocPath, YamlDocument, read_yaml

from smskd.datasets import DATASETS
from smskd.errors import ConfigError, UsageError, did_you_mean
from smskd.methods import METHODS, MODIFIERS, load_plugins
from smskd.methods.base import Method, Modifier
from smskd.models import MODELS, model_entry
from smskd_bench.matrix import STUDENT, Matrix
from smskd_bench.matrix_checks import check_values
from smskd_bench.problems import Problems, read_strictly

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
    misformed = [path for path, _ in problems.found]
    methods, modifiers = _read_methods(raw, problems)
    _check_names(raw, methods, problems)
    # What is misformed is replaced for the moment, so that the values of the rest are checked too.
    whole = matrix or _repaired(raw, misformed)
    if whole is not None:
        check_values(whole, problems)
    if problems.found or matrix is None:
        raise problems.error()
    return LoadedMatrix(matrix, document.file, methods, modifiers, raw)


def _repaired(raw: Document, broken: Iterable[DocPath]) -> Matrix | None:
    """The matrix with harmless entries where the form is wrong."""
    harmless: Document = {"name": "?", "dataset": {"name": "?"}, "seeds": [0]}
    harmless |= {"pairs": [_harmless("pairs", 0, None)], "rows": [_harmless("rows", 0, None)]}
    fixed: Document = copy.deepcopy(raw)
    for path in broken:
        key = str(path[0]) if path else ""
        index = path[1] if len(path) > 1 else None
        if len(path) > 1 and _dropped(fixed, path):
            continue  # an optional entry: its default takes its place
        if key in ("pairs", "rows") and isinstance(index, int):
            fixed[key][index] = _harmless(key, index, fixed[key][index])
        elif key in harmless:
            fixed[key] = harmless[key]
        else:
            fixed.pop(key, None)
    try:
        return read_strictly(Matrix, fixed)
    except ValueError:
        return None


def _dropped(document: Document, path: DocPath) -> bool:
    """Drop one entry of a mapping inside ``document``, unless its section cannot do without it."""
    section: Any = document
    for part in path[:-1]:
        try:
            section = section[part]
        except (KeyError, IndexError, TypeError):  # an earlier repair has taken it away
            return False
    if not isinstance(section, dict) or path[-1] in (
        "name",
        "teacher",
        "student",
        "stages",
        "method",
    ):
        return False
    return section.pop(path[-1], section) is not section


def _harmless(key: str, index: int, entry: object) -> Document:
    if key == "pairs":
        return {"teacher": [f"?{index}"], "student": "?"}
    name = entry.get("name") if isinstance(entry, dict) else None
    stages = [{"method": ["scratch"]}]
    return {"name": name if isinstance(name, str) else f"?{index}", "stages": stages}


def normalise(content: Document) -> Document:
    """Write the short forms out in full: ``stages: [kd]``, ``epochs: [240, 90]``."""
    document = dict(content)
    if isinstance(document.get("recipe"), dict):
        document["recipe"] = _with_epochs(document["recipe"])
    if isinstance(document.get("methods"), dict):
        document["methods"] = {k: _with_modifiers(v) for k, v in document["methods"].items()}
    if isinstance(document.get("pairs"), list):
        document["pairs"] = [_with_list(pair, "teacher") for pair in document["pairs"]]
    if isinstance(document.get("rows"), list):
        document["rows"] = [_normal_row(row) for row in document["rows"]]
    if isinstance(document.get("assistants"), dict):
        document["assistants"] = {k: _normal_row(v) for k, v in document["assistants"].items()}
    return document


def _with_list(section: Any, key: str) -> Any:
    """One name in place of a list of names."""
    if isinstance(section, dict) and isinstance(section.get(key), str):
        return {**section, key: [section[key]]}
    return section


def _normal_row(row: Any) -> Any:
    if isinstance(row, str):
        row = [row]
    if not isinstance(row, dict):
        return {"stages": _normal_stages(row)} if isinstance(row, list) else row
    row = _with_reference(_with_epochs(row))
    return {**row, "stages": _normal_stages(row["stages"])} if "stages" in row else row


def _with_reference(section: Document) -> Document:
    """``reference: null`` switches the reference off."""
    off = "reference" in section and section["reference"] is None
    return {**section, "reference": {"weight": 0.0}} if off else section


def _normal_stages(stages: Any) -> Any:
    return [_normal_stage(stage) for stage in stages] if isinstance(stages, list) else stages


def _normal_stage(stage: Any) -> Any:
    if not isinstance(stage, dict):
        stage = {"method": stage}
    if "method" in stage and not isinstance(stage["method"], list):
        stage = {**stage, "method": [stage["method"]]}
    return _with_reference(_with_list(stage, "teacher"))


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
        if not isinstance(name, str) or name not in MODIFIERS:
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
            _known_model(pair, ("pairs", i), role, problems)
    teacher = raw.get("teacher")
    weights = teacher.get("weights") if isinstance(teacher, dict) else None
    for model in weights if isinstance(weights, dict) else ():
        _check_model(str(model), ("teacher", "weights", model), problems)
    for i, row in enumerate(_dicts(raw.get("rows"))):
        _check_stage_methods(row, ("rows", i), methods, problems)
    assistants = raw.get("assistants")
    for name, section in assistants.items() if isinstance(assistants, dict) else ():
        if isinstance(section, dict):
            _known_model(section, ("assistants", name), "model", problems, (STUDENT,))
            _check_stage_methods(section, ("assistants", name), methods, problems)


def _check_stage_methods(
    row: Document, path: DocPath, methods: Iterable[str], problems: Problems
) -> None:
    for j, stage in enumerate(_dicts(row.get("stages"))):
        names = stage.get("method")
        for name in names if isinstance(names, list) else ():
            if isinstance(name, str) and name not in methods:
                hint = did_you_mean(name, methods)
                problems.add((*path, "stages", j), f"unknown method {name!r}; {hint}")


def _known(
    section: Document,
    path: DocPath,
    key: str,
    kind: str,
    table: Mapping[str, object],
    problems: Problems,
) -> None:
    given = section.get(key)
    for name in given if isinstance(given, list) else [given]:
        if isinstance(name, str) and name not in table:
            problems.add((*path, key), f"unknown {kind} {name!r}; {did_you_mean(name, table)}")


def _known_model(
    section: Document, path: DocPath, key: str, problems: Problems, also: tuple[str, ...] = ()
) -> None:
    given = section.get(key)
    for name in given if isinstance(given, list) else [given]:
        if isinstance(name, str) and name not in also:
            _check_model(name, (*path, key), problems, also)


def _check_model(name: str, path: DocPath, problems: Problems, also: tuple[str, ...] = ()) -> None:
    try:
        model_entry(name)
    except UsageError as error:
        hint = did_you_mean(name, [*MODELS, *also]) if also else error.hint
        problems.add(path, f"{error.message}; {hint}")


def _dicts(value: Any) -> list[Document]:
    # Keeps positions: what is no mapping becomes an empty one.
    items = value if isinstance(value, list) else []
    return [item if isinstance(item, dict) else {} for item in items]
