"""Checks of a user's labels, which are refused or turned into classes and class numbers."""

from numbers import Integral
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d

from skqlora.text.values import is_missing, plain_str, short

SEVERAL_LABELS = (
    "Wanted: one label for each text. For several, pass a table of 0 and 1: "
    "sklearn.preprocessing.MultiLabelBinarizer().fit_transform(y)."
)


def check_labels(
    y: Any, n_texts: int, classes: np.ndarray | None = None, suffix: str = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Turn a user's labels into sorted classes and class numbers.

    Parameters
    ----------
    y : array-like of shape (n_texts,), or array-like or sparse matrix of shape (n_texts, n_labels)
        A label for each text, or a multilabel indicator of 0 and 1.
    n_texts : int
    classes : ndarray of shape (n_classes,), optional
        The only classes that `y` may have, sorted. Without them `y` must have two or more.
    suffix : str, default=""
        The suffix of the user's names for texts and labels.

    Returns
    -------
    classes : ndarray of shape (n_classes,)
        The classes in the labels' own dtype, or the numbers of an indicator's columns.
    targets : ndarray of int, of shape (n_texts,) or (n_texts, n_classes)

    Raises
    ------
    ValueError
        If labels are missing, of mixed types, continuous, all the same or not among `classes`, if
        there is not one for each text, or if an indicator has other values than 0 and 1.
    """
    if y is None:
        raise ValueError("QLoRAClassifier requires y to be passed, but the target y is None.")
    name = f"y{suffix}"
    labels = _as_array(y, name)
    if len(labels) != n_texts:
        raise ValueError(
            f"Found inconsistent numbers of samples: {n_texts} texts in X{suffix} but "
            f"{len(labels)} labels in {name}. Wanted: one label for each text."
        )
    if labels.ndim == 2 and labels.shape[1] > 1:
        return _check_indicator(labels, classes, name)
    labels = _like_numpy(y, _check_column(column_or_1d(labels, warn=True), name))
    if classes is None:
        classes, targets = np.unique(labels, return_inverse=True)
        if len(classes) < 2:
            raise ValueError(
                f"Got a y with only one class, {classes.tolist()[0]!r}. Wanted: at least two "
                "classes."
            )
        return classes, targets
    numbers = {label: number for number, label in enumerate(classes.tolist())}
    unknown = [label for label in np.unique(labels).tolist() if label not in numbers]
    if unknown:
        raise ValueError(
            f"Got labels in {name} that are not among the classes: {short(unknown)}. Wanted: only "
            f"{short(classes.tolist())}. Drop those rows, or fit anew with all classes."
        )
    return classes, np.array([numbers[label] for label in labels.tolist()])


def check_classes(classes: Any, earlier: np.ndarray | None) -> np.ndarray:
    """Check the classes of data that comes in pieces.

    Parameters
    ----------
    classes : array-like of shape (n_classes,) or None
    earlier : ndarray of shape (n_classes,) or None
        The classes of the earlier pieces.

    Returns
    -------
    classes : ndarray of shape (n_classes,)
        The classes, sorted.

    Raises
    ------
    ValueError
        If there are no classes, fewer than two, or other ones than before.
    """
    if classes is None:
        if earlier is None:
            raise ValueError(
                "classes must be passed on the first call to partial_fit. Wanted: all labels that "
                "will come."
            )
        return earlier
    column = column_or_1d(_as_array(classes, "classes"))
    if len(column):
        column = _like_numpy(classes, _check_column(column, "classes"))
    classes = np.unique(column)
    if len(classes) < 2:
        raise ValueError(f"Got classes={classes.tolist()}. Wanted: at least two classes.")
    if earlier is not None and not np.array_equal(classes, earlier):
        raise ValueError(
            f"Got classes={classes.tolist()} but those before are {earlier.tolist()}. Wanted: the "
            "same at each call of partial_fit, or a new estimator."
        )
    return classes


def _like_numpy(y: Any, labels: np.ndarray) -> np.ndarray:
    """Give the labels of a list of str the dtype that NumPy gives it, if that loses nothing."""
    if not isinstance(y, list | tuple) or labels.dtype != object:
        return labels
    fixed_width = labels.astype(str)
    return fixed_width if fixed_width.tolist() == labels.tolist() else labels  # it cuts off "\0"


def plain_labels(y: Any) -> Any:
    """Turn the entries of a list into plain text where they are text of another type."""
    return [plain_str(label) for label in y] if isinstance(y, list | tuple) else y


def _as_array(y: Any, name: str) -> np.ndarray:
    """Turn labels into an array without turning other types into text."""
    if scipy.sparse.issparse(y):
        return y.toarray()
    if not isinstance(y, (list, tuple)):
        labels = np.asarray(y)
        if labels.ndim == 0:
            raise ValueError(f"Got {name} = {short(y)}. Wanted: one label for each text.")
        return labels.astype(object) if labels.dtype.kind == "T" else labels  # "T" is StringDType
    # NumPy would turn ["a", nan] and ["a", 1] into text, so keep a list's entries as they are.
    try:
        return np.array(y, dtype=object)
    except ValueError as error:  # the labels are arrays of different lengths
        raise ValueError(f"Got {name} that is no array: {error}. {SEVERAL_LABELS}") from error


def _check_column(labels: np.ndarray, name: str) -> np.ndarray:
    """Refuse a column of labels of different kinds; return other columns in the labels' dtype."""
    if labels.dtype != object:
        labels = _check_no_missing(labels, name)
        if labels.dtype.kind == "f" and not np.isfinite(labels).all():
            raise ValueError(
                f"Input {name} contains infinity. Wanted: class labels, e.g. str or int."
            )
    else:
        for position, label in enumerate(labels):
            if isinstance(label, (list, tuple, set, frozenset, np.ndarray)):
                raise ValueError(f"Got {name}[{position}] = {short(label)}. {SEVERAL_LABELS}")
        labels = _check_no_missing(labels, name)
        if len({isinstance(label, str) for label in labels}) > 1:
            types = sorted({type(label).__name__ for label in labels})
            raise ValueError(
                f"Got labels of the types {', '.join(types)} in {name}. Wanted: one type, e.g. "
                "[str(label) for label in y]."
            )
        if isinstance(labels[0], str):
            labels = np.array([plain_str(label) for label in labels], dtype=object)
        else:
            # The labels are numbers, bools or dates, from a list or from pandas.
            typed = np.array(labels.tolist())
            are_integers = all(isinstance(label, Integral) for label in labels)
            if are_integers and typed.dtype.kind in ("f", "O"):
                largest = max(labels.tolist(), key=abs)
                raise ValueError(
                    f"Got labels in {name} beyond signed integers of 64 bits, e.g. {largest}. "
                    "Wanted: smaller numbers, or text: [str(label) for label in y]."
                )
            if typed.dtype == object or typed.ndim != 1:
                raise ValueError(
                    f"Got labels of type {type(labels[0]).__name__} in {name}. Wanted: str, int or "
                    "bool, e.g. [str(label) for label in y]."
                )
            return _check_column(typed, name)
    check_classification_targets(labels)
    return labels


def _check_indicator(
    labels: np.ndarray, classes: np.ndarray | None, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Check a table of 0 and 1 that says which labels each text has."""
    values = np.array(labels.tolist())
    if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        flat = labels.ravel().tolist()
        others = [value for value in flat if is_missing(value) or value not in (0, 1)]
        what = short(others[0]) if others else f"entries of type {type(flat[0]).__name__}"
        raise ValueError(
            f"Got {name} of shape {labels.shape} with {what} in it. Wanted: one label for each "
            "text, or a multilabel indicator of 0 and 1 with a column for each label."
        )
    n_labels = values.shape[1]
    if classes is not None and not np.array_equal(classes, np.arange(n_labels)):
        raise ValueError(
            f"Got a multilabel {name} with {n_labels} columns. Wanted: the classes "
            f"{short(classes.tolist())}, as before."
        )
    return np.arange(n_labels), values.astype(np.int64)


def _check_no_missing(labels: np.ndarray, name: str) -> np.ndarray:
    for position, label in enumerate(labels):
        if is_missing(label):
            raise ValueError(
                f"Got {name}[{position}] = {label}, a missing label. Wanted: a label in every row. "
                "Drop the rows without one."
            )
    return labels
