"""
Does it classify better? QLoRA beside what one would do else, on real texts.

Nine ways of training on the same texts: TF-IDF, a frozen model's embeddings, a head alone, the last
layers, all layers, LoRA on an unquantized base, and QLoRA in three quantizations, of which the last
is what `QLoRAClassifier` does by itself. All compute in the same precision but for the frozen
model, take as large batches and as many epochs. What trains layers themselves has the head's rate
of the others, and the rate that the rule behind ``learning_rate="auto"`` gives for full
fine-tuning. Each run has a process of its own and is appended to a JSON-lines file, from which the
next call goes on. Prints a Markdown table for each task, and one over all::

    python bench_methods.py --data folder
    python bench_methods.py --data folder --tasks trec6-100 --methods "QLoRA NF4 + DQ" --seeds 0
"""

import argparse
import math
import pickle
import resource
import time
from functools import partial

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from tasks import (
    add_options,
    frozen_embeddings,
    load_table,
    main_figure,
    resolve_model,
    run_missing,
    score,
)

LAST_LAYERS = 2  # of what trains the last ones
PRODUCT = "QLoRA NF4 + DQ"
CHEAP = 0.05  # of the model's parameters: what trains fewer is ranked among its like
DEFAULT_TASKS = [
    "trec6-100",
    "trec6-1000",
    "trec6",
    "banking77-10shot",
    "banking77",
    "clinc150-10shot",
    "r8-1000",
    "r8",
    "goemotions",
]


# The ways: each takes a model, whether texts have several labels, and a seed


def tfidf(model, multilabel, seed):
    """Make logistic regression on weighted counts of words and pairs of words."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    return make_pipeline(vectorizer, logistic_regression(multilabel))


def frozen(model, multilabel, seed):
    """Make logistic regression on the mean of the model's last hidden states."""
    return make_pipeline(frozen_embeddings(model), logistic_regression(multilabel))


def logistic_regression(multilabel):
    regression = LogisticRegression(C=10, max_iter=1000)
    return OneVsRestClassifier(regression) if multilabel else regression


def dense(model, multilabel, seed, *, layers):
    """Make the model itself trainable: its last layers, or all ("all"), under a linear head."""
    return DenseClassifier(model, layers, seed)


def lora(model, multilabel, seed, **params):
    """Make this package's estimator."""
    from skqlora import QLoRAClassifier

    return QLoRAClassifier(model, random_state=seed, **params)


METHODS = {
    "TF-IDF + LR": tfidf,
    "frozen + LR": frozen,
    "head only": partial(dense, layers=0),
    f"last {LAST_LAYERS} layers": partial(dense, layers=LAST_LAYERS),
    "full fine-tuning": partial(dense, layers="all"),
    "LoRA": partial(lora, quantization=None),
    "QLoRA FP4": partial(lora, quantization="fp4", double_quant=False),
    "QLoRA NF4": partial(lora, double_quant=False),
    PRODUCT: lora,
}


