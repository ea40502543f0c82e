"""What texts and labels may look like: refused here, before anything is loaded, or made plain."""

from typing import Any

import numpy as np
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d


def check_texts(X: Any) -> list[str]:
    """Turn a user's texts into a list of str.

    Parameters
    ----------
    X : list, tuple, Series or array of str, of shape (n_texts,), or a table with one column

    Returns
    -------
    texts : list of str, of length n_texts

    Raises
    ------
    TypeError
        If `X` is no sequence, or one of its entries is no str: the message names its position.
    ValueError
        If `X` is empty, has several columns, or a text is no valid Unicode.
    """
    wanted = "Wanted: a list, Series or array of str."
    if isinstance(X, (str, bytes)):
        raise TypeError(f"Got X as a single {type(X).__name__}. {wanted} Pass [text] for one text.")
    if not hasattr(X, "__len__") or not hasattr(X, "__getitem__") or isinstance(X, dict):
        raise TypeError(
            f"Got X of type {type(X).__name__}. {wanted} Pass list(X) if it holds texts."
        )
    values = np.asarray(X, dtype=object)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values[:, 0]
    if values.ndim != 1:
        raise ValueError(
            f"Got X of shape {values.shape}. Wanted: one text a row. Pass a single column, or join "
            "the columns into one text."
        )
    if len(values) == 0:
        raise ValueError("Got X with 0 sample(s). Wanted: at least one text.")
    for position, text in enumerate(values):
        if not isinstance(text, str):
            raise TypeError(
                f"Got X[{position}] = {_short(text)} of type {type(text).__name__}. Wanted: str in "
                "every row. Drop the row, or turn it into text (missing texts: fillna(''))."
            )
    return [_well_formed(text, position) for position, text in enumerate(values)]


def check_labels(y: Any, n_texts: int) -> tuple[np.ndarray, np.ndarray]:
    """Turn a user's labels into sorted classes and class numbers.

    Parameters
    ----------
    y : array-like of shape (n_texts,)
    n_texts : int

    Returns
    -------
    classes : ndarray of shape (n_classes,)
        In the labels' own dtype.
    targets : ndarray of shape (n_texts,), int

    Raises
    ------
    ValueError
        If labels are missing, of mixed types, continuous, not one for each text, or all the same.
    """
    if y is None:
        raise ValueError("QLoRAClassifier requires y to be passed, but the target y is None.")
    # NumPy would turn ["a", nan] and ["a", 1] into text: look at a list's own entries first.
    labels = np.array(y, dtype=object) if isinstance(y, (list, tuple)) else np.asarray(y)
    if labels.ndim > 2 or (labels.ndim == 2 and labels.shape[1] > 1):
        raise ValueError(f"Got y of shape {labels.shape}. Wanted: one label for each text.")
    labels = column_or_1d(labels, warn=True)
    if len(labels) != n_texts:
        raise ValueError(
            f"Found inconsistent numbers of samples: {n_texts} texts in X but {len(labels)} labels "
            "in y. Wanted: one label for each text."
        )
    for position, label in enumerate(labels):
        if _is_missing(label):
            raise ValueError(
                f"Got y[{position}] = {label}, a missing label. Wanted: a label in every row. Drop "
                "the rows without one."
            )
    if len({isinstance(label, str) for label in labels}) > 1:
        types = sorted({type(label).__name__ for label in labels})
        raise ValueError(
            f"Got labels of the types {', '.join(types)} in y. Wanted: one type, e.g. "
            "[str(label) for label in y]."
        )
    if isinstance(y, (list, tuple)):
        labels = np.asarray(y)
    check_classification_targets(labels)
    classes, targets = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"Got a y with only one class, {classes.tolist()[0]!r}. Wanted: at least two classes."
        )
    return classes, targets


def _well_formed(text: str, position: int) -> str:
    """Return a plain str, refusing half a surrogate pair, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"Got X[{position}] = {_short(text)}, which is no valid Unicode. Wanted: text, e.g. "
            "text.encode('utf-8', 'replace').decode('utf-8')."
        ) from error
    return str(text)


def _is_missing(label: Any) -> bool:
    if label is None or type(label).__name__ in ("NAType", "NaTType"):  # pandas' own
        return True
    if isinstance(label, np.datetime64):
        return bool(np.isnat(label))
    return isinstance(label, (float, np.floating)) and bool(np.isnan(label))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
