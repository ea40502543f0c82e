"""
The tasks that benchmarks share: tables of texts, how a prediction is scored, and runs that resume.

A table is ``folder/name/train.csv`` and ``test.csv`` with the columns "text" and "label", or
"labels" with several ones joined by "|"; a few have other files as well, and those of pairs
have two columns instead of "text". Without a folder the tables come from the Hugging Face Hub, for
which ``pip install datasets`` is needed.
"""

import csv
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from sklearn.metrics import accuracy_score, f1_score
from sklearn.preprocessing import MultiLabelBinarizer

from skqlora.demo import minilm_folder


@dataclass(frozen=True)
class Task:
    """Which rows of which table are trained on: all of `part`, `rows`, or `rows_per_class`."""

    table: str
    part: str = "train"
    rows: int | None = None
    rows_per_class: int | None = None


TASKS = {
    "trec6-100": Task("trec6", rows=100),
    "trec6-1000": Task("trec6", rows=1000),
    "trec6": Task("trec6"),
    "banking77-1shot": Task("banking77", rows_per_class=1),
    "banking77-3shot": Task("banking77", rows_per_class=3),
    "banking77-10shot": Task("banking77", part="train_10shot"),
    "banking77": Task("banking77"),
    "clinc150-1shot": Task("clinc150", rows_per_class=1),
    "clinc150-3shot": Task("clinc150", rows_per_class=3),
    "clinc150-10shot": Task("clinc150", part="train_10shot"),
    "clinc150": Task("clinc150"),
    "r8-100": Task("r8", rows=100),
    "r8-1000": Task("r8", rows=1000),
    "r8": Task("r8"),
    "goemotions-2000": Task("goemotions", rows=2000),
    "goemotions": Task("goemotions"),
    "sick-1000": Task("sick", rows=1000),
    "sick": Task("sick"),
}
PAIRS = {"sick": ("sentence_a", "sentence_b")}  # the columns of tables of pairs
# What a language model can read of a table's abbreviated labels.
LABEL_WORDS = {
    "trec6": {
        "ABBR": "abbreviation",
        "DESC": "description",
        "ENTY": "entity",
        "HUM": "human",
        "LOC": "location",
        "NUM": "number",
    }
}
# Table: the Hub's data set, its columns of texts and labels, its split for validation.
ON_THE_HUB = {
    "trec6": ("SetFit/TREC-QC", "text", "label_coarse_original", None),
    "banking77": ("mteb/banking77", "text", "label_text", None),
    "clinc150": ("DeepPavlov/clinc150", "utterance", "label", "validation"),
    "goemotions": ("google-research-datasets/go_emotions", "text", "labels", "validation"),
}


@dataclass(frozen=True)
class Table:
    """What a run is given.

    Attributes
    ----------
    texts, test_texts, valid_texts : list of str, or of tuple of two str
        To train on, to be scored on, and, for several labels a text, to choose the threshold on.
    y, test_y, valid_y : ndarray of shape (n_texts,) or (n_texts, n_labels)
    """

    texts: list
    y: np.ndarray
    test_texts: list
    test_y: np.ndarray
    valid_texts: list
    valid_y: np.ndarray

    @property
    def multilabel(self):
        """Whether a text has any number of labels."""
        return self.y.ndim == 2


def load_table(name, data, seed, max_test_rows=None):
    """Return the `Table` of a task: rows are drawn by the seed where not all are taken."""
    task = TASKS[name]
    parts = read_hub(task.table) if data is None else read_folder(data / task.table)
    if task.part != "train" and task.part not in parts:
        raise SystemExit(f"{name} needs {task.part}.csv, which is not in {data or 'the Hub'}.")
    texts, labels = parts[task.part]
    tests = parts["test"]
    valid = parts.get("valid", ([], []))
    if isinstance(labels[0], tuple):
        binarizer = MultiLabelBinarizer().fit(labels)
        labels, test_y, valid_y = map(binarizer.transform, (labels, tests[1], valid[1]))
    else:
        labels, test_y, valid_y = map(np.array, (labels, tests[1], valid[1]))
    chosen = choose_rows(labels, task, np.random.RandomState(seed))
    tested = np.random.RandomState(0).permutation(len(tests[0]))[:max_test_rows]
    return Table(
        texts=[texts[row] for row in chosen],
        y=labels[chosen],
        test_texts=[tests[0][row] for row in tested],
        test_y=test_y[tested],
        valid_texts=valid[0][:max_test_rows],
        valid_y=valid_y[:max_test_rows],
    )


def held_out(name, data, seed, max_rows=None):
    """Return the `Table` of a task with texts of ``train.csv`` in the place of the test texts.

    What is chosen on them leaves the test file untouched. None of them is trained on.
    """
    table = load_table(name, data, seed)
    everything = load_table(TASKS[name].table, data, seed=0)
    trained = set(table.texts)
    rows = [row for row, text in enumerate(everything.texts) if text not in trained][:max_rows]
    if not rows:
        raise SystemExit(f"{name} trains on all of its texts, so that none can be held out.")
    return replace(
        table, test_texts=[everything.texts[row] for row in rows], test_y=everything.y[rows]
    )


def with_label_words(name, table):
    """Return the `Table` with words in the place of labels that are abbreviations."""
    words = LABEL_WORDS[TASKS[name].table]

    def written_out(labels):
        return np.array([words[label] for label in labels])

    return replace(table, y=written_out(table.y), test_y=written_out(table.test_y))


