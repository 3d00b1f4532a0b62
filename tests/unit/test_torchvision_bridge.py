"""torchvision imports beside any torch, and says so clearly where it is missing."""

import subprocess
import sys
import textwrap

import pytest
import torch
from cases import later

from smskd.errors import ConfigError
from smskd.torchvision_bridge import import_torchvision


def run(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def torchvision():
    pytest.importorskip("PIL", reason="torchvision is not installed")
    try:
        return import_torchvision()
    except ConfigError:
        pytest.skip("torchvision is not installed")


def test_transforms_models_and_second_import_work(torchvision):
    assert import_torchvision() is torchvision is sys.modules["torchvision"]
    from torchvision.transforms import functional

    image = torch.arange(16.0).view(1, 4, 4)
    assert torch.equal(functional.hflip(image), image.flip(-1))
    assert hasattr(torchvision.models, "resnet18")


def test_missing_package_is_one_clear_message():
    code = """
        import sys
        class Hide:
            def find_spec(self, name, path=None, target=None):
                if name == "torchvision":
                    raise ModuleNotFoundError("No module named 'torchvision'", name=name)
        sys.meta_path.insert(0, Hide())
        from smskd.errors import ConfigError
        from smskd.torchvision_bridge import import_torchvision
        try:
            import_torchvision()
        except ConfigError as error:
            print(error)
    """
    said = run(code)
    assert "torchvision is needed here but not installed" in said
    assert "pip install 'torchvision" in said


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("raise RuntimeError('something else')", "RuntimeError: something else"),
        later("import no_such_part", "ModuleNotFoundError: No module named 'no_such_part'"),
    ],
)
def test_other_import_errors_pass_through(tmp_path, body, expected):
    (tmp_path / "torchvision.py").write_text(body)
    code = f"""
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from smskd.torchvision_bridge import import_torchvision
        try:
            import_torchvision()
        except Exception as error:
            print(type(error).__name__ + ": " + str(error))
    """
    assert run(code).strip() == expected
