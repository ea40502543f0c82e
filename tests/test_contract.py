"""Weights, multilabel targets, early stopping, pieces, callbacks, and the meta-estimators."""

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse
import sklearn
from helpers import assert_equal_adapters, make_classifier
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
from sklearn.utils.fixes import parse_version

from skqlora import LossCurveDisplay, QLoRAClassifier


@pytest.fixture
def texts(corpus):
    return np.array(corpus[0], dtype=object)


@pytest.fixture
def labels(corpus):
    return np.array(corpus[1], dtype=object)


@pytest.fixture
def animal(labels):
    """Two classes."""
    return (labels == "animal").astype(int)


@pytest.fixture
def indicator(labels):
    """Two labels, of which a text has none, one or both."""
    return np.column_stack([labels == "animal", labels != "number"]).astype(int)


@pytest.fixture
def clf(encoder):
    return make_classifier(encoder, num_train_epochs=2)


def values(clf):
    tensors = [*clf.adapter_.lora_tensors.values(), *clf.adapter_.head_tensors.values()]
    return np.concatenate([tensor.ravel() for tensor in tensors])


# Weights


def test_weight_of_two_is_the_row_twice_and_of_zero_no_row(model, corpus):
    texts, labels = corpus
    weights = np.arange(48) // 3 % 3
    repeated = [i for i in range(48) for _ in range(weights[i])]
    one_batch = {"batch_size": 64, "lora_dropout": 0.0, "optim": "adamw", "num_train_epochs": 1}
    weighted = make_classifier(model, **one_batch).fit(texts, labels, sample_weight=weights)
    twice = make_classifier(model, **one_batch)
    twice.fit([texts[i] for i in repeated], [labels[i] for i in repeated])
    np.testing.assert_allclose(weighted.loss_curve_, twice.loss_curve_, rtol=1e-5)
    np.testing.assert_allclose(values(weighted), values(twice), rtol=0, atol=1e-4)


def test_equal_weights_change_nothing(encoder, corpus):
    plain = make_classifier(encoder).fit(*corpus)
    assert_equal_adapters(plain, make_classifier(encoder).fit(*corpus, sample_weight=[3.0] * 48))


def test_class_weight_moves_the_predictions(encoder, texts):
    labels = np.array(["0", "1"])[(np.arange(48) % 8 == 0).astype(int)]
    share = {
        key: make_classifier(encoder, class_weight=weight, lora_dropout=0.0)
        .fit(texts, labels)
        .predict_proba(texts)[:, 1]
        .mean()
        for key, weight in [("none", None), ("balanced", "balanced"), ("dict", {"0": 1, "1": 7})]
    }
    assert share["none"] < share["balanced"] - 0.1
    assert share["dict"] == pytest.approx(share["balanced"], abs=1e-3)


@pytest.mark.parametrize(
    ("fit", "params", "message"),
    [
        ({"sample_weight": [1.0, -1.0]}, {}, r"sample_weight\[1\] = -1.0.*negative"),
        ({"sample_weight": [1.0, np.nan]}, {}, r"sample_weight\[1\] = nan"),
        ({"sample_weight": [0, 0]}, {}, "zeros alone"),
        ({"sample_weight": [1]}, {}, r"shape \(1,\)"),
        ({"sample_weight": ["a", "b"]}, {}, "not all numbers"),
        ({"sample_weight": [1, 0]}, {}, r"leave the classes \['a'\] alone"),
        ({}, {"class_weight": {"c": 2}}, r"class_weight for \['c'\]"),
        ({}, {"class_weight": {"a": -2}}, "weight -2 in class_weight"),
        ({}, {"class_weight": [{0: 1}]}, "list as class_weight"),
        ({"X_val": ["a"]}, {}, "X_val without y_val"),
        ({"X_val": ["a"], "y_val": ["a"]}, {}, "early_stopping=False"),
        ({"X_val": ["a"], "y_val": ["c"]}, {"early_stopping": True}, "not among the classes"),
        ({}, {"early_stopping": True}, "too few for one text of each"),
        ({"X_val": ["a"], "y_val": ["a"]}, {"early_stopping": True, "scoring": "best"}, "scoring"),
    ],
)
def test_bad_weights_and_validation_are_refused(encoder, monkeypatch, fit, params, message):
    def load(*_, **__):
        raise AssertionError("a base was loaded")

    monkeypatch.setattr("skqlora.backbone.Backbone.load", load)
    with pytest.raises(ValueError, match=message):
        make_classifier(encoder, **params).fit(["one", "two"], ["a", "b"], **fit)