class DenseClassifier(ClassifierMixin, BaseEstimator):
    """The usual fine-tuning: AdamW on a model's own weights, with its own dropout.

    Parameters
    ----------
    model : str
    layers : int or "all"
        How many at the end are trained beside the head; "all" trains the embeddings too.
    seed : int
    """

    def __init__(self, model, layers, seed):
        self.model = model
        self.layers = layers
        self.seed = seed

    def fit(self, X, y):
        """Train in batches as large as `QLoRAClassifier` has, for its "auto" epochs."""
        from transformers import get_scheduler

        from skqlora import QLoRAClassifier
        from skqlora.data import training_batches
        from skqlora.finetuning import backbone_spec
        from skqlora.recipe import auto_epochs, scaled_learning_rate

        torch.manual_seed(self.seed)
        ours = QLoRAClassifier(self.model)
        self.dtype_ = backbone_spec(ours).compute_dtype
        self.classes_, targets = encode(y)
        self._load(len(self.classes_))
        tokens = self._tokenize(X)
        config = self.encoder_.config
        rate = scaled_learning_rate(config.model_type, config.hidden_size)  # the rule's for LoRA
        trained = [p for p in self.encoder_.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [
                {"params": trained, "lr": rate / 10},
                {"params": list(self.head_.parameters()), "lr": 5 * rate},
            ],
            weight_decay=0.0,
        )
        rng = np.random.RandomState(self.seed)
        n_epochs = auto_epochs(len(X), ours.batch_size)
        n_steps = n_epochs * math.ceil(len(X) / ours.batch_size)
        scheduler = get_scheduler("linear", optimizer, math.ceil(0.1 * n_steps), n_steps)
        for _ in range(n_epochs):
            self.encoder_.train(self.layers != 0)
            for rows in training_batches(tokens.lengths, ours.batch_size, rng):
                loss = self._loss(tokens, rows, targets)
                loss.backward()
                torch.nn.utils.clip_grad_norm_([*trained, *self.head_.parameters()], 1.0)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        self.encoder_.eval()
        return self

    @torch.no_grad()
    def predict_proba(self, X):
        """Return softmax, or for several labels sigmoid, of the logits."""
        from skqlora.data import prediction_batches

        tokens = self._tokenize(X)
        proba = np.empty((len(X), len(self.classes_)))
        for rows in prediction_batches(tokens.lengths, 4096):
            logits = self._logits(*tokens.batch(rows))
            chosen = logits.sigmoid() if self.multilabel_ else logits.softmax(dim=1)
            proba[rows] = chosen.cpu().numpy()
        return proba

    def trained(self):
        """Return what training changes."""
        parameters = [p for p in self.encoder_.parameters() if p.requires_grad]
        return [p.detach().cpu().numpy() for p in (*parameters, *self.head_.parameters())]

    def _load(self, n_classes):
        from transformers import AutoModel

        self.device_ = "cuda" if torch.cuda.is_available() else "cpu"
        self.encoder_ = AutoModel.from_pretrained(self.model, dtype=torch.float32)
        self.encoder_.to(self.device_).eval()
        if hasattr(self.encoder_, "pooler"):
            self.encoder_.pooler = None  # unused under mean pooling
        self.head_ = torch.nn.Linear(self.encoder_.config.hidden_size, n_classes).to(self.device_)
        torch.nn.init.normal_(self.head_.weight, std=0.02)
        torch.nn.init.zeros_(self.head_.bias)
        if self.layers == "all":
            return
        self.encoder_.requires_grad_(False)
        stack = max(
            (m for m in self.encoder_.modules() if isinstance(m, torch.nn.ModuleList)), key=len
        )
        for layer in stack[len(stack) - self.layers :]:
            layer.requires_grad_(True)

    def _tokenize(self, X):
        from skqlora.adapter import TextSettings
        from skqlora.tokenization import load_tokenizer

        n_tokens = self.encoder_.get_input_embeddings().num_embeddings
        return load_tokenizer(self.model).tokenize(list(X), TextSettings(512), n_tokens)[0]

    def _logits(self, input_ids, mask):
        input_ids, mask = input_ids.to(self.device_), mask.to(self.device_)
        with torch.autocast(self.device_, self.dtype_, enabled=self.dtype_ != torch.float32):
            hidden = self.encoder_(input_ids=input_ids, attention_mask=mask)[0].float()
        return self.head_((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))

    def _loss(self, tokens, rows, targets):
        logits = self._logits(*tokens.batch(rows))
        wanted = torch.as_tensor(targets[rows], device=self.device_)
        if wanted.ndim == 2:
            loss = torch.nn.functional.binary_cross_entropy_with_logits
            return loss(logits, wanted.float())
        return torch.nn.functional.cross_entropy(logits, wanted)

    @property
    def multilabel_(self):
        """Whether a text has any number of labels: then classes are numbers of columns."""
        return self.classes_.dtype.kind == "i"


def encode(y):
    """Return classes and class numbers; for an indicator its columns' numbers and itself."""
    return (np.arange(y.shape[1]), y) if y.ndim == 2 else np.unique(y, return_inverse=True)


# One run


def fit_and_score(model, data, key):
    """Train in one way and measure."""
    table = load_table(key["task"], data, key["seed"], key["test_rows"])
    classifier = METHODS[key["method"]](model, table.multilabel, key["seed"])
    start = time.perf_counter()
    classifier.fit(table.texts, table.y)
    fit_s = time.perf_counter() - start
    n_trained, n_bytes = size_of(classifier)
    return {
        "fit_s": fit_s,
        "trained": n_trained,
        "bytes": n_bytes,
        "peak_mb": peak_megabytes(),
    } | score(table, classifier.predict_proba, classifier.classes_)


def size_of(classifier):
    """Return how many numbers were learned, and how many bytes what must be kept of them takes."""
    if hasattr(classifier, "footprint_"):
        return classifier.footprint_.trainable_parameters, len(pickle.dumps(classifier))
    if hasattr(classifier, "trained"):
        arrays = classifier.trained()
        return sum(a.size for a in arrays), sum(a.nbytes for a in arrays)
    last = classifier[-1]
    regressions = getattr(last, "estimators_", [last])
    n_trained = sum(r.coef_.size + r.intercept_.size for r in regressions)
    return n_trained, len(pickle.dumps(classifier))


