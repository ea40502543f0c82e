"""What warnings and errors share: the line that a warning points to, and the name that was meant.

This module knows nothing of estimators.
"""

import inspect
import warnings
from collections.abc import Iterable
from difflib import get_close_matches

# The packages between a user's line and a warning: this one, and those that call its methods.
PASSED = {"skqlora", "sklearn", "joblib", "contextlib"}


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that points to the line of the user's program that led to it.

    Parameters
    ----------
    message : str
    category : type, default=UserWarning
    """
    frame, level = inspect.currentframe(), 1
    while frame is not None and _package_of(frame.f_globals.get("__name__", "")) in PASSED:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _package_of(module: str) -> str:
    return module.partition(".")[0]


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Find the name that was probably meant by another one.

    Parameters
    ----------
    name : str
    known : iterable of str

    Returns
    -------
    nearest : str or None
        A name that is spelled almost like it, or else the shortest that contains it.
    """
    known = sorted(known, key=len)
    alike = get_close_matches(name, known, n=1, cutoff=0.7)
    containing = [each for each in known if name and name in each.split("_")]
    return next(iter([*alike, *containing]), None)
