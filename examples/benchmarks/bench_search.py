"""
What sharing one frozen base costs and saves: a search over the rank, many estimators, prediction.

Prints a Markdown table of figures and their targets, and writes them as JSON::

    python bench_search.py                                    # docstrings and the embedded MiniLM
    python bench_search.py --csv train.csv --rows 600         # columns text and label
"""

import argparse
import csv
import ctypes
import gc
import hashlib
import json
import multiprocessing
import pickle
import platform
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
import torch
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, StratifiedKFold

from skqlora import QLoRAClassifier, backbone_cache_info, clear_backbone_cache
from skqlora.demo import load_docstrings, minilm_folder

RANKS = [4, 8, 16]
FOLDS = 3


def main():
    options = parse_arguments()
    texts, labels = load_texts(options)
    clf = QLoRAClassifier(
        options.model,
        random_state=0,
        num_train_epochs=options.epochs,
        max_length=64,
        device=options.device,
    )
    rows = [
        *bench_search(clf, texts, labels, options.repeats),
        *bench_switches(clf, texts, labels),
        *bench_prediction(clf, texts, labels, options.repeats),
        bench_used_process(clf, texts[:96], labels[:96]),
        *in_fresh_process(
            bench_memory, clf, texts[:64], labels[:64], options.estimators, options.fits
        ),
    ]
    machine = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "rows": len(texts),
        "classes": len(set(labels)),
        "epochs": options.epochs,
    }
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    print("\n| what | measured | target |\n|---|---|---|")
    for name, value, target in rows:
        print(f"| {name} | {value} | {target} |")
    options.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--model", help="folder or Hub id (default: the embedded MiniLM)")
    parser.add_argument("--csv", help="table of texts (default: docstrings)")
    parser.add_argument("--rows", type=int, default=600, help="of the table")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--estimators", type=int, default=30, help="kept alive at once")
    parser.add_argument("--fits", type=int, default=50, help="thrown away")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", type=Path, default=Path("bench_search.json"))
    options = parser.parse_args()
    options.model = options.model or minilm_folder()
    return options


def load_texts(options):
    """Return shuffled texts and labels."""
    if options.csv is None:
        texts, labels = load_docstrings()
    else:
        with open(options.csv, newline="") as file:
            rows = list(csv.DictReader(file))
        texts, labels = [row["text"] for row in rows], [row["label"] for row in rows]
    chosen = np.random.RandomState(0).permutation(len(texts))[: options.rows]
    return [texts[i] for i in chosen], [labels[i] for i in chosen]


# A search


def bench_search(clf, texts, labels, repeats):
    """Count the loads and injections of a search; time it against its fits and scores alone."""
    folds = list(StratifiedKFold(FOLDS).split(texts, labels))
    clear_backbone_cache()
    with counted_injections() as injections:
        grid_search(clf, texts, labels, folds)
    info = backbone_cache_info()
    n_injections = injections.call_count
    ratios = []
    for _ in range(repeats):
        start = time.perf_counter()
        grid_search(clf, texts, labels, folds)
        whole = time.perf_counter() - start
        ratios.append(whole / fits_and_scores_alone(clf, texts, labels, folds))
    n_fits = len(RANKS) * FOLDS + 1
    return [
        (f"loads of the base in {n_fits} fits of a search", info.misses, "1"),
        (f"injections of LoRA for {len(RANKS)} ranks", n_injections, f"{len(RANKS)}"),
        (
            "search / its fits and scores alone, warm",
            f"{np.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})",
            "1.10",
        ),
    ]


def grid_search(clf, texts, labels, folds):
    search = GridSearchCV(clf, {"lora_r": RANKS}, cv=folds, error_score="raise")
    return search.fit(texts, labels)


def fits_and_scores_alone(clf, texts, labels, folds):
    """Sum of the seconds of what a search does, each timed on its own."""
    seconds = 0.0
    texts, labels = np.array(texts, dtype=object), np.array(labels)
    for rank in RANKS:
        for train, test in folds:
            candidate = clone(clf).set_params(lora_r=rank)
            start = time.perf_counter()
            candidate.fit(texts[train], labels[train]).score(texts[test], labels[test])
            seconds += time.perf_counter() - start
    best = clone(clf).set_params(lora_r=RANKS[-1])
    start = time.perf_counter()
    best.fit(texts, labels)
    return seconds + time.perf_counter() - start


@contextmanager
def counted_injections():
    """Count the times that PEFT puts LoRA layers into a replica."""
    from skqlora.model.replicas import AdaptedReplica

    make = AdaptedReplica.__init__
    with patch.object(AdaptedReplica, "__init__", autospec=True, side_effect=make) as spy:
        yield spy


# Estimators in turn


def bench_switches(clf, texts, labels):
    """Milliseconds to predict one text: same adapter, another of its shape, another shape."""
    few = slice(0, 64)
    short = clone(clf).set_params(num_train_epochs=1)
    fitted = [
        clone(short).set_params(lora_r=r, random_state=s).fit(texts[few], labels[few])
        for r, s in [(8, 0), (8, 1), (16, 2)]
    ]

    def predict(i):
        start = time.perf_counter()
        fitted[i].predict(texts[:1])
        return (time.perf_counter() - start) * 1e3

    clear_replicas(clf)
    predict(0)
    same = np.median([predict(0) for _ in range(30)])
    turns = np.median([predict(i % 2) for i in range(60)])
    new = []
    for _ in range(10):
        clear_replicas(clf)
        new.append(predict(2))
    loads = backbone_cache_info().misses
    return [
        ("one text, adapter active", f"{same:.1f} ms", ""),
        ("... after another estimator of its shape (one copy)", f"{turns:.1f} ms", ""),
        ("... with a new shape (one injection)", f"{np.median(new):.1f} ms", ""),
        ("loads of the base so far", loads, "1"),
    ]


