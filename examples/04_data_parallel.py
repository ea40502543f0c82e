r"""
One fit on several processes: data-parallel training with torchrun
==================================================================

A table that takes too long on one GPU, or on the cores of one machine, is trained on several at
once. `torchrun` starts this script once for each of them; all of them call `fit` with the same
texts, each trains on its share of every batch, and all end with the same weights, which are those
of a single process up to rounding::

    torchrun --nproc-per-node=2 04_data_parallel.py

On a machine with GPUs that is one process for each GPU, over several machines `torchrun` takes
``--nnodes`` and ``--rdzv-endpoint``. Without `torchrun` the script trains alone.
"""

import os
import time

import joblib
import torch
from sklearn.model_selection import train_test_split
from torch import distributed

from skqlora import QLoRAClassifier
from skqlora.demo import load_docstrings, minilm_folder

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
    rank, n_ranks = join_the_others()
    texts, labels = load_docstrings()
    train_texts, test_texts, train_labels, test_labels = train_test_split(
        texts, labels, test_size=0.2, stratify=labels, random_state=0
    )
    clf = QLoRAClassifier(minilm_folder(), num_train_epochs=2, batch_size=32, random_state=0)
    start = time.perf_counter()
    clf.fit(train_texts, train_labels)
    seconds = time.perf_counter() - start

    if rank == 0:
        joblib.dump(clf, "data_parallel.joblib")
        accuracy = clf.score(test_texts, test_labels)
        print(f"{n_ranks} process(es): fit {seconds:.1f} s, accuracy {accuracy:.3f}")
    if n_ranks > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
