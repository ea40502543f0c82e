"""What docs/guide/clients.md says besides its code: what other libraries take and refuse."""

from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import shap
import skrub
from cleanlab.classification import CleanLearning
from datasets import Dataset
from helpers import make_classifier
from imblearn.over_sampling import SMOTE, RandomOverSampler
from imblearn.pipeline import make_pipeline as make_imblearn_pipeline
from mapie.classification import SplitConformalClassifier
from mapie.regression import SplitConformalRegressor
from skactiveml.classifier import SklearnClassifier
from skactiveml.pool import UncertaintySampling
from sklearn.ensemble import AdaBoostClassifier, BaggingClassifier
from sklearn.inspection import permutation_importance
from sklearn.multiclass import OneVsOneClassifier
from sklearn.multioutput import ClassifierChain
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.semi_supervised import SelfTrainingClassifier

from skqlora import TRUSTED_TYPES, QLoRARegressor

TABLES_ONLY = {
    "BaggingClassifier": lambda clf, X, y: BaggingClassifier(clf, n_estimators=2).fit(X, y),
    "AdaBoostClassifier": lambda clf, X, y: AdaBoostClassifier(clf, n_estimators=2).fit(X, y),
    "permutation_importance": lambda clf, X, y: permutation_importance(clf.fit(X, y), X, y),
    "imbalanced-learn": lambda clf, X, y: RandomOverSampler().fit_resample(X, y),
    "SklearnClassifier": lambda clf, X, y: SklearnClassifier(clf, missing_label=None).fit(X, y),
}


@pytest.fixture
def table(texts):
    """The texts in a table of one column."""
    return pd.DataFrame({"text": texts})


@pytest.fixture
def rows():
    """The numbers of the texts, which stand for them."""
    return np.arange(48).reshape(-1, 1)


@pytest.fixture
def looking_up(clf, texts):
    """A classifier of the numbers of texts."""
    step = FunctionTransformer(lambda rows: texts[np.asarray(rows)[:, 0].astype(int)])
    return make_pipeline(step, clf)


@pytest.mark.parametrize("use", TABLES_ONLY.values(), ids=TABLES_ONLY)
def test_some_take_tables_only(clf, texts, table, labels, use):
    clf.set_params(num_train_epochs=10, batch_size=4)
    with pytest.raises(ValueError, match="Expected 2D array, got 1D array"):
        use(clf, texts, labels)
    assert getattr(use(clf, table, labels), "is_fitted_", True)  # SklearnClassifier hides failures


@pytest.mark.parametrize(
    "kind",
    [ClassifierChain, OneVsOneClassifier, SelfTrainingClassifier],
    ids=lambda kind: kind.__name__,
)
def test_some_take_numbers_only(clf, looking_up, table, rows, labels, indicator, kind):
    y = indicator if kind is ClassifierChain else labels
    with pytest.raises(ValueError, match="could not convert string to float"):
        kind(clf).fit(table, y)
    assert kind(looking_up).fit(rows, y).predict(rows).shape == y.shape


@pytest.mark.parametrize("kind", [BaggingClassifier, AdaBoostClassifier, SklearnClassifier])
def test_some_pass_on_no_names_of_columns(clf, table, labels, kind):
    table = table.assign(price=range(48))
    clf.set_params(num_train_epochs=10, batch_size=4, prompt="{0}: {1}")
    options = {"missing_label": None} if kind is SklearnClassifier else {"n_estimators": 2}
    assert kind(clf, **options).fit(table, labels).predict(table).shape == (48,)
    clf.set_params(prompt="{text}: {price}")
    if kind is SklearnClassifier:
        assert not kind(clf, **options).fit(table, labels).is_fitted_
    else:
        with pytest.raises(ValueError, match="columns, which have no names"):
            kind(clf, **options).fit(table, labels)


@pytest.mark.parametrize("kind", ["importance", "sampler"])
def test_others_pass_on_the_names_of_columns(clf, table, labels, kind):
    table = table.assign(price=range(48))
    clf.set_params(prompt="{text}: {price}")
    if kind == "importance":
        found = permutation_importance(clf.fit(table, labels), table, labels, n_repeats=1)
        assert found.importances.shape == (2, 1)
    else:
        pipeline = make_imblearn_pipeline(RandomOverSampler(), clf).fit(table, labels)
        assert list(pipeline[-1].feature_names_in_) == ["text", "price"]


def test_query_strategies_take_numbers_only(clf, looking_up, table, rows, labels):
    partly = labels.copy()
    partly[24:] = None
    query = UncertaintySampling(missing_label=None, random_state=0).query
    known = {"classes": list(np.unique(labels)), "missing_label": None}
    with pytest.raises(ValueError, match="could not convert string to float"):
        query(table, partly, SklearnClassifier(clf, **known))
    fitted = SklearnClassifier(looking_up, **known).fit(rows, partly)
    assert fitted.is_fitted_
    assert query(rows, partly, fitted, fit_clf=False) >= 24


