"""
Does it classify better? QLoRA compared with what else one would do, on real texts.

Nine methods are trained on the same texts: TF-IDF, a frozen model's embeddings, a head alone, the
last layers, all layers, LoRA on an unquantized base, and QLoRA in three quantizations, of which the
last is what `QLoRAClassifier` does by itself. Those that train the model's own layers have batches,
epochs, warm-up and the head's learning rate from `QLoRAClassifier`, and the learning rate that the
rule behind ``learning_rate="auto"`` gives for full fine-tuning. What they compute in differs: the
frozen model is float32; the dense methods are float32 under autocast; LoRA's base is stored in the
compute dtype; and of a 4-bit base on a CPU only the linear layers compute in it. Variants, which
run only if they are named by ``--methods``, say what that and the untuned rates are worth.

Each run has a process of its own and is appended to a JSON-lines file, from which the next call
resumes. Prints a Markdown table for each task, and one over all::

    python bench_methods.py --data folder
    python bench_methods.py --data folder --tasks trec6-100 --methods "QLoRA NF4 + DQ" --seeds 0
"""

import argparse
import math
import pickle
import resource
import time
from collections import defaultdict
from functools import partial
from pathlib import Path

import numpy as np
import scipy.sparse
import torch
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin, TransformerMixin, clone
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.multiclass import OneVsRestClassifier
from sklearn.pipeline import make_pipeline
from tasks import (
    add_options,
    common_key,
    load_table,
    primary_metric,
    resolve_model,
    run_missing,
    score,
)

from skqlora.demo import FrozenEmbeddings

LAST_LAYERS = 2  # of the method that trains the last ones
PRODUCT = "QLoRA NF4 + DQ"
# Those that train under 5% of the model's parameters, or none, are ranked among each other.
CHEAP = ["TF-IDF + LR", "frozen + LR", "head only", "LoRA", "QLoRA FP4", "QLoRA NF4", PRODUCT]
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


# The methods: each is made of a model, whether texts have several labels, and a seed


def tfidf(model, multilabel, seed):
    """Make logistic regression on weighted counts of words and pairs of words."""
    vectorizer = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    return make_pipeline(PairFeatures(vectorizer), logistic_regression(multilabel))


def frozen(model, multilabel, seed, *, C=10):
    """Make logistic regression on the mean of the model's last hidden states."""
    features = PairFeatures(FrozenEmbeddings(model))
    return make_pipeline(features, logistic_regression(multilabel, C))


class PairFeatures(TransformerMixin, BaseEstimator):
    """Vectors of texts; of two texts u and v both with |u - v| and u * v, as SentEval has them.

    Parameters
    ----------
    vectorizer : transformer of texts
    """

    def __init__(self, vectorizer):
        self.vectorizer = vectorizer

    def fit(self, X, y=None):
        """Fit the vectorizer to all texts."""
        texts = [text for row in X for text in row] if isinstance(X[0], tuple) else X
        self.vectorizer_ = clone(self.vectorizer).fit(texts)
        return self

    def transform(self, X):
        """Return dense or sparse features, as the vectorizer does."""
        if not isinstance(X[0], tuple):
            return self.vectorizer_.transform(X)
        u, v = (self.vectorizer_.transform(list(column)) for column in zip(*X, strict=True))
        if scipy.sparse.issparse(u):
            return scipy.sparse.hstack([u, v, abs(u - v), u.multiply(v)], format="csr")
        return np.hstack([u, v, abs(u - v), u * v])


def logistic_regression(multilabel, C=10):
    regression = LogisticRegression(C=C, max_iter=1000)
    return OneVsRestClassifier(regression) if multilabel else regression


def dense(model, multilabel, seed, *, layers, rate_factor=1):
    """Make the model itself trainable: its last layers, or all ("all"), under a linear head."""
    return DenseClassifier(model, layers, seed, rate_factor)


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
VARIANTS = {
    "frozen + LR, C=1": partial(frozen, C=1),
    "frozen + LR, C=100": partial(frozen, C=100),
    "full fine-tuning, half the rate": partial(dense, layers="all", rate_factor=0.5),
    "full fine-tuning, twice the rate": partial(dense, layers="all", rate_factor=2),
    "LoRA in float32": partial(lora, quantization=None, compute_dtype="float32"),
}


