"""What pages of the guide say of parameters is so: names, defaults, and that none is missing."""

import ast
import dataclasses
import hashlib
import importlib
import inspect
import re
from pathlib import Path

import pytest
from peft import LoraConfig
from PIL import Image
from transformers import BitsAndBytesConfig, TrainingArguments

from skqlora import QLoRAClassifier, QLoRARegressor

DOCS = Path(__file__).parent.parent / "docs"
GUIDE = DOCS / "guide"
DEFAULTS = {
    name: parameter.default
    for estimator in (QLoRAClassifier, QLoRARegressor)
    for name, parameter in inspect.signature(estimator).parameters.items()
}
ATTRIBUTES = re.findall(r"^(\w+_) :", inspect.getdoc(QLoRAClassifier), re.MULTILINE)
ARGUMENTS = inspect.signature(QLoRAClassifier.fit).parameters
KNOWN = {*DEFAULTS, *ATTRIBUTES, *ARGUMENTS, *dir(QLoRAClassifier)}


def rows_of(section):
    """Cells of the rows of a section's tables."""
    rows = re.findall(r"^\|(.*)\|$", section, re.MULTILINE)
    return [[cell.strip() for cell in row.split("|")] for row in rows]


def named(cell):
    """Names in a cell, with the text of the value that stands beside them, if one does."""
    return re.findall(r"`(\w+)(?:=([^`]+))?`", cell)


def test_each_parameter_is_in_one_group_with_its_default():
    page = (GUIDE / "parameters.md").read_text()
    groups = page.partition("## Everyday")[2]
    rows = [row for row in rows_of(groups) if row[0].startswith("`")]
    names = [row[0].strip("`") for row in rows]
    assert sorted(names) == sorted(DEFAULTS)
    for name, row in zip(names, rows, strict=True):
        assert ast.literal_eval(row[1].strip("`")) == DEFAULTS[name], name


@pytest.mark.parametrize("page", ["from_trainer.md", "from_setfit.md"])
def test_parameters_that_correspond_to_others_exist(page):
    cells = [row[1] for row in rows_of((GUIDE / page).read_text()) if len(row) > 1]
    found = [pair for cell in cells for pair in named(cell)]
    assert len(found) > 20
    for name, value in found:
        if value:
            assert ast.literal_eval(value) == DEFAULTS[name], name
        assert name in KNOWN, name


@pytest.mark.parametrize(
    ("heading", "owner"),
    [
        ("### The model and its 4 bits", BitsAndBytesConfig),
        ("### LoRA", LoraConfig),
        ("### Training", TrainingArguments),
    ],
)
def test_parameters_of_others_exist(heading, owner):
    """The names on the left are theirs: of a configuration, or of `from_pretrained`."""
    section = (GUIDE / "from_trainer.md").read_text().partition(heading + "\n")[2]
    section = section.partition("\n#")[0].partition("What belongs")[0]
    known = {*inspect.signature(owner.__init__).parameters}
    if dataclasses.is_dataclass(owner):
        known |= {field.name for field in dataclasses.fields(owner)}
    known |= {"num_labels", "id2label", "problem_type", "revision", "attn_implementation"}
    known |= {"device_map", "token", "trust_remote_code", "bf16", "fp16"}
    known |= {"prepare_model_for_kbit_training", "EarlyStoppingCallback", "eval_dataset"}
    names = [name for row in rows_of(section)[2:] for name, _ in named(row[0])]
    assert len(names) > 5
    assert set(names) <= known


def test_the_cheat_sheet_is_drawn_from_its_page():
    """Run ``python docs/figures/cheat_sheet.py`` if this fails."""
    digest = hashlib.sha256((GUIDE / "cheat_sheet.md").read_bytes()).hexdigest()
    with Image.open(GUIDE / "cheat_sheet.png") as picture:
        assert picture.text["Source"] == digest


@pytest.mark.slow
def test_recipes_by_gpu_are_what_is_estimated_and_measured(monkeypatch):
    """Run ``python docs/gpus.py`` for the tables if this fails."""
    monkeypatch.syspath_prepend(DOCS)
    gpus = importlib.import_module("gpus")
    page = (GUIDE / "gpus.md").read_text()
    name = "Qwen/Qwen3-0.6B-Base"
    sizes = gpus.sizes_of(*gpus.SHOWN[name])
    for gpu, measured in gpus.measured_rows().items():
        section = page.partition(f"\n## {gpu} GB\n")[2].partition("\n## ")[0]
        for row in (gpus.row_of(name, sizes, gpu), *measured):
            assert row in section
