"""The first values of a head, and the check that it can start from class names."""

import numpy as np

from skqlora._utils.messages import warn
from skqlora.model.prediction import compute_features
from skqlora.model.text_model import TextModel
from skqlora.settings.parameters import Parameters
from skqlora.settings.template import TEXT_FIELD
from skqlora.text.batches import TokenizedTexts
from skqlora.text.inputs import LabelledTexts
from skqlora.text.targets import Classes, Target
from skqlora.text.tokenization import CachingTokenizer
from skqlora.text.values import well_formed
from skqlora.training.class_names import head_of_class_names
from skqlora.training.distributed import Ranks
from skqlora.training.probe import choose_probe_rows, fit_linear_probe, fit_probe


def check_class_names(parameters: Parameters, table: LabelledTexts) -> None:
    """Refuse a start from class names if labels are not names, or the last token is not pooled.

    Parameters
    ----------
    parameters : Parameters
    table : LabelledTexts

    Raises
    ------
    ValueError
        If the head cannot start from the names of the classes.
    """
    if parameters.init_head_weights != "class_names":
        return
    target, pooling = table.target, parameters.pooling
    assert isinstance(target, Classes)  # a regressor has no such start
    if target.multilabel or not all(isinstance(label, str) for label in target.values.tolist()):
        what = "a multilabel indicator" if target.multilabel else f"{target.values.dtype} labels"
        raise ValueError(
            f"Got init_head_weights='class_names' with {what}. Wanted: one label of type str for "
            "each text, or another start of the head."
        )
    for label in target.values.tolist():
        well_formed(label, "the class")
    if pooling not in ("auto", "last"):
        raise ValueError(
            f"Got init_head_weights='class_names' with pooling={pooling!r}. Wanted: 'last' or "
            "'auto', since a decoder predicts after the last token."
        )


def warn_of_missing_prompt(parameters: Parameters, lines: str | None) -> None:
    """Warn if the head starts from class names and no prompt asks for one.

    Parameters
    ----------
    parameters : Parameters
    lines : str or None
        The prompt that is made for several columns, if there are several.
    """
    if parameters.init_head_weights == "class_names" and parameters.prompt is None:
        example = f"{lines or TEXT_FIELD}\nLabel:"
        warn(
            "Got init_head_weights='class_names' without a prompt. The head starts as the model's "
            "guess at the next word, and only a prompt that ends where the name of the class would "
            f"come next makes that a class. Pass such a prompt, e.g. {example!r}."
        )


def start_head(
    how: str,
    model: TextModel,
    tokenizer: CachingTokenizer,
    target: Target,
    tokens: TokenizedTexts,
    targets: np.ndarray,
    weights: np.ndarray,
    seed: int,
) -> None:
    """Set the first values of the head of a model whose adapter changes nothing yet.

    Parameters
    ----------
    how : {"normal", "probe", "class_names"}
        The kind of start. "normal" leaves the head as it is.
    model : TextModel
        The model, before its training begins.
    tokenizer : CachingTokenizer
    target : Classes or Numbers
        What is predicted.
    tokens : TokenizedTexts
        The n_rows texts.
    targets : ndarray of shape (n_rows,) or (n_rows, n_outputs)
        What the outputs are compared with.
    weights : ndarray of the shape of `targets`
    seed : int
        The seed that draws the rows that a probe is fitted to, if not to all.

    Raises
    ------
    ValueError
        With "class_names", if the base does not predict tokens. With "probe", if its hidden states
        are not finite.
    """

    def probe() -> dict[str, np.ndarray]:
        rows = choose_probe_rows(targets, seed)
        features = compute_features(model, tokens.take(rows))
        if not np.isfinite(features).all():
            raise ValueError(
                "The base gives hidden states that are infinite or NaN, to which no "
                "regression can be fitted. Pass compute_dtype='float32', or "
                "init_head_weights='normal'."
            )
        bias = model.head.bias is not None
        fit = fit_probe if isinstance(target, Classes) else fit_linear_probe
        return fit(features, targets[rows], weights[rows], target.n_outputs, bias=bias)

    if how == "class_names":
        if not model.backbone.causal:
            raise ValueError(
                f"Got init_head_weights='class_names' with model={model.backbone.spec.model!r}, "
                "which is no decoder. Wanted: a decoder such as Qwen or Llama, or "
                "init_head_weights='normal' or 'probe'."
            )
        assert isinstance(target, Classes)
        names = target.values.tolist()
        model.load_head(head_of_class_names(model.backbone, tokenizer, names))
    elif how == "probe":
        model.load_head(Ranks.current().call_on_first(probe))
