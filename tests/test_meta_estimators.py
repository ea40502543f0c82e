"""scikit-learn's meta-estimators, with real fits, and metadata routed through them."""

import numpy as np
import pandas as pd
import pytest
import sklearn
from helpers import assert_equal_adapters
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import (
    AdaBoostClassifier,
    BaggingClassifier,
    StackingClassifier,
    VotingClassifier,
)
from sklearn.experimental import enable_halving_search_cv  # noqa: F401
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    HalvingGridSearchCV,
    RandomizedSearchCV,
    TunedThresholdClassifierCV,
    cross_val_predict,
    cross_val_score,
    cross_validate,
    learning_curve,
    permutation_test_score,
    validation_curve,
)
from sklearn.multiclass import OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer


def test_pipeline_that_cleans_and_search_within(clf, texts, labels):
    clean = FunctionTransformer(lambda X: np.array([text.upper() for text in X], dtype=object))
    grid = {"qloraclassifier__lora_r": [2, 4]}
    search = GridSearchCV(make_pipeline(clean, clf), grid, cv=2, error_score="raise")
    assert search.fit(texts, labels).predict(texts).shape == (48,)
    random = RandomizedSearchCV(clf, {"lora_r": [2, 4]}, n_iter=1, cv=2, random_state=0)
    assert random.fit(texts, labels).best_params_["lora_r"] in (2, 4)


def test_column_of_a_table(clf, texts, labels):
    table = pd.DataFrame({"id": range(48), "text": texts})
    pick = ColumnTransformer([("text", "passthrough", ["text"])])
    assert make_pipeline(pick, clf).fit(table, labels).predict(table).shape == (48,)


def test_halving_over_epochs(clf, texts, labels):
    search = HalvingGridSearchCV(
        clf,
        {"lora_r": [2, 4]},
        resource="num_train_epochs",
        max_resources=4,
        min_resources=1,
        factor=2,
        cv=2,
        random_state=0,
    )
    assert search.fit(texts, labels).best_estimator_.n_iter_ == 2


@pytest.mark.parametrize("method", ["temperature", "sigmoid"])
def test_calibration(clf, texts, labels, method):
    frozen = FrozenEstimator(clf.fit(texts, labels))
    for estimator in (clf, frozen):
        calibrated = CalibratedClassifierCV(estimator, method=method, cv=2).fit(texts, labels)
        np.testing.assert_allclose(calibrated.predict_proba(texts).sum(axis=1), 1, rtol=1e-6)


def test_threshold(clf, texts, animal):
    tuned = TunedThresholdClassifierCV(clf, scoring="f1", cv=2).fit(texts, animal)
    assert set(tuned.predict(texts)) <= {0, 1}


@pytest.mark.parametrize("kind", [VotingClassifier, StackingClassifier])
def test_beside_a_model_of_words(clf, texts, labels, kind):
    words = make_pipeline(TfidfVectorizer(), LogisticRegression())
    options = {"voting": "soft"} if kind is VotingClassifier else {"cv": 2}
    ensemble = kind([("words", words), ("qlora", clf)], **options).fit(texts, labels)
    assert ensemble.predict(texts).shape == (48,)


def test_one_classifier_for_each_class_or_output(clf, texts, labels, indicator):
    assert OneVsRestClassifier(clf).fit(texts, labels).predict(texts).shape == (48,)
    assert MultiOutputClassifier(clf).fit(texts, indicator).predict(texts).shape == (48, 2)


@pytest.mark.parametrize("kind", [BaggingClassifier, AdaBoostClassifier])
def test_ensembles_of_tables(clf, texts, labels, kind):
    table = pd.DataFrame({"text": texts})
    clf.set_params(num_train_epochs=10, batch_size=4)
    ensemble = kind(clf, n_estimators=2, random_state=0).fit(table, labels)
    assert ensemble.predict(table).shape == (48,)


def test_curves_and_scores(clf, texts, labels, indicator):
    clf.set_params(num_train_epochs=1)
    assert cross_val_predict(clf, texts, labels, cv=2, method="predict_proba").shape == (48, 3)
    assert cross_val_predict(clf, texts, indicator, cv=2, method="predict_proba").shape == (48, 2)
    assert np.isfinite(cross_val_score(clf, texts, indicator, cv=2, scoring="f1_macro")).all()
    result = cross_validate(clf, texts, labels, cv=2, return_estimator=True)
    assert all(fitted.predict(texts).shape == (48,) for fitted in result["estimator"])
    curve = learning_curve(clf, texts, labels, cv=2, train_sizes=[0.5, 1.0], error_score="raise")
    assert curve[1].shape == (2, 2)
    scores, _ = validation_curve(
        clf, texts, labels, param_name="lora_r", param_range=[2, 4], cv=2, error_score="raise"
    )
    assert np.isfinite(scores).all()
    assert 0 < permutation_test_score(clf, texts, labels, cv=2, n_permutations=2)[2] <= 1


def test_metadata_is_routed(clf, texts, labels):
    weights = np.linspace(0.1, 4, 48)
    held_out = {"X_val": texts[:9], "y_val": labels[:9]}
    clf.set_params(early_stopping=True, scoring="loss")
    direct = clone(clf).fit(texts, labels, sample_weight=weights, **held_out)
    with sklearn.config_context(enable_metadata_routing=True):
        clf.set_fit_request(sample_weight=True, X_val=True, y_val=True)
        clf.set_score_request(sample_weight=True)
        search = GridSearchCV(clf, {"lora_r": [clf.lora_r]}, cv=2, error_score="raise")
        search.fit(texts, labels, sample_weight=weights, **held_out)
        assert_equal_adapters(search.best_estimator_, direct)
        assert search.best_estimator_.validation_scores_ == direct.validation_scores_


def test_validation_texts_go_through_the_steps_before(clf, texts, labels):
    clean = FunctionTransformer(lambda X: [text.upper() for text in X])
    seen = []
    clf.set_params(early_stopping=True, scoring=lambda est, X, y: seen.extend(X) or 1.0)
    with sklearn.config_context(enable_metadata_routing=True):
        clf.set_fit_request(X_val=True, y_val=True)
        pipeline = make_pipeline(clean, clf, transform_input=["X_val"])
        pipeline.fit(texts, labels, X_val=texts[:9], y_val=labels[:9])
    assert seen[:9] == [text.upper() for text in texts[:9]]
