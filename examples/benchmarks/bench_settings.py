"""
How the settings of QLoRAClassifier change what it reaches: the sweeps behind its defaults.

Each sweep is a list of parameters, each tried on every task with every seed, in a fresh process.
Prints a Markdown table, appends each run to a JSON-lines file from which the next call resumes, and
draws a picture of a sweep over one parameter. ``--held-out`` scores on texts of ``train.csv`` that
are not trained on, and so leaves the test file untouched::

    python bench_settings.py --data folder --sweep defaults --held-out
    python bench_settings.py --data folder --sweep rank --plot rank.png
    python bench_settings.py --data folder --tasks trec6-100 --try '{"lora_r": 2}' '{"lora_r": 64}'
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
from tasks import (
    add_options,
    common_key,
    held_out,
    load_table,
    primary_metric,
    resolve_model,
    run_missing,
    score,
    with_label_words,
)

from skqlora.settings.recipe import HEAD_RATE_FACTOR, auto_learning_rate

# The defaults with MiniLM, and what differs from them in one thing each.
RATE = auto_learning_rate("bert", 384)
HEAD_RATE = HEAD_RATE_FACTOR * RATE
# Layers of a BERT that get adapters, and what to call them.
MODULES = {
    "all-linear": "all linear",
    r".*attention.*(query|key|value|dense)": "attention",
    r".*layer\.\d+\.(intermediate|output)\.dense": "MLP",
    r".*(query|value)": "query and value",
}
SWEEPS = {
    "defaults": [
        {},
        {"learning_rate": RATE / 2, "head_learning_rate": HEAD_RATE},
        {"learning_rate": RATE * 2, "head_learning_rate": HEAD_RATE},
        {"head_learning_rate": HEAD_RATE / 2},
        {"head_learning_rate": HEAD_RATE * 2},
        {"num_train_epochs": 5},
        {"num_train_epochs": 10},
        {"num_train_epochs": 40},
        {"init_head_weights": "probe"},
        {"lora_alpha": 8},
        {"lora_alpha": 32},
        {"lora_dropout": 0.0},
        {"lora_dropout": 0.2},
        {"batch_size": 8, "num_train_epochs": 20},
        {"batch_size": 32, "num_train_epochs": 20},
        {"warmup_steps": 0.0},
        {"warmup_steps": 0.3},
        {"pooling": "cls"},
    ],
    "rank": [{"lora_r": r} for r in (1, 2, 4, 8, 16, 32, 64)],
    "modules": [{"target_modules": modules} for modules in MODULES],
    "layers": [{"layers": k} for k in (1, 2, 3, 4, 5, 6)],
}
CHOSEN_ON = ["trec6-100", "trec6-1000", "banking77-3shot", "banking77-10shot"]


def main():
    options = parse_arguments()
    settings = SWEEPS[options.sweep] if options.settings is None else options.settings
    keys = [
        {"task": task, "seed": seed, "settings": setting, "held_out": options.held_out}
        | ({"label_words": True} if options.label_words else {})
        | common_key(options)
        for seed in options.seeds
        for task in options.tasks
        for setting in settings
    ]
    run = partial(fit_and_score, resolve_model(options.model), options.data)
    runs = run_missing(keys, None if options.report else run, options.output)
    print_table(runs, settings, options.tasks)
    if options.plot is not None:
        plot(runs, settings, options.tasks, options.plot)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    add_options(parser, CHOSEN_ON, "bench_settings.jsonl")
    parser.add_argument("--sweep", choices=SWEEPS, default="defaults")
    parser.add_argument(
        "--try", nargs="+", type=json.loads, dest="settings", help="parameters, each as JSON"
    )
    parser.add_argument("--plot", type=Path, help="picture, of a sweep over one parameter")
    parser.add_argument(
        "--held-out", action="store_true", help="score on training texts that are not trained on"
    )
    parser.add_argument(
        "--label-words", action="store_true", help="write abbreviated labels out, for class names"
    )
    return parser.parse_args()


def fit_and_score(model, data, key):
    """Fit with the settings and score."""
    from skqlora import QLoRAClassifier

    load = held_out if key["held_out"] else load_table
    table = load(key["task"], data, key["seed"], key["test_rows"])
    if key.get("label_words"):
        table = with_label_words(key["task"], table)
    clf = QLoRAClassifier(model, random_state=key["seed"], **key["settings"])
    start = time.perf_counter()
    clf.fit(table.texts, table.y)
    fit_s = time.perf_counter() - start
    return {"fit_s": fit_s} | score(table, clf.predict_proba, clf.classes_)


def figures_of(runs, setting, task):
    """Collect what the seeds of one setting reached on one task, in percent."""
    return 100 * np.array(
        [
            run[primary_metric(task)]
            for run in runs
            if run["run"]["settings"] == setting and run["run"]["task"] == task
        ]
    )


def print_table(runs, settings, tasks):
    """Print mean and deviation (and number of seeds) by setting and task, and means over tasks."""
    print(f"| settings | {' | '.join(tasks)} | mean | fit, s |")
    print("|---" * (len(tasks) + 3) + "|")
    for setting in settings:
        figures = [figures_of(runs, setting, task) for task in tasks]
        seconds = [run["fit_s"] for run in runs if run["run"]["settings"] == setting]
        if not seconds:
            continue
        mean = f"{np.mean([np.mean(f) for f in figures]):.1f}" if all(map(len, figures)) else ""
        name = ", ".join(f"{k}={shorten(v)}" for k, v in setting.items()) or "defaults"
        cells = " | ".join(map(cell, figures))
        print(f"| {name} | {cells} | {mean} | {np.mean(seconds):.0f} |")


def shorten(value):
    return f"{value:.2g}" if isinstance(value, float) else MODULES.get(str(value), str(value))


def cell(figures):
    if not len(figures):
        return ""
    deviation = f" ± {np.std(figures, ddof=1):.1f} ({len(figures)})" if len(figures) > 1 else ""
    return f"{np.mean(figures):.1f}{deviation}"


def plot(runs, settings, tasks, path):
    """Draw a line for each task over the parameter that the settings differ in."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if any(list(setting) != list(settings[0]) or len(setting) != 1 for setting in settings):
        raise SystemExit("A picture is of settings of one and the same parameter.")
    name = next(iter(settings[0]))
    values = [setting[name] for setting in settings]
    numeric = all(isinstance(value, (int, float)) for value in values)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for task in tasks:
        figures = [figures_of(runs, setting, task) for setting in settings]
        axes.errorbar(
            values if numeric else range(len(values)),
            [np.mean(f) for f in figures],
            yerr=[np.std(f, ddof=len(f) > 1) for f in figures],
            marker="o",
            linestyle="-" if numeric else "none",
            capsize=3,
            label=task,
        )
    if numeric and max(values) > 8 * min(values) > 0:
        axes.set_xscale("log", base=2)
    axes.set_xticks(values if numeric else range(len(values)), list(map(shorten, values)))
    axes.set(xlabel=name, ylabel="accuracy, %" if "goemotions" not in tasks else "score, %")
    axes.legend()
    figure.savefig(path, dpi=120)
    print(f"\nThe picture is in {path}")


if __name__ == "__main__":
    main()
