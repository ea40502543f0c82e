"""Names of parameters that do not exist, and those that were probably meant."""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from skqlora._utils.messages import nearest

Init = TypeVar("Init", bound=Callable[..., None])

# What other libraries call a parameter, where the spelling does not show which one it is here.
OTHER_NAMES = {
    "dtype": "compute_dtype",
    "eta0": "learning_rate",
    "eval_split": "validation_fraction",
    "load_in_4bit": "quantization",
    "lora_layers": "layers",
    "lora_target": "target_modules",
    "lr": "learning_rate",
    "max_iter": "num_train_epochs",
    "max_seq_length": "max_length",
    "max_tokens": "max_length",
    "model_name": "model",
    "model_name_or_path": "model",
    "n_epochs": "num_train_epochs",
    "patience": "n_iter_no_change",
    "per_device_train_batch_size": "batch_size",
    "quant": "quantization",
    "quant_type": "quantization",
    "r": "lora_r",
    "rank": "lora_r",
    "seed": "random_state",
    "template": "prompt",
    "torch_dtype": "compute_dtype",
    "val_split": "validation_fraction",
    "warmup_ratio": "warmup_steps",
    "weight": "class_weight",
    "weights": "class_weight",
}
# What is no parameter of this estimator, but is found elsewhere.
OF_TEXTS = "Weights of texts are the argument sample_weight of `fit`."
ELSEWHERE = {
    "loss": "Only QLoRARegressor has it, for targets that are numbers.",
    "sample_weight": OF_TEXTS,
    "weight": OF_TEXTS,
    "weights": OF_TEXTS,
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
    return " ".join(
        (
            f"{estimator} has no parameter {unknown!r}.",
            *_hints(unknown, known),
            f"Wanted: one of those in `help({estimator})`.",
        )
    )


def _hints(unknown: str, known: set[str]) -> Iterator[str]:
    """Say which parameter was probably meant, and where else there is one of that name."""
    meant = OTHER_NAMES.get(unknown)
    if meant is None and unknown not in ELSEWHERE:
        meant = nearest(unknown, known)
    if meant in known:
        yield f"Did you mean {meant!r}?"
    if unknown in ELSEWHERE:
        yield ELSEWHERE[unknown]


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
