import functools
import hashlib
import http.server
import io
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import smskd.datasets
from smskd.datasets import (
    DATASETS,
    content_sha256,
    dataset_info,
    download,
    load_dataset,
    split_indices,
)
from smskd.datasets.base import VERIFIED, Dataset, DatasetInfo, ImageSet, verify_content
from smskd.datasets.cifar import (
    CIFAR10,
    CIFAR100,
    CifarSpec,
    DataFile,
    Layout,
    load_cifar,
    load_restricted_pickle,
)
from smskd.datasets.download import download_archive
from smskd.errors import ConfigError, DataError, UnknownNameError

# ---------------------------------------------------------------- a small CIFAR in both forms

INFO = DatasetInfo(
    name="tiny",
    num_classes=3,
    channels=3,
    size=4,
    num_train=12,
    num_test=6,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    pad=1,
    flip=True,
    fingerprint="archive-md5:none",
)


class Python2Pickler(pickle._Pickler):
    """Writes str and bytes as Python 2 did, in the form of the published files."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_python2_str(self, value):
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_python2_str


def python2_pickle(value):
    out = io.BytesIO()
    Python2Pickler(out, 2).dump(value)
    # Where numpy 1 kept the function that rebuilds arrays.
    return out.getvalue().replace(b"cnumpy._core.multiarray", b"cnumpy.core.multiarray")


def make_part(count, seed):
    raw = np.random.Philox(key=seed).random_raw(count * 3 * 4 * 4)
    images = (raw >> np.uint64(56)).astype(np.uint8).reshape(count, 3, 4, 4)
    return ImageSet(images, np.arange(count) % INFO.num_classes)


TRAIN, TEST = make_part(INFO.num_train, 1), make_part(INFO.num_test, 2)
HALVES = [
    ImageSet(TRAIN.images[:6], TRAIN.labels[:6]),
    ImageSet(TRAIN.images[6:], TRAIN.labels[6:]),
]


def binary_file(part):
    coarse = np.zeros_like(part.labels)
    head = np.stack([coarse, part.labels], axis=1)
    return np.hstack([head, part.images.reshape(len(part.labels), -1)]).astype(np.uint8).tobytes()


def python_file(part):
    pixels = part.images.reshape(len(part.labels), -1)
    labels = [int(label) for label in part.labels]
    return python2_pickle({"data": pixels, "fine_labels": labels, "batch_label": "tiny"})


FILES = {
    "tiny-bin": {
        "a.bin": binary_file(HALVES[0]),
        "b.bin": binary_file(HALVES[1]),
        "test.bin": binary_file(TEST),
    },
    "tiny-py": {
        "a": python_file(HALVES[0]),
        "b": python_file(HALVES[1]),
        "test": python_file(TEST),
        "meta": python2_pickle({"names": ["x", "y", "z"]}),
    },
}


def summed(folder, name, algorithm, records):
    digest = hashlib.new(algorithm, FILES[folder][name]).hexdigest()
    return DataFile(name, records, f"{algorithm}:{digest}")


SPEC = CifarSpec(
    info=INFO,
    label_bytes=2,
    label_key="fine_labels",
    layouts=(
        Layout(
            "binary",
            "tiny-bin",
            train=(summed("tiny-bin", "a.bin", "sha1", 6), DataFile("b.bin", 6)),
            test=(DataFile("test.bin", 6),),
        ),
        Layout(
            "python",
            "tiny-py",
            train=(summed("tiny-py", "a", "md5", 6), summed("tiny-py", "b", "md5", 6)),
            test=(summed("tiny-py", "test", "md5", 6),),
            extra=(summed("tiny-py", "meta", "md5", 0),),
        ),
    ),
    archive_url="http://127.0.0.1:9/tiny.tar.gz",
    archive_md5="",
)


def place(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("form", FILES)
@pytest.mark.parametrize("inside", [True, False], ids=["root", "folder itself"])
def test_both_forms_and_both_places_give_the_same_dataset(form, inside, tmp_path):
    place(tmp_path / form, FILES[form])
    dataset = load_cifar(SPEC, tmp_path if inside else tmp_path / form)
    for part, expected in ((dataset.train, TRAIN), (dataset.test, TEST)):
        assert np.array_equal(part.images, expected.images)
        assert np.array_equal(part.labels, expected.labels)
        assert part.images.dtype == np.uint8
        assert part.labels.dtype == np.int64
        assert part.images.flags.writeable
        assert part.images.flags.c_contiguous
    assert content_sha256(dataset) == content_sha256(Dataset(INFO, TRAIN, TEST))


def test_a_complete_form_wins_over_an_incomplete_one(tmp_path):
    place(tmp_path / "tiny-bin", {"a.bin": b""})
    place(tmp_path / "tiny-py", FILES["tiny-py"])
    assert len(load_cifar(SPEC, tmp_path).train.labels) == 12


def test_the_fingerprint_is_checked_whatever_the_form(tmp_path):
    place(tmp_path / "tiny-py", FILES["tiny-py"])
    right = VERIFIED + content_sha256(Dataset(INFO, TRAIN, TEST))
    load_cifar(replace(SPEC, info=replace(INFO, fingerprint=right)), tmp_path)
    wrong = replace(SPEC, info=replace(INFO, fingerprint=VERIFIED + "0" * 64))
    with pytest.raises(DataError, match="differs from the published one") as caught:
        load_cifar(wrong, tmp_path)
    assert right in caught.value.message


# ---------------------------------------------------------------- missing and damaged files


def test_missing_data_names_folder_layouts_and_next_step(tmp_path):
    with pytest.raises(DataError) as caught:
        load_cifar(SPEC, tmp_path)
    message = str(caught.value)
    for part in (
        str(tmp_path),
        "tiny-bin/ with a.bin, b.bin, test.bin",
        "tiny-py/ with a, b, test",
    ):
        assert part in message
    for part in ("--data-root DIR", "SMSKD_DATA", "--download"):
        assert part in caught.value.hint


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_a_missing_cifar_is_an_error_with_one_message(name, tmp_path):
    with pytest.raises(DataError, match=f"dataset '{name}' not found"):
        load_dataset(name, tmp_path / "absent")


def test_the_environment_says_where_to_look(tmp_path, monkeypatch):
    monkeypatch.setenv("SMSKD_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match="elsewhere"):
        load_dataset("cifar100", None)


def test_an_incomplete_folder_says_what_is_missing(tmp_path):
    place(tmp_path / "tiny-bin", {"a.bin": FILES["tiny-bin"]["a.bin"]})
    with pytest.raises(DataError, match=r"tiny-bin lacks b\.bin, test\.bin"):
        load_cifar(SPEC, tmp_path)


def flipped(content):
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    ("form", "name", "damage", "reason"),
    [
        ("tiny-bin", "a.bin", flipped, "a.bin is corrupt or not the published file: SHA1 is"),
        ("tiny-bin", "a.bin", lambda c: c[:-1], "a.bin has 299 bytes, expected 300"),
        ("tiny-bin", "test.bin", lambda c: c + c, "test.bin has 600 bytes, expected 300"),
        ("tiny-bin", "b.bin", lambda c: c[:1] + b"\x07" + c[2:], "labels in .* are damaged"),
        ("tiny-bin", "test.bin", lambda c: c[:1] + b"\x02" + c[2:], "1 to 3 images"),
        ("tiny-py", "b", lambda c: c[:-9], "b is corrupt or not the published file: MD5 is"),
        ("tiny-py", "meta", flipped, "meta is corrupt"),
    ],
)
def test_damaged_files_are_refused(form, name, damage, reason, tmp_path):
    place(tmp_path / form, {**FILES[form], name: damage(FILES[form][name])})
    with pytest.raises(DataError, match=reason) as caught:
        load_cifar(SPEC, tmp_path)
    assert caught.value.hint


def test_a_path_the_system_refuses_is_one_message(tmp_path):
    with pytest.raises(DataError, match="dataset 'tiny': cannot read "):
        load_cifar(SPEC, tmp_path / ("x" * 300))


# ---------------------------------------------------------------- pickles


class Hostile:
    def __reduce__(self):
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (pickle.dumps({"data": Hostile()}, 2), "posix.system|nt.system"),
        (b"cbuiltins\neval\n(V1+1\ntR.", "builtins.eval"),
        (b"cnumpy\nload\n(Vx\ntR.", "numpy.load"),
        (pickle.dumps(np.float64(1)), "scalar"),
        (b"", "Ran out of input"),
        (FILES["tiny-py"]["a"][:-20], "cannot be read as a pickle"),
    ],
)
def test_pickles_that_could_run_code_are_refused(content, reason):
    with pytest.raises(DataError, match=reason):
        load_restricted_pickle(content, Path("batch"))


@pytest.mark.parametrize(
    "batch",
    [
        [1, 2],
        {"data": TEST.images.reshape(6, -1)},
        {"data": TEST.images.reshape(6, -1).astype(np.float32), "fine_labels": [0] * 6},
        {"data": TEST.images, "fine_labels": [0] * 6},
        {"data": TEST.images.reshape(6, -1), "fine_labels": [0] * 5},
        {"data": TEST.images.reshape(6, -1), "fine_labels": ["0"] * 6},
    ],
)
def test_a_pickle_of_something_else_is_refused(batch, tmp_path):
    form = SPEC.layouts[1]
    place(tmp_path / "tiny-py", {**FILES["tiny-py"], "test": python2_pickle(batch)})
    unsummed = replace(form, test=(DataFile("test", 6),))
    with pytest.raises(DataError, match="is a pickle, but not of 6 images"):
        load_cifar(replace(SPEC, layouts=(unsummed,)), tmp_path)


# ---------------------------------------------------------------- download


def tar_of(folder, files, extra=()):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"{folder}/{name}" if folder else name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in extra:
            tar.addfile(member)
    return out.getvalue()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def serve(tmp_path, monkeypatch):
    """A web server on this machine; call it with bytes to get their address and MD5."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    root = tmp_path / "served"
    root.mkdir()
    handler = functools.partial(QuietHandler, directory=str(root))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()

        def put(content):
            (root / "tiny.tar.gz").write_bytes(content)
            url = f"http://127.0.0.1:{server.server_port}/tiny.tar.gz"
            return url, hashlib.md5(content).hexdigest()

        yield put
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("form", FILES)
def test_download_then_load(form, serve, tmp_path):
    url, md5 = serve(tar_of(form, FILES[form]))
    spec = replace(SPEC, archive_url=url, archive_md5=md5)
    root = tmp_path / "new" / "root"
    dataset = load_cifar(spec, root, download=True)
    assert np.array_equal(dataset.train.images, TRAIN.images)
    assert [path.name for path in root.iterdir()] == [form]
    load_cifar(replace(spec, archive_url="http://127.0.0.1:9/"), root, download=True)  # not again