def test_cross_val_score_shows_our_message(clf, texts, labels):
    texts[5] = None
    with pytest.raises(TypeError, match="of type NoneType"):
        cross_val_score(clf, texts, labels, cv=2, error_score="raise")


# Labels and texts


@pytest.mark.parametrize(
    "wrap",
    [
        pl.Series,
        lambda X: pl.DataFrame({"text": X}),
        lambda X: pd.DataFrame({"text": X}, index=np.arange(48)[::-1]),
        lambda X: np.array(X)[:, None],
        tuple,
    ],
)
def test_every_kind_of_column_gives_the_same(clf, corpus, wrap):
    texts, labels = corpus
    expected = clf.fit(texts, labels).predict_proba(texts)
    again = clf.fit(wrap(texts), pl.Series(labels)).predict_proba(wrap(texts))
    np.testing.assert_array_equal(again, expected)


@pytest.mark.parametrize(
    "y",
    [
        pd.Series([1, 0] * 24, dtype="Int64"),
        pd.Series([True, False] * 24, dtype="boolean"),
        pd.Series(["x", "y"] * 24, dtype="category"),
        pd.Series(["x", "y"] * 24, dtype="string"),
        np.array([1.0, 2.0] * 24),
    ],
    ids=lambda y: str(y.dtype),
)
def test_labels_come_back_as_they_were(clf, texts, y):
    predicted = clf.fit(texts, y).predict(texts)
    assert set(predicted.tolist()) <= set(y.tolist())
    assert {type(label) for label in predicted.tolist()} == {type(label) for label in y.tolist()}


@pytest.mark.parametrize("wrap", [np.asarray, scipy.sparse.csr_array, pl.DataFrame, np.bool_])
def test_multilabel_targets(encoder, texts, indicator, wrap):
    clf = make_classifier(encoder, num_train_epochs=15, batch_size=4)
    clf.fit(texts, wrap(indicator))
    assert clf.multilabel_
    assert clf.classes_.tolist() == [0, 1]
    probabilities, scores = clf.predict_proba(texts), clf.decision_function(texts)
    assert probabilities.shape == scores.shape == (48, 2)
    np.testing.assert_allclose(probabilities, 1 / (1 + np.exp(-scores)), atol=1e-12)
    np.testing.assert_allclose(np.exp(clf.predict_log_proba(texts)), probabilities, atol=1e-12)
    np.testing.assert_array_equal(clf.predict(texts), (probabilities > 0.5).astype(int))
    assert clf.score(texts, indicator) > 0.9


def test_class_weights_of_labels(encoder, texts, indicator):
    rare = indicator * (np.arange(48) % 5 == 0)[:, None]
    plain, balanced, dicts = (
        make_classifier(encoder, class_weight=weight).fit(texts, rare).predict_proba(texts).mean()
        for weight in (None, "balanced", [{0: 1, 1: 12}, {0: 1, 1: 8}])
    )
    assert plain < balanced - 0.1
    assert plain < dicts - 0.1
    with pytest.raises(ValueError, match="a list of 2 dicts"):
        make_classifier(encoder, class_weight={0: 2}).fit(texts, rare)


def test_several_labels_as_tuples_name_the_binarizer(clf, texts):
    with pytest.raises(ValueError, match="MultiLabelBinarizer"):
        clf.fit(texts[:2], [("a", "b"), ("c",)])


# Early stopping, going on, pieces


@pytest.mark.parametrize("scoring", [None, "loss", "f1_macro", lambda est, X, y: est.score(X, y)])
def test_early_stopping_keeps_the_best_adapter(encoder, corpus, scoring):
    texts, labels = corpus
    clf = make_classifier(
        encoder, early_stopping=True, scoring=scoring, num_train_epochs=6, validation_fraction=0.25
    )
    clf.fit(texts, labels)
    scores = clf.validation_scores_
    assert len(scores) == len(clf.loss_curve_) == clf.n_iter_ <= 6
    assert clf.best_validation_score_ == max(scores)


