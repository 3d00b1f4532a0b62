"""What a bundle says of itself: ``bundle.json``, the list of everything that travels to a device.

    <bundle>/
      bundle.json              this record; its SHA-256 is the bundle's id
      model/<precision>-b<batch>.onnx
      parity/inputs.npy        (n, C, H, W) float32 in 0..1, test images
      parity/logits.npy        (n, K) float32, PyTorch's logits of them
      parity/classes.npy       (N,) int32, PyTorch's predicted class of every test image
      calibration.json         which training images the int8 scales come from
      protocol.json            what run.py does: the protocol, requirements and gates
      run.py                   the device runner
    <test set>/                travels once, named by its content
      images.npy               (N, C, H, W) uint8
      labels.npy               (N,) int64

Nothing in it depends on the time or the place of the export, so the same student gives the same id.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from smskd.errors import StoreError
from smskd_export.records import read_record
from smskd_export.targets import Target

SCHEMA = 2
MANIFEST, PROTOCOL, RUNNER, CALIBRATION = (
    "bundle.json",
    "protocol.json",
    "run.py",
    "calibration.json",
)


@dataclass(frozen=True)
class GraphInfo:
    """One ONNX file.

    Attributes:
        precision: Name of the precision it computes in.
        batch: B, fixed.
        path: Of the file in the bundle.
        sha256: Hash of the file.
        bytes: Size of the file.
        opset: Operator set of the default domain, the only domain in the graph.
        ir_version: Version of the ONNX file format.
        input_shape: ``(B, C, H, W)``.
        output_shape: ``(B, K)``.
        operators: How many nodes of each operator, by name.
    """

    precision: str
    batch: int
    path: str
    sha256: str
    bytes: int
    opset: int
    ir_version: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    operators: dict[str, int]


@dataclass(frozen=True)
class TestSet:
    """The images that accuracy is measured on.

    Attributes:
        sha256: Hash over both files.
        n: Number of images.
    """

    __test__ = False  # no test class, whatever pytest thinks of its name

    sha256: str
    n: int


@dataclass(frozen=True)
class Manifest:
    """Everything about one bundle.

    Attributes:
        schema: Version of this record.
        name: Name of the student.
        dataset: Name of the data set.
        image_shape: ``(C, H, W)``.
        num_classes: K.
        mean: Per channel, of images in 0..1; it is inside the graphs.
        std: As mean.
        parameters: Trainable and frozen parameters of the student.
        macs: Multiply-accumulates of one image.
        torch_top1: Accuracy of the PyTorch student on the test set, in percent.
        target: The profile, as it was applied.
        graphs: One for each precision and batch size.
        left_out: Precision name to the reason why it is not in the bundle.
        test_set: The test set.
        versions: Package name to version, of those that made the graphs.
        provenance: What the caller wants to be remembered, e.g. the training run.
        files: SHA-256 of every other file of the bundle, by path.
    """

    schema: int
    name: str
    dataset: str
    image_shape: tuple[int, int, int]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    parameters: int
    macs: int
    torch_top1: float
    target: Target
    graphs: tuple[GraphInfo, ...]
    left_out: dict[str, str]
    test_set: TestSet
    versions: dict[str, str]
    provenance: dict[str, object]
    files: dict[str, str]


def as_json(record: object) -> str:
    """A dataclass as text that does not depend on the order of anything."""
    document = asdict(record)  # type: ignore[call-overload]
    return json.dumps(document, indent=2, sort_keys=True, allow_nan=False) + "\n"


def bundle_id(bundle: Path) -> str:
    """SHA-256 of the manifest, which holds the hashes of everything else."""
    return hashlib.sha256((bundle / MANIFEST).read_bytes()).hexdigest()


def read_manifest(bundle: Path) -> Manifest:
    """Read the manifest of a bundle; :func:`smskd_export.bundle.verify_bundle` checks the files.

    Raises:
        StoreError: there is no bundle, it is damaged, or a newer version made it.
    """
    found = read_record(bundle / MANIFEST, Manifest, SCHEMA, "export the student again")
    if found is None:
        raise StoreError(f"{bundle} holds no bundle", "smskd-bench export makes one")
    return found