def peak_megabytes():
    """Return the most memory that the process, or the GPU, had in use."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


# Tables


def print_task(task, runs):
    """Print a table of one task's runs: means over seeds, and the score's deviation."""
    figure = main_figure(task)
    n_seeds = len({run["run"]["seed"] for run in runs})
    print(f"\n### {task}, seeds: {n_seeds}\n")
    print("| method | accuracy, % | macro-F1, % | fit, s | trained | saved, MB | peak, MB |")
    print("|---" * 7 + "|")
    for method in METHODS:
        mine = [run for run in runs if run["run"]["method"] == method]
        if not mine:
            continue
        values = {name: np.array([run[name] for run in mine]) for name in mine[0] if name != "run"}
        cells = [
            with_deviation(values["accuracy"], bold=figure == "accuracy"),
            with_deviation(values["macro_f1"], bold=figure == "macro_f1"),
            f"{values['fit_s'].mean():.1f}",
            f"{values['trained'].mean():,.0f}",
            f"{values['bytes'].mean() / 1e6:.1f}",
            f"{values['peak_mb'].mean():.0f}",
        ]
        print(f"| {method} | {' | '.join(cells)} |")


def with_deviation(values, bold):
    text = f"{100 * values.mean():.1f} ± {100 * values.std(ddof=len(values) > 1):.1f}"
    return f"**{text}**" if bold else text


def print_overview(runs, tasks, model):
    """Print what counts of each task, with ranks among what trains little, and the gap of 4 bits.

    Ranked are the tasks where all of those ways were run.
    """
    means = {
        (run["run"]["method"], run["run"]["task"]): np.mean(
            [r[main_figure(r["run"]["task"])] for r in runs if same_cell(r, run)]
        )
        for run in runs
    }
    n_parameters = count_parameters(model)
    cheap = [
        method
        for method in METHODS
        if 0
        < max((r["trained"] for r in runs if is_cheap_kind(r, method)), default=0)
        < CHEAP * n_parameters
    ]
    ranked = [task for task in tasks if all((method, task) in means for method in cheap)]
    ranks = {
        method: np.mean(
            [
                1 + sum(means[other, task] > means[method, task] for other in cheap)
                for task in ranked
            ]
        )
        for method in cheap
        if ranked
    }
    print("\n### Over all\n")
    print(f"| method | {' | '.join(tasks)} | mean rank |")
    print("|---" * (len(tasks) + 2) + "|")
    for method in METHODS:
        cells = [
            f"{100 * means[method, task]:.1f}" if (method, task) in means else "" for task in tasks
        ]
        rank = f"{ranks[method]:.1f}" if method in ranks else ""
        print(f"| {method} | {' | '.join(cells)} | {rank} |")
    print(
        f"\nMean rank among the ways that train under {CHEAP:.0%} of the model's parameters, over "
        f"{len(ranked)} tasks."
    )
    print_gap(runs)


def same_cell(run, other):
    return all(run["run"][name] == other["run"][name] for name in ("method", "task"))


def is_cheap_kind(run, method):
    return run["run"]["method"] == method


def count_parameters(model):
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        skeleton = AutoModel.from_config(AutoConfig.from_pretrained(model))
    return sum(p.numel() for p in skeleton.parameters())


def print_gap(runs):
    """Print what 4 bits cost: the mean of paired differences, and its 95% interval."""
    scores = {
        tuple(run["run"][name] for name in ("method", "task", "seed")): run[
            main_figure(run["run"]["task"])
        ]
        for run in runs
    }
    gaps = [
        100 * (scores[PRODUCT, task, seed] - value)
        for (method, task, seed), value in scores.items()
        if method == "LoRA" and (PRODUCT, task, seed) in scores
    ]
    if len(gaps) > 1:
        from scipy import stats

        half = stats.t.ppf(0.975, len(gaps) - 1) * np.std(gaps, ddof=1) / math.sqrt(len(gaps))
        print(
            f"\n{PRODUCT} less LoRA: {np.mean(gaps):+.2f} ± {half:.2f} points (95% interval of "
            f"{len(gaps)} pairs of runs)."
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    add_options(parser, DEFAULT_TASKS, "bench_methods.jsonl")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    options = parser.parse_args()
    model = resolve_model(options.model)
    keys = [
        {"task": task, "method": method, "seed": seed, "test_rows": options.test_rows}
        for task in options.tasks
        for seed in options.seeds
        for method in options.methods
    ]
    run = partial(fit_and_score, model, options.data)
    runs = run_missing(keys, None if options.report else run, options.output)
    tasks = [task for task in options.tasks if any(run["run"]["task"] == task for run in runs)]
    for task in tasks:
        print_task(task, [run for run in runs if run["run"]["task"] == task])
    print_overview(runs, tasks, model)


if __name__ == "__main__":
    main()
