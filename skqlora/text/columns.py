"""A user's texts or table: what is in its columns, and the text that a prompt takes of them.

This module knows nothing of labels, tokens or models.
"""

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np
import scipy.sparse

from skqlora._utils.messages import warn
from skqlora.settings.template import TEXT_FIELD, Field, Template, is_for_one_text
from skqlora.text.values import is_missing, plain_str, short, well_formed

# What is printed as a reader would write it. Anything else has to be turned into text by the user.
PRINTABLE = (str, Number, np.generic, datetime.date, datetime.time, datetime.timedelta)
SHORT_FLOATS = "float32", "float16", "float", "halffloat"  # the last two are pyarrow's names
LIKE_A_FIELD = re.compile(r"\{[A-Za-z_]\w*(?:![rsa])?(?::[^{}]*)?\}")


@dataclass(frozen=True)
class Columns:
    """What a fit remembers of the columns of its `X`.

    Attributes
    ----------
    names : tuple of str or None
    number : int or None
        The number of columns; None if it is not known, as for an adapter that was trained
        elsewhere.
    """

    names: tuple[str, ...] | None
    number: int | None

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes by which scikit-learn's estimators tell it."""
        found: dict[str, Any] = {}
        if self.number is not None:
            found["n_features_in_"] = self.number
        if self.names is not None:
            found["feature_names_in_"] = np.array(self.names, dtype=object)
        return found


class Rows(list):
    """The rows of a table that was checked, as tuples of its cells. A slice of them is one too.

    Attributes
    ----------
    remembered : Columns
        What was remembered of the table.
    """

    def __init__(self, rows: Sequence[tuple], remembered: Columns):
        super().__init__(rows)
        self.remembered = remembered

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        return Rows(found, self.remembered) if isinstance(place, slice) else found


@dataclass(frozen=True)
class Table:
    """The cells of a user's table.

    Attributes
    ----------
    cells : list of list, of shape (n_columns, n_rows)
    labels : list or None
        What the columns are called in the user's table, str or not.
    two_dimensional : bool
        Whether these are columns, and not just texts.
    """

    cells: list[list[Any]]
    labels: list[Any] | None
    two_dimensional: bool

    @property
    def names(self) -> tuple[str, ...] | None:
        """The names of the columns, if all are str."""
        if self.labels is None or not all(isinstance(label, str) for label in self.labels):
            return None
        return tuple(map(plain_str, self.labels))


def read_table(X: Any, name: str = "X") -> Table:
    """Read what a user passes as texts.

    Parameters
    ----------
    X : array-like of shape (n_rows,) or (n_rows, n_columns)
        A list, array or Series of texts; or a DataFrame of pandas or polars, a table of pyarrow or
        `datasets`, an array of two dimensions, or a list of lists or tuples.
    name : str, default="X"
        The user's name for `X`.

    Returns
    -------
    table : Table
        The columns. The content of their cells is not looked at.

    Raises
    ------
    TypeError
        If `X` is not a sequence.
    ValueError
        If there are no columns or no rows, if two columns have one name, if rows are of different
        lengths, or if no column of several holds text.
    """
    _check_sequence(X, name)
    keys, two_dimensional = _keys(X), True
    if keys is not None:
        cells = _cells_of_frame(X, keys, name)
    elif isinstance(X, (list, tuple)) and X and _is_row(X[0]):
        cells = _cells_of_rows(X, name)
    else:
        values = np.asarray(X, dtype=object)
        two_dimensional = values.ndim == 2
        if values.ndim not in (1, 2):
            raise ValueError(
                f"Got {name} of shape {values.shape}. Wanted: a text, or a row of a table, for "
                "each sample."
            )
        cells = values.T.tolist() if two_dimensional else [values.tolist()]
    if not cells:
        raise ValueError(f"Got {name} with 0 columns. Wanted: at least one column of text.")
    if not cells[0]:
        raise ValueError(f"Got {name} with 0 sample(s). Wanted: at least one text.")
    if len(cells) > 1 and not any(isinstance(cell, str) for column in cells for cell in column):
        raise ValueError(
            f"Got {name} of shape {len(cells[0]), len(cells)} without any text. Wanted: a table "
            "with at least one column of str."
        )
    return Table(cells, keys, two_dimensional)


def check_column(cells: list[Any], name: str = "X") -> list[str]:
    """Check the only column of a table, which holds texts.

    Raises
    ------
    TypeError
        If a cell is not a str. The message names its position.
    ValueError
        If a text is not valid Unicode.
    """
    for position, text in enumerate(cells):
        if not isinstance(text, str):
            remedy = "Turn it into text."
            if isinstance(text, dict):  # a row of a table, such as `datasets.Dataset`
                column = f"a column, such as {name}[{next(iter(text), 'text')!r}]"
                remedy = f"Pass {column}, or pandas.DataFrame({name}) for all columns."
            if isinstance(text, (list, tuple)):
                remedy = "Pass a table with a column for each of its entries."
            if is_missing(text):
                remedy = "Drop the row, or fill it with '' (pandas: fillna, polars: fill_null)."
            raise TypeError(
                f"Got {name}[{position}] = {short(text)} of type {type(text).__name__}. Wanted: "
                f"str in every row. {remedy}"
            )
    return [well_formed(text, f"{name}[{position}]") for position, text in enumerate(cells)]


