"""Names of parameters that do not exist, and those that were probably meant."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from skqlora._utils.messages import nearest

Init = TypeVar("Init", bound=Callable[..., None])

# What other libraries call a parameter, where the spelling does not show which one it is here.
OTHER_NAMES = {
    "eta0": "learning_rate",
    "lr": "learning_rate",
    "max_iter": "num_train_epochs",
    "max_seq_length": "max_length",
    "model_name_or_path": "model",
    "per_device_train_batch_size": "batch_size",
    "r": "lora_r",
    "rank": "lora_r",
    "seed": "random_state",
    "template": "prompt",
}


def check_names(names: Iterable[str], known: Iterable[str], estimator: str) -> str | None:
    """Say which name is no parameter, and which one was probably meant.

    Parameters
    ----------
    names : iterable of str
        The names that a user passed.
    known : iterable of str
        The parameters of the estimator.
    estimator : str
        The name of its class.

    Returns
    -------
    message : str or None
        None if all names are parameters.
    """
    known = set(known)
    unknown = next((name for name in names if name not in known), None)
    if unknown is None:
        return None
    meant = OTHER_NAMES.get(unknown) or nearest(unknown, known)
    hint = "" if meant is None else f" Did you mean {meant!r}?"
    return (
        f"{estimator} has no parameter {unknown!r}.{hint} Wanted: one of those in "
        f"`help({estimator})`."
    )


def with_checked_names(init: Init) -> Init:
    """Decorate a constructor so that a name which is no parameter is refused with a suggestion.

    Parameters
    ----------
    init : callable
        The method `__init__`, whose signature stays as scikit-learn reads it.

    Returns
    -------
    init : callable
    """
    known = tuple(inspect.signature(init).parameters)[1:]

    @functools.wraps(init)
    def checked(self: Any, *args: Any, **params: Any) -> None:
        message = check_names(params, known, type(self).__name__)
        if message is not None:
            raise TypeError(message)
        init(self, *args, **params)

    return checked  # type: ignore[return-value]
