"""Tables of several columns: what is taken and refused, remembered, saved and searched over."""

import warnings
from decimal import Decimal

import joblib
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
import tiny
from helpers import assert_equal_adapters, fit_interrupted, make_classifier
from sklearn.calibration import CalibratedClassifierCV
from sklearn.compose import ColumnTransformer
from sklearn.ensemble import BaggingClassifier
from sklearn.inspection import permutation_importance
from sklearn.model_selection import GridSearchCV, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from skqlora import QLoRAClassifier

PROMPT = "One: {first}\nTwo: {second}\nSame:"


@pytest.fixture(scope="module")
def encoder(typed_encoder):
    """Folder of a tiny BERT that is told of which text a token is."""
    return typed_encoder


# Containers


@pytest.mark.parametrize(
    "convert",
    [
        pl.from_pandas,
        lambda frame: pa.Table.from_pandas(frame, preserve_index=False),
        lambda frame: pa.RecordBatch.from_pandas(frame, preserve_index=False),
        lambda frame: frame.to_numpy(dtype=object),
        lambda frame: frame.to_numpy().astype(str),
        lambda frame: list(frame.itertuples(index=False, name=None)),
        lambda frame: frame.to_numpy().tolist(),
        lambda frame: tuple(map(tuple, frame.to_numpy().tolist())),
        lambda frame: frame.astype("category"),
        lambda frame: pd.DataFrame(frame.to_numpy(), index=range(100, 100 + len(frame))),
    ],
    ids=[
        "polars",
        "pyarrow",
        "batch",
        "object",
        "str",
        "tuples",
        "lists",
        "tuple",
        "category",
        "numbered",
    ],
)
def test_every_kind_of_table_gives_the_same(encoder, pairs, convert):
    frame, labels = pairs
    expected = make_classifier(encoder, num_train_epochs=1).fit(frame, labels)
    clf = make_classifier(encoder, num_train_epochs=1).fit(convert(frame), labels)
    assert_equal_adapters(clf, expected)
    assert clf.n_features_in_ == 2
    np.testing.assert_array_equal(clf.predict(convert(frame)), expected.predict(frame))


@pytest.mark.filterwarnings("error")
def test_names_are_remembered_and_compared_as_in_scikit_learn(encoder, pairs):
    frame, labels = pairs
    clf = make_classifier(encoder, num_train_epochs=1).fit(frame, labels)
    assert clf.feature_names_in_.tolist() == ["first", "second"]
    with pytest.raises(ValueError, match="must be in the same order as they were in fit"):
        clf.predict(frame[["second", "first"]])
    with pytest.raises(ValueError, match=r"unseen at fit time:\n- other\n.*yet now missing"):
        clf.predict(frame.rename(columns={"second": "other"}))
    with pytest.raises(ValueError, match="must be in the same order"):
        clf.predict(pl.from_pandas(frame[["second", "first"]]))
    with pytest.raises(ValueError, match="must be in the same order"):
        clf.predict(pa.RecordBatch.from_pandas(frame[["second", "first"]]))
    with (
        pytest.warns(UserWarning, match="valid feature names"),
        pytest.raises(ValueError, match="X has 3 features, but QLoRAClassifier is expecting 2"),
    ):
        clf.predict([("a", "b", "c")])
    with pytest.raises(ValueError, match="one text a row, but QLoRAClassifier was fitted with 2"):
        clf.predict(frame["first"])
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        proba = clf.predict_proba(frame.to_numpy())
    np.testing.assert_array_equal(proba, clf.predict_proba(frame))
    with pytest.warns(UserWarning, match="X has feature names, but QLoRAClassifier was fitted wi"):
        make_classifier(encoder, num_train_epochs=1).fit(frame.to_numpy(), labels).predict(frame)
    with pytest.raises(ValueError, match=r"should match.*\n.*\n- second"):
        clf.set_params(early_stopping=True).fit(frame, labels, X_val=frame[["first"]], y_val=labels)


