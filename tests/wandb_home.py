"""W&B as on a machine where nobody ever used it."""

import os


def isolate(patch, folder):
    """No W&B setting and no file of the person running the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        patch.delenv(name)
    for name in ("home", "cwd"):
        (folder / name).mkdir()
    patch.setenv("HOME", str(folder / "home"))
    patch.delenv("XDG_CACHE_HOME", raising=False)
    patch.delenv("XDG_DATA_HOME", raising=False)
    patch.chdir(folder / "cwd")
