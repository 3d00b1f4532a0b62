"""One file for a bundle and its test set: the same bytes each time, and nothing hostile gets out."""

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from smskd_export import archive
from smskd_export.archive import open_bundle, write_archive
from smskd_export.arrays import read_array
from smskd_export.bundle import CLASSES, INPUTS, LOGITS, seal_bundle
from smskd_export.manifest import MANIFEST, PROTOCOL, RUNNER, SCHEMA, GraphInfo, Manifest
from smskd_export.manifest import TestSet as TestImages
from smskd_export.targets import load_target
from smskd_export.test_sets import place_test_set

from smskd.errors import StoreError

GRAPH = "model/int8+fp32-b1.onnx"


def make_export(folder):
    """A small export: its files say little, but its manifest is a real one."""
    bundle = folder / "bundle"
    for name in ("model", "parity"):
        (bundle / name).mkdir(parents=True)
    (bundle / GRAPH).write_bytes(b"graph" * 99)
    (bundle / PROTOCOL).write_text("{}\n")
    (bundle / RUNNER).write_text("print('run')\n")
    for name in (INPUTS, LOGITS, CLASSES):
        np.save(bundle / name, np.zeros((2, 3), np.float32))
    images = np.arange(96, dtype=np.uint8).reshape(2, 3, 4, 4)
    tests = place_test_set(images, np.array([0, 1]), folder / "test_set")
    return seal(bundle, tests)


def seal(bundle, tests):
    digest = archive.hash_file(bundle / GRAPH)
    graph = GraphInfo("int8+fp32", 1, GRAPH, digest, 495, 17, 8, (1, 3, 4, 4), (1, 2), {})
    manifest = Manifest(
        schema=SCHEMA, name="x", dataset="d", image_shape=(3, 4, 4), num_classes=2, mean=(0.5,) * 3,
        std=(0.5,) * 3, parameters=1, macs=1, torch_top1=50.0, target=load_target("jetson"),
        graphs=(graph,), left_out={}, test_set=tests, versions={}, provenance={}, files={},
    )  # fmt: skip
    seal_bundle(bundle, manifest)
    return bundle.parent


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return make_export(tmp_path_factory.mktemp("export") / "x")


@pytest.fixture(scope="module")
def whole(export, tmp_path_factory):
    """Bytes of the export's archive."""
    path = tmp_path_factory.mktemp("archive") / "x.tar"
    write_archive(open_bundle(export, path.parent), path)
    return Whole(path.read_bytes())


