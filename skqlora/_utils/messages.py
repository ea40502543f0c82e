"""What warnings and errors share: the line that a warning points to, and the name that was meant.

This module knows nothing of estimators.
"""

import inspect
import warnings
from collections.abc import Iterable, Iterator
from difflib import get_close_matches

# The packages between a user's line and a warning: this one, those that call its methods, and
# those that start a thread, in which there may be no line of the user's.
PASSED = {"skqlora", "sklearn", "joblib", "contextlib"}
THREADS = {"multiprocessing", "concurrent", "threading"}


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Issue a warning that points to the line of the user's program that led to it.

    In a thread that has no such line, it points to the outermost method that led to it.

    Parameters
    ----------
    message : str
    category : type, default=UserWarning
    """
    packages = list(_packages_of_the_stack())  # [1] is of this function, which is stacklevel 1
    outer = (i for i, package in enumerate(packages) if package not in PASSED | THREADS)
    passed = (i for i, package in enumerate(packages) if package in PASSED)
    warnings.warn(message, category, stacklevel=next(outer, max(passed)))


def _packages_of_the_stack() -> Iterator[str]:
    """List the packages of the frames, from this one outwards."""
    frame = inspect.currentframe()
    while frame is not None:
        yield frame.f_globals.get("__name__", "").partition(".")[0]
        frame = frame.f_back


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Find the name that was probably meant by another one.

    Parameters
    ----------
    name : str
    known : iterable of str

    Returns
    -------
    nearest : str or None
        The name without "_score", as scikit-learn's functions have it, or else the shortest that
        begins with it, one that is spelled almost like it, or the shortest that contains it.
    """
    known = sorted(known, key=lambda each: (len(each), each))
    bare = [each for each in known if each == name.removesuffix("_score")]
    beginning = [each for each in known if each.startswith(f"{name}_")]
    alike = get_close_matches(name, known, n=1, cutoff=0.7)
    containing = [each for each in known if name and name in each.split("_")]
    return next(iter([*bare, *beginning, *alike, *containing]), None)
