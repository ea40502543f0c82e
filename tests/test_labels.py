"""Every kind of text column and of label; multilabel targets."""

import enum

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse
from helpers import make_classifier


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
        np.array(["2026-01-01", "2026-01-02"] * 24, dtype="datetime64[D]"),
        np.array(["x", "y"] * 24, dtype=np.dtypes.StringDType()),
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


class Topic(str, enum.Enum):  # noqa: UP042 (its str is its name)
    """Text that prints and hashes as something else."""

    PO = "politics"
    SP = "sport"
    POL = "police"


class Loud(str):
    """Text that prints as something else."""

    def __str__(self):
        return super().__str__().upper()


@pytest.mark.parametrize(
    "wrap",
    [
        list,
        tuple,
        pd.Series,
        lambda y: pd.Series(y, dtype="category"),
        lambda y: np.array(y, dtype=object),
        lambda y: [Loud(label.value) for label in y],
    ],
)
def test_labels_that_print_as_something_else(clf, corpus, wrap):
    y = list(Topic) * 16
    plain = [str.__str__(label) for label in y]
    expected = clf.fit(corpus[0], plain).predict(corpus[0]).tolist()
    clf.set_params(class_weight={Topic.PO: 1.0}).fit(corpus[0], wrap(y))
    assert clf.classes_.tolist() == sorted(plain[:3])
    assert clf.predict(corpus[0]).tolist() == expected
    assert {type(label) for label in clf.predict(corpus[0]).tolist()} == {str}
    assert clf.score(corpus[0], wrap(y)) == clf.score(corpus[0], plain) > 0.3
    clf.partial_fit(corpus[0], wrap(y), classes=plain[:3])


def test_texts_that_print_as_something_else(clf, corpus):
    texts, labels = corpus
    expected = clf.fit(texts, labels).predict_proba(texts)
    np.testing.assert_array_equal(clf.predict_proba([Loud(text) for text in texts]), expected)


def test_labels_that_end_in_zeros_stay_apart(clf, corpus):
    y = ["a", "a\0", "b"] * 16
    clf.fit(corpus[0], y)
    assert clf.classes_.tolist() == ["a", "a\0", "b"]
    assert set(clf.predict(corpus[0]).tolist()) <= set(y)


@pytest.mark.parametrize("y", [[2**63, -1], [2**70, 1], pd.Series([2**70, 1], dtype=object)])
def test_integers_beyond_64_bits_are_named(clf, y):
    with pytest.raises(ValueError, match=r"beyond signed integers of 64 bits, e\.g\. \d+\."):
        clf.fit(["a", "b"], y)


def test_classes_of_a_list_have_one_dtype(clf, corpus):
    texts, labels = corpus
    fitted = clf.fit(texts, list(labels)).classes_.dtype
    other = make_classifier(clf.model, num_train_epochs=1)
    other.partial_fit(texts, list(labels), classes=sorted(set(labels)))
    assert fitted == other.classes_.dtype == np.dtype("<U6")
