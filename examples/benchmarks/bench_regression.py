"""
Does it predict numbers better? QLoRA and ridge regressions, on the relatedness of sentences.

The table is SICK: two sentences and how related they are, from 1 to 5. The baselines are ridge
regressions, whose penalty cross-validation chooses, on what `bench_methods.py` has for pairs: the
vectors u and v of TF-IDF or a frozen model, with |u - v| and u * v. Each run has a process of its
own and is appended to a JSON-lines file, which the next call reads. Prints a Markdown table::

    python bench_regression.py --data folder
"""

import argparse
import csv
import time
from collections import defaultdict
from functools import partial

import numpy as np
from bench_methods import PairFeatures
from scipy import stats
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import Ridge
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from tasks import add_options, common_key, resolve_model, run_missing

from skqlora.demo import FrozenEmbeddings

PENALTIES = np.logspace(-2, 4, 13)


def ridge(vectorizer):
    """Make a ridge regression on features of pairs, which are computed once for all penalties."""
    search = GridSearchCV(Ridge(), {"alpha": PENALTIES}, cv=5)
    return make_pipeline(PairFeatures(vectorizer), search)


def qlora(model, seed):
    """Make this package's regressor."""
    from skqlora import QLoRARegressor

    return QLoRARegressor(model, random_state=seed)


METHODS = {
    "TF-IDF + ridge": lambda model, seed: ridge(TfidfVectorizer(ngram_range=(1, 2))),
    "frozen + ridge": lambda model, seed: ridge(FrozenEmbeddings(model)),
    "QLoRARegressor": qlora,
}


def read(path):
    """Return pairs of sentences, and how related they are."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    pairs = [(row["sentence_a"], row["sentence_b"]) for row in rows]
    return pairs, np.array([float(row["relatedness"]) for row in rows])


def fit_and_score(model, data, key):
    """Train with one method, and score it on the whole test file."""
    if data is None:
        raise SystemExit("Pass --data, a folder with sick/train.csv and sick/test.csv.")
    X, y = read(data / "sick" / "train.csv")
    test_X, test_y = read(data / "sick" / "test.csv")
    regressor = METHODS[key["method"]](model, key["seed"])
    start = time.perf_counter()
    regressor.fit(X, y)
    fit_s = time.perf_counter() - start
    predicted = regressor.predict(test_X[: key["test_rows"]])
    test_y = test_y[: key["test_rows"]]
    return {
        "fit_s": fit_s,
        "pearson": stats.pearsonr(predicted, test_y)[0],
        "spearman": stats.spearmanr(predicted, test_y)[0],
        "r2": r2_score(test_y, predicted),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    add_options(parser, ["sick"], "bench_regression.jsonl")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    keys = [
        {"task": "sick", "method": method, "seed": seed} | common_key(options)
        for seed in options.seeds
        for method in options.methods
    ]
    run = partial(fit_and_score, resolve_model(options.model), options.data)
    runs = run_missing(keys, None if options.report else run, options.output)
    by_method = defaultdict(list)
    for each in runs:
        by_method[each["run"]["method"]].append(each)
    print("| method | Pearson | Spearman | R² | fit, s |\n|---|---|---|---|---|")
    for method, found in by_method.items():
        cells = [
            f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"
            if len(values) > 1
            else f"{values[0]:.3f}"
            for values in ([each[name] for each in found] for name in ("pearson", "spearman", "r2"))
        ]
        seconds = np.mean([each["fit_s"] for each in found])
        print(f"| {method} | {' | '.join(cells)} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