def test_texts_and_a_table_of_one_column_are_the_same(encoder, corpus):
    texts, labels = corpus
    frame = pd.DataFrame({"text": texts})
    clf = make_classifier(encoder, num_train_epochs=1).fit(frame, labels)
    of_texts = make_classifier(encoder, num_train_epochs=1).fit(texts, labels)
    assert_equal_adapters(clf, of_texts)
    assert clf.feature_names_in_.tolist() == ["text"]
    assert not hasattr(of_texts, "n_features_in_")
    expected = of_texts.predict(texts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for X in (texts, frame["text"], frame):
            np.testing.assert_array_equal(clf.predict(X), expected)
            np.testing.assert_array_equal(of_texts.predict(X), expected)
    with pytest.raises(ValueError, match="unseen at fit time"):
        clf.predict(frame.rename(columns={"text": "body"}))
    with pytest.raises(ValueError, match="X has 2 features, but QLoRAClassifier is expecting 1"):
        of_texts.predict([("a", "b")])
    clf.fit(texts, labels)  # which forgets the table
    assert not hasattr(clf, "n_features_in_")
    assert not hasattr(clf, "feature_names_in_")


# Bad input


@pytest.fixture
def no_model(monkeypatch):
    """Fail a test in which a base is loaded."""

    def load(*_, **__):
        raise AssertionError("a base was loaded")

    monkeypatch.setattr("skqlora.model.backbone.Backbone.load", load)


AB = pd.DataFrame({"a": ["x", "y"], "b": ["u", "v"]})


@pytest.mark.usefixtures("no_model")
@pytest.mark.parametrize(
    ("X", "prompt", "error", "message"),
    [
        (pd.DataFrame(index=[0, 1]), None, ValueError, "X with 0 columns"),
        (np.empty((2, 0), dtype=object), None, ValueError, "X with 0 columns"),
        (AB[:0], None, ValueError, r"0 sample\(s\)"),
        (
            AB.assign(b=[["u"], ["v"]]),
            None,
            TypeError,
            r"\['u'\] of type list in row 0 of column 'b'",
        ),
        (pd.concat([AB, AB], axis=1), None, ValueError, "several columns named 'a'"),
        (
            AB.rename(columns={"a": 1}),
            None,
            TypeError,
            "only supported if all input features have s",
        ),
        (
            [("x", "u"), ("y",)],
            None,
            ValueError,
            r"X\[0\] with 2 entries and X\[1\] with 1 entries",
        ),
        ([("x", "u"), "yv"], None, ValueError, r"X\[1\] with 'yv'.*same length"),
        (np.zeros((2, 3)), None, ValueError, r"shape \(2, 3\) without any text"),
        (np.zeros((2, 3, 1)), None, ValueError, r"shape \(2, 3, 1\)"),
        (AB.assign(b=["u", None]), None, TypeError, "row 1 of column 'b' of X.*fillna"),
        (AB.assign(b=[1.0, np.nan]), None, TypeError, "nan in row 1 of column 'b'"),
        (
            pl.DataFrame({"a": ["x", None], "b": [1, 2]}),
            None,
            TypeError,
            "None in row 1 of column 'a'",
        ),
        (AB.assign(b=[pd.NaT, pd.NaT]), None, TypeError, "NaT in row 0 of column 'b'"),
        ([("x", None), ("y", "v")], None, TypeError, "None in row 0 of column 1 of X"),
        (AB.assign(b=[b"u", b"v"]), None, TypeError, "b'u' of type bytes in row 0 of column 'b'"),
        (
            [("x", "u"), ("y", "\ud800")],
            None,
            ValueError,
            "row 1 in column 1 of X.*no valid Unicode",
        ),
        (AB, "{a} and {c}", ValueError, r"field \{c\}, which is no column of X.*\{a\}, \{b\}"),
        ([("x", np.timedelta64("NaT")), ("y", "v")], None, TypeError, "NaT.* in row 0 of column 1"),
        ([("x", Decimal("nan")), ("y", "v")], None, TypeError, "NaN.* in row 0 of column 1"),
        (AB, "{text}", ValueError, r"field \{text\}, which is no column of X.*\{a\}, \{b\}"),
        (AB, "{a} {2}", ValueError, r"field \{2\}, which is no column"),
        (AB, "{a} {}", ValueError, r"field \{\}, which is no column"),
        (AB, "no field", ValueError, "with a field|fields with their names"),
        (AB, "{a} {b", ValueError, "expected '}'"),
        (AB, "{a:{b}}", ValueError, "fields with their names"),
        (
            AB.assign(b=[1.0, np.nan]),
            "{a}{b:.1f}",
            TypeError,
            "turn the column into text, with a word",
        ),
        (
            AB.assign(b=[pd.Timestamp(0)] * 2),
            "{a}{b:.2f}",
            ValueError,
            "is no format of a date",
        ),
        ([{"a": "x"}], None, TypeError, r"or pandas\.DataFrame\(X\) for all columns"),
        ({"a": "x", "b": "y"}, None, TypeError, r"Pass pandas\.DataFrame\(\[X\]\) if it is a row"),
        (AB, "{a:.2f}{b}", ValueError, "'x' in row 0 of column 'a' of X.*cannot be formatted"),
        (AB.to_numpy(), "{a} {b}", ValueError, r"which have no names: \{0\} to \{1\}"),
        (AB["a"], "{b}", ValueError, r"a template with one \{text\}"),
    ],
)
def test_bad_tables_are_refused_before_a_model_is_loaded(encoder, X, prompt, error, message):
    with pytest.raises(error, match=message):
        make_classifier(encoder, prompt=prompt).fit(X, ["p", "q"])


def test_a_tokenizer_that_cannot_tell_two_texts_apart_is_refused(encoder, pairs, monkeypatch):
    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.is_fast", False)
    with pytest.raises(ValueError, match="Got two columns but the model's tokenizer cannot say"):
        make_classifier(encoder).fit(*pairs)


# What surrounds an estimator


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("prompt", [None, PROMPT, "{second:>9}|{first}"])
def test_a_fitted_table_is_saved_and_read(encoder, pairs, prompt, tmp_path):
    frame, labels = pairs
    clf = make_classifier(encoder, num_train_epochs=1, prompt=prompt).fit(frame, labels)
    expected = clf.predict_proba(frame)
    clf.save(tmp_path / "saved")
    joblib.dump(clf, tmp_path / "dumped")
    for other in [QLoRAClassifier.load(tmp_path / "saved"), joblib.load(tmp_path / "dumped")]:
        np.testing.assert_array_equal(other.predict_proba(frame), expected)
        assert other.feature_names_in_.tolist() == ["first", "second"]
        with pytest.raises(ValueError, match="same order"):
            other.predict(frame[["second", "first"]])
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "['first', 'second']" in card
    assert "clf.predict(X)  # a table with the columns ['first', 'second']" in card
    assert prompt is None or "| prompt |" in card


@pytest.mark.filterwarnings("error")
def test_early_stopping_scores_tables(decoder, pairs):
    frame, labels = pairs
    seen = []

    def scorer(clf, X, y):
        seen.append(X)
        assert (clf.predict(X[:4]) == clf.predict(X)[:4]).all()
        return clf.score(X, y)

    clf = make_classifier(
        decoder, early_stopping=True, prompt="{second:>9}|{first}", num_train_epochs=2
    )
    clf.fit(frame, labels, X_val=frame[:10], y_val=labels[:10])
    assert clf.score(frame[:10], labels[:10]) == clf.best_validation_score_
    clf.set_params(scoring=scorer).fit(frame, labels)
    rows = set(frame.itertuples(index=False, name=None))
    assert all(row in rows for X in seen for row in X)


def test_pieces_and_warm_starts_of_tables(encoder, pairs):
    frame, labels = pairs
    clf = make_classifier(encoder)
    clf.partial_fit(frame[:24], labels[:24], classes=["other", "same"])
    with pytest.raises(ValueError, match="same order"):
        clf.partial_fit(frame[["second", "first"]], labels)
    with pytest.raises(ValueError, match="one text a row"):
        clf.partial_fit(frame["first"], labels)
    clf.partial_fit(frame[24:], labels[24:])
    assert clf.n_samples_seen_ == 48
    assert clf.feature_names_in_.tolist() == ["first", "second"]
    clf.set_params(warm_start=True, num_train_epochs=1).fit(frame, labels)
    assert clf.n_iter_ == 3
    with pytest.raises(ValueError, match="same order"):
        clf.fit(frame[["second", "first"]], labels)


def test_a_fit_of_an_earlier_version_predicts(encoder, corpus):
    clf = make_classifier(encoder, num_train_epochs=1).fit(*corpus)
    expected = clf.predict_proba(corpus[0])
    state = vars(clf)
    del state["_columns_"], state["_weight_scale_"]
    np.testing.assert_array_equal(clf.predict_proba(corpus[0]), expected)


@pytest.mark.filterwarnings("ignore:The prompt has no field for 'other'")
def test_a_killed_fit_of_a_table_resumes_whatever_is_not_read(encoder, pairs, tmp_path):
    frame, labels = pairs
    params = {"checkpoint_dir": tmp_path, "checkpoint_every": 2, "prompt": "{first}: {second}"}
    expected = make_classifier(encoder, prompt=params["prompt"]).fit(frame, labels)
    clf = make_classifier(encoder, **params)
    made = fit_interrupted(clf, (frame.assign(other=[lambda: 1] * 48), labels), at=5)
    assert made == [0, 1, 2, 3, 4]
    resumed = fit_interrupted(clf, (frame.assign(other=2), labels), at=None)
    assert resumed[0] == 4
    assert_equal_adapters(clf, expected)


@pytest.mark.filterwarnings("ignore:The prompt has no field for 'first'")
def test_tables_go_through_scikit_learn(decoder, pairs):
    frame, labels = pairs
    clf = make_classifier(decoder, num_train_epochs=1, prompt="{first}, {second}?")
    search = GridSearchCV(
        clf, {"prompt": ["{first}, {second}?", "{second}"]}, cv=2, error_score="raise"
    )
    search.fit(frame.assign(second=labels), labels)
    assert set(search.cv_results_["param_prompt"]) == {"{first}, {second}?", "{second}"}
    assert len(cross_val_predict(clf, frame, labels, cv=2)) == len(frame)
    calibrated = CalibratedClassifierCV(clf, cv=2, ensemble=False).fit(frame, labels)
    assert calibrated.predict_proba(frame).shape == (48, 2)
    positions = make_classifier(decoder, num_train_epochs=1)
    bagging = BaggingClassifier(positions, n_estimators=2, random_state=0)
    assert len(bagging.fit(frame, labels).predict(frame)) == 48
    upper = FunctionTransformer(
        lambda table: table.apply(lambda column: column.str.upper()),
        feature_names_out="one-to-one",
    )
    table = ColumnTransformer(
        [("upper", upper, ["second"])], remainder="passthrough", verbose_feature_names_out=False
    ).set_output(transform="pandas")
    pipe = make_pipeline(table, clf).fit(frame, labels)
    assert pipe[-1].feature_names_in_.tolist() == ["second", "first"]
    assert len(pipe.predict(frame)) == 48


def test_permutation_importance_tells_which_column_matters(decoder, pairs):
    frame, _ = pairs
    labels = frame["second"].isin(tiny.TOPICS["animal"]).astype(int)
    clf = make_classifier(decoder, num_train_epochs=8).fit(frame, labels)
    found = permutation_importance(clf, frame, labels, n_repeats=3, random_state=0)
    assert found.importances_mean[1] > 0.2
    assert abs(found.importances_mean[0]) < 0.1


def test_partitions_of_dask_are_tables(encoder, pairs):
    dataframe = pytest.importorskip("dask.dataframe")
    frame, labels = pairs
    clf = make_classifier(encoder, num_train_epochs=1).fit(frame, labels)
    partitions = dataframe.from_pandas(frame, npartitions=3)
    predicted = partitions.map_partitions(clf.predict, meta=pd.Series(dtype=object))
    assert predicted.compute(scheduler="threads").tolist() == clf.predict(frame).tolist()