class DenseClassifier(ClassifierMixin, BaseEstimator):
    """The usual fine-tuning: AdamW on a model's own weights, with its own dropout.

    Parameters
    ----------
    model : str
    layers : int or "all"
        How many at the end are trained besides the head; "all" trains the embeddings too.
    seed : int
    rate_factor : float
        Of the layers' learning rate over the rule's.
    """

    def __init__(self, model, layers, seed, rate_factor):
        self.model = model
        self.layers = layers
        self.seed = seed
        self.rate_factor = rate_factor

    def fit(self, X, y):
        """Train in batches as large as `QLoRAClassifier` has, for its "auto" epochs."""
        from transformers import get_scheduler

        from skqlora import QLoRAClassifier
        from skqlora.checkpoint.spec import BackboneSpec
        from skqlora.settings.parameters import read_parameters
        from skqlora.settings.recipe import (
            HEAD_RATE_FACTOR,
            auto_epochs,
            auto_learning_rate,
            scaled_learning_rate,
        )
        from skqlora.text.batches import training_batches

        torch.manual_seed(self.seed)
        ours = QLoRAClassifier(self.model)
        self.dtype_ = BackboneSpec.of(read_parameters(ours)).compute_dtype
        self.multilabel_ = y.ndim == 2
        self.classes_, targets = encode(y)
        self._load(len(self.classes_))
        tokens = self._tokenize(X)
        family, width = self.encoder_.config.model_type, self.encoder_.config.hidden_size
        n_epochs = auto_epochs(len(X), ours.batch_size)
        head_rate = HEAD_RATE_FACTOR * auto_learning_rate(family, width)
        rate = self.rate_factor * scaled_learning_rate(family, width) / 10  # full fine-tuning's
        trained = [p for p in self.encoder_.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            [
                {"params": trained, "lr": rate},
                {"params": list(self.head_.parameters()), "lr": head_rate},
            ],
            weight_decay=ours.weight_decay,
        )
        parameters = [*trained, *self.head_.parameters()]
        rng = np.random.RandomState(self.seed)
        n_steps = n_epochs * math.ceil(len(X) / ours.batch_size)
        n_warmup = math.ceil(ours.warmup_steps * n_steps)
        scheduler = get_scheduler(ours.lr_scheduler_type, optimizer, n_warmup, n_steps)
        for _ in range(n_epochs):
            for module in self.trained_modules_:  # the others' dropout stays off
                module.train()
            for rows in training_batches(tokens.lengths, ours.batch_size, rng):
                loss = self._loss(tokens, rows, targets)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, ours.max_grad_norm)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        self.encoder_.eval()
        return self

    @torch.no_grad()
    def predict_proba(self, X):
        """Return softmax, or for several labels sigmoid, of the logits."""
        from skqlora.text.batches import prediction_batches

        tokens = self._tokenize(X)
        proba = np.empty((len(X), len(self.classes_)))
        for rows in prediction_batches(tokens.lengths, 4096):
            logits = self._logits(tokens.batch(rows))
            chosen = logits.sigmoid() if self.multilabel_ else logits.softmax(dim=1)
            proba[rows] = chosen.cpu().numpy()
        return proba

    def trained(self):
        """Return what training changes."""
        parameters = [p for p in self.encoder_.parameters() if p.requires_grad]
        return [p.detach().cpu().numpy() for p in (*parameters, *self.head_.parameters())]

    def _load(self, n_classes):
        from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModel

        self.device_ = "cuda" if torch.cuda.is_available() else "cpu"
        self.encoder_ = AutoModel.from_pretrained(self.model, dtype=torch.float32)
        self.encoder_.to(self.device_).eval()
        if hasattr(self.encoder_, "pooler"):
            self.encoder_.pooler = None  # unused under mean pooling
        masked = type(self.encoder_.config) in MODEL_FOR_MASKED_LM_MAPPING
        self.pooling_ = "mean" if masked else "last"  # of an encoder; of a decoder
        self.head_ = torch.nn.Linear(self.encoder_.config.hidden_size, n_classes).to(self.device_)
        torch.nn.init.normal_(self.head_.weight, std=0.02)
        torch.nn.init.zeros_(self.head_.bias)
        self.trained_modules_ = [self.encoder_]
        if self.layers == "all":
            return
        self.encoder_.requires_grad_(False)
        stack = max(
            (m for m in self.encoder_.modules() if isinstance(m, torch.nn.ModuleList)), key=len
        )
        self.trained_modules_ = stack[len(stack) - self.layers :]
        for layer in self.trained_modules_:
            layer.requires_grad_(True)

    def _tokenize(self, X):
        from skqlora.settings.adapter_settings import TextSettings
        from skqlora.settings.recipe import AUTO_MAX_LENGTH
        from skqlora.settings.template import prompt_of_lines
        from skqlora.text.tokenization import load_tokenizer

        n_tokens = self.encoder_.get_input_embeddings().num_embeddings
        lines = isinstance(X[0], tuple) and self.pooling_ == "last"  # a decoder's pairs
        settings = TextSettings(
            AUTO_MAX_LENGTH,
            prompt=prompt_of_lines(None, 2) if lines else None,
            token_type_ids=getattr(self.encoder_.config, "type_vocab_size", 0) > 1,
        )
        return load_tokenizer(self.model).tokenize(list(X), settings, n_tokens)[0]

    def _logits(self, inputs):
        from skqlora.model.text_model import pool

        inputs = {name: x.to(self.device_) for name, x in inputs.items()}
        with torch.autocast(self.device_, self.dtype_, enabled=self.dtype_ != torch.float32):
            hidden = self.encoder_(**inputs)[0].float()
        return self.head_(pool(hidden, inputs["attention_mask"], self.pooling_))

    def _loss(self, tokens, rows, targets):
        logits = self._logits(tokens.batch(rows))
        wanted = torch.as_tensor(targets[rows], device=self.device_)
        if wanted.ndim == 2:
            loss = torch.nn.functional.binary_cross_entropy_with_logits
            return loss(logits, wanted.float())
        return torch.nn.functional.cross_entropy(logits, wanted)


