"""The structure: imports point one way, only some modules know of Ray, and reading tables is light."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import raylab

PACKAGE = Path(raylab.__file__).parent
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.stem != "__init__"
}
KNOW_RAY = {"runs.submission", "runs.tuning", "runs.workers"}


def list_imports(module: str, *, top_only: bool) -> set[str]:
    """What a module imports, at its top or anywhere."""
    tree = ast.parse(FILES[module].read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # A name that is imported from a folder is a module.
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in inner if name.removeprefix("raylab.") in FILES}
            found |= modules or {node.module or ""}
    return found


@pytest.mark.parametrize("module", FILES)
def test_only_the_runners_import_ray(module: str) -> None:
    imports_ray = any(name.split(".")[0] == "ray" for name in list_imports(module, top_only=False))
    assert imports_ray == (module in KNOW_RAY)


def read_graph() -> dict[str, set[str]]:
    """The modules of raylab that each of them imports."""
    imported = {module: list_imports(module, top_only=False) for module in FILES}
    return {
        module: {name.removeprefix("raylab.") for name in names if name.startswith("raylab.")}
        for module, names in imported.items()
    }


def test_imports_point_one_way() -> None:
    graph = read_graph()
    # Raises CycleError where two modules lean on each other.
    order = list(TopologicalSorter(graph).static_order())
    assert order[-1] == "cli"
    assert set(order) == set(FILES)


def test_folders_point_one_way() -> None:
    graph: dict[str, set[str]] = {}
    for module, names in read_graph().items():
        folder = module.partition(".")[0]
        graph.setdefault(folder, set()).update({name.partition(".")[0] for name in names} - {folder})
    order = list(TopologicalSorter(graph).static_order())
    assert order[-1] == "cli"


def test_a_module_is_one_folder_deep_and_its_name_stands_once() -> None:
    assert all(module.count(".") == 1 for module in FILES if module != "cli")
    names = [module.rpartition(".")[2] for module in FILES]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("module", FILES)
def test_modules_are_one_noun_and_not_long(module: str) -> None:
    assert "_" not in module
    assert len(FILES[module].read_text().splitlines()) <= 400


@pytest.mark.parametrize("module", ["cli", "results.queries", "job.jobs", "results.tables", "store.stages"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    heavy = ("torch", "ray", "sklearn", "transformers", "optuna", "pandas")
    code = f"import sys, raylab.{module}; print([name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
