"""The rules behind "auto": the numbers of a training that the user leaves to this package."""

import math

AUTO_MAX_LENGTH = 512  # tokens
RATE_FACTOR = 0.5  # LoRA's learning rate divided by that of `scaled_learning_rate`
HEAD_RATE_FACTOR = 10.0  # the learning rate of a head that starts at random, divided by LoRA's
AUTO_UPDATES = 300  # the updates that a training should have, if the bounds of its epochs allow it
AUTO_EPOCHS = 3, 20  # the fewest and the most


def scaled_learning_rate(model_type: str, hidden_size: int) -> float:
    """Compute LoRA's peak learning rate from the width of the model.

    The rule is from "LoRA Without Regret" (Schulman and Thinking Machines Lab, 2025): 10 times the
    5e-5 of full fine-tuning at a width of 2000, times (2000 / width) to a power that was fitted for
    each family.

    Parameters
    ----------
    model_type : str
        The name of the family in transformers.
    hidden_size : int

    Returns
    -------
    learning_rate : float
    """
    power = 0.0775 if model_type.startswith("qwen") else 0.781
    return 5e-5 * 10 * (2000 / hidden_size) ** power


def auto_learning_rate(model_type: str, hidden_size: int) -> float:
    """Compute LoRA's default peak learning rate: half of what `scaled_learning_rate` returns.

    The half was chosen with one small encoder, on TREC-6, BANKING77 and CLINC150
    (``docs/how_well.md``).

    Parameters
    ----------
    model_type : str
    hidden_size : int

    Returns
    -------
    learning_rate : float
    """
    return RATE_FACTOR * scaled_learning_rate(model_type, hidden_size)


def auto_head_learning_rate(learning_rate: float, init_head_weights: str) -> float:
    """Compute the head's default peak learning rate from LoRA's.

    A head that starts at random has far to go and gets 10 times LoRA's rate. One that starts as the
    model's own guess gets LoRA's: with 100 questions and a decoder of 135 million parameters that
    was 5 percentage points better (``docs/how_well.md``).

    Parameters
    ----------
    learning_rate : float
    init_head_weights : {"normal", "probe", "class_names"}

    Returns
    -------
    head_learning_rate : float
    """
    guesses = init_head_weights == "class_names"
    return learning_rate if guesses else HEAD_RATE_FACTOR * learning_rate


def auto_epochs(n_texts: int, batch_rows: int) -> int:
    """Compute the number of epochs that gives a training enough updates: many for few texts.

    Parameters
    ----------
    n_texts : int
    batch_rows : int
        The number of texts in one update.

    Returns
    -------
    n_epochs : int
    """
    fewest, most = AUTO_EPOCHS
    wanted = math.ceil(AUTO_UPDATES / math.ceil(n_texts / batch_rows))
    return min(max(wanted, fewest), most)
