"""Whatever a bundle on disk holds: it opens, or one message that can be printed says why not.

Archives of bundles have their ten thousand mutations in test_archive.py.
"""

import json
import random
import shutil

import numpy as np
import pytest
from mutations import damaged_json, is_clean, mutate_bytes
from smskd_export.archive import open_bundle, write_archive
from smskd_export.arrays import read_array
from smskd_export.bundle import CLASSES, INPUTS, LOGITS, hash_file
from smskd_export.manifest import MANIFEST, bundle_id
from standin_bundle import make_bundle, make_test_set

from smskd.errors import SmskdError


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An export: bundle and test set, with arrays where a bundle has arrays."""
    folder = tmp_path_factory.mktemp("bundle") / "x"
    make_bundle(folder / "bundle", make_test_set(folder / "test_set"))
    for name in (INPUTS, LOGITS, CLASSES):
        np.save(folder / "bundle" / name, np.arange(20, dtype=np.int32))
        seal(folder / "bundle", name)
    open_bundle(folder, folder)
    return folder


def seal(bundle, name):
    """Make the manifest vouch for a changed file, as whoever changed it would."""
    record = json.loads((bundle / MANIFEST).read_bytes())
    record["files"][name] = hash_file(bundle / name)
    for graph in record["graphs"]:
        if graph["path"] == name:
            graph["sha256"] = record["files"][name]
    (bundle / MANIFEST).write_text(json.dumps(record))


def read_all(folder):
    opened = open_bundle(folder, folder)
    for name in (INPUTS, LOGITS, CLASSES):
        read_array(opened.bundle / name)
    if opened.test_set is not None:
        read_array(opened.test_set / "labels.npy")
    write_archive(opened, folder.parent / "again.tar")
    return f"{opened.manifest.name} {bundle_id(opened.bundle)}"


def check_bundles(made, folder, count):
    """Damage one file at a time, half of the time sealed again; returns how often it was noticed."""
    copy = shutil.copytree(made, folder / "x")
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    refused = 0
    for seed in range(count):
        draw = random.Random(seed)
        path = copy / "bundle" / MANIFEST if draw.random() < 0.5 else draw.choice(files)
        kept = {p: p.read_bytes() for p in (path, copy / "bundle" / MANIFEST)}
        damage = damaged_json if path.suffix == ".json" else mutate_bytes
        path.write_bytes(damage(draw, kept[path]))
        if path.name != MANIFEST and "bundle" in path.parts and draw.random() < 0.7:
            seal(copy / "bundle", path.relative_to(copy / "bundle").as_posix())
        try:
            read_all(copy)
        except SmskdError as error:
            refused += 1
            said = str(error)
        except Exception as error:
            raise AssertionError(f"seed {seed}, {path.name}: {type(error).__name__}") from error
        else:
            said = ""
        finally:
            for other, data in kept.items():
                other.write_bytes(data)
        assert is_clean(said), f"seed {seed}, {path.name}: {said!r}"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert names <= {p.relative_to(folder).as_posix() for p in files} | {"again.tar"}
    return refused


def test_fuzz_bundles(made, tmp_path):
    assert 150 < check_bundles(made, tmp_path, 300) < 300


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_fuzz_ten_thousand_bundles(made, tmp_path):
    assert 5000 < check_bundles(made, tmp_path, 10_000) < 10_000
