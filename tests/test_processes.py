"""Worker processes: a base each, their own thread limits, forks, a GPU that is shared."""

import os
import subprocess
import sys
from types import SimpleNamespace

import joblib
import numpy as np
import pytest
import torch
from filelock import Timeout
from helpers import make_classifier
from joblib.externals.loky.process_executor import TerminatedWorkerError
from sklearn.model_selection import GridSearchCV, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from skqlora import backbone_cache_info, clear_backbone_cache
from skqlora._utils import processes
from skqlora._utils.processes import (
    lock_of_machine,
    warn_if_gpu_is_shared,
    warn_of_waiting_threads,
)


def run(script, *arguments):
    """Run a script in a process of its own; return what it printed."""
    environment = os.environ | {"PYTHONPATH": os.path.dirname(__file__)}
    result = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


FORK = """
import multiprocessing, sys, tiny, torch
from concurrent.futures import ThreadPoolExecutor
from helpers import make_classifier

def predict():
    try:
        return clf.predict_proba(texts)
    except RuntimeError as error:
        return str(error)

torch.set_num_threads(int(sys.argv[2]))
texts, labels = tiny.corpus()
clf = make_classifier(sys.argv[1], num_train_epochs=1).fit(texts, labels)
if sys.argv[3] == "in a thread":
    with ThreadPoolExecutor(1) as pool:
        pool.submit(clf.predict, texts).result()
with multiprocessing.get_context("fork").Pool(1) as pool:
    result = pool.apply_async(predict).get(timeout=60)
print(result if isinstance(result, str) else (result == clf.predict_proba(texts)).all())
"""


@pytest.mark.parametrize(
    ("n_threads", "where"),
    [("2", "in main"), pytest.param("1", "in a thread", marks=pytest.mark.slow)],
)
def test_fork_of_a_process_that_computed_on_threads_is_refused(encoder, n_threads, where):
    printed = run(FORK, encoder, n_threads, where)
    assert "was forked from one" in printed
    assert "Take joblib's default backend 'loky'" in printed


def test_fork_of_a_process_that_computed_on_one_thread_predicts(encoder):
    assert run(FORK, encoder, "1", "in main").strip() == "True"


def describe_worker(clf, X, y):
    """Score, and tell of the worker that computes it."""
    return {
        "accuracy": clf.score(X, y),
        "process": os.getpid(),
        "loads": backbone_cache_info().misses,
        "threads": torch.get_num_threads(),
    }


def test_each_worker_loads_one_base_and_keeps_to_its_threads(encoder, corpus):
    def validate(n_jobs):
        clf = make_classifier(encoder, num_train_epochs=1)
        return cross_validate(
            clf,
            *corpus,
            cv=6,
            scoring=describe_worker,
            n_jobs=n_jobs,
            return_estimator=True,
            error_score="raise",
        )

    with joblib.parallel_config(backend="loky", inner_max_num_threads=1):
        in_workers = validate(n_jobs=2)
    in_turn = validate(n_jobs=1)
    assert 1 <= len(set(in_workers["test_process"])) <= 2
    assert os.getpid() not in in_workers["test_process"]
    assert set(in_workers["test_loads"]) == {1}
    assert set(in_workers["test_threads"]) == {1}
    # Another number of threads rounds otherwise.
    for theirs, ours in zip(in_workers["estimator"], in_turn["estimator"], strict=True):
        np.testing.assert_allclose(
            theirs.predict_proba(corpus[0]), ours.predict_proba(corpus[0]), atol=1e-4
        )


def die_in_a_worker(texts, parent):
    if os.getpid() != parent:
        os._exit(1)
    return texts


@pytest.mark.slow  # the workers start twice
def test_worker_that_dies_is_an_error_and_the_next_search_runs(encoder, corpus):
    deadly = FunctionTransformer(die_in_a_worker, kw_args={"parent": os.getpid()})
    clf = make_classifier(encoder, num_train_epochs=1)
    with pytest.raises(TerminatedWorkerError):
        GridSearchCV(make_pipeline(deadly, clf), {}, cv=2, n_jobs=2).fit(*corpus)
    search = GridSearchCV(clf, {}, cv=2, n_jobs=2, error_score="raise").fit(*corpus)
    assert np.isfinite(search.best_score_)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU as far as its lock is concerned."""
    properties = SimpleNamespace(uuid="GPU-0123")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setattr(processes, "_gpu_locks", {})
    return torch.device("cuda", 0)


HOLD = (
    "from skqlora._utils.processes import lock_of_machine; lock = lock_of_machine('GPU-0123')\n"
    "lock.acquire(); print(flush=True); input()"
)


def test_second_process_on_a_gpu_is_warned_once(gpu):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with other:
        other.stdout.readline()
        with pytest.warns(UserWarning, match="Another process has loaded a base on cuda:0 too"):
            warn_if_gpu_is_shared(gpu)
        warn_if_gpu_is_shared(gpu)
        other.communicate(b"\n")


def test_only_process_on_a_gpu_is_not_warned_and_holds_it(gpu):
    for _ in range(2):
        warn_if_gpu_is_shared(gpu)
    assert processes._gpu_locks["GPU-0123"].is_locked
    with pytest.raises(Timeout):
        lock_of_machine("GPU-0123").acquire(timeout=0)
    warn_if_gpu_is_shared(torch.device("cpu"))
    assert list(processes._gpu_locks) == ["GPU-0123"]
    processes._gpu_locks["GPU-0123"].release()


def test_more_threads_than_cores_are_warned_of_once(encoder, corpus, monkeypatch):
    monkeypatch.setattr(processes, "_warned_of_threads", False)
    monkeypatch.setattr("joblib.cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    clear_backbone_cache()
    clf = make_classifier(encoder, num_train_epochs=1)
    with pytest.warns(RuntimeWarning, match=r"64 threads.*2 cores.*set_num_threads\(2\)"):
        clf.fit(*corpus)
    clear_backbone_cache()
    clf.fit(*corpus)  # a warning would be an error


@pytest.mark.parametrize(
    ("device", "n_threads", "limit"), [("cpu", 2, None), ("cuda", 64, None), ("cpu", 64, "2")]
)
def test_as_many_threads_as_cores_are_not_warned_of(device, n_threads, limit, monkeypatch):
    if limit:
        monkeypatch.setenv("LOKY_MAX_CPU_COUNT", limit)
    monkeypatch.setattr(processes, "_warned_of_threads", False)
    monkeypatch.setattr("joblib.cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: n_threads)
    warn_of_waiting_threads(torch.device(device))
