r"""
One fit on several processes: data-parallel training with torchrun
==================================================================

A table that takes too long on one GPU, or on the cores of one machine, is trained on several at
once. `torchrun` starts this script once for each of them; all of them call `fit` with the same
texts, each trains on its share of every batch, and all end with the same weights, which are those
of a single process up to rounding::

    torchrun --nproc-per-node=2 examples/04_data_parallel.py

On a machine with GPUs that is one process for each GPU, over several machines `torchrun` takes
``--nnodes`` and ``--rdzv-endpoint``. Without `torchrun` the script trains alone.
"""

import argparse
import os
import time

import joblib
import torch
from demo import load_docstrings, minilm_folder, read_csv
from sklearn.model_selection import train_test_split
from torch import distributed

from skqlora import QLoRAClassifier

# %%
# The processes find each other
# -----------------------------
# Only this part is new. NCCL connects GPUs, gloo connects processes on CPUs.


def join_the_others():
    """Join the processes that `torchrun` started; return the number of this one and of all."""
    if "RANK" not in os.environ:
        return 0, 1
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    return distributed.get_rank(), distributed.get_world_size()


# %%
# Fit, and keep what the first one has
# ------------------------------------
# `batch_size` is still the number of texts of one update, over all processes. The same table, in
# the same order, must be there for each of them: `fit` refuses to start if it is not.


def main():
    parser = argparse.ArgumentParser(description="Data-parallel training with torchrun.")
    parser.add_argument("--model", help="Hub id or folder (default: the embedded MiniLM)")
    parser.add_argument("--csv", help="table with columns text and label (default: docstrings)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--output", default="data_parallel.joblib", help="fitted classifier")
    options = parser.parse_args()

    rank, n_ranks = join_the_others()
    if options.csv is None:
        texts, labels = load_docstrings()
    else:
        texts, labels = read_csv(options.csv, "text", "label")
    train_texts, test_texts, train_labels, test_labels = train_test_split(
        texts, labels, test_size=0.2, stratify=labels, random_state=0
    )
    clf = QLoRAClassifier(
        options.model or minilm_folder(),
        num_train_epochs=options.epochs,
        batch_size=options.batch_size,
        random_state=0,
        verbose=1,
    )
    start = time.perf_counter()
    clf.fit(train_texts, train_labels)
    seconds = time.perf_counter() - start

    if rank == 0:
        joblib.dump(clf, options.output)
        accuracy = clf.score(test_texts, test_labels)
        print(f"{n_ranks} process(es): fit {seconds:.1f} s, accuracy {accuracy:.3f}")
    if n_ranks > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
