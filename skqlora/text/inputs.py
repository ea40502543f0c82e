"""Checks of a user's texts, labels and weights, which are refused or turned into plain values.

This module knows nothing about models: bad input is reported before a model is loaded.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d

SEVERAL_LABELS = (
    "Wanted: one label for each text. For several, pass a table of 0 and 1: "
    "sklearn.preprocessing.MultiLabelBinarizer().fit_transform(y)."
)


def check_texts(X: Any, name: str = "X") -> list[str]:
    """Turn a user's texts into a list of str.

    Parameters
    ----------
    X : list, tuple, Series or array of str, of shape (n_texts,), or a table with one column
    name : str, default="X"
        The user's name for `X`.

    Returns
    -------
    texts : list of str, of length n_texts

    Raises
    ------
    TypeError
        If `X` is not a sequence, or if an entry is not a str. The message names its position.
    ValueError
        If `X` is empty or has several columns, or if a text is not valid Unicode.
    """
    wanted = "Wanted: a list, Series or array of str."
    if isinstance(X, (str, bytes)):
        raise TypeError(
            f"Got {name} as a single {type(X).__name__}. {wanted} Pass [text] for one text."
        )
    column_like = hasattr(X, "__len__") and hasattr(X, "__getitem__")
    if not column_like or isinstance(X, dict) or scipy.sparse.issparse(X):
        raise TypeError(
            f"Got {name} of type {type(X).__name__}. {wanted} Pass list({name}) if it holds texts."
        )
    values = np.asarray(X, dtype=object)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise ValueError(
            f"Got {name} of shape {values.shape}. Wanted: one text a row. Pass a single column, "
            "or join the columns into one text."
        )
    if len(values) == 0:
        raise ValueError(f"Got {name} with 0 sample(s). Wanted: at least one text.")
    for position, text in enumerate(values):
        if not isinstance(text, str):
            remedy = "Turn it into text."
            if _is_missing(text):
                remedy = "Drop the row, or fill it with '' (pandas: fillna, polars: fill_null)."
            raise TypeError(
                f"Got {name}[{position}] = {_short(text)} of type {type(text).__name__}. Wanted: "
                f"str in every row. {remedy}"
            )
    return [_well_formed(text, f"{name}[{position}]") for position, text in enumerate(values)]


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with their labels as numbers, and their weights.

    Attributes
    ----------
    texts : list of str, of length n_texts
    classes : ndarray of shape (n_classes,)
        The classes in the labels' own dtype, or the numbers of a multilabel indicator's columns.
    targets : ndarray of int, of shape (n_texts,) or (n_texts, n_classes)
        The class numbers, or a multilabel indicator of 0 and 1.
    sample_weight : ndarray of shape (n_texts,), float64, or None
        The weights, without zeros. None gives each text a weight of one.
    """

    texts: list[str]
    classes: np.ndarray
    targets: np.ndarray
    sample_weight: np.ndarray | None

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def multilabel(self) -> bool:
        """Whether a text has any number of labels instead of one class."""
        return self.targets.ndim == 2

    @property
    def labels(self) -> np.ndarray:
        """The labels as the user wrote them."""
        return self.targets if self.multilabel else self.classes[self.targets]

    def take(self, rows: np.ndarray) -> "LabelledTexts":
        """Select rows by number."""
        return LabelledTexts(
            texts=[self.texts[row] for row in rows],
            classes=self.classes,
            targets=self.targets[rows],
            sample_weight=None if self.sample_weight is None else self.sample_weight[rows],
        )


def check_labelled_texts(
    texts: list[str],
    y: Any,
    sample_weight: Any = None,
    classes: np.ndarray | None = None,
    suffix: str = "",
) -> LabelledTexts:
    """Combine checked texts with a user's labels and weights; leave out rows of weight zero.

    Parameters
    ----------
    texts : list of str, of length n_texts
    y : array-like or sparse matrix of shape (n_texts,) or (n_texts, n_labels)
    sample_weight : array-like of shape (n_texts,) or float, optional
    classes : ndarray of shape (n_classes,), optional
        The only classes that `y` may have. Without them `y` must have two or more.
    suffix : str, default=""
        The suffix of the user's names for texts, labels and weights.

    Raises
    ------
    ValueError
        If labels or weights are invalid, or if there is not one for each text.
    """
    classes, targets = check_labels(y, len(texts), classes, suffix)
    sample_weight = check_sample_weight(sample_weight, len(texts), f"sample_weight{suffix}")
    table = LabelledTexts(texts, classes, targets, sample_weight)
    if table.sample_weight is None:
        return table
    return table.take(np.flatnonzero(table.sample_weight))


