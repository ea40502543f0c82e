"""
Fit and predict, this package against transformers' Trainer with PEFT, and against SetFit.

This package and the Trainer fine-tune the same 4-bit base with the same texts, epochs, batches,
LoRA and learning rate, in turn, each time in a fresh process. The rest is as each has it: the peer
pools and ends as Transformers' class for sequence classification does, and has one rate for all.
The first peer is as tutorials teach it. The second has the two cheap things that this package does
by itself: it groups texts of like lengths, and the base's own dropout is off. SetFit trains the
encoder with pairs of texts and is only run if it is asked for and installed. In "trec6-last-2"
adapters on the last two layers are compared with this package's own on all. Prints a Markdown table
and writes every run as JSON::

    python bench_fit_predict.py --data folder     # of r8/train.csv, r8/test.csv, trec6/...
    python bench_fit_predict.py --data folder --works trec6 --repeats 1 --model my-base
    python bench_fit_predict.py --data folder --works trec6 --rows 100 --sides skqlora SetFit
"""

import argparse
import csv
import importlib
import json
import multiprocessing
import platform
import resource
import statistics
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

LORA = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.05}
WORKS = {
    # Rows to train on, of the table or of each class, and to test on; what both sides are given.
    "r8": {"rows": 1000, "test_rows": 1000, "epochs": 2, "max_length": 256},
    "banking77": {"rows_per_class": 10, "test_rows": 1000, "epochs": 5, "max_length": 128},
    "trec6": {"rows": 1000, "test_rows": 500, "epochs": 5, "max_length": 128},
    "trec6-last-2": {"rows": 1000, "test_rows": 500, "epochs": 5, "max_length": 128, "layers": 2},
}
FIGURES = {
    "fit_s": "fit, s",
    "predict_s": "predict, s",
    "accuracy": "accuracy",
    "peak_mb": "peak memory, MB",
    "padded_share": "padding in fit",
    "tokens_per_s": "tokens/s in fit",
}


def main():
    options = parse_arguments()
    runs = []
    for name in options.works:
        work = WORKS[name] | {"batch_size": options.batch_size}
        if options.rows is not None:
            work |= {"rows": options.rows, "test_rows": options.rows}
        for seed in range(options.repeats):
            table = read_table(options.data / name.split("-")[0], work, seed)
            sides = {side: SIDES[side] for side in options.sides}
            if "layers" in work:
                sides = {"skqlora": run_ours, "skqlora, all layers": run_all_layers}
            for side, run in sides.items():
                print(f"{name}, seed {seed}, {side}", file=sys.stderr)
                figures = in_fresh_process(run, options.model, work, table, seed)
                runs.append({"work": name, "side": side, "seed": seed} | figures)
    machine = (
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}"
    )
    print(f"{machine}; medians of {options.repeats}, batches of {options.batch_size} texts")
    print_table(runs)
    options.output.write_text(json.dumps({"machine": machine, "runs": runs}, indent=1))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--data", type=Path, required=True, help="folder of folders of tables")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES)[:3])
    parser.add_argument("--works", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--model", help="folder or Hub id (default: the embedded MiniLM)")
    parser.add_argument("--repeats", type=int, default=3, help="each with another seed")
    parser.add_argument("--rows", type=int, help="of each table, for a shorter run")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("bench_fit_predict.json"))
    options = parser.parse_args()
    if options.model is None:
        from skqlora.demo import minilm_folder  # here, so that the peer's process goes without

        options.model = minilm_folder()
    return options


def read_table(folder, work, seed):
    """Return the texts and labels to train on and to test on."""
    train, test = (read_csv(folder / f"{part}.csv") for part in ("train", "test"))
    rng = np.random.RandomState(seed)
    order = rng.permutation(len(train[0]))
    if "rows_per_class" in work:
        labels = np.array(train[1])[order]
        order = rng.permutation(
            np.concatenate(
                [order[labels == label][: work["rows_per_class"]] for label in np.unique(labels)]
            )
        )
    chosen = order[: work.get("rows")]
    tested = np.random.RandomState(0).permutation(len(test[0]))[: work["test_rows"]]
    return [
        [column[i] for i in rows]
        for part, rows in ((train, chosen), (test, tested))
        for column in part
    ]


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [row["label"] for row in rows]