def clear_replicas(clf):
    """Drop the free replicas of the base."""
    backbone_of(clf).replicas._free.clear()


def backbone_of(clf):
    from skqlora.checkpoint.spec import BackboneSpec
    from skqlora.model.cache import get_backbone
    from skqlora.settings.parameters import read_parameters

    return get_backbone(BackboneSpec.of(read_parameters(clf)))


# Prediction


def bench_prediction(clf, texts, labels, repeats):
    """Ratio of `predict` of one text to a forward pass of the same model."""
    from skqlora.checkpoint.spec import BackboneSpec
    from skqlora.model.text_model import TextModel
    from skqlora.settings.parameters import read_parameters
    from skqlora.text.tokenization import load_tokenizer

    fitted = clone(clf).set_params(num_train_epochs=1).fit(texts[:64], labels[:64])
    backbone, spec = backbone_of(clf), BackboneSpec.of(read_parameters(clf))
    tokenizer = load_tokenizer(spec.model, spec.revision, spec.files)
    tokens, _ = tokenizer.tokenize(texts[:1], fitted.adapter_.text_settings, backbone.vocab_size)
    inputs = {name: x.to(spec.device) for name, x in tokens.batch(np.arange(1)).items()}

    def seconds(work):
        start = time.perf_counter()
        work()
        if spec.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    with TextModel.for_prediction(backbone, fitted.adapter_) as model:
        bare = torch.no_grad()(lambda: model(**inputs))
        with_base = torch.no_grad()(lambda: backbone.module(**inputs))
    fitted.predict(texts[:1])
    ratios, to_base = [], []
    for _ in range(20 * repeats):
        predict = seconds(lambda: fitted.predict(texts[:1]))
        ratios.append(predict / seconds(bare))
        to_base.append(predict / seconds(with_base))
    return [
        ("predict of one text / bare forward pass", f"{np.median(ratios):.2f}", "1.25"),
        ("... / forward pass of the base without adapter", f"{np.median(to_base):.2f}", ""),
    ]


# Memory


def bench_memory(clf, texts, labels, n_estimators, n_fits):
    """Resident memory for each estimator that is kept alive, and for each that is not."""
    short = clone(clf).set_params(num_train_epochs=1)

    # One random state, hence one sequence of batch shapes: for each new shape of a matrix oneDNN
    # keeps a kernel, some megabytes every dozen fits until it has seen them all.
    def fit():
        return clone(short).fit(texts, labels)

    for _ in range(5):  # allocators and caches fill
        fit()
    kept, resident, on_gpu = [], [], []
    for _ in range(n_estimators):
        kept.append(fit())
        resident.append(resident_bytes())
        on_gpu.append(gpu_bytes())
    slope = np.polyfit(np.arange(n_estimators), resident, 1)[0]
    state = kept[0].adapter_
    arrays = [*state.lora_tensors.values(), *state.head_tensors.values()]
    size = sum(array.nbytes for array in arrays)
    thrown = []
    for _ in range(n_fits):
        fit()
        thrown.append(resident_bytes())
    drift = np.polyfit(np.arange(n_fits), thrown, 1)[0]
    return [
        (
            f"resident memory of each of {n_estimators} estimators kept",
            f"{slope / 1024:.0f} KiB",
            f"{(size + 65536) / 1024:.0f} KiB (adapter and head {size / 1024:.0f} + 64)",
        ),
        (
            f"GPU memory, paged included, of each of {n_estimators} estimators kept",
            f"{np.polyfit(np.arange(n_estimators), on_gpu, 1)[0] / 1024:.1f} KiB"
            if torch.cuda.is_initialized()
            else "no GPU",
            "0",
        ),
        (f"resident memory of each of {n_fits} fits thrown away", f"{drift / 1024:.1f} KiB", "0"),
        ("pickle of one", f"{len(pickle.dumps(kept[0])) / 1024:.0f} KiB", ""),
    ]


def gpu_bytes():
    """Bytes of the GPU that are in use; 0 where there is none."""
    if not torch.cuda.is_initialized():
        return 0
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def resident_bytes():
    """Resident memory once the allocator has given back what it only held in reserve."""
    gc.collect()
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_info().rss


# A used process


def bench_used_process(clf, texts, labels):
    """Compare a fit in this process, after many others, with one in a new process."""
    few = clone(clf).set_params(num_train_epochs=1)
    clone(few).set_params(lora_r=3).fit(texts[:40], ["a", "b"] * 20).predict(texts)
    clone(few).set_params(compute_dtype="float32", use_dora=True).fit(texts, labels)
    interrupt = patch(
        "skqlora.training.trainer.Trainer._check_finite", side_effect=KeyboardInterrupt
    )
    with interrupt, suppress(KeyboardInterrupt):
        clone(few).fit(texts, labels)
    used = digest(clone(few).fit(texts, labels))
    fresh = in_fresh_process(fit_and_digest, few, texts, labels)
    same = "bit for bit" if used == fresh else "NO"
    return ("a fit here equals one in a fresh process", same, "bit for bit")


def fit_and_digest(clf, texts, labels):
    return digest(clf.fit(texts, labels))


def in_fresh_process(function, *arguments):
    """Call a function of this script in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def digest(fitted):
    """SHA-256 of the adapter and the head."""
    state = fitted.adapter_
    arrays = [*state.lora_tensors.values(), *state.head_tensors.values()]
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()


if __name__ == "__main__":
    main()