def test_early_stopping_stops_and_restores(encoder, corpus):
    texts, labels = corpus
    given = iter([0.1, 0.5, 0.4, 0.3, 0.9])
    settings = {"early_stopping": True, "num_train_epochs": 5, "n_iter_no_change": 2}
    clf = make_classifier(encoder, scoring=lambda est, X, y: next(given), **settings)
    clf.fit(texts, labels, X_val=texts[:9], y_val=labels[:9])
    assert clf.validation_scores_ == [0.1, 0.5, 0.4, 0.3]
    assert clf.n_iter_ == 4
    # The adapter of the second epoch: that of a fit which stopped there.
    given = iter([0.1, 0.5])
    settings |= {"n_iter_no_change": 1, "tol": 1.0}
    second = make_classifier(encoder, scoring=lambda est, X, y: next(given), **settings)
    second.fit(texts, labels, X_val=texts[:9], y_val=labels[:9])
    assert second.n_iter_ == 2
    assert_equal_adapters(clf, second)


def test_a_class_with_one_text_keeps_it_for_training(encoder, corpus):
    texts, labels = [*corpus[0], "odd"], [*corpus[1], "single"]
    clf = make_classifier(encoder, early_stopping=True, num_train_epochs=1).fit(texts, labels)
    assert "single" in clf.classes_


def test_warm_start_goes_on_from_the_adapter(encoder, corpus):
    texts, labels = corpus
    clf = make_classifier(encoder, warm_start=True, num_train_epochs=2).fit(texts, labels)
    before = clf.loss_curve_[-1]
    clf.set_params(learning_rate=1e-12, head_learning_rate=1e-12).fit(texts, labels)
    assert clf.n_iter_ == len(clf.loss_curve_) == 4
    assert clf.loss_curve_[2] == pytest.approx(clf.loss_curve_[3], abs=0.05)
    assert clf.loss_curve_[2] < before
    with pytest.raises(ValueError, match="Wanted: the same classes"):
        clf.fit(texts, ["x", "y"] * 24)
    with pytest.raises(ValueError, match="the fitted adapter to go on from has"):
        clf.set_params(lora_r=2).fit(texts, labels)


@pytest.mark.parametrize("optim", ["paged_adamw_32bit", "paged_adamw_8bit", "adamw"])
def test_pieces_learn_what_the_whole_does_and_the_optimizer_goes_on(model, corpus, optim):
    texts, labels = corpus
    # One batch a piece: two pieces are two updates of one constant schedule.
    settings = {"batch_size": 24, "lora_dropout": 0.0, "optim": optim, "warmup_steps": 0}
    pieces = make_classifier(model, **settings)
    half = [slice(0, 24), slice(24, 48)] * 2
    for piece in half:
        pieces.partial_fit(texts[piece], labels[piece], classes=["animal", "colour", "number"])
    assert pieces.optimizer_state_.n_updates == pieces.n_iter_ == 4
    fresh = make_classifier(model, **settings)
    for piece in half:
        fresh.optimizer_state_ = None  # forgets its moments
        fresh.partial_fit(texts[piece], labels[piece], classes=["animal", "colour", "number"])
    assert np.abs(values(pieces) - values(fresh)).max() > 1e-3
    for _ in range(30):
        pieces.partial_fit(texts, labels)
    assert pieces.score(texts, labels) > 0.9


def test_partial_fit_says_what_it_needs(clf, corpus):
    texts, labels = corpus
    with pytest.raises(ValueError, match="classes must be passed on the first call"):
        clf.partial_fit(texts, labels)
    with pytest.raises(ValueError, match=r"not among the classes.*colour"):
        clf.partial_fit(texts, labels, classes=["animal", "number"])
    assert not hasattr(clf, "classes_")
    clf.partial_fit(texts[:1], labels[:1], classes=sorted(set(labels)))
    with pytest.raises(ValueError, match="those before are"):
        clf.partial_fit(texts, labels, classes=["animal", "number"])
    for params in ({"early_stopping": True}, {"class_weight": "balanced"}):
        with pytest.raises(ValueError, match="partial_fit does not support"):
            make_classifier(clf.model, **params).partial_fit(texts, labels, classes=labels)


# Callbacks, metadata, pictures


class StopAfter:
    """A callback that stops a fit after some epochs."""

    max_propagation_depth = None

    def __init__(self, n_epochs):
        self.n_epochs, self.seen = n_epochs, []

    def setup(self, estimator, context):
        pass

    def teardown(self, estimator, context):
        pass

    def on_fit_task_begin(self, estimator, context):
        pass

    def on_fit_task_end(self, estimator, context, *, fitted_estimator=None, X=None):
        if context.task_name == "epoch":
            self.seen.append(fitted_estimator.predict(X))
            return len(self.seen) >= self.n_epochs
        return False