def choose_rows(labels, task, rng):
    """Draw rows; few of a table with classes hold one of each."""
    order = rng.permutation(len(labels))
    if task.rows_per_class is not None:
        return np.concatenate(
            [order[labels[order] == label][: task.rows_per_class] for label in np.unique(labels)]
        )
    if task.rows is None or labels.ndim == 2:
        return order[: task.rows]
    firsts = np.unique(labels[order], return_index=True)[1]
    rest = np.setdiff1d(np.arange(len(order)), firsts)
    return order[np.concatenate([firsts, rest])[: task.rows]]


def read_folder(folder):
    """Read all tables of a folder: texts and labels, by the file's name."""
    return {file.stem: read_csv(file) for file in sorted(folder.glob("*.csv"))}


def read_csv(path):
    """Read texts and labels; several labels of a text as a tuple."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    texts = [row["text"] for row in rows] if "text" in rows[0] else read_pairs(path, rows)
    if "labels" in rows[0]:
        return texts, [tuple(row["labels"].split("|")) for row in rows]
    return texts, [row["label"] for row in rows]


def read_pairs(path, rows):
    """Take the two columns of a table of pairs."""
    first, second = PAIRS[path.parent.name]
    return [(row[first], row[second]) for row in rows]


def read_hub(table):
    """Read a table from the Hub."""
    from datasets import load_dataset

    if table not in ON_THE_HUB:
        raise SystemExit(f"{table} is not on the Hub. Pass its folder by --data.")
    name, text, label, validation = ON_THE_HUB[table]
    splits = {"train": "train", "test": "test"} | ({"valid": validation} if validation else {})
    parts = {}
    for part, split in splits.items():
        rows = load_dataset(name, split=split)
        known = [(x, y) for x, y in zip(rows[text], rows[label], strict=True) if y is not None]
        texts = [x for x, _ in known]
        parts[part] = texts, [tuple(y) if isinstance(y, list) else y for _, y in known]
    return parts


def score(table, predict_proba, classes):
    """Score probabilities on the test texts.

    Several labels of a text are those above one threshold, which is chosen on the texts for
    validation by macro-F1.

    Returns
    -------
    figures : dict of str to float
        "accuracy" (of several labels: the share of texts with all of them right) and "macro_f1".
    """
    proba = predict_proba(table.test_texts)
    if table.multilabel:
        predicted = proba >= best_threshold(predict_proba(table.valid_texts), table.valid_y)
    else:
        predicted = np.asarray(classes)[proba.argmax(axis=1)]
    return {
        "accuracy": accuracy_score(table.test_y, predicted),
        "macro_f1": f1_score(table.test_y, predicted, average="macro", zero_division=0),
    }


def best_threshold(proba, y):
    """Return the threshold of the greatest macro-F1, of 0.02 to 0.6."""
    thresholds = np.linspace(0.02, 0.6, 59)
    scores = [f1_score(y, proba >= t, average="macro", zero_division=0) for t in thresholds]
    return thresholds[int(np.argmax(scores))]


def primary_metric(task):
    """Name the metric that counts: macro-F1 for several labels a text, else accuracy."""
    return "macro_f1" if TASKS[task].table == "goemotions" else "accuracy"


def in_fresh_process(function, *arguments):
    """Call a function in a new process, whose peak memory is then its own."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as executor:
        return executor.submit(function, *arguments).result()


def run_missing(keys, run, output):
    """Run what a JSON-lines file does not hold yet, in fresh processes, and return those runs.

    Parameters
    ----------
    keys : list of dict
        What tells a run from the others.
    run : callable or None
        Given such a dict; returns a dict of figures. None runs nothing: what is there is returned.
    output : Path
        Each run is written there when it is over, so that a long table can be made in pieces.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    done = {canonical(each["run"]): each for each in read_runs(output)}
    for key in keys:
        name = canonical(key)
        if name in done or run is None:
            continue
        print(name, file=sys.stderr, flush=True)
        done[name] = {"run": key} | in_fresh_process(run, key)
        with output.open("a") as file:
            file.write(json.dumps(done[name]) + "\n")
    names = map(canonical, keys)
    return [done[name] for name in names if name in done]


def read_runs(output):
    """Read the runs of an earlier call, except for a line that a kill cut off."""
    lines = output.read_text().split("\n") if output.exists() else [""]
    if lines[-1]:
        output.write_text("".join(line + "\n" for line in lines[:-1]))
    return [json.loads(line) for line in lines[:-1]]


def canonical(key):
    return json.dumps(key, sort_keys=True)


def resolve_model(model):
    """Return the model that was asked for, or the folder of the embedded MiniLM."""
    return minilm_folder() if model is None else model


def common_key(options):
    """Return what tells the runs of two calls apart, other than task, seed and method."""
    return {"model": options.model, "test_rows": options.test_rows}


def add_options(parser, tasks, output):
    """Add the options that all of these benchmarks have."""
    parser.add_argument(
        "--data",
        type=Path,
        help=f"folder of folders of tables (default: the Hub, which has {', '.join(ON_THE_HUB)})",
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=tasks)
    parser.add_argument("--model", help="folder or Hub id (default: the embedded MiniLM)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--test-rows", type=int, help="of each table, for a shorter run")
    parser.add_argument("--output", type=Path, default=Path(output))
    parser.add_argument(
        "--report", action="store_true", help="run nothing: show the runs that --output holds"
    )
