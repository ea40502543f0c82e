"""Estimators that share one base from several threads give what they give in turn."""

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pytest
from helpers import assert_equal_adapters, make_classifier
from sklearn.ensemble import VotingClassifier
from sklearn.model_selection import GridSearchCV, cross_validate

from skqlora import QLoRAClassifier, backbone_cache_info, clear_backbone_cache

THREADS = {"backend": "threading", "n_jobs": 2}
IN_TURN = {"backend": "sequential"}


def test_voting_in_threads_equals_voting_in_turn(model, corpus):
    texts, labels = corpus

    def fit(**options):
        members = [
            (f"r{r}p{p}", make_classifier(model, lora_r=r, lora_dropout=p, random_state=r))
            for r in (2, 4)
            for p in (0.0, 0.3)
        ]
        clear_backbone_cache()
        with joblib.parallel_config(**options):
            voting = VotingClassifier(members, voting="soft", n_jobs=2).fit(texts, labels)
            return voting, voting.predict_proba(texts)

    in_turn, expected = fit(**IN_TURN)
    in_threads, probabilities = fit(**THREADS)
    assert backbone_cache_info().misses == 1
    np.testing.assert_array_equal(probabilities, expected)
    for ours, theirs in zip(in_threads.estimators_, in_turn.estimators_, strict=True):
        assert_equal_adapters(ours, theirs)


def test_search_in_threads_equals_search_in_turn(model, corpus):
    texts, labels = corpus

    def search(**options):
        grid = {"lora_r": [2, 4], "batch_size": [8, 16]}
        with joblib.parallel_config(**options):
            return GridSearchCV(
                make_classifier(model, num_train_epochs=1), grid, cv=2, error_score="raise"
            ).fit(texts, labels)

    in_turn, in_threads = search(**IN_TURN), search(**THREADS)
    for name in ("mean_test_score", "split0_test_score", "params"):
        np.testing.assert_array_equal(in_threads.cv_results_[name], in_turn.cv_results_[name])
    assert_equal_adapters(in_threads.best_estimator_, in_turn.best_estimator_)


def test_one_estimator_and_its_likes_predict_from_many_threads(model, corpus):
    texts, labels = corpus
    found = cross_validate(
        make_classifier(model, num_train_epochs=1), texts, labels, cv=3, return_estimator=True
    )
    estimators = found["estimator"]
    expected = [clf.predict_proba(texts) for clf in estimators]
    turns = np.random.RandomState(0).randint(len(estimators), size=30)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: estimators[i].predict_proba(texts), turns))
    for i, probabilities in zip(turns, results, strict=True):
        np.testing.assert_array_equal(probabilities, expected[i])


@pytest.mark.parametrize("use_dora", [False, True])
def test_predictions_beside_a_fit_disturb_neither(model, corpus, use_dora):
    texts, labels = corpus
    clf = make_classifier(model, use_dora=use_dora, lora_dropout=0.2).fit(texts, labels)
    expected = clf.predict_proba(texts)
    with ThreadPoolExecutor(2) as pool:
        refit = pool.submit(
            make_classifier(model, use_dora=use_dora, lora_dropout=0.2).fit, texts, labels
        )
        while not refit.done():
            np.testing.assert_array_equal(clf.predict_proba(texts), expected)
    assert_equal_adapters(refit.result(), clf)


@pytest.mark.parametrize("method", ["predict", "predict_proba", "score", "save"])
def test_each_call_sees_one_of_two_fits(encoder, texts, labels, tmp_path, method):
    names = [np.array([f"{fit}{label}" for label in labels], dtype=object) for fit in "ab"]
    names[1][:8] = "one more"  # another number of classes
    clf = make_classifier(encoder, num_train_epochs=1).fit(texts, names[0])
    others = [make_classifier(encoder, num_train_epochs=1).fit(texts, y) for y in names]
    fits = [other._get_fitted() for other in others]
    stop = threading.Event()

    def alternate():
        for number in itertools.count():
            clf._set_fitted(fits[number % 2])
            if stop.is_set():
                return

    def call(number):
        if method == "save":
            clf.save(tmp_path / f"{number}")
            clf_again = QLoRAClassifier.load(tmp_path / f"{number}")
            return len(clf_again.classes_), len(clf_again.adapter_.head_tensors["weight"])
        if method == "score":
            return clf.score(texts[:8], names[number % 2][:8])
        return getattr(clf, method)(texts[:8])

    expected = {
        "predict": [other.predict(texts[:8]).tolist() for other in others],
        "predict_proba": [other.predict_proba(texts[:8]).tolist() for other in others],
        "score": [o.score(texts[:8], y[:8]) for o in others for y in names],
        "save": [(3, 3), (4, 4)],
    }[method]
    with ThreadPoolExecutor(1) as pool:
        refits = pool.submit(alternate)
        try:
            for number in range(100 if method == "predict" else 20):
                result = call(number)
                result = result.tolist() if isinstance(result, np.ndarray) else result
                assert result in expected
        finally:
            stop.set()
        refits.result()
