"""The names and the number of a table's columns, noted and compared as scikit-learn does it."""

import copy
from typing import Any

from sklearn.base import BaseEstimator
from sklearn.utils.validation import validate_data

from skqlora.text.columns import Columns, Rows, Table

NOTED = "n_features_in_", "feature_names_in_"  # by scikit-learn, as attributes of an estimator


def readable(X: Any) -> Any:
    """Give what scikit-learn does not see the columns of as a table of pyarrow.

    These are the tables of `datasets`, and pyarrow's own batches.
    """
    if type(X).__name__ == "RecordBatch":
        from pyarrow import Table as ArrowTable

        return ArrowTable.from_batches([X])
    if isinstance(getattr(X, "column_names", None), list) and hasattr(X, "with_format"):
        return X.with_format("arrow")[:]
    return X


def find_columns(estimator: BaseEstimator, X: Any, table: Table) -> Columns | None:
    """Return what an estimator remembers of the columns of its `X`.

    Parameters
    ----------
    estimator : estimator
        It is left as it is.
    X : array-like
    table : Table
        The table that was read from `X`.

    Returns
    -------
    columns : Columns or None
        None if `X` is just texts.

    Raises
    ------
    TypeError
        If only some of the names are str.
    """
    if not table.two_dimensional:
        return None
    seen = _remembering(estimator, Columns(None, None))
    validate_data(seen, X, skip_check_array=True)
    # Not every version of scikit-learn sees the names of every library's tables.
    return Columns(table.names, seen.n_features_in_)


def check_columns(
    estimator: BaseEstimator, X: Any, table: Table, known: Columns | None, name: str = "X"
) -> Columns | None:
    """Compare the columns of a table with those of a fit.

    A table with one column is as good as the texts in it.

    Parameters
    ----------
    estimator : estimator
        It is left as it is.
    X : array-like
    table : Table
        The table that was read from `X`.
    known : Columns or None
        What the fit remembers; None if it saw just texts.
    name : str, default="X"
        The user's name for `X`.

    Returns
    -------
    columns : Columns or None
        What is known of the columns now.

    Raises
    ------
    ValueError
        If the table has other columns than that of the fit, or others in their places.

    Warns
    -----
    UserWarning
        If only one of the two has names.
    """
    if isinstance(X, Rows):
        return X.remembered
    known_number = 1 if known is None else known.number
    if known_number is None:  # of an adapter that was trained elsewhere
        return find_columns(estimator, X, table)
    if not table.two_dimensional:
        if known_number > 1:
            raise ValueError(
                f"Got {name} with one text a row, but {type(estimator).__name__} was fitted with "
                f"{known_number} columns. Wanted: a table with these columns, in their order, "
                "even for one row: X.iloc[[0]], or pandas.DataFrame([row])."
            )
        return known
    if known is not None or len(table.cells) > 1:
        known_names = None if known is None else known.names
        if known_names and table.names and not _sees_names(estimator, X):
            if known_names != table.names:
                raise ValueError(
                    "The feature names should match those that were passed during fit.\nFeature "
                    f"names must be in the same order as they were in fit.\nGot {name} with "
                    f"{list(table.names)}. Wanted: {list(known_names)}."
                )
            known_names = None
        seen = _remembering(estimator, Columns(known_names, known_number))
        validate_data(seen, X, skip_check_array=True, reset=False)
    return known


def _sees_names(estimator: BaseEstimator, X: Any) -> bool:
    """Return whether this version of scikit-learn knows where the names of a table are."""
    seen = _remembering(estimator, Columns(None, None))
    validate_data(seen, X, skip_check_array=True)
    return hasattr(seen, "feature_names_in_")


def _remembering(estimator: BaseEstimator, columns: Columns) -> Any:
    """Return a copy of an estimator that remembers these columns and no others."""
    copied = copy.copy(estimator)
    for attribute in NOTED:
        vars(copied).pop(attribute, None)
    vars(copied).update(columns.attributes)
    return copied