needs_callbacks = pytest.mark.skipif(
    not hasattr(QLoRAClassifier, "set_callbacks"), reason="scikit-learn < 1.9 has no callbacks"
)


@needs_callbacks
def test_callback_stops_a_fit_and_stays_out_of_the_pickle(encoder, corpus):
    import pickle

    callback = StopAfter(2)
    clf = make_classifier(encoder, num_train_epochs=5).set_callbacks(callback).fit(*corpus)
    assert clf.n_iter_ == len(callback.seen) == 2
    np.testing.assert_array_equal(callback.seen[-1], clf.predict(corpus[0]))
    assert "_skl_callbacks" not in vars(pickle.loads(pickle.dumps(clf)))


@needs_callbacks
@pytest.mark.parametrize("nested", [False, True])
def test_callbacks_of_scikit_learn_in_searches_and_pipelines(clf, texts, labels, nested, capsys):
    from sklearn.callback import ProgressBar, ScoringMonitor

    monitor = ScoringMonitor(scoring="accuracy")
    clf.set_callbacks(monitor)
    search = make_pipeline(clf) if nested else GridSearchCV(clf, {"lora_r": [2, 4]}, cv=2)
    search.set_callbacks(ProgressBar(max_propagation_depth=None)).fit(texts, labels)
    scores = monitor.get_logs().data_as_pandas["accuracy"].dropna()
    assert len(scores) >= (2 if nested else 10)
    assert "QLoRAClassifier - fit" in capsys.readouterr().out


def test_metadata_is_routed(clf, texts, labels):
    with sklearn.config_context(enable_metadata_routing=True):
        clf.set_params(early_stopping=True)
        clf.set_fit_request(sample_weight=True, X_val=True, y_val=True)
        clf.set_score_request(sample_weight=True)
        search = GridSearchCV(clf, {"lora_r": [2]}, cv=2, error_score="raise")
        search.fit(texts, labels, sample_weight=np.ones(48), X_val=texts[:9], y_val=labels[:9])
        assert len(search.best_estimator_.validation_scores_) == 2


def test_curves_of_several_estimators_on_one_axis(encoder, corpus):
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    clf = make_classifier(encoder, early_stopping=True, num_train_epochs=2).fit(*corpus)
    plain = make_classifier(encoder, num_train_epochs=3).fit(*corpus)
    display = LossCurveDisplay.from_estimator(clf, name="early")
    other = LossCurveDisplay.from_estimator(plain, ax=display.ax_, name="plain")
    third = LossCurveDisplay.from_estimator(clf, ax=display.ax_)
    assert other.ax_ is display.ax_
    assert third.score_ax_ is display.score_ax_
    assert other.score_ax_ is None
    np.testing.assert_array_equal(display.line_.get_ydata(), clf.loss_curve_)
    np.testing.assert_array_equal(display.score_line_.get_ydata(), clf.validation_scores_)
    legend = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert legend[:3] == ["early: training loss", "early: validation score", "plain: training loss"]
    plt.close("all")


def test_html_repr_links_to_the_documentation_and_is_small(clf, corpus):
    html = clf.fit(*corpus)._repr_html_()
    assert "skqlora.classifier.QLoRAClassifier.html" in html
    assert len(html) < 100_000


# Meta-estimators


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
    if method == "temperature" and parse_version(sklearn.__version__) < parse_version("1.8"):
        pytest.skip("scikit-learn < 1.8 has no temperature scaling")
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


def test_curves_and_scores(clf, texts, labels):
    clf.set_params(num_train_epochs=1)
    assert cross_val_predict(clf, texts, labels, cv=2, method="predict_proba").shape == (48, 3)
    result = cross_validate(clf, texts, labels, cv=2, return_estimator=True)
    assert all(fitted.predict(texts).shape == (48,) for fitted in result["estimator"])
    curve = learning_curve(clf, texts, labels, cv=2, train_sizes=[0.5, 1.0], error_score="raise")
    assert curve[1].shape == (2, 2)
    scores, _ = validation_curve(
        clf, texts, labels, param_name="lora_r", param_range=[2, 4], cv=2, error_score="raise"
    )
    assert np.isfinite(scores).all()
    assert 0 < permutation_test_score(clf, texts, labels, cv=2, n_permutations=2)[2] <= 1
