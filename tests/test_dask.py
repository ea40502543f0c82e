"""Searches and predictions on a real Dask cluster of two processes."""

import os
import pickle

import dask
import dask.dataframe as dd
import joblib
import numpy as np
import pandas as pd
import pytest
from dask.distributed import Client
from helpers import make_classifier
from sklearn.model_selection import GridSearchCV, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from skqlora import backbone_cache_info, clear_backbone_cache

pytestmark = pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame")  # in dask


@pytest.fixture(scope="module")
def cluster():
    """Return a client of two worker processes."""
    with Client(n_workers=2, threads_per_worker=1, dashboard_address=":0") as client:
        yield client


@pytest.fixture
def client(cluster):
    """A client of workers that hold no base yet."""
    cluster.run(clear_backbone_cache)
    return cluster


def loads(client):
    return [info.misses for info in client.run(backbone_cache_info).values()]


@pytest.fixture(scope="module")
def fitted(encoder, corpus):
    return make_classifier(encoder).fit(*corpus)


@pytest.mark.slow  # twelve fits; those of a cross-validation are compared below
def test_search_on_a_cluster_is_a_search(client, encoder, corpus):
    texts, labels = corpus

    def search():
        grid = {"lora_r": [2, 4, 8]}
        clf = make_classifier(encoder, num_train_epochs=2, lora_dropout=0.1)
        scoring = "neg_log_loss"  # the workers compute on one thread, which rounds otherwise
        return GridSearchCV(clf, grid, cv=2, scoring=scoring, error_score="raise").fit(
            texts, labels
        )

    here = search()
    with joblib.parallel_config(backend="dask"):
        there = search()
    for split in ("split0_test_score", "split1_test_score"):
        np.testing.assert_allclose(there.cv_results_[split], here.cv_results_[split], atol=1e-4)
    assert max(loads(client)) == 1


def test_estimators_that_workers_fitted_predict_here(client, encoder, corpus):
    texts, labels = corpus

    def validate():
        clf = make_classifier(encoder, num_train_epochs=1)
        return cross_validate(clf, texts, labels, cv=4, return_estimator=True)["estimator"]

    here = validate()
    with joblib.parallel_config(backend="dask"):
        there = validate()
    for theirs, ours in zip(there, here, strict=True):
        np.testing.assert_allclose(
            theirs.predict_proba(texts), ours.predict_proba(texts), atol=1e-4
        )


def label(part, clf):
    return part.assign(label=clf.predict(part["text"]) if len(part) else [])


def probabilities(part, clf):
    return pd.DataFrame(clf.predict_proba(part["text"]), index=part.index, columns=clf.classes_)


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_partitions_are_predicted_by_an_adapter_that_travels(
    client, fitted, corpus, tmp_path, kind
):
    frame = pd.DataFrame({"text": corpus[0] * 3, "number": range(144)})
    if kind == "csv":
        frame.to_csv(tmp_path / "texts.csv", index=False)
        table = dd.read_csv(tmp_path / "texts.csv", blocksize=600)
    else:
        dd.from_pandas(frame, npartitions=5).to_parquet(tmp_path / "texts")
        table = dd.read_parquet(tmp_path / "texts")
    assert table.npartitions >= 5
    meta = pd.DataFrame(columns=fitted.classes_, dtype=float)
    found = table.map_partitions(probabilities, dask.delayed(fitted), meta=meta).compute()
    np.testing.assert_allclose(found.to_numpy(), fitted.predict_proba(frame["text"]), atol=1e-5)
    assert max(loads(client)) == 1
    labelled = table.map_partitions(label, dask.delayed(fitted), meta=table._meta.assign(label=""))
    labelled = labelled.compute()
    assert labelled["number"].tolist() == list(range(144))
    assert labelled["label"].tolist() == fitted.predict(frame["text"]).tolist()


def test_what_travels_is_the_adapter_alone(fitted):
    clear_backbone_cache()
    arrays = [*fitted.adapter_.lora_tensors.values(), *fitted.adapter_.head_tensors.values()]
    assert len(pickle.dumps(fitted)) < sum(array.nbytes for array in arrays) + 65536
    assert backbone_cache_info().misses == 0


def test_message_of_a_worker_reaches_the_caller(client, fitted, corpus):
    texts = pd.Series([*corpus[0], None], dtype=object).to_frame("text")
    table = dd.from_pandas(texts, npartitions=3)
    meta = pd.DataFrame(columns=fitted.classes_, dtype=float)
    with pytest.raises(TypeError, match=r"Got X\[\d+\] = .* Wanted: str in every row"):
        table.map_partitions(probabilities, dask.delayed(fitted), meta=meta).compute()
    search = GridSearchCV(make_classifier("unused"), {"lora_r": [0]}, cv=2, error_score="raise")
    with joblib.parallel_config(backend="dask"), pytest.raises(ValueError, match="'lora_r'"):
        search.fit(*corpus)


def die_once(texts, mark, parent):
    """End the first worker process that comes by."""
    if os.getpid() != parent:
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return texts
        os._exit(1)
    return texts


@pytest.mark.slow  # another worker starts
def test_worker_that_dies_is_replaced(client, encoder, corpus, tmp_path):
    texts, labels = (np.array(values, dtype=object) for values in corpus)
    mark = tmp_path / "died"
    deadly = FunctionTransformer(die_once, kw_args={"mark": mark, "parent": os.getpid()})
    clf = make_pipeline(deadly, make_classifier(encoder, num_train_epochs=1))

    def search():
        grid = {"qloraclassifier__lora_r": [2, 4]}
        scoring = "neg_log_loss"
        return GridSearchCV(clf, grid, cv=2, scoring=scoring, error_score="raise").fit(
            texts, labels
        )

    with joblib.parallel_config(backend="dask"):
        there = search()
    assert mark.exists()
    here = search()
    for split in ("split0_test_score", "split1_test_score"):
        np.testing.assert_allclose(there.cv_results_[split], here.cv_results_[split], atol=1e-4)