def in_fresh_process(function, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


# This package


def run_ours(model, work, table, seed):
    """Fit and predict with QLoRAClassifier."""
    from skqlora import QLoRAClassifier
    from skqlora._utils.libraries import import_libraries

    import_libraries()
    texts, labels, test_texts, test_labels = table
    clf = QLoRAClassifier(
        model,
        lora_r=LORA["r"],
        lora_alpha=LORA["lora_alpha"],
        lora_dropout=LORA["lora_dropout"],
        num_train_epochs=work["epochs"],
        max_length=work["max_length"],
        batch_size=work["batch_size"],
        layers=work.get("layers", "all"),
        random_state=seed,
    )
    with counted_tokens("skqlora.text.batches.TokenizedTexts.batch") as counts:
        fit_s = seconds(lambda: clf.fit(texts, labels))
    predicted = []
    predict_s = seconds(lambda: predicted.extend(clf.predict(test_texts)))
    return figures(fit_s, predict_s, predicted, test_labels, counts)


def run_all_layers(model, work, table, seed):
    """Fit and predict with adapters on all layers."""
    return run_ours(model, work | {"layers": "all"}, table, seed)


# What tutorials teach


def run_grouping_peer(model, work, table, seed):
    """Fit and predict with the Trainer on texts of like lengths, without the base's dropout."""
    return run_peer(model, work, table, seed, grouping=True)


def run_peer(model, work, table, seed, *, grouping=False):
    """Fit and predict with transformers' Trainer, PEFT and bitsandbytes."""
    import transformers
    from transformers import AutoConfig, AutoTokenizer, DataCollatorWithPadding, Trainer

    from skqlora import QLoRAClassifier
    from skqlora.checkpoint.spec import BackboneSpec
    from skqlora.settings.parameters import read_parameters
    from skqlora.settings.recipe import auto_learning_rate

    transformers.logging.set_verbosity_error()
    texts, labels, test_texts, test_labels = table
    config = AutoConfig.from_pretrained(model)
    ours = QLoRAClassifier(model)
    rate = auto_learning_rate(config.model_type, config.hidden_size)
    dtype = BackboneSpec.of(read_parameters(ours)).compute_dtype
    classes = sorted(set(labels))
    tokenizer = AutoTokenizer.from_pretrained(model)

    def dataset(texts, labels):
        ids = tokenizer(texts, truncation=True, max_length=work["max_length"])["input_ids"]
        return [
            {"input_ids": i, "labels": classes.index(y)} for i, y in zip(ids, labels, strict=True)
        ]

    with tempfile.TemporaryDirectory() as folder:
        trainers = []

        def fit():
            trainer = Trainer(
                peer_model(model, len(classes), tokenizer, dtype, dropout=not grouping),
                peer_arguments(work, seed, rate, folder, grouping=grouping),
                train_dataset=dataset(texts, labels),
                data_collator=DataCollatorWithPadding(tokenizer),
            )
            trainer.train()
            trainers.append(trainer)

        def predict():
            logits = trainers[0].predict(dataset(test_texts, test_labels)).predictions
            predicted.extend(classes[i] for i in logits.argmax(axis=1))

        predicted = []
        with counted_tokens("transformers.DataCollatorWithPadding.__call__") as counts:
            fit_s = seconds(fit)
        predict_s = seconds(predict)
    return figures(fit_s, predict_s, predicted, test_labels, counts)


def peer_model(model, n_classes, tokenizer, dtype, *, dropout):
    """Load a base in NF4 with double quantization and put LoRA on every linear layer."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig

    config = AutoConfig.from_pretrained(model, num_labels=n_classes)
    for name, value in config.to_dict().items():
        if not dropout and "dropout" in name and isinstance(value, float):
            setattr(config, name, 0.0)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["score", "classifier"],
    )
    base = AutoModelForSequenceClassification.from_pretrained(
        model, config=config, quantization_config=quantization
    )
    base.config.pad_token_id = tokenizer.pad_token_id
    # Checkpointing, which PEFT turns on here, would only make it slower.
    base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", **LORA)
    return get_peft_model(base, lora)


def peer_arguments(work, seed, rate, folder, *, grouping):
    from transformers import TrainingArguments

    return TrainingArguments(
        folder,
        num_train_epochs=work["epochs"],
        per_device_train_batch_size=work["batch_size"],
        per_device_eval_batch_size=64,
        learning_rate=rate,
        warmup_steps=0.1,
        train_sampling_strategy="group_by_length" if grouping else "random",
        optim="paged_adamw_32bit" if torch.cuda.is_available() else "adamw_torch",
        seed=seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )


# SetFit


def run_setfit(model, work, table, seed):
    """Fit and predict with SetFit's defaults: contrastive training, then a logistic regression."""
    import setfit
    from datasets import Dataset

    texts, labels, test_texts, test_labels = table
    trained = []

    def fit():
        encoder = setfit.SetFitModel.from_pretrained(model, labels=sorted(set(labels)))
        arguments = setfit.TrainingArguments(
            batch_size=work["batch_size"], max_steps=work.get("setfit_steps", -1), seed=seed
        )
        dataset = Dataset.from_dict({"text": texts, "label": labels})
        setfit.Trainer(encoder, arguments, train_dataset=dataset).train()
        trained.append(encoder)

    predicted = []
    fit_s = seconds(fit)
    predict_s = seconds(lambda: predicted.extend(trained[0].predict(test_texts)))
    return figures(fit_s, predict_s, predicted, test_labels, {"tokens": 0, "padding": 0})


SIDES = {
    "skqlora": run_ours,
    "Trainer + PEFT": run_peer,
    "Trainer + PEFT, grouped": run_grouping_peer,
    "SetFit": run_setfit,
}


# Figures


def seconds(work):
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


@contextmanager
def counted_tokens(name):
    """Count the tokens, and those that are padding, of all batches that a function makes."""
    owner, attribute = name.rsplit(".", 1)
    package, class_name = owner.rsplit(".", 1)
    owner = getattr(importlib.import_module(package), class_name)
    make, counts = getattr(owner, attribute), {"tokens": 0, "padding": 0}

    def counting(*arguments):
        batch = make(*arguments)
        mask = batch["attention_mask"] if hasattr(batch, "keys") else batch[1]
        n_tokens = int(mask.sum())
        counts["tokens"] += n_tokens
        counts["padding"] += mask.numel() - n_tokens
        return batch

    with patch.object(owner, attribute, counting):
        yield counts


def figures(fit_s, predict_s, predicted, labels, counts):
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated() / 1e6
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3  # of the whole process
    hits = [a == b for a, b in zip(predicted, labels, strict=True)]
    return {
        "fit_s": fit_s,
        "predict_s": predict_s,
        "accuracy": sum(hits) / len(hits),
        "peak_mb": peak,
        "padded_share": counts["padding"] / max(1, counts["tokens"] + counts["padding"]),
        "tokens_per_s": counts["tokens"] / fit_s,
    }


def print_table(runs):
    """Print the median of each figure for two sides, and of the ratios of each pair of runs."""
    print("\n| work | what | skqlora | against | ratio |\n|---|---|---|---|---|")
    for work in dict.fromkeys(run["work"] for run in runs):
        of_work = [run for run in runs if run["work"] == work]
        ours = [run for run in of_work if run["side"] == "skqlora"]
        for side in dict.fromkeys(run["side"] for run in of_work if run["side"] != "skqlora"):
            peer = [run for run in of_work if run["side"] == side]
            for key, name in FIGURES.items():
                mine, theirs = ([run[key] for run in of_side] for of_side in (ours, peer))
                # SetFit's tokens are not counted.
                ratios = [a / b for a, b in zip(mine, theirs, strict=True) if b] or [np.nan]
                ratio = statistics.median(ratios)
                print(
                    f"| {work} against {side} | {name} | {statistics.median(mine):.3g} | "
                    f"{statistics.median(theirs):.3g} | {ratio:.2f} |"
                )


if __name__ == "__main__":
    main()
