r"""
A grid search on a cluster: joblib's Dask backend
=================================================

scikit-learn hands its independent fits to joblib, and joblib can hand them to a Dask cluster. Not
a line of the search changes. Each worker loads the base once and keeps it for all the fits that it
is given; what comes back is an adapter.

Here the cluster is two processes on this machine. To use one that runs already (on Kubernetes,
Slurm, or started with ``dask scheduler`` and ``dask worker``), set ``SCHEDULER`` to its address.
The workers need the packages, too: ``pip install "skqlora[demo,dask]"``.
"""

import time

import dask
import joblib
from dask.distributed import Client
from sklearn.model_selection import GridSearchCV

from skqlora import QLoRAClassifier, backbone_cache_info
from skqlora.demo import load_docstrings, minilm_folder

MODEL = minilm_folder()  # or a model that the workers can load, e.g. "Qwen/Qwen3-0.6B-Base"
SCHEDULER = None  # or e.g. "tcp://10.0.0.1:8786"
N_TEXTS = 150

# %%
# A cluster
# ---------
# A worker has one thread, since a fit already uses all cores that its process may use. On machines
# with GPUs, start one worker for each GPU and show it that one alone (``CUDA_VISIBLE_DEVICES``, or
# the package ``dask-cuda``).


def connect(scheduler):
    """Return a client of a running cluster, or of a new one of two processes on this machine."""
    if scheduler:
        return Client(scheduler)
    # By default a worker gives freed memory back at once, which the next layer asks for again.
    dask.config.set({"distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None})
    return Client(n_workers=2, threads_per_worker=1, dashboard_address=":0")


# %%
# The search
# ----------
# A script that starts processes needs a function ``main`` that these do not run.


def main():
    texts, labels = load_docstrings()
    step = -(-len(texts) // N_TEXTS)
    texts, labels = texts[::step], labels[::step]
    clf = QLoRAClassifier(MODEL, random_state=0)
    search = GridSearchCV(
        clf, {"lora_r": [4, 16], "num_train_epochs": [1, 2]}, cv=2, error_score="raise"
    )
    with connect(SCHEDULER) as client:
        start = time.perf_counter()
        with joblib.parallel_config(backend="dask"):
            search.fit(texts, labels)
        print(f"{len(texts)} texts, {time.perf_counter() - start:.1f} s")
        # The best one was fitted again in this process. On each worker there is one base:
        for worker, info in client.run(backbone_cache_info).items():
            print(f"{worker}: the base was loaded {info.misses} time(s), found {info.hits} times")
    results = search.cv_results_
    for params, score in zip(results["params"], results["mean_test_score"], strict=True):
        print(f"  {params}: {score:.3f}")


if __name__ == "__main__":
    main()