def rows_of(table: Table, columns: Columns | None) -> list[Any]:
    """Return the rows of a table, as tuples or texts, which `predict` takes like the table."""
    if columns is None or len(table.cells) == 1:
        return table.cells[0]
    return Rows(list(zip(*table.cells, strict=True)), columns)


def texts_of(
    table: Table, names: tuple[str, ...] | None, prompt: str | None, name: str = "X"
) -> list[tuple[str, ...]]:
    """Turn the columns that a prompt has fields for into text, or all columns without a prompt.

    Parameters
    ----------
    table : Table
    names : tuple of str or None
        The names of the columns.
    prompt : str or None
    name : str, default="X"
        The user's name for the table.

    Returns
    -------
    texts : list of tuple of str, of shape (n_rows, n_fields)

    Raises
    ------
    ValueError
        If the prompt has a field that is no column, or if a cell cannot be formatted in the way
        that the prompt says.
    TypeError
        If a cell is empty, or is neither text nor a number, a date or a time.
    """
    if prompt is None:
        numbers, fields = range(len(table.cells)), [Field("")] * len(table.cells)
    else:
        fields = list(Template.of_columns(prompt).fields)
        numbers = [_find(field, names, len(table.cells), prompt, name) for field in fields]
    texts = []
    for number, field in zip(numbers, fields, strict=True):
        where = f"column {number if names is None else names[number]!r} of {name}"
        texts.append(_as_text(table.cells[number], field, where))
    return list(zip(*texts, strict=True))


def check_fields(table: Table, prompt: str | None) -> None:
    """Look for misunderstandings between a prompt and the columns of a fit.

    Parameters
    ----------
    table : Table
    prompt : str or None

    Raises
    ------
    ValueError
        If a field is a number that is both the name of one column and the position of another.

    Warns
    -----
    UserWarning
        If the prompt has no field for a column, or if its fields are literal text because there
        is only one column.
    """
    if prompt is None:
        return
    n_columns, labels = len(table.cells), table.labels or []
    if n_columns == 1 and is_for_one_text(prompt):
        literal = [found for found in LIKE_A_FIELD.findall(prompt) if found != TEXT_FIELD]
        if literal:
            warn(
                f"X has one column, whose place in the prompt is {TEXT_FIELD}, so the model reads "
                f"{literal[0]} as it stands there. Pass a table with all columns, or leave it out.",
            )
        return
    used = set()
    for field in Template.of_columns(prompt).fields:
        number = _find(field, table.names, n_columns, prompt, "X")
        others = [each for place, each in enumerate(labels) if place != number]
        if field.key in map(str, others):
            raise ValueError(
                f"Got prompt={prompt!r} with the field {{{field.key}}}, a position, but another "
                "column has this number as its name. Wanted: names of columns that are no numbers, "
                "or positions of columns without names."
            )
        used.add(number)
    unused = [
        repr(each) for place, each in enumerate(labels or range(n_columns)) if place not in used
    ]
    if unused:
        warn(
            f"The prompt has no field for {', '.join(unused)} of X, so the model does not see "
            "them, although `predict` will need them in X. Leave them out, or add them to the "
            "prompt.",
        )


def _check_sequence(X: Any, name: str) -> None:
    wanted = "Wanted: a list, Series or array of str, or a table."
    if isinstance(X, (str, bytes)):
        raise TypeError(
            f"Got {name} as a single {type(X).__name__}. {wanted} Pass [text] for one text."
        )
    if isinstance(X, dict):
        raise TypeError(
            f"Got {name} of type dict. {wanted} Pass pandas.DataFrame([{name}]) if it is a row."
        )
    column_like = hasattr(X, "__len__") and hasattr(X, "__getitem__")
    if not column_like or scipy.sparse.issparse(X):
        raise TypeError(
            f"Got {name} of type {type(X).__name__}. {wanted} Pass list({name}) if it holds texts."
        )


def _keys(X: Any) -> list[Any] | None:
    """Return what the columns of a table are looked up by, or None if `X` has no such columns."""
    # In pandas a column may have one of these names, and pyarrow's `columns` are data.
    names = getattr(X, "column_names", None)
    if isinstance(names, list):
        return names
    return list(X.columns) if len(getattr(X, "shape", ())) == 2 and hasattr(X, "columns") else None


