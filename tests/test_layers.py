"""The structure: imports point one way, only some modules know of Ray, and reading tables is light."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import raylab

PACKAGE = Path(raylab.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
KNOW_RAY = {"submission", "tuning", "workers"}


def list_imports(module: str, *, top_only: bool) -> set[str]:
    """What a module imports, at its top or anywhere."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
    return found


@pytest.mark.parametrize("module", MODULES)
def test_only_the_runners_import_ray(module: str) -> None:
    imports_ray = any(name.split(".")[0] == "ray" for name in list_imports(module, top_only=False))
    assert imports_ray == (module in KNOW_RAY)


def test_imports_point_one_way() -> None:
    graph = {
        module: {
            name.removeprefix("raylab.") for name in list_imports(module, top_only=False) if name.startswith("raylab.")
        }
        for module in MODULES
    }
    # Raises CycleError where two modules lean on each other.
    order = list(TopologicalSorter(graph).static_order())
    assert order[-1] == "cli"


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_one_noun_and_not_long(module: str) -> None:
    assert "_" not in module
    assert len((PACKAGE / f"{module}.py").read_text().splitlines()) <= 400


@pytest.mark.parametrize("module", ["cli", "results", "jobs", "tables", "stages"])
def test_light_modules_import_nothing_heavy(module: str) -> None:
    heavy = ("torch", "ray", "sklearn", "transformers", "optuna", "pandas")
    code = f"import sys, raylab.{module}; print([name for name in {heavy!r} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