def contents(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_every_form_of_a_bundle_opens_to_the_same(export, whole, tmp_path):
    (tmp_path / "x.tar").write_bytes(whole)
    shutil.copytree(export / "bundle", tmp_path / "renamed")
    opened = [
        open_bundle(path, tmp_path / "cache")
        for path in (export, export / "bundle", tmp_path / "x.tar", tmp_path / "renamed")
    ]
    assert len({str(o.manifest) for o in opened}) == 1
    assert [o.test_set is not None for o in opened] == [True, True, True, False]
    for one in opened:
        assert contents(one.bundle) == contents(export / "bundle")
    assert contents(opened[2].test_set) == contents(export / "test_set")


def test_archive_is_the_same_whatever_the_files_look_like(export, whole, tmp_path):
    copy = Path(shutil.copytree(export, tmp_path / "copy"))
    for path in sorted(copy.rglob("*"), reverse=True):
        if path.is_file():
            path.chmod(0o600)
    write_archive(open_bundle(copy, tmp_path), tmp_path / "deep" / "x.tar")
    assert (tmp_path / "deep" / "x.tar").read_bytes() == whole


def test_archive_is_plain_tar(whole):
    with tarfile.open(fileobj=io.BytesIO(whole)) as tar:
        members = tar.getmembers()
    names = [m.name for m in members]
    assert names == sorted(names)
    assert {m.name.split("/")[0] for m in members} == {"bundle", "test_set"}
    for m in members:
        assert m.isreg()
        assert (m.mtime, m.uid, m.gid, m.uname, m.mode) == (0, 0, 0, "", 0o644)


def test_archive_is_unpacked_once(whole, tmp_path):
    (tmp_path / "x.tar").write_bytes(whole)
    first = open_bundle(tmp_path / "x.tar", tmp_path / "cache").bundle
    before = {p: p.stat().st_mtime_ns for p in first.rglob("*")}
    again = open_bundle(tmp_path / "x.tar", tmp_path / "cache").bundle
    assert again == first
    assert {p: p.stat().st_mtime_ns for p in again.rglob("*")} == before
    (first / PROTOCOL).write_text("changed")
    with pytest.raises(StoreError, match=r"changed .*protocol\.json"):
        open_bundle(tmp_path / "x.tar", tmp_path / "cache")


def test_bundle_without_test_set_travels_too(export, tmp_path):
    bare = replace(open_bundle(export, tmp_path), test_set=None)
    write_archive(bare, tmp_path / "x.tar")
    assert open_bundle(tmp_path / "x.tar", tmp_path / "cache").test_set is None


def member(name, data=b"x", **fields):
    """One tar member as bytes, with anything a tar can say."""
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    form = fields.pop("format", tarfile.USTAR_FORMAT)
    for key, value in fields.items():
        setattr(info, key, value)
    return info.tobuf(form) + data + bytes(-len(data) % 512)


END = bytes(1024)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (member("/etc/passwd") + END, r"holds '/etc/passwd', which is no file of a bundle"),
        (member("bundle/../../x") + END, r"holds 'bundle/\.\./\.\./x', which is no"),
        (member("bundle/./x") + END, "which is no file"),
        (member("bundle//x") + END, "which is no file"),
        (member("bundle\\x") + END, "which is no file"),
        (member("other/x") + END, "which is no file"),
        (member("bundle") + END, "which is no file"),
        (member("bundle/.hidden") + END, "which is no file"),
        (member("bundle/a b") + END, "which is no file"),
        (
            member("bundle/\N{LATIN SMALL LETTER E WITH ACUTE}", format=tarfile.GNU_FORMAT) + END,
            "is no archive",
        ),
        (member("bundle/" + "n" * 200, format=tarfile.GNU_FORMAT) + END, "which is no file"),
        (member("bundle/" + "n" * 200, format=tarfile.PAX_FORMAT) + END, "holds"),
        (
            member("bundle/x", type=tarfile.SYMTYPE, linkname="/etc") + END,
            "something else than a plain",
        ),
        (
            member("bundle/x", type=tarfile.LNKTYPE, linkname="bundle/y") + END,
            "something else than",
        ),
        (member("bundle/x", type=tarfile.CHRTYPE) + END, "something else than a plain file"),
        (member("bundle/x", type=tarfile.FIFOTYPE) + END, "something else than a plain file"),
        (member("bundle/x", b"", type=tarfile.DIRTYPE) + END, "something else|which is no file"),
        (member("bundle/x", type=tarfile.GNUTYPE_SPARSE) + END, "something else than a plain file"),
        (member("bundle/x", mode=0o4755) + END, "something else than a plain file"),
        (member("bundle/x", mtime=5) + END, "something else than a plain file"),
        (member("bundle/x", uname="root") + END, "something else than a plain file"),
        (member("bundle/x") * 2 + END, "holds 'bundle/x' twice"),
        (member("bundle/x") + member("bundle/X") + END, "holds 'bundle/X' twice"),
        (member("bundle/x") + member("bundle/x/y") + END, "twice, or as a file and a folder"),
        (member("bundle/x"), "ends too early"),
        (member("bundle/x") + bytes(512), "ends too early"),
        (member("bundle/x") + END + b"more", "goes on after its end"),
        (member("bundle/x", b"y" * 600)[:-300] + b"", "holds something behind|ends within"),
        (member("bundle/x", b"y" * 512)[:-100], "ends within 'x'"),
        (member("bundle/x")[:-1] + b"!" + END, "holds something behind 'x'"),
        (member("bundle/x") + END, "holds no bundle"),
        (END, "holds no bundle"),
        (b"", "ends too early"),
        (b"PK\x03\x04" + bytes(600), "is no archive of a bundle"),
        (b"\x1f\x8b" * 600, "is no archive of a bundle"),
    ],
)
def test_hostile_archive_is_refused_and_leaves_nothing(tmp_path, data, message):
    (tmp_path / "x.tar").write_bytes(data)
    with pytest.raises(StoreError, match=message):
        open_bundle(tmp_path / "x.tar", tmp_path / "cache")
    assert contents(tmp_path) == {"x.tar": data}


def test_too_much_is_refused(whole, tmp_path, monkeypatch):
    (tmp_path / "x.tar").write_bytes(whole)
    monkeypatch.setattr(archive, "MOST_FILES", 5)
    with pytest.raises(StoreError, match="more than 5 files"):
        open_bundle(tmp_path / "x.tar", tmp_path / "cache")
    monkeypatch.undo()
    huge = member("bundle/x", b"")
    huge = bytearray(archive._header("bundle/x", archive.MOST_BYTES - 1)) + huge
    huge += archive._header("bundle/y", 2)
    (tmp_path / "y.tar").write_bytes(huge)
    with pytest.raises(StoreError, match=r"ends within 'x'|more than 8 GiB"):
        open_bundle(tmp_path / "y.tar", tmp_path / "cache")
    monkeypatch.setattr(archive, "MOST_BYTES", 100)
    with pytest.raises(StoreError, match="more than 0 GiB"):
        open_bundle(tmp_path / "x.tar", tmp_path / "cache")
    assert not (tmp_path / "cache").exists() or not list((tmp_path / "cache").iterdir())


