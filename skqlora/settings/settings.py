"""The settings of one fit: its parameters, with a choice where the user left it open."""

from dataclasses import asdict, dataclass
from typing import Any

from skqlora._utils.tables import html_table
from skqlora.settings.adapter_settings import TextSettings
from skqlora.settings.parameters import Parameters
from skqlora.settings.recipe import (
    AUTO_MAX_LENGTH,
    auto_epochs,
    auto_head_learning_rate,
    auto_learning_rate,
)
from skqlora.settings.template import check_prompt

# The parameters that may be "auto" and that a fit therefore settles, in the order of the table.
SETTLED = (
    "device",
    "compute_dtype",
    "max_length",
    "pooling",
    "num_train_epochs",
    "learning_rate",
    "head_learning_rate",
    "gradient_checkpointing",
)


@dataclass(frozen=True, repr=False)
class Settings(Parameters):
    """The parameters of a fit, with what was chosen where the user left the choice open.

    Its attributes have the names and the meaning of the estimator's parameters. Printing it shows a
    table of the ones that may be "auto".

    Attributes
    ----------
    device : str
        The torch device that the model was on, e.g. "cuda:0".
    compute_dtype : str
        The precision of the products with the base's weights, e.g. "bfloat16".
    max_length : int
        The greatest number of tokens of a text.
    pooling : {"last", "mean", "cls", "pooler"}
        The way in which the hidden states of a text become one vector.
    num_train_epochs : int
        The number of passes over the training texts, unless the fit stopped earlier.
    learning_rate, head_learning_rate : float
        The peak rates of LoRA and of the head.
    gradient_checkpointing : bool
        Whether activations were computed again instead of being kept.
    incremental : bool
        Whether this was a call of `partial_fit`, which trains one epoch of an unknown number, so
        that the rates are constant after a warm-up.
    chosen : tuple of str
        The names of the parameters that were "auto", and "prompt" if the columns made one
        necessary.
    """

    max_length: int
    num_train_epochs: int
    gradient_checkpointing: bool
    learning_rate: float
    head_learning_rate: float
    incremental: bool = False
    chosen: tuple[str, ...] = ()

    def as_params(self) -> dict[str, Any]:
        """Return what was chosen, for the parameters of another estimator.

        Returns
        -------
        params : dict
            The parameters that were "auto", by name, with their exact values. An estimator to which
            ``set_params(**params)`` gives them makes the same choices on other data and machines.
        """
        return {name: getattr(self, name) for name in self.chosen}

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in SETTLED)
        return f"Settings({values})"

    def __str__(self) -> str:
        rows = self._rows()
        name_width, value_width = (max(len(row[i]) for row in rows) for i in (0, 1))
        lines = (f"{name:{name_width}}  {value:{value_width}}  {by}" for name, value, by in rows)
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        return html_table("Settings of the fit", self._rows())

    def _rows(self) -> list[tuple[str, str, str]]:
        """Return the rows of the table: a name, its value and who chose it."""
        rows = []
        for name in SETTLED:
            value = getattr(self, name)
            shown = f"{value:.3g}" if isinstance(value, float) else str(value)
            by = 'chosen by "auto"' if name in self.chosen else "as asked"
            if self.incremental and name == "num_train_epochs":
                by = "one epoch at each partial_fit"
            rows.append((name, shown, by))
        if "prompt" in self.chosen:
            rows.append(("prompt", repr(self.prompt), "chosen for the columns"))
        if self.incremental:
            by = "the rates do not decay in partial_fit"
            rows.append(("lr_scheduler_type", self.lr_scheduler_type, by))
        return rows


