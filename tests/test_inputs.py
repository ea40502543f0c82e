"""Bad texts and labels are refused with what came, what is wanted and the remedy."""

from datetime import date
from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse

from skqlora.text.columns import read_table
from skqlora.text.inputs import CheckedTexts
from skqlora.text.labels import check_labels

TEXTS = ["one", "two"]


@pytest.mark.parametrize(
    "X",
    [
        TEXTS,
        tuple(TEXTS),
        np.array(TEXTS),
        np.array(TEXTS, dtype=object),
        np.array(TEXTS)[:, None],
        pd.Series(TEXTS, index=[7, 3]),
        pd.Series(TEXTS, dtype="category"),
        pd.DataFrame({"text": TEXTS}, index=[7, 3]),
    ],
    ids=lambda X: type(X).__name__,
)
def test_every_shape_of_a_column_of_texts_is_taken(X):
    texts = CheckedTexts.of(read_table(X)).texts
    assert texts == TEXTS
    assert all(type(text) is str for text in texts)


@pytest.mark.parametrize(
    ("X", "error", "message"),
    [
        ("one text", TypeError, r"single str\. .* Pass \[text\]"),
        (b"one text", TypeError, "single bytes"),
        (None, TypeError, "X of type NoneType"),
        (3, TypeError, "X of type int"),
        ({"a": "b"}, TypeError, "X of type dict"),
        ((text for text in TEXTS), TypeError, r"type generator\. .* Pass list\(X\)"),
        ([], ValueError, r"0 sample\(s\)"),
        (["a", None], TypeError, r"X\[1\] = None of type NoneType.*fillna"),
        (["a", np.nan], TypeError, r"X\[1\] = nan of type float"),
        (pd.Series(["a", pd.NA]), TypeError, r"X\[1\] ="),
        (pl.Series(["a", None]), TypeError, r"X\[1\] = None of type NoneType.*fillna"),
        (pl.DataFrame({"text": ["a", None]}), TypeError, r"X\[1\] = None of type NoneType"),
        (["a", b"b"], TypeError, r"X\[1\] = b'b' of type bytes"),
        ([1.5, "a"], TypeError, r"X\[0\] = 1.5 of type float.*Turn it into text\.$"),
        ([["a"], ["b", "c"]], ValueError, r"X\[0\] with 1 entries and X\[1\] with 2 entries"),
        (["a", ["b", "c"]], TypeError, r"X\[1\] = \['b', 'c'\] of type list.*Pass a table"),
        (np.zeros((3, 4)), ValueError, r"shape \(3, 4\)"),
        (scipy.sparse.eye_array(3).tocsr(), TypeError, "X of type csr_array"),
        (["a", "\ud800 b"], ValueError, r"X\[1\] = .* no valid Unicode"),
    ],
)
def test_bad_texts_are_refused(X, error, message):
    with pytest.raises(error, match=message):
        CheckedTexts.of(read_table(X))


@pytest.mark.parametrize(
    "y",
    [
        ["b", "a", "b"],
        [3, 1, 3],
        [True, False, True],
        np.array(["b", "a", "b"], dtype=object),
        pd.Series(["b", "a", "b"], dtype="category"),
        pd.Series([3, 1, 3], dtype="Int64"),
    ],
)
def test_labels_come_back_from_their_classes(y):
    classes, targets = check_labels(y, n_texts=3)
    assert targets.tolist() == [1, 0, 1]
    assert classes[targets].tolist() == list(y)


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (None, "target y is None"),
        (["a", "b"], "3 texts in X but 2 labels in y"),
        (["a", "a", "a"], "only one class"),
        (["a", None, "b"], r"y\[1\] = None, a missing label"),
        (["a", np.nan, "b"], r"y\[1\] = nan, a missing label"),
        (["a", 1, "b"], "types int, str in y"),
        ([True, "x", False], "types bool, str in y"),
        (np.array(["2020-01-01", "NaT", "2020-01-03"], "M8[D]"), r"y\[1\] = NaT, a missing"),
        ([1.0, np.nan, 2.0], r"y\[1\] = nan, a missing label"),
        (pd.Series(["a", "b", pd.NA]), r"y\[2\] = .*a missing label"),
        (pl.Series(["a", "b", None]), r"y\[2\] = .*a missing label"),
        (pl.Series([1, 2, None]), r"y\[2\] = .*a missing label"),
        ([date(2026, 1, day) for day in (1, 2, 3)], "labels of type date in y"),
        (pd.cut(pd.Series([1, 2, 3]), 2), "labels of type Interval in y"),
        ([Decimal(1), Decimal(2), Decimal(1)], "labels of type Decimal in y"),
        (np.full((3, 2), Decimal("0.5")), r"y of shape \(3, 2\) with Decimal"),
        (np.full((3, 2), Decimal(1)), "entries of type Decimal"),
        ([0.5, 1.25, 2.0], "Unknown label type: continuous"),
        (np.eye(3) * 2, r"shape \(3, 3\) with 2.0 in it.*multilabel indicator of 0 and 1"),
    ],
)
def test_bad_labels_are_refused(y, message):
    with pytest.raises(ValueError, match=message):
        check_labels(y, n_texts=3)


def test_labels_of_mixed_types_are_refused():
    y = np.array(["a", 1, "b"], dtype=object)
    with pytest.raises(ValueError, match="types int, str in y"):
        check_labels(y, n_texts=3)
