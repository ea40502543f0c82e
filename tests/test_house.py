"""What holds of the package as a whole: its files, its imports, its documentation."""

import ast
import inspect
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from helpers import make_classifier
from numpydoc.validate import validate

import skqlora
from skqlora import demo
from skqlora.model import losses
from skqlora.training.trainer import Trainer

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "skqlora"
FILES = sorted(PACKAGE.rglob("*.py"))
# From the top floor down: what is in a room may use what is in the rooms below it, and no others.
ROOMS = [
    "demo",
    "estimate",
    "display",
    "versions",
    "classifier",
    "regressor",
    "base_estimator",
    "training",
    "persistence",
    "memory",
    "model",
    "checkpoint",
    "adapter",
    "text",
    "settings",
    "_utils",
]
PUBLIC = {
    f"{module.__name__}.{name}": thing
    for module in (skqlora, demo)
    for name in module.__all__
    if callable(thing := getattr(module, name))
}
METHODS = [
    f"{name}.{method}"
    for name, thing in PUBLIC.items()
    if isinstance(thing, type)
    for method in dir(thing)
    if not method.startswith("_")
    and callable(getattr(thing, method))
    and getattr(thing, method).__module__.startswith("skqlora")
]
# numpydoc's own list, less what is a matter of taste here: where a summary ends, an extended one,
# examples of each method, "See Also", types of what is returned, and yields.
UNCHECKED = {"GL01", "SA01", "EX01", "ES01", "RT02", "SS06", "YD01"}


def name_of(path):
    """Name of a module within the package, e.g. "training.trainer"."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path):
    """Modules of the package that a file imports, at whatever place."""
    modules, found = {name_of(each) for each in FILES}, set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "skqlora":
            module = node.module.removeprefix("skqlora").removeprefix(".")
            inner = {f"{module}.{alias.name}" for alias in node.names}
            found |= inner & modules or {module}
    return found


def test_every_room_is_in_the_order():
    rooms = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path in FILES}
    assert rooms - {"__init__"} == set(ROOMS)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path):
    room = name_of(path).split(".")[0]
    if room == "__init__":  # the public names, of all rooms
        return
    below = ROOMS[ROOMS.index(room) :]
    upwards = {name for name in imports_of(path) if name.split(".")[0] not in below}
    assert not upwards


def test_no_import_cycle():
    graph = {name_of(path): imports_of(path) for path in FILES if name_of(path) != "__init__"}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names it


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_no_file_is_long(path):
    assert len(path.read_text().splitlines()) <= 500


def test_contributing_has_a_row_for_each_room():
    page = (ROOT / "docs" / "contributing.md").read_text()
    rows = re.findall(r"^\| `skqlora/([\w/.]+)`", page, re.MULTILINE)
    assert sorted(row.removesuffix("/").removesuffix(".py") for row in rows) == sorted(ROOMS)


def test_the_path_of_a_fit_is_as_the_design_lists_it(encoder, corpus, monkeypatch):
    page = (ROOT / "docs" / "design.md").read_text()
    section = page.partition("## From `fit` to the loss")[2].partition("\n## ")[0]
    listed = re.findall(r"^\d\. `([\w.]+)`", section, re.MULTILINE)
    assert 0 < len(listed) <= 8
    calls = []
    compute = losses.LOSSES["cross_entropy"]

    def noting(logits, targets):
        frames = [info.frame for info in inspect.stack()[1:]]
        names = [f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}" for frame in frames]
        calls[:] = reversed([name for name in names if name.startswith("skqlora.")])
        return compute(logits, targets)

    monkeypatch.setitem(losses.LOSSES, "cross_entropy", noting)
    clf = make_classifier(encoder, num_train_epochs=1)
    epoch = Trainer.train_epoch
    path = []

    def stopping_after(trainer, after_update):
        loss = epoch(trainer, after_update)
        path[:] = calls
        return loss

    monkeypatch.setattr(Trainer, "train_epoch", stopping_after)
    clf.fit(*corpus)
    path.append("skqlora.model.losses.cross_entropies")
    assert [name.removeprefix("skqlora.") for name in path] == listed


@pytest.mark.parametrize("name", [*PUBLIC, *METHODS])
def test_public_docstrings_are_numpydoc(name):
    errors = [(code, what) for code, what in validate(name)["errors"] if code not in UNCHECKED]
    assert not errors
