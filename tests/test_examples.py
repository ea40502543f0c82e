"""The examples run."""

import csv
import importlib.util
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def load_example(name):
    """Import an example by its file name."""
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quick_start_on_a_table_and_a_model_of_ones_own(
    tmp_path, encoder, corpus, monkeypatch, capsys
):
    table, picture = tmp_path / "train.csv", tmp_path / "matrix.png"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("words", "topic"), *zip(*corpus, strict=True)])
    options = ["--model", encoder, "--csv", table, "--text", "words", "--label", "topic"]
    monkeypatch.setattr(sys, "argv", ["quickstart", *map(str, options), "--output", str(picture)])
    load_example("01_quickstart").main()
    printed = capsys.readouterr().out
    assert "36 training texts, 12 test texts, 3 classes" in printed
    assert "QLoRAClassifier" in printed
    assert "bits each" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_docstrings_do_not_name_their_function():
    example = load_example("01_quickstart")
    texts, areas = example.load_docstrings()
    assert len(texts) == len(areas) > 600
    assert set(areas) == set(example.AREAS)
    assert not any("scipy." in text or "sklearn." in text for text in texts)
    text = example.describe(
        "kmeans", "Run kmeans of `scipy.cluster` on data.\n\nParameters\n-----\n"
    )
    assert text == "Run of on data."
