"""
Do the probabilities mean what they say? Calibration before and after temperature scaling.

Fits on four fifths of the training texts, learns one temperature on the rest with scikit-learn's
`CalibratedClassifierCV`, and compares confidence with accuracy on the test texts: the expected
calibration error (Guo et al., arXiv 1706.04599, equation 3) over 15 bins, and a reliability
diagram::

    python bench_calibration.py --data folder --tasks trec6-1000 --plot reliability.png
"""

import argparse
from functools import partial
from pathlib import Path

import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from tasks import add_options, common_key, load_table, resolve_model, run_missing

N_BINS = 15
DEFAULT_TASKS = ["trec6-1000", "banking77-10shot", "clinc150-10shot"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    add_options(parser, DEFAULT_TASKS, "bench_calibration.jsonl")
    parser.add_argument("--plot", type=Path, help="picture: the reliability diagram")
    options = parser.parse_args()
    keys = [
        {"task": task, "seed": seed} | common_key(options)
        for task in options.tasks
        for seed in options.seeds
    ]
    run = partial(fit_and_calibrate, resolve_model(options.model), options.data)
    runs = run_missing(keys, None if options.report else run, options.output)
    print_table(runs, options.tasks)
    if options.plot is not None:
        draw(runs, options.tasks, options.plot)


def fit_and_calibrate(model, data, key):
    """Return the figures of the test texts before and after, and how far each bin is off."""
    from skqlora import QLoRAClassifier

    table = load_table(key["task"], data, key["seed"], key["test_rows"])
    texts, held_out, y, held_out_y = train_test_split(
        table.texts, table.y, test_size=0.2, stratify=table.y, random_state=key["seed"]
    )
    clf = QLoRAClassifier(model, random_state=key["seed"]).fit(texts, y)
    # One "fold" of all texts: nothing is fitted in it but the temperature, and classes are rare.
    rows = np.arange(len(held_out))
    calibrated = CalibratedClassifierCV(
        FrozenEstimator(clf), method="temperature", cv=[(rows, rows)]
    )
    calibrated.fit(held_out, held_out_y)
    figures = {}
    for name, classifier in {"before": clf, "after": calibrated}.items():
        proba = classifier.predict_proba(table.test_texts)
        hits = classifier.classes_[proba.argmax(axis=1)] == table.test_y
        counts, confidence, accuracy = reliability(proba.max(axis=1), hits)
        figures[name] = {
            "ece": float(np.sum(counts * np.abs(confidence - accuracy)) / counts.sum()),
            "log_loss": log_loss(table.test_y, proba, labels=classifier.classes_),
            "accuracy": float(hits.mean()),
            "counts": counts.tolist(),
            "confidences": confidence.tolist(),
            "accuracies": accuracy.tolist(),
        }
    return figures


def reliability(confidence, hits):
    """Count, and average confidence and hits, in each bin of equal width; zeros where it is empty.

    Parameters
    ----------
    confidence : ndarray of shape (n_texts,)
        Probability of the predicted class.
    hits : ndarray of bool, of shape (n_texts,)

    Returns
    -------
    counts, confidences, accuracies : ndarray of shape (N_BINS,)
    """
    bins = np.minimum((confidence * N_BINS).astype(int), N_BINS - 1)
    counts = np.bincount(bins, minlength=N_BINS)
    sums = (np.bincount(bins, weights, minlength=N_BINS) for weights in (confidence, hits))
    return counts, *(total / np.maximum(counts, 1) for total in sums)


def print_table(runs, tasks):
    """Print means over seeds."""
    print("| task | accuracy, % | ECE, % | after | log loss, nats | after |")
    print("|---" * 6 + "|")
    for task in tasks:
        of_task = [run for run in runs if run["run"]["task"] == task]

        def mean(side, name, of_task=of_task):
            return np.mean([run[side][name] for run in of_task])

        print(
            f"| {task} | {100 * mean('before', 'accuracy'):.1f} | "
            f"{100 * mean('before', 'ece'):.1f} | {100 * mean('after', 'ece'):.1f} | "
            f"{mean('before', 'log_loss'):.3f} | {mean('after', 'log_loss'):.3f} |"
        )


def draw(runs, tasks, path):
    """Draw accuracy over confidence, all seeds of a task together, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 4.2), sharey=True, layout="constrained")
    for axis, side in zip(axes, ("before", "after"), strict=True):
        axis.plot([0, 1], [0, 1], color="0.7", linestyle="--")
        for task in tasks:
            of_task = [run[side] for run in runs if run["run"]["task"] == task]
            counts = np.array([run["counts"] for run in of_task])
            total = counts.sum(axis=0)
            confidence, accuracy = (
                (counts * np.array([run[name] for run in of_task])).sum(axis=0)
                / np.maximum(total, 1)
                for name in ("confidences", "accuracies")
            )
            shown = total >= 20  # a bin of fewer texts says little
            axis.plot(confidence[shown], accuracy[shown], marker="o", label=task)
        axis.set(title=f"{side} temperature scaling", xlabel="confidence", xlim=(0, 1), ylim=(0, 1))
        axis.set_aspect("equal")
    axes[0].set_ylabel("accuracy")
    axes[0].legend()
    figure.savefig(path, dpi=120)
    print(f"\nThe picture is in {path}")


if __name__ == "__main__":
    main()