def _cells_of_frame(X: Any, keys: list[Any], name: str) -> list[list[Any]]:
    twice = [key for number, key in enumerate(keys) if key in keys[:number]]
    if twice:
        raise ValueError(
            f"Got {name} with several columns named {twice[0]!r}. Wanted: a name for each column."
        )
    return [_cells(X[key]) for key in keys]


def _cells_of_rows(X: Sequence[Any], name: str) -> list[list[Any]]:
    n_columns = len(X[0])
    for number, row in enumerate(X):
        if not _is_row(row) or len(row) != n_columns:
            has = f"{len(row)} entries" if _is_row(row) else short(row)
            raise ValueError(
                f"Got {name}[0] with {n_columns} entries and {name}[{number}] with {has}. Wanted: "
                "rows of the same length, an entry for each column. Fill empty ones with ''."
            )
    return [[row[number] for row in X] for number in range(n_columns)]


def _cells(column: Any) -> list[Any]:
    """Return the entries of a column as Python's own values."""
    if str(getattr(column, "dtype", getattr(column, "type", None))).lower() in SHORT_FLOATS:
        return list(column.to_numpy())  # as Python's they would have digits that mean nothing
    for method in ("to_pylist", "to_list", "tolist"):  # of pyarrow, polars, pandas
        if hasattr(column, method):
            return list(getattr(column, method)())
    return list(column)


def _find(
    field: Field, names: tuple[str, ...] | None, n_columns: int, prompt: str, name: str
) -> int:
    """Return the number of the column that a field stands for; a number is always a position."""
    if field.key.isdecimal() and int(field.key) < n_columns:
        return int(field.key)
    if names is not None and field.key in names:
        return names.index(field.key)
    if names is not None:
        wanted = f"the names of its columns, {', '.join(f'{{{each}}}' for each in names[:10])}, "
        wanted += f"or their positions, {{0}} to {{{n_columns - 1}}}"
        if field.key == "text":
            wanted += "; {text} is for a single column"
    elif n_columns == 1:
        wanted = "a template with one {text}, the place of the text, e.g. '{text}\\nLabel:'"
    else:
        wanted = f"the positions of its columns, which have no names: {{0}} to {{{n_columns - 1}}}"
    raise ValueError(
        f"Got prompt={prompt!r} with the field {{{field.key}}}, which is no column of {name}. "
        f"Wanted: {wanted}."
    )


def names_of_parts(prompt: str | None, columns: Columns | None) -> list[str]:
    """Name the parts of a row, which are the fields of a prompt or the columns without one.

    Parameters
    ----------
    prompt : str or None
    columns : Columns or None

    Returns
    -------
    names : list of str
        A column without a name is called by its position. Empty if a row is one text.
    """
    if columns is None or columns.number is None or columns.number < 2:
        return []
    names = columns.names or tuple(map(str, range(columns.number)))
    if prompt is None:
        return list(names)
    fields = Template.of_columns(prompt).fields
    return [names[_find(field, columns.names, len(names), prompt, "X")] for field in fields]


def _check_date_format(field: Field) -> None:
    """Refuse a format for numbers, which would print the same for each date."""
    if field.spec and "%" not in field.spec:
        raise ValueError(f"{field.spec!r} is no format of a date or a time, such as '%Y-%m-%d'")


def _is_row(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, np.ndarray) and value.ndim == 1)


def _as_text(cells: list[Any], field: Field, where: str) -> list[str]:
    """Format the cells of a column, and name the row of one that cannot be formatted."""
    texts = []
    plain = field.conversion is None and not field.spec
    for row, cell in enumerate(map(plain_str, cells)):
        if isinstance(cell, str) and plain:
            texts.append(well_formed(cell, f"row {row} in {where}"))
            continue
        if is_missing(cell):
            remedy = "fill it with '' (pandas: fillna, polars: fill_null)"
            if field.spec or not any(isinstance(other, str) for other in cells):
                remedy = "turn the column into text, with a word such as 'unknown' in this place"
            raise TypeError(
                f"Got {cell!r} in row {row} of {where}. Wanted: a value in every row. Drop the "
                f"row, or {remedy}."
            )
        if not isinstance(cell, PRINTABLE):
            raise TypeError(
                f"Got {short(cell)} of type {type(cell).__name__} in row {row} of {where}. Wanted: "
                "text, numbers, dates or times. Turn the column into text."
            )
        value: Any = cell
        if isinstance(cell, np.datetime64) and not plain:  # it knows no formats
            value = cell.astype("datetime64[us]").item()
        try:
            if isinstance(value, (datetime.date, datetime.time)) and not plain:
                _check_date_format(field)
            texts.append(well_formed(field.format(value), f"row {row} in {where}"))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"Got {short(cell)} in row {row} of {where}, which cannot be formatted as the "
                f"prompt says: {error}. Wanted: a value that str.format takes there."
            ) from error
    return texts