def encode(y):
    """Return classes and class numbers; for an indicator its columns' numbers and itself."""
    return (np.arange(y.shape[1]), y) if y.ndim == 2 else np.unique(y, return_inverse=True)


# One run


def fit_and_score(model, data, key):
    """Train with one method and measure."""
    table = load_table(key["task"], data, key["seed"], key["test_rows"])
    method = (METHODS | VARIANTS)[key["method"]]
    classifier = method(model, table.multilabel, key["seed"])
    start = time.perf_counter()
    classifier.fit(table.texts, table.y)
    fit_s = time.perf_counter() - start
    n_trained, n_bytes = size_of(classifier)
    return {
        "fit_s": fit_s,
        "trained": n_trained,
        "bytes": n_bytes,
        "peak_mb": peak_megabytes(),
        "device": device_name(),
    } | score(table, classifier.predict_proba, classifier.classes_)


def size_of(classifier):
    """Return how many numbers were learned, and how many bytes what must be kept takes, pickled."""
    if hasattr(classifier, "footprint_"):
        return classifier.footprint_.trainable_parameters, len(pickle.dumps(classifier))
    if hasattr(classifier, "trained"):
        arrays = classifier.trained()
        return sum(a.size for a in arrays), len(pickle.dumps((classifier.classes_, arrays)))
    last = classifier[-1]
    regressions = [r for r in getattr(last, "estimators_", [last]) if hasattr(r, "coef_")]
    n_trained = sum(r.coef_.size + r.intercept_.size for r in regressions)
    return n_trained, len(pickle.dumps(classifier))


def device_name():
    """Name the GPU if the run has used it, which TF-IDF does not."""
    return torch.cuda.get_device_name() if torch.cuda.is_initialized() else "CPU"


def peak_megabytes():
    """Return the most memory that the process, or torch on the GPU, had in use."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says there includes the parent's, of before this process
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


# Tables

FIGURES = ("accuracy", "macro_f1", "fit_s", "trained", "bytes", "peak_mb")


def print_task(task, runs):
    """Print a table of one task's runs: means over seeds, and the deviation of the scores."""
    metric = primary_metric(task)
    print(f"\n### {task}\n")
    print(
        "| method | seeds | accuracy, % | macro-F1, % | fit, s | trained | saved, MB | peak, MB "
        "| on |"
    )
    print("|---" * 9 + "|")
    for (method, device), mine in by_method_and_device(runs).items():
        values = {name: np.array([run[name] for run in mine]) for name in FIGURES}
        cells = [
            str(len(mine)),
            with_deviation(values["accuracy"], bold=metric == "accuracy"),
            with_deviation(values["macro_f1"], bold=metric == "macro_f1"),
            f"{values['fit_s'].mean():.1f}",
            f"{values['trained'].mean():,.0f}",
            f"{values['bytes'].mean() / 1e6:.1f}",
            f"{values['peak_mb'].mean():.0f}",
            device,
        ]
        print(f"| {method} | {' | '.join(cells)} |")


