"""Imports go one way: each folder imports only from those above it, scripts are imported by none."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# top first; a module that is no folder stands for itself, and the doors share the last place
FLOORS = [
    ("errors",),
    ("units",),
    ("dtypes",),
    ("files",),
    ("checks",),
    ("model",),
    ("weights",),
    ("planning",),
    ("runtime",),
    ("pipeline",),
    ("link",),
    ("process",),
    ("pool",),
    ("relay",),
    ("cluster",),
    ("server",),
    (
        *("__init__", "interrupts", "cli", "options", "memory_options", "picture_options"),
        *("naming", "origin", "talk", "worker", "generate", "batch", "serve", "devices"),
        *("plan_table", "plan", "comfyui", "__main__"),
    ),
]
CONVERTER_ORDER = [
    *("checksums", "convert", "inspect", "export", "hub", "downloads", "fetch"),
    *("commands", "__main__"),
]
FLOOR = {name: index for index, names in enumerate(FLOORS) for name in names}


def imported(path: Path, package: str) -> set[str]:
    """Modules of `package` that a file imports, dotted, without the package's own name."""
    here = path.relative_to(ROOT / package).parent.parts if path.is_relative_to(ROOT) else ()
    names = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                above = here[: len(here) - node.level + 1]
                module = ".".join((*above, *([module] if module else [])))
            elif module.split(".")[0] != package:
                continue
            else:
                module = module.removeprefix(package).strip(".")
            names |= {f"{module}.{alias.name}".strip(".") for alias in node.names}
        elif isinstance(node, ast.Import):
            own = (a.name for a in node.names if a.name.split(".")[0] == package)
            names |= {name.removeprefix(package).strip(".") for name in own}
    return names


def rooms(path: Path, package: str) -> set[str]:
    """Folders, or modules that are in none, of `package` that a file imports."""
    return {name.split(".")[0] for name in imported(path, package)} & FLOOR.keys()


@pytest.mark.parametrize("path", sorted((ROOT / "zimage_jax").rglob("*.py")), ids=str)
def test_a_folder_imports_only_from_folders_above_it(path):
    room = path.relative_to(ROOT / "zimage_jax").parts[0].removesuffix(".py")
    assert room in FLOOR, "a new folder needs its place among the floors"
    last = FLOOR["__main__"]
    for name in rooms(path, "zimage_jax") - {room}:
        assert FLOOR[name] < FLOOR[room] or FLOOR[name] == FLOOR[room] == last, (
            f"{path.name} imports {name}, which stands below it"
        )


def test_no_folder_has_a_cycle():
    for folder in ("model", "weights", "planning", "runtime", "pipeline"):
        files = {
            ".".join(p.relative_to(ROOT / "zimage_jax").with_suffix("").parts): p
            for p in (ROOT / "zimage_jax" / folder).rglob("*.py")
        }
        arrows = {
            name: {
                other
                for i in imported(path, "zimage_jax")
                for other in files
                if i == other or i.startswith(other + ".")
            }
            - {name}
            for name, path in files.items()
        }
        while leaves := [name for name, targets in arrows.items() if not targets]:
            arrows = {n: t - set(leaves) for n, t in arrows.items() if n not in leaves}
        assert not arrows, f"modules that import one another: {sorted(arrows)}"


def test_the_converter_imports_in_its_order():
    files = {p.stem: p for p in (ROOT / "checkpoints_convert").glob("*.py") if p.stem != "__init__"}
    assert set(files) == set(CONVERTER_ORDER), "a new module needs its place in the order"
    for position, name in enumerate(CONVERTER_ORDER):
        found = {i.split(".")[0] for i in imported(files[name], "checkpoints_convert")}
        assert not found & set(CONVERTER_ORDER[position:]), f"{name}.py imports from below"


@pytest.mark.parametrize("package", ["zimage_jax", "checkpoints_convert"])
def test_packages_import_neither_scripts_nor_tests_nor_what_is_above_them(package):
    forbidden = {"scripts", "tests"} | (
        {"checkpoints_convert"} if package == "zimage_jax" else set()
    )
    for path in (ROOT / package).rglob("*.py"):
        tree = ast.parse(path.read_text("utf-8"))
        roots = {
            a.name.split(".")[0]
            for n in ast.walk(tree)
            if isinstance(n, ast.Import)
            for a in n.names
        }
        roots |= {
            (n.module or "").split(".")[0]
            for n in ast.walk(tree)
            if isinstance(n, ast.ImportFrom) and not n.level
        }
        assert not roots & forbidden, path


def test_imported_finds_every_form(tmp_path):
    file = tmp_path / "x.py"
    file.write_text(
        "from . import a, b\nfrom .c import d\nimport p.e\nfrom p import f\nfrom p.g import h\nimport os\n"
    )
    assert imported(file, "p") == {"a", "b", "c.d", "e", "f", "g.h"}
