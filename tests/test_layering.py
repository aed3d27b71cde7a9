"""Each file imports only from those above it; the converter imports the package, scripts are imported by none."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ORDER = [
    "errors", "config", "ops", "kv", "layers", "dit", "text_encoder", "vae", "vae_strips", "prompt", "sampling", "components",
    "schedule", "planner", "cards", "device", "ledger", "checkpoint", "staging", "programs", "deviceless", "denoise", "image", "job", "pipeline", "cli",
    "generate", "plan", "__main__",
]  # fmt: skip
CONVERTER_ORDER = ["rules", "sources", "convert", "inspect", "__main__"]


def imported(path: Path, package: str) -> set[str]:
    """Modules of `package` that a file imports, by bare name; the package itself is ""."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if not node.level:
                if module.split(".")[0] != package:
                    continue
                module = module.removeprefix(package).strip(".")
            names |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {a.name.removeprefix(package).strip(".") for a in node.names if a.name.split(".")[0] == package}
    return names


@pytest.mark.parametrize(("package", "order"), [("zimage_jax", ORDER), ("checkpoints_convert", CONVERTER_ORDER)])
def test_modules_import_only_what_stands_above(package, order):
    files = {p.stem: p for p in (ROOT / package).glob("*.py") if p.stem != "__init__"}
    assert set(files) == set(order), "a new module needs its place in the order"
    for position, name in enumerate(order):
        below = imported(files[name], package) & set(order[position:])
        assert not below, f"{package}/{name}.py imports {below} from below"


def test_the_package_never_imports_converter_or_scripts():
    scripts = {p.stem for p in (ROOT / "scripts").glob("*.py")}
    for package, forbidden in [("zimage_jax", {"checkpoints_convert"}), ("checkpoints_convert", set())]:
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text("utf-8"))
            roots = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
            roots |= {
                (n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level
            }
            assert not roots & (forbidden | scripts), path


def test_imported_finds_every_form(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("from . import a, b\nfrom .c import d\nimport p.e\nfrom p import f\nfrom p.g import h\nimport os\n")
    assert imported(file, "p") == {"a", "b", "c", "e", "f", "g"}