def test_a_chain_may_show_the_labels_before(clf, texts, rows, indicator):
    def look_up(rows):
        before = pd.DataFrame(rows[:, 1:]).add_prefix("label_")
        return before.assign(text=texts[rows[:, 0].astype(int)])

    chain = ClassifierChain(make_pipeline(FunctionTransformer(look_up), clf)).fit(rows, indicator)
    assert list(chain.estimators_[1][-1].feature_names_in_) == ["label_0", "text"]


def test_scoring_is_called_once_before_the_first_epoch(clf, texts, labels):
    scores = []

    def scoring(estimator, X, y):
        scores.append(len(scores))
        return scores[-1]

    clf.set_params(early_stopping=True, scoring=scoring).fit(texts, labels)
    assert scores == [0, 1, 2]
    assert clf.validation_scores_ == [1, 2]


def test_fewer_classes_are_for_partial_fit(clf, texts, labels):
    clf.set_params(warm_start=True).fit(texts, labels)
    some = labels != "number"
    with pytest.raises(ValueError, match="Wanted: the same classes"):
        clf.fit(texts[some], labels[some])
    assert len(clf.partial_fit(texts[some], labels[some]).classes_) == 3


def test_shap_wants_a_function_and_several_words(clf, texts, labels):
    words = shap.maskers.Text(r"\W+")
    with pytest.raises(TypeError, match="not callable"):
        shap.Explainer(clf.fit(texts, labels), words)
    with pytest.raises(ValueError, match="zero-size array"):
        shap.Explainer(clf.predict_proba, words)(["horse"])


def test_cleanlab_wants_an_array_and_numbers(clf, texts, labels):
    codes = np.unique(labels, return_inverse=True)[1]
    cleaning = CleanLearning(clf, cv_n_folds=2, seed=0)
    with pytest.raises(TypeError, match="must support list-based indexing"):
        cleaning.fit(list(texts), codes)
    with pytest.raises(ValueError, match="Labels cannot be strings"):
        cleaning.fit(texts, labels)
    assert cleaning.fit(texts, codes).predict(texts).shape == (48,)


def test_mapie_wants_no_list_and_no_regressor_of_a_table(encoder, clf, texts, table, labels):
    conformal = SplitConformalClassifier(clf.fit(texts, labels), prefit=True)
    with pytest.raises(TypeError, match="number of features"):
        conformal.conformalize(list(texts), labels)
    numbers = np.arange(48.0)
    reg = QLoRARegressor(encoder, num_train_epochs=1, device="cpu")
    conformal = SplitConformalRegressor(reg.fit(texts, numbers), prefit=True)
    with pytest.warns(UserWarning, match="does not appear fitted"):
        conformal.conformalize(texts, numbers)
    assert conformal.predict_interval(texts)[1].shape == (48, 2, 1)
    conformal = SplitConformalRegressor(reg.fit(table, numbers), prefit=True)
    with pytest.raises(UserWarning, match="minimal prediction test"):
        conformal.conformalize(table, numbers)


def test_mlflow_loads_a_model_that_is_a_path(encoder, texts, labels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    clf = make_classifier(Path(encoder)).partial_fit(texts, labels, classes=labels)
    options = {"name": "model", "pip_requirements": ["skqlora"]}
    with mlflow.start_run(), pytest.raises(mlflow.MlflowException, match="untrusted types"):
        mlflow.sklearn.log_model(clf, skops_trusted_types=TRUSTED_TYPES[1:], **options)
    with mlflow.start_run():
        logged = mlflow.sklearn.log_model(clf, skops_trusted_types=TRUSTED_TYPES, **options)
    loaded = mlflow.sklearn.load_model(logged.model_uri)
    np.testing.assert_array_equal(loaded.predict_proba(texts), clf.predict_proba(texts))


def test_mlflow_logs_by_itself_only_what_is_of_scikit_learn(
    clf, texts, labels, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    mlflow.sklearn.autolog(log_models=False, silent=True)
    try:
        clf.fit(texts, labels)
        alone = mlflow.search_runs()
        BaggingClassifier(clf, n_estimators=1).fit(pd.DataFrame({"text": texts}), labels)
        assert (len(alone), len(mlflow.search_runs())) == (0, 1)
    finally:
        mlflow.sklearn.autolog(disable=True)


def test_smote_does_not_take_texts(table, labels):
    with pytest.raises(ValueError, match="could not convert string to float"):
        SMOTE().fit_resample(table, labels)


def test_skrub_picks_columns_and_its_pipeline_makes_numbers(clf, table, labels):
    wide = table.assign(id=range(48))
    pipeline = make_pipeline(skrub.SelectCols("text"), clf).fit(wide, labels)
    assert list(pipeline[-1].feature_names_in_) == ["text"]
    with pytest.raises(ValueError, match="without any text"):
        skrub.tabular_pipeline(clf).fit(wide, labels)


def test_datasets_are_tables_and_streams_of_columns(clf, table, labels):
    data = Dataset.from_pandas(table)
    expected = clf.fit(data, labels).predict(data)
    streamed = clf.fit(data["text"], labels).predict(data.to_iterable_dataset()["text"])
    np.testing.assert_array_equal(streamed, expected)