def by_method_and_device(runs):
    """Group runs so that seconds and megabytes of different devices are not averaged."""
    groups = defaultdict(list)
    for run in runs:
        groups[run["run"]["method"], run.get("device", "CPU")].append(run)
    return groups


def by(runs, name):
    """Group runs by what one entry of their keys is."""
    groups = defaultdict(list)
    for run in runs:
        groups[run["run"][name]].append(run)
    return groups


def with_deviation(values, bold):
    text = f"{100 * values.mean():.1f}"
    if len(values) > 1:
        text += f" ± {100 * values.std(ddof=1):.1f}"
    return f"**{text}**" if bold else text


def print_overview(runs):
    """Print the primary metric of each task, and ranks among the methods that train little."""
    scores = primary_scores(runs)
    tasks, methods = by(runs, "task"), by(runs, "method")
    means = {
        (method, task): f"{100 * np.mean(list(of_seeds.values())):.1f}"
        for (method, task), of_seeds in scores.items()
    }
    ranks, ranked = mean_ranks(scores, tasks)
    print("\n### Over all\n")
    print(f"| task | {' | '.join(methods)} |")
    print("|---" * (len(methods) + 1) + "|")
    for task in tasks:
        print(f"| {task} | {' | '.join(means.get((method, task), '') for method in methods)} |")
    of_methods = (f"{ranks[method]:.1f}" if method in ranks else "" for method in methods)
    print(f"| mean rank | {' | '.join(of_methods)} |")
    if ranked:
        print(f"\nMean rank of {len(CHEAP)} methods over {', '.join(ranked)}; ties share a rank.")
    for other in ("LoRA", "LoRA in float32", "full fine-tuning", "frozen + LR"):
        print_difference(scores, tasks, other)


def primary_scores(runs):
    """Return the primary metric by method and task, and there by seed."""
    scores = defaultdict(dict)
    for run in runs:
        method, task, seed = (run["run"][name] for name in ("method", "task", "seed"))
        scores[method, task][seed] = run[primary_metric(task)]
    return scores


def mean_ranks(scores, tasks):
    """Rank what trains little on each task where all of it was run with the same seeds."""
    ranked, ranks = [], []
    for task in tasks:
        seeds = {tuple(sorted(scores.get((method, task), ()))) for method in CHEAP}
        if len(seeds) == 1 and seeds != {()}:
            means = [np.mean(list(scores[method, task].values())) for method in CHEAP]
            ranked.append(task)
            ranks.append(stats.rankdata([-mean for mean in means]))
    return dict(zip(CHEAP, np.mean(ranks, axis=0), strict=True)) if ranks else {}, ranked


def print_difference(scores, tasks, other):
    """Print by how much the default is above another method, by task and over tasks.

    Runs of the same seed are paired. The interval is over the tasks' means: seeds of a task share
    its test texts, so that they are no independent witnesses.
    """
    means = {}
    for task in tasks:
        ours, theirs = scores.get((PRODUCT, task), {}), scores.get((other, task), {})
        differences = [100 * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
        if differences:
            means[task] = np.mean(differences)
    if not means:
        return
    values = list(means.values())
    text = f"{np.mean(values):+.2f}"
    if len(values) > 1:
        text += f" ± {stats.t.ppf(0.975, len(values) - 1) * stats.sem(values):.2f}"
    listed = ", ".join(f"{task} {mean:+.1f}" for task, mean in means.items())
    print(
        f"\n{PRODUCT} minus {other}: {text} percentage points (mean over {len(values)} tasks and "
        f"its 95% interval; {listed})."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    add_options(parser, DEFAULT_TASKS, "bench_methods.jsonl")
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS | VARIANTS, help="default: all but variants"
    )
    options = parser.parse_args()
    methods = options.methods or (METHODS | VARIANTS if options.report else METHODS)
    keys = [
        {"task": task, "method": method, "seed": seed} | common_key(options)
        for task in options.tasks
        for seed in options.seeds
        for method in methods
    ]
    run = partial(fit_and_score, resolve_model(options.model), options.data)
    runs = run_missing(keys, None if options.report else run, options.output)
    for task, of_task in by(runs, "task").items():
        print_task(task, of_task)
    print_overview(runs)


if __name__ == "__main__":
    main()