def is_validation_given(
    X_val: Any, y_val: Any, sample_weight_val: Any, early_stopping: bool
) -> bool:
    """Check whether the user passed texts for early stopping to score.

    Raises
    ------
    ValueError
        If the texts or the labels are missing from what was passed, or if there is no early
        stopping.
    """
    values = {"X_val": X_val, "y_val": y_val, "sample_weight_val": sample_weight_val}
    given = [name for name, value in values.items() if value is not None]
    missing = [name for name in ("X_val", "y_val") if name not in given]
    if given and missing:
        raise ValueError(
            f"Got {' and '.join(given)} without {' and '.join(missing)}. Wanted: both X_val and "
            "y_val, or neither."
        )
    if given and not early_stopping:
        raise ValueError(
            f"Got {' and '.join(given)} with early_stopping=False, which would ignore them. "
            "Wanted: early_stopping=True, or none of them."
        )
    return bool(given)


def check_validation(
    texts: list[str], y_val: Any, sample_weight_val: Any, training: LabelledTexts
) -> LabelledTexts:
    """Combine texts and labels for early stopping to score, with the classes of the training.

    Parameters
    ----------
    texts : list of str, of length n_texts
    y_val : array-like or sparse matrix of shape (n_texts,) or (n_texts, n_labels)
    sample_weight_val : array-like of shape (n_texts,) or None
    training : LabelledTexts
        The texts and labels to train on.

    Raises
    ------
    ValueError
        If labels or weights are invalid, or if the labels are of another kind than in training.
    """
    table = check_labelled_texts(texts, y_val, sample_weight_val, training.classes, suffix="_val")
    if table.multilabel != training.multilabel:
        kinds = ["one label for each text", "a multilabel indicator"]
        raise ValueError(
            f"Got {kinds[table.multilabel]} as y_val, but {kinds[training.multilabel]} as y. "
            "Wanted: both of one kind."
        )
    return table


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
    labels = _check_column(column_or_1d(labels, warn=True), name)
    if isinstance(y, (list, tuple)) and labels.dtype == object:
        labels = labels.astype(str)  # the dtype that NumPy gives a list of str
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
            f"Got labels in {name} that are not among the classes: {_short(unknown)}. Wanted: only "
            f"{_short(classes.tolist())}. Drop those rows, or fit anew with all classes."
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
    classes = np.unique(_check_column(column, "classes")) if len(column) else column
    if len(classes) < 2:
        raise ValueError(f"Got classes={classes.tolist()}. Wanted: at least two classes.")
    if earlier is not None and not np.array_equal(classes, earlier):
        raise ValueError(
            f"Got classes={classes.tolist()} but those before are {earlier.tolist()}. Wanted: the "
            "same at each call of partial_fit, or a new estimator."
        )
    return classes


def check_same_classes(table: LabelledTexts, classes: np.ndarray, multilabel: bool) -> None:
    """Refuse to continue a fit that had other classes than the table.

    Raises
    ------
    ValueError
        If the table's classes are not the fitted ones.
    """
    if not np.array_equal(table.classes, classes) or table.multilabel != multilabel:
        kinds = [
            "multilabel" if kind else "one for each text" for kind in (table.multilabel, multilabel)
        ]
        raise ValueError(
            f"Got y with the classes {_short(table.classes.tolist())} ({kinds[0]}) but the fit to "
            f"continue from has {_short(classes.tolist())} ({kinds[1]}). Wanted: the same classes, "
            "or `fit` with warm_start=False."
        )


