"""Fits on the ranks of `torchrun`; started by test_distributed.py, not by pytest."""

import sys
from pathlib import Path

import joblib
import numpy as np
import tiny
import torch
from helpers import make_classifier
from torch import distributed

from skqlora.training.distributed import Ranks
from skqlora.training.trainer import Trainer

CASES = {
    "dropout": {"lora_dropout": 0.3},
    "micro-batches and weights": {
        "batch_size": 2,
        "gradient_accumulation_steps": 8,
        "class_weight": {"animal": 5},
    },
    "bfloat16": {"compute_dtype": "bfloat16"},
    "8-bit": {"optim": "paged_adamw_8bit"},
    "no seed": {"random_state": None},
    "early stopping": {"early_stopping": True, "validation_fraction": 0.25, "random_state": None},
}
N_ROWS = 33  # the last batch of 16 is one row, so that one rank has none


def main(model, folder):
    """Fit every case on this rank and write what became of it."""
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    texts, labels = tiny.corpus(N_ROWS)
    fitted = {
        name: make_classifier(model, **case).fit(texts, labels) for name, case in CASES.items()
    }
    fitted["predictions"] = fitted["dropout"].predict_proba(texts)
    fitted["threads"] = torch.get_num_threads()
    fitted["steps without a row"] = make_classifier(model, batch_size=1).fit(texts[:5], labels[:5])
    for name, change in {
        "other labels": {"y": list(np.roll(labels, rank))},
        "other order": {"X": texts[rank:] + texts[:rank]},
        "other rank of LoRA": {"lora_r": 2 + rank},
        "other dtype": {"compute_dtype": ["float32", "bfloat16"][rank]},
        "other quantization": {"quantization": ["nf4", None][rank]},
    }.items():
        data = {"X": change.pop("X", texts), "y": change.pop("y", labels)}
        try:
            make_classifier(model, **change).fit(**data)
        except ValueError as error:
            fitted[name] = str(error)
    fitted["checkpoints"] = fit_after_an_interrupt(model, folder, texts, labels)
    fitted["two at once"] = fit_beside_a_fit(model, texts, labels)
    joblib.dump(fitted, Path(folder) / f"{rank}.joblib")
    distributed.destroy_process_group()


def fit_after_an_interrupt(model, folder, texts, labels):
    """Fit from a checkpoint that an interrupted fit left."""
    step, clf = (
        Trainer.step,
        make_classifier(
            model, checkpoint_dir=folder, checkpoint_every=2, early_stopping=True, scoring="loss"
        ),
    )

    def interrupt(trainer, rows):
        if trainer.n_updates == 5:
            raise KeyboardInterrupt
        return step(trainer, rows)

    Trainer.step = interrupt
    try:
        clf.fit(texts, labels)
    except KeyboardInterrupt:
        Trainer.step = step
    return clf.fit(texts, labels)


def fit_beside_a_fit(model, texts, labels):
    """Return the message for a fit within another one of the same process."""
    with Ranks.current().one_fit_at_a_time():
        try:
            make_classifier(model).fit(texts, labels)
        except RuntimeError as error:
            return str(error)


if __name__ == "__main__":
    main(*sys.argv[1:])
