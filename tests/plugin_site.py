"""Packages with methods, as an installer leaves them."""


def install(folder, module, code, methods):
    """A module and what its package says of itself; ``methods`` are classes of it by name."""
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    name = module.replace("_", "-")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    points = "".join(f"{method} = {module}:{kind}\n" for method, kind in methods.items())
    (info / "entry_points.txt").write_text(f"[smskd.methods]\n{points}")
    (folder / f"{module}.py").write_text(code)
    return folder