def check_sample_weight(
    sample_weight: Any, n_texts: int, name: str = "sample_weight"
) -> np.ndarray | None:
    """Check a user's weights.

    Parameters
    ----------
    sample_weight : array-like of shape (n_texts,), float or None
    n_texts : int
    name : str, default="sample_weight"
        The user's name for the weights.

    Returns
    -------
    sample_weight : ndarray of shape (n_texts,), float64, or None

    Raises
    ------
    ValueError
        If a weight is negative, infinite, NaN or not numeric, or if all weights are zero.
    """
    if sample_weight is None:
        return None
    weights = np.asarray(sample_weight)
    if weights.dtype.kind not in "biuf":  # numbers of pandas' own types arrive as objects
        try:
            weights = weights.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Got a {name} that is not all numbers: {error}. Wanted: a number for each text."
            ) from error
    weights = np.full(n_texts, weights) if weights.ndim == 0 else weights
    if weights.shape != (n_texts,):
        raise ValueError(
            f"Got a {name} of shape {weights.shape}. Wanted: ({n_texts},), one weight for "
            "each text."
        )
    weights = weights.astype(np.float64)
    bad = np.flatnonzero(~(np.isfinite(weights) & (weights >= 0)))
    if len(bad):
        raise ValueError(
            f"Got {name}[{bad[0]}] = {weights[bad[0]]}. Wanted: finite numbers, none of "
            "them negative. A weight of 0 leaves a text out."
        )
    if not weights.any():
        raise ValueError(f"Got a {name} of zeros only. Wanted: at least one weight above zero.")
    return weights


def _as_array(y: Any, name: str) -> np.ndarray:
    """Turn labels into an array without turning other types into text."""
    if scipy.sparse.issparse(y):
        return y.toarray()
    if not isinstance(y, (list, tuple)):
        labels = np.asarray(y)
        if labels.ndim == 0:
            raise ValueError(f"Got {name} = {_short(y)}. Wanted: one label for each text.")
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
                raise ValueError(f"Got {name}[{position}] = {_short(label)}. {SEVERAL_LABELS}")
        labels = _check_no_missing(labels, name)
        if len({isinstance(label, str) for label in labels}) > 1:
            types = sorted({type(label).__name__ for label in labels})
            raise ValueError(
                f"Got labels of the types {', '.join(types)} in {name}. Wanted: one type, e.g. "
                "[str(label) for label in y]."
            )
        if not isinstance(labels[0], str):
            # The labels are numbers, bools or dates, from a list or from pandas.
            typed = np.array(labels.tolist())
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
        others = [value for value in flat if _is_missing(value) or value not in (0, 1)]
        what = _short(others[0]) if others else f"entries of type {type(flat[0]).__name__}"
        raise ValueError(
            f"Got {name} of shape {labels.shape} with {what} in it. Wanted: one label for each "
            "text, or a multilabel indicator of 0 and 1 with a column for each label."
        )
    n_labels = values.shape[1]
    if classes is not None and not np.array_equal(classes, np.arange(n_labels)):
        raise ValueError(
            f"Got a multilabel {name} with {n_labels} columns. Wanted: the classes "
            f"{_short(classes.tolist())}, as before."
        )
    return np.arange(n_labels), values.astype(np.int64)


def _check_no_missing(labels: np.ndarray, name: str) -> np.ndarray:
    for position, label in enumerate(labels):
        if _is_missing(label):
            raise ValueError(
                f"Got {name}[{position}] = {label}, a missing label. Wanted: a label in every row. "
                "Drop the rows without one."
            )
    return labels


def _well_formed(text: str, name: str) -> str:
    """Return a plain str; refuse one with half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"Got {name} = {_short(text)}, which is no valid Unicode. Wanted: text, e.g. "
            "text.encode('utf-8', 'replace').decode('utf-8')."
        ) from error
    return str(text)


def _is_missing(label: Any) -> bool:
    if label is None or type(label).__name__ in ("NAType", "NaTType"):  # types of pandas
        return True
    if isinstance(label, np.datetime64):
        return bool(np.isnat(label))
    return isinstance(label, (float, np.floating)) and bool(np.isnan(label))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
