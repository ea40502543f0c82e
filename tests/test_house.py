"""What holds of the package as a whole: its files, its imports, its documentation."""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from numpydoc.validate import validate

import skqlora

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "skqlora").glob("*.py"))
PUBLIC = [f"skqlora.{name}" for name in skqlora.__all__]
METHODS = [
    f"skqlora.{name}.{method}"
    for name in skqlora.__all__
    if isinstance(thing := getattr(skqlora, name), type)
    for method in dir(thing)
    if not method.startswith("_")
    and callable(getattr(thing, method))
    and getattr(thing, method).__module__.startswith("skqlora")
]
# numpydoc's own list, less what is a matter of taste here: where a summary ends, an extended one,
# examples of each method, "See Also", types of what is returned, and yields.
UNCHECKED = {"GL01", "SA01", "EX01", "ES01", "RT02", "SS06", "YD01"}


def imports_of(path):
    """Modules of the package that a file imports, at whatever place."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("skqlora."):
            found.add(node.module.removeprefix("skqlora."))
    return found


def test_no_import_cycle():
    graph = {path.stem: imports_of(path) for path in FILES if path.stem != "__init__"}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names it


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= 500


def test_readme_has_a_line_for_each_file():
    listed = re.findall(r"^\| `skqlora/(\w+\.py)` \|", (ROOT / "README.md").read_text(), re.M)
    assert sorted(listed) == [path.name for path in FILES if path.name != "__init__.py"]


@pytest.mark.parametrize("name", PUBLIC + METHODS)
def test_public_docstrings_are_numpydoc(name):
    errors = [(code, what) for code, what in validate(name)["errors"] if code not in UNCHECKED]
    assert not errors
