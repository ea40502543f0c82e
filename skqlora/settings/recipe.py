"""What a training's numbers are where the user leaves them to us: the rules behind "auto"."""

import math

AUTO_MAX_LENGTH = 512  # tokens
RATE_FACTOR = 0.5  # of LoRA's learning rate over the rule below
HEAD_RATE_FACTOR = 10.0  # of the head's learning rate over LoRA's
AUTO_UPDATES = 300  # that a training should have, as far as the bounds of its epochs allow
AUTO_EPOCHS = 3, 20


def scaled_learning_rate(model_type: str, hidden_size: int) -> float:
    """LoRA's peak rate by the width of the model.

    "LoRA Without Regret" (Schulman and Thinking Machines Lab, 2025): 10 times the 5e-5 of full
    fine-tuning at a width of 2000, times (2000 / width) to a power fitted for each family.

    Parameters
    ----------
    model_type : str
        transformers' name of the family.
    hidden_size : int

    Returns
    -------
    learning_rate : float
    """
    power = 0.0775 if model_type.startswith("qwen") else 0.781
    return 5e-5 * 10 * (2000 / hidden_size) ** power


def auto_learning_rate(model_type: str, hidden_size: int) -> float:
    """LoRA's peak rate where the user chooses none: half of what `scaled_learning_rate` says.

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


def auto_epochs(n_texts: int, batch_rows: int) -> int:
    """Count the epochs that give a training enough updates: many for few texts.

    Parameters
    ----------
    n_texts : int
    batch_rows : int
        Texts of one update.

    Returns
    -------
    n_epochs : int
    """
    fewest, most = AUTO_EPOCHS
    wanted = math.ceil(AUTO_UPDATES / math.ceil(n_texts / batch_rows))
    return min(max(wanted, fewest), most)