def test_a_wrong_checksum_leaves_nothing_behind(serve, tmp_path):
    url, _ = serve(tar_of("tiny-bin", FILES["tiny-bin"]))
    root = tmp_path / "root"
    with pytest.raises(DataError, match=r"MD5 is .*, expected 00") as caught:
        download_archive(url, "00", root)
    assert url in str(caught.value)
    assert f"unpack it in {root}" in caught.value.hint
    assert list(root.iterdir()) == []


def link(name, target, kind):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


@pytest.mark.parametrize(
    "archive",
    [
        tar_of("", {"../outside": b"x"}),
        tar_of("", {"/absolute": b"x"}),
        tar_of("", {"a\\..\\b": b"x"}),
        tar_of("ok", {"a": b"x"}, [link("ok/link", "/etc/passwd", tarfile.SYMTYPE)]),
        tar_of("ok", {"a": b"x"}, [link("ok/hard", "ok/a", tarfile.LNKTYPE)]),
        tar_of("ok", {"a": b"x"}, [link("ok/fifo", "", tarfile.FIFOTYPE)]),
    ],
    ids=["parent", "absolute", "backslash", "symlink", "hardlink", "fifo"],
)
def test_unsafe_archives_are_refused(archive, serve, tmp_path):
    url, md5 = serve(archive)
    root = tmp_path / "root"
    with pytest.raises(DataError, match="nothing was unpacked"):
        download_archive(url, md5, root)
    assert list(root.iterdir()) == []
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("limit", ["MOST_FETCHED", "MOST_UNPACKED", "MOST_FILES"])
def test_archives_without_end_are_refused(limit, serve, tmp_path, monkeypatch):
    monkeypatch.setattr(download, limit, 2)
    url, md5 = serve(tar_of("ok", {name: bytes(9) for name in "abc"}))
    with pytest.raises(DataError, match=r"more than (10000 files or )?2 "):
        download_archive(url, md5, tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [b"not an archive", tar_of("ok", {"a": bytes(9999)})[:60]],
    ids=["no archive", "cut off"],
)
def test_broken_archives_are_refused(content, serve, tmp_path):
    url, md5 = serve(content)
    with pytest.raises(DataError, match="failed: "):
        download_archive(url, md5, tmp_path / "root")
    assert list((tmp_path / "root").iterdir()) == []