def resolve_settings(
    parameters: Parameters,
    *,
    device: str,
    compute_dtype: str,
    max_length: int,
    prompt: str | None,
    pooling: str,
    num_train_epochs: int,
    gradient_checkpointing: bool,
    model_type: str,
    hidden_size: int,
    incremental: bool = False,
) -> Settings:
    """Put the choice of `recipe` or of the caller where the user left it open by "auto".

    Parameters
    ----------
    parameters : Parameters
    device, compute_dtype, pooling : str
        The values for this machine and this model.
    max_length : int
        The result of `resolve_max_length`.
    prompt : str or None
        The template of the texts, which several columns may have made necessary.
    num_train_epochs : int
        The result of `resolve_epochs`, or 1 for an incremental training.
    gradient_checkpointing : bool
        The choice that the memory of this machine requires.
    model_type : str
        The name of the family in transformers, e.g. "llama".
    hidden_size : int
        The number of features of a last hidden state.
    incremental : bool, default=False
        Whether to train one epoch, at rates that do not decay.

    Returns
    -------
    settings : Settings
    """
    rate, head_rate = parameters.learning_rate, parameters.head_learning_rate
    if isinstance(rate, str):
        rate = auto_learning_rate(model_type, hidden_size)
    if isinstance(head_rate, str):
        head_rate = auto_head_learning_rate(rate, parameters.init_head_weights)
    chosen = tuple(name for name in SETTLED if getattr(parameters, name) == "auto")
    if prompt != parameters.prompt:
        chosen = (*chosen, "prompt")
    if incremental:  # which is no choice by "auto"
        chosen = tuple(name for name in chosen if name != "num_train_epochs")
    schedule, head = parameters.lr_scheduler_type, parameters.init_head_weights
    if incremental:  # nobody knows how much is to come, and all texts are not at hand
        schedule, head = "constant_with_warmup", "normal" if head == "probe" else head
    settled = {
        "device": device,
        "compute_dtype": compute_dtype,
        "max_length": max_length,
        "prompt": prompt,
        "pooling": pooling,
        "num_train_epochs": num_train_epochs,
        "learning_rate": float(rate),
        "head_learning_rate": float(head_rate),
        "gradient_checkpointing": gradient_checkpointing,
        "lr_scheduler_type": schedule,
        "init_head_weights": head,
        "incremental": incremental,
        "chosen": chosen,
    }
    return Settings(**asdict(parameters) | settled)


def resolve_epochs(parameters: Parameters, n_texts: int) -> int:
    """Choose the number of passes over this many training texts."""
    n_epochs = parameters.num_train_epochs
    if isinstance(n_epochs, str):
        return auto_epochs(n_texts, parameters.batch_rows)
    return n_epochs


def resolve_max_length(parameters: Parameters, limit: int) -> int:
    """Choose the greatest number of tokens of a text.

    Parameters
    ----------
    parameters : Parameters
    limit : int
        The number of tokens that the model and its tokenizer take.

    Returns
    -------
    max_length : int

    Raises
    ------
    ValueError
        If the user asks for more tokens than the model takes.
    """
    max_length = parameters.max_length
    if isinstance(max_length, str):
        return min(AUTO_MAX_LENGTH, limit)
    if max_length > limit:
        raise ValueError(
            f"Got max_length={max_length} but model={parameters.model!r} takes {limit} tokens. "
            "Pass at most that, or 'auto'."
        )
    return max_length


def resolve_text_settings(
    parameters: Parameters, limit: int, prompt: str | None, *, token_type_ids: bool
) -> TextSettings:
    """Choose the settings for turning the texts of a fit into token ids.

    Parameters
    ----------
    parameters : Parameters
    limit : int
        The number of tokens that the model and its tokenizer take.
    prompt : str or None
        The template of the texts.
    token_type_ids : bool
        Whether the model is told of which of two texts a token is.

    Returns
    -------
    text : TextSettings

    Raises
    ------
    ValueError
        If `max_length` is too large, or there is no field in the prompt.
    """
    check_prompt(prompt)
    return TextSettings(
        max_length=resolve_max_length(parameters, limit),
        truncation=parameters.truncation,
        stride=parameters.stride,
        prompt=prompt,
        token_type_ids=token_type_ids,
    )