def changed_test_set(folder):
    np.save(folder / "test_set" / "labels.npy", np.array([1, 1]))


def longer_test_set(folder):
    (folder / "test_set" / "more.npy").write_bytes(b"")


def linked_test_set(folder):
    labels = folder / "test_set" / "labels.npy"
    labels.rename(folder / "elsewhere.npy")
    labels.symlink_to(folder / "elsewhere.npy")


@pytest.mark.parametrize("change", [changed_test_set, longer_test_set, linked_test_set])
def test_other_test_set_is_refused(export, tmp_path, change):
    folder = Path(shutil.copytree(export, tmp_path / "copy"))
    change(folder)
    with pytest.raises(StoreError, match="not the test set of this bundle"):
        open_bundle(folder, tmp_path)


def test_path_without_bundle(tmp_path):
    for path in (tmp_path, tmp_path / "none", tmp_path / "none" / "bundle"):
        with pytest.raises(StoreError, match="holds no bundle"):
            open_bundle(path, tmp_path)


def test_names_that_an_archive_cannot_hold_are_refused(export, tmp_path):
    folder = Path(shutil.copytree(export, tmp_path / "copy"))
    (folder / "bundle" / "a b").write_text("")
    seal(folder / "bundle", open_bundle(export, tmp_path).manifest.test_set)
    with pytest.raises(StoreError, match="no name of a file in a bundle"):
        write_archive(open_bundle(folder, tmp_path), tmp_path / "x.tar")
    assert not (tmp_path / "x.tar").exists()


def test_place_that_cannot_be_written(export, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write"):
        write_archive(open_bundle(export, tmp_path), tmp_path / "file" / "x.tar")


def test_arrays_are_never_pickles(tmp_path):
    np.save(tmp_path / "x.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "y.npz", a=1)
    (tmp_path / "z.npy").write_bytes(b"\x93NUMPY\x01\x00\x10\x00" + b"{" * 16)
    for name in ("x.npy", "y.npz", "z.npy", "none.npy"):
        with pytest.raises(StoreError, match="is damaged"):
            read_array(tmp_path / name)


class Whole(bytes):
    """An archive that hypothesis can name."""

    def __repr__(self):
        return f"<an archive of {len(self)} bytes>"


def mutate(whole, edits):
    """Apply edits (kind, position, bytes) to the archive."""
    data = bytearray(whole)
    for kind, position, new in edits:
        at = position % (len(data) + 1)
        if kind == "put":
            data[at : at + len(new)] = new
        elif kind == "insert":
            data[at:at] = new
        elif kind == "cut":
            del data[at : at + len(new) * 64]
        else:
            del data[at:]
    return bytes(data)


EDITS = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "insert", "cut", "end"]),
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=12),
    ),
    min_size=1,
    max_size=4,
)


def check_mutation(whole, edits, folder):
    """It opens to the very same content, or is refused; anything else is an error of the test."""
    data = mutate(whole, edits)
    (folder / "m.tar").write_bytes(data)
    try:
        opened = open_bundle(folder / "m.tar", folder / "cache")
    except StoreError as error:
        refusal = error.message
    else:
        refusal = ""
        # the manifest is the one file whose hash is nowhere but in the id
        assert contents(opened.bundle).keys() - {MANIFEST}
        assert opened.bundle.is_relative_to(folder / "cache")
    finally:
        shutil.rmtree(folder / "cache", ignore_errors=True)
    assert refusal.isprintable()
    assert {p.name for p in folder.iterdir()} == {"m.tar"}


@given(edits=EDITS)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_mutations_are_refused_without_a_crash(whole, tmp_path, edits):
    check_mutation(whole, edits, tmp_path)


@pytest.mark.slow
@given(edits=EDITS)
@settings(
    max_examples=10_000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_many_mutations_are_refused_without_a_crash(whole, tmp_path, edits):
    check_mutation(whole, edits, tmp_path)


@given(text=st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
), key=st.sampled_from(sorted(Manifest.__dataclass_fields__)))  # fmt: skip
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_field_of_a_manifest_may_be_anything(export, tmp_path, text, key):
    folder = tmp_path / "copy"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(export, folder)
    record = json.loads((folder / "bundle" / MANIFEST).read_text())
    record[key] = text
    (folder / "bundle" / MANIFEST).write_text(json.dumps(record))
    try:
        opened = open_bundle(folder, tmp_path)
    except StoreError:
        return
    assert isinstance(opened.manifest.test_set, TestImages)