def test_a_folder_that_exists_is_not_replaced(serve, tmp_path):
    url, md5 = serve(tar_of("tiny-bin", FILES["tiny-bin"]))
    place(tmp_path / "root" / "tiny-bin", {"mine": b"x"})
    with pytest.raises(DataError, match="already there and was not replaced"):
        download_archive(url, md5, tmp_path / "root")
    assert (tmp_path / "root" / "tiny-bin" / "mine").read_bytes() == b"x"


def test_no_connection_says_what_to_do_by_hand(serve, tmp_path):
    url, md5 = serve(b"")
    with pytest.raises(DataError, match="404") as caught:
        download_archive(url.replace("tiny", "absent"), md5, tmp_path / "root")
    assert "unpack it in" in caught.value.hint
    with pytest.raises(DataError, match="failed: "):
        download_archive("http://127.0.0.1:9/x.tar.gz", md5, tmp_path / "root")


# ---------------------------------------------------------------- registry, digits, real data


def test_facts_are_consistent():
    for name, entry in DATASETS.items():
        info = entry.info
        assert info.name == name
        assert dataset_info(name) is info
        assert len(info.mean) == len(info.std) == info.channels
        assert info.fingerprint
    for spec in (CIFAR10, CIFAR100):
        for layout in spec.layouts:
            assert sum(file.records for file in layout.train) == spec.info.num_train
            assert sum(file.records for file in layout.test) == spec.info.num_test


