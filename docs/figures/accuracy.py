"""Accuracy over the number of training texts, from the records of the benchmarks.

``python docs/figures/accuracy.py`` draws ``docs/accuracy.png`` again.
"""

import json
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "examples" / "benchmarks" / "results" / "methods.jsonl"
METHODS = {"QLoRA NF4 + DQ": "QLoRAClassifier", "frozen + LR": "frozen embeddings"}
METHODS |= {"TF-IDF + LR": "TF-IDF"}
PANELS = {
    "Questions by type of answer (TREC-6)": {"trec6-100": 100, "trec6-1000": 1000, "trec6": 5452},
    "Requests by intent (BANKING77)": {
        "banking77-3shot": 231,
        "banking77-10shot": 770,
        "banking77": 10_003,
    },
}
COLOURS = {"QLoRAClassifier": "#1f6feb", "frozen embeddings": "#e08a1e", "TF-IDF": "#7a7a7a"}


def read_accuracies():
    """Return the accuracies of all seeds by task and method."""
    found = defaultdict(list)
    for line in RECORDS.read_text().splitlines():
        record = json.loads(line)
        found[record["run"]["task"], record["run"]["method"]].append(record.get("accuracy"))
    return found


def draw():
    """Draw one panel for each table."""
    accuracies = read_accuracies()
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained", sharey=True)
    for axes, (title, tasks) in zip(panels, PANELS.items(), strict=True):
        sizes = list(tasks.values())
        for method, name in METHODS.items():
            percents = [100 * mean(accuracies[task, method]) for task in tasks]
            ours = name == "QLoRAClassifier"
            axes.plot(
                sizes,
                percents,
                marker="o",
                color=COLOURS[name],
                label=name,
                linewidth=2.4 if ours else 1.6,
                zorder=3 if ours else 2,
            )
        axes.set_xscale("log")
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
        axes.minorticks_off()
        axes.set(title=title, xlabel="training texts", ylim=(40, 100))
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test accuracy, %")
    panels[1].legend(loc="lower right", frameon=False)
    return figure


if __name__ == "__main__":
    draw().savefig(ROOT / "docs" / "accuracy.png", dpi=150)
