"""What is in a cell of a user's column: text, a label, or nothing."""

from decimal import Decimal
from typing import Any

import numpy as np


def well_formed(text: str, name: str) -> str:
    """Return a plain str; refuse one with half a surrogate pair, which no tokenizer takes.

    Raises
    ------
    ValueError
        If the text cannot be encoded. The message begins with its `name`.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"Got {name} = {short(text)}, which is no valid Unicode. Wanted: text, e.g. "
            "text.encode('utf-8', 'replace').decode('utf-8')."
        ) from error
    return plain_str(text)


def plain_str(value: Any) -> Any:
    """Turn text of a subclass of str into plain text, and leave other values as they are.

    An enumeration's member may print and hash as something else than the text it is equal to.
    """
    return str.__str__(value) if isinstance(value, str) else value


def is_missing(label: Any) -> bool:
    """Return whether a cell is empty: None, NaN, or what pandas has for that."""
    if label is None or type(label).__name__ in ("NAType", "NaTType"):  # types of pandas
        return True
    if isinstance(label, (np.datetime64, np.timedelta64)):
        return bool(np.isnat(label))
    if isinstance(label, Decimal):
        return label.is_nan()
    return isinstance(label, (float, np.floating)) and bool(np.isnan(label))


def short(value: Any) -> str:
    """Print a value in at most 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
