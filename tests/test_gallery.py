"""Each example of the gallery runs as the notebook that is downloaded, alone in an empty folder.

All tests are slow: each starts a kernel, imports torch and fits real classifiers.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import tiny
from nbclient import NotebookClient
from sphinx_gallery.notebook import python_to_jupyter_cli
from transformers import AutoConfig, AutoModelForCausalLM

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
# The few texts and the one epoch of tests/quick.py. Warnings are errors here, too.
HIDDEN_CELL = f"""
import sys, warnings
sys.path.insert(0, {str(ROOT / "tests")!r})
import quick
quick.make_quick()
warnings.filterwarnings("error", module="skqlora|sklearn|matplotlib|__main__")
"""
PRINTED = {
    "01_quickstart": "QLoRAClassifier       0.",
    "05_pipeline_and_search": "the base was loaded 1 time(s)",
    "06_imbalanced": "the tuned threshold is 0.",
    "07_few_texts": "class or function       16 texts  QLoRAClassifier",
    "08_multilabel": "macro-F1 with a threshold of 0.5: 0.",
    "09_calibration": "after   accuracy 0.",
    "10_three_tasks_one_base": "the base was loaded 1 time(s)",
    "11_explain": "Predicted: ",
    "13_pairs": "both texts at once    0.",
    "14_table": "all columns     accuracy 0.",
    "15_regression": "R² on the test pairs: ",
}


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch, tmp_path_factory):
    """Let a kernel keep its files to itself."""
    folder = str(tmp_path_factory.mktemp("jupyter"))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, folder)


def notebook_of(name, folder):
    """Convert an example as the gallery does."""
    script = Path(shutil.copy(EXAMPLES / f"{name}.py", folder))
    python_to_jupyter_cli([str(script)])
    return nbformat.read(script.with_suffix(".ipynb"), as_version=4)


def run_notebook(notebook, folder):
    """Execute a notebook in a folder; return what it prints, and how many pictures it shows."""
    notebook.cells.insert(0, nbformat.v4.new_code_cell(HIDDEN_CELL))
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    return printed, sum("image/png" in output.get("data", {}) for output in outputs)


def test_all_examples_are_run():
    """Those on several processes, and on a language model, have tests of their own."""
    numbered = {path.stem for path in EXAMPLES.glob("[0-9]*.py")}
    elsewhere = {name for name in numbered if name[:2] in {"02", "03", "04", "12"}}
    assert len(elsewhere) == 4
    assert numbered - elsewhere == set(PRINTED)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINTED)
def test_notebook(name, tmp_path_factory):
    notebook = notebook_of(name, tmp_path_factory.mktemp("download"))
    folder = tmp_path_factory.mktemp("empty")
    printed, n_pictures = run_notebook(notebook, folder)
    assert PRINTED[name] in printed
    assert n_pictures >= 1


@pytest.mark.slow
def test_notebook_of_a_language_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("causal")
    config = AutoConfig.for_model("llama", **tiny.LLAMA | tiny.TOKENS | {"vocab_size": 408})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.make_tokenizer("decoder").save_pretrained(folder)
    notebook = notebook_of("12_language_model", tmp_path_factory.mktemp("download"))
    for cell in notebook.cells:
        cell.source = cell.source.replace('"HuggingFaceTB/SmolLM2-135M"', repr(str(folder)))
    printed, _ = run_notebook(notebook, tmp_path_factory.mktemp("empty"))
    assert "48 training texts, 36 test texts, 12 areas" in printed
    assert "... and class names accuracy 0." in printed


@pytest.mark.slow
def test_quick_start_runs_in_a_terminal_without_a_display(tmp_path):
    """It prints its table, and neither waits for a window nor warns that there is none."""
    hidden = "DISPLAY", "WAYLAND_DISPLAY", "MPLBACKEND"
    result = subprocess.run(
        [sys.executable, "-W", "error", ROOT / "tests" / "quick.py", EXAMPLES / "01_quickstart.py"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name not in hidden},
    )
    assert "QLoRAClassifier       0." in result.stdout
    assert result.stderr == ""