def test_unknown_dataset():
    with pytest.raises(UnknownNameError, match="unknown dataset 'cifar1000'") as caught:
        dataset_info("cifar1000")
    assert "cifar100" in caught.value.hint


def test_importing_datasets_loads_neither_torch_nor_sklearn():
    # Beside the package's own __init__, which is about training.
    code = (
        "import sys, types; package = types.ModuleType('smskd'); "
        f"package.__path__ = [{str(Path(smskd.datasets.__file__).parents[1])!r}]; "
        "sys.modules['smskd'] = package; import smskd.datasets; "
        "sys.exit(', '.join({'torch', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) in [(0, ""), (1, "")]


def test_digits():
    dataset = load_dataset("digits", None)
    info = dataset.info
    assert dataset.train.images.shape == (info.num_train, 1, 8, 8) == (1000, 1, 8, 8)
    assert dataset.test.images.shape == (info.num_test, 1, 8, 8) == (797, 1, 8, 8)
    assert info.fingerprint == VERIFIED + content_sha256(dataset)
    scaled = dataset.train.images / 255
    assert (scaled.min(), scaled.max()) == (0, 1)
    assert scaled.mean() == pytest.approx(info.mean[0], abs=5e-5)
    assert scaled.std() == pytest.approx(info.std[0], abs=5e-5)
    assert set(dataset.train.labels) == set(dataset.test.labels) == set(range(10))


@pytest.mark.skipif("SMSKD_DATA" not in os.environ, reason="SMSKD_DATA names no data folder")
def test_real_cifar100():
    dataset = load_dataset("cifar100", None)
    assert dataset.train.images.shape == (50_000, 3, 32, 32)
    assert dataset.test.images.shape == (10_000, 3, 32, 32)
    assert (np.bincount(dataset.test.labels) == 100).all()
    means = dataset.train.images.mean(axis=(0, 2, 3)) / 255
    assert means == pytest.approx(dataset.info.mean, abs=5e-4)


# ---------------------------------------------------------------- content hash and splits


def test_content_hash_is_stable_and_sees_every_part():
    dataset = Dataset(INFO, TRAIN, TEST)
    assert content_sha256(dataset) == HASH_OF_TINY
    as_stored = ImageSet(np.asfortranarray(TRAIN.images), TRAIN.labels.astype(np.int32))
    assert content_sha256(replace(dataset, train=as_stored)) == HASH_OF_TINY
    pixel = TRAIN.images.copy()
    pixel[3, 1, 2, 0] ^= 1
    label = TEST.labels.copy()
    label[0] += 1
    changed = [
        replace(dataset, train=ImageSet(pixel, TRAIN.labels)),
        replace(dataset, test=ImageSet(TEST.images, label)),
        replace(dataset, train=TEST, test=TRAIN),
    ]
    assert len({content_sha256(d) for d in changed} | {HASH_OF_TINY}) == 4


HASH_OF_TINY = "ff5f40249f5aa59b29fa1bb11f2ace8481eb3e511beb178f5969b42219996dba"


def test_an_unverified_fingerprint_is_not_compared():
    verify_content(Dataset(INFO, TRAIN, TEST), "")


LABELS = np.arange(60) * 7 % 60 % 4


def test_split_golden():
    train, dev = split_indices(LABELS, 4, train_size=8, dev_size=4, seed=3)
    assert (train.tolist(), dev.tolist()) == GOLDEN_SPLIT


GOLDEN_SPLIT = ([10, 11, 24, 26, 28, 43, 45, 49], [7, 29, 52, 54])


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_split_is_balanced_sorted_and_disjoint(seed):
    train, dev = split_indices(LABELS, 4, 32, 12, seed)
    assert np.bincount(LABELS[train]).tolist() == [8] * 4
    assert np.bincount(LABELS[dev]).tolist() == [3] * 4
    assert not set(train) & set(dev)
    assert (np.diff(train) > 0).all()
    assert (np.diff(dev) > 0).all()


def test_split_sizes_nest_and_do_not_disturb_each_other():
    train, dev = split_indices(LABELS, 4, 24, 8, 5)
    small, none = split_indices(LABELS, 4, 8, 0, 5)
    assert set(small) < set(train)
    assert len(none) == 0
    rest, same = split_indices(LABELS, 4, None, 8, 5)
    assert same.tolist() == dev.tolist()
    assert sorted([*rest, *dev]) == list(range(60))
    assert split_indices(LABELS, 4, 24, 8, 6)[0].tolist() != train.tolist()


def test_no_development_set_leaves_everything():
    train, dev = split_indices(LABELS, 4, None, 0, 0)
    assert train.tolist() == list(range(60))
    assert len(dev) == 0


@pytest.mark.parametrize(
    ("train_size", "dev_size", "seed", "reason"),
    [
        (10, 4, 0, "train_size 10 cannot be shared equally by 4 classes"),
        (8, 6, 0, "dev_size 6 cannot be shared"),
        (-4, 0, 0, "train_size -4"),
        (0, 4, 0, "train_size is 0"),
        (56, 8, 0, "asks for 16 images of each class .14 train, 2 dev., but class . has 15"),
        (None, 64, 0, "asks for 16 images"),
        (None, 60, 0, "leaves nothing to train on"),
        (8, 4, -1, "seed -1 is outside"),
        (8, 4, 2**64, "is outside"),
    ],
)
def test_impossible_splits_are_refused(train_size, dev_size, seed, reason):
    with pytest.raises(ConfigError, match=reason) as caught:
        split_indices(LABELS, 4, train_size, dev_size, seed)
    assert caught.value.hint
