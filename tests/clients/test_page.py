"""The code of docs/guide/clients.md runs, section by section, and does what the page says."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from helpers import assert_equal_adapters, make_classifier

from skqlora import QLoRAClassifier

PAGE = Path(__file__).parents[2] / "docs" / "guide" / "clients.md"
SECTIONS = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for section in PAGE.read_text().split("\n## ")
}

# What the names of a section's code are to be afterwards.
CHECKS = {
    "Libraries that take numbers only": lambda found: (
        set(found["self_training"].transduction_) <= set(found["labels"]) | {-1}
    ),
    "scikit-learn's ensembles and importances": lambda found: (
        len(found["bagging"].estimators_) == 2
    ),
    "LIME": lambda found: len(found["explanation"].as_list(found["label"])) > 1,
    "SHAP": lambda found: found["values"][0].shape == (6, 3),
    "cleanlab": lambda found: found["probabilities"].shape == (48, 3),
    "MAPIE": lambda found: found["sets"].shape == (4, 3, 1),
    "Optuna": lambda found: len(found["study"].trials) == 2,
    "MLflow": lambda found: found["logged"].flavors["sklearn"]["serialization_format"] == "skops",
    "skops": lambda found: assert_equal_adapters(found["loaded"], found["clf"]) is None,
    "imbalanced-learn": lambda found: set(found["pipeline"].classes_) == set(found["labels"]),
    "skrub": lambda found: len(found["learner"].predict({"table": found["table"]})) == 48,
    "Hugging Face datasets": lambda found: len(pd.read_csv("predicted.csv")["predicted"]) == 48,
}


@pytest.mark.parametrize("section", [name for name, blocks in SECTIONS.items() if blocks])
def test_code_runs(section, encoder, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    texts, labels = map(list, corpus)
    clf = make_classifier(encoder).fit(texts, labels)
    clf.save("tickets")
    table = pd.DataFrame({"text": texts, "label": labels})
    table.to_csv("train.csv", index=False)
    names = {
        "QLoRAClassifier": QLoRAClassifier,
        "clf": clf,
        "model": encoder,
        "table": table,
        "texts": texts,
        "labels": labels,
        "held_out_texts": texts[::2],
        "held_out_labels": labels[::2],
    }
    for block in SECTIONS[section]:
        if "__main__" in block:
            Path("script.py").write_text(block)
            subprocess.run([sys.executable, "script.py"], check=True)
        else:
            exec(compile(block, str(PAGE), "exec"), names)
    assert CHECKS[section](names)
