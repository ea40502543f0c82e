"""The values that the parameters of the estimators may have, in scikit-learn's notation."""

import os
from numbers import Integral, Real

from sklearn.metrics import get_scorer_names
from sklearn.utils._param_validation import Interval, Options, StrOptions

from skqlora._utils.messages import nearest
from skqlora.settings.adapter_settings import TRUNCATIONS

REGRESSION_LOSSES = {"squared_error", "absolute_error", "huber"}
SCHEDULES = {"linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"}
PARAMETER_CONSTRAINTS: dict[str, list] = {
    "model": [str, os.PathLike],
    "revision": [str, None],
    "quantization": [StrOptions({"nf4", "fp4"}), None],
    "double_quant": ["boolean"],
    "compute_dtype": [StrOptions({"auto", "bfloat16", "float16", "float32"})],
    "device": [str],
    "attn_implementation": [str, None],
    "lora_r": [Interval(Integral, 1, None, closed="left")],
    "lora_alpha": [Interval(Real, 0, None, closed="neither")],
    "lora_dropout": [Interval(Real, 0, 1, closed="left")],
    "target_modules": [str, list, tuple],
    "layers": [StrOptions({"all"}), Interval(Integral, 1, None, closed="left"), list, tuple],
    "cache_dtype": [StrOptions({"auto", "bfloat16"}), None],
    "use_rslora": ["boolean"],
    "use_dora": ["boolean"],
    # PEFT's other ways to initialize LoRA write to the base, which is shared.
    "init_lora_weights": [Options(bool, {True}), StrOptions({"gaussian"})],
    "init_head_weights": [StrOptions({"normal", "probe", "class_names"})],
    "pooling": [StrOptions({"auto", "last", "mean", "cls", "pooler"})],
    "max_length": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
    "truncation": [StrOptions(set(TRUNCATIONS))],
    "stride": [Interval(Integral, 0, None, closed="left")],
    "prompt": [str, None],
    "num_train_epochs": [StrOptions({"auto"}), Interval(Integral, 1, None, closed="left")],
    "batch_size": [Interval(Integral, 1, None, closed="left")],
    "gradient_accumulation_steps": [Interval(Integral, 1, None, closed="left")],
    "gradient_checkpointing": [StrOptions({"auto"}), "boolean"],
    "learning_rate": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
    "head_learning_rate": [StrOptions({"auto"}), Interval(Real, 0, None, closed="neither")],
    "weight_decay": [Interval(Real, 0, None, closed="left")],
    "warmup_steps": [Interval(Real, 0, None, closed="left")],
    "lr_scheduler_type": [StrOptions(SCHEDULES)],
    "max_grad_norm": [Interval(Real, 0, None, closed="neither"), None],
    "optim": [StrOptions({"paged_adamw_32bit", "paged_adamw_8bit", "adamw"})],
    "class_weight": [dict, list, StrOptions({"balanced"}), None],
    "early_stopping": ["boolean"],
    "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
    "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
    "tol": [Interval(Real, 0, None, closed="left")],
    "scoring": [str, callable, None],  # see `check_scoring`
    "warm_start": ["boolean"],
    "checkpoint_dir": [str, os.PathLike, None],
    "checkpoint_every": [Interval(Integral, 1, None, closed="left")],
    "random_state": ["random_state"],
    "verbose": ["verbose"],
}
REGRESSOR_CONSTRAINTS = {
    name: allowed for name, allowed in PARAMETER_CONSTRAINTS.items() if name != "class_weight"
} | {
    "loss": [StrOptions(REGRESSION_LOSSES)],
    "init_head_weights": [StrOptions({"normal", "probe"})],
}


def check_scoring(scoring: object) -> None:
    """Refuse a `scoring` that is no scorer's name, without a list of all that there are.

    Parameters
    ----------
    scoring : str, callable or None

    Raises
    ------
    ValueError
    """
    names = {"loss", *get_scorer_names()}
    if isinstance(scoring, str) and scoring not in names:
        meant = nearest(scoring, names)
        raise ValueError(
            f"Got scoring={scoring!r}, which is no scorer."
            f"{'' if meant is None else f' Did you mean {meant!r}?'} Wanted: 'loss', a name of "
            "`sklearn.metrics.get_scorer_names()`, a callable or None."
        )
