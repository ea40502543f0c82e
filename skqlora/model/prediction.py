"""Forward passes over many texts, which compute the outputs or the inputs of the head."""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from skqlora._utils.processes import check_not_forked
from skqlora._utils.torch_state import plain_torch
from skqlora.adapter import AdapterState
from skqlora.checkpoint.spec import BackboneSpec
from skqlora.model.cache import get_backbone
from skqlora.model.text_model import TextModel, check_base
from skqlora.settings.parameters import Parameters
from skqlora.text.batches import TokenizedTexts, prediction_batches
from skqlora.text.encoding import Row
from skqlora.text.tokenization import check_tokenizer, load_tokenizer

# The most tokens of a padded batch, which fill two CPU cores and take little memory on a GPU.
PREDICTION_TOKENS = 4096


@plain_torch()
def compute_outputs(
    parameters: Parameters, adapter: AdapterState, texts: Sequence[Row], *, chunk_size: int
) -> np.ndarray:
    """Compute outputs of the head for texts, with an adapter on the base that the process keeps.

    A text that occurs several times is computed once. Token ids are made chunk by chunk, so that
    the memory stays bounded, except for that of the texts and outputs.

    Parameters
    ----------
    parameters : Parameters
    adapter : AdapterState
    texts : sequence of str or of tuple of str, of length n_texts
    chunk_size : int
        The number of texts whose token ids are held at a time.

    Returns
    -------
    outputs : ndarray of shape (n_texts, n_outputs), float64
        Of classes these are logits.

    Raises
    ------
    ValueError
        If the base or its tokenizer is not the one that the adapter was trained with.
    """
    check_not_forked()
    spec = BackboneSpec.of(parameters, adapter)
    backbone = get_backbone(spec, verbose=bool(parameters.verbose))
    check_base(backbone, adapter)
    tokenizer = load_tokenizer(spec.model, spec.revision, spec.files)
    check_tokenizer(tokenizer, spec.model, adapter.tokenizer_fingerprint)
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    different = list(places)
    outputs = []
    with TextModel.for_prediction(backbone, adapter) as model:
        for start in range(0, len(different), chunk_size):
            chunk = different[start : start + chunk_size]
            tokens, counts = tokenizer.tokenize(chunk, adapter.text_settings, backbone.vocab_size)
            # The outputs of a text are the mean over its windows, which lie one after the other.
            sums = np.add.reduceat(predict_outputs(model, tokens), np.cumsum(counts) - counts)
            outputs.append(sums / counts[:, None])
    return np.concatenate(outputs)[[places[text] for text in texts]]


def predict_outputs(model: TextModel, tokens: TokenizedTexts) -> np.ndarray:
    """Compute the outputs of the head for each row, in the order of the rows.

    Parameters
    ----------
    model : TextModel
    tokens : TokenizedTexts
        The n_rows tokenized texts.

    Returns
    -------
    outputs : ndarray of shape (n_rows, n_outputs), float64
    """
    outputs = np.empty((len(tokens), model.head.out_features))
    return _compute(model, model, tokens, outputs)


def compute_features(model: TextModel, tokens: TokenizedTexts) -> np.ndarray:
    """Compute the input of the head for each row, in the order of the rows.

    Parameters
    ----------
    model : TextModel
    tokens : TokenizedTexts
        The n_rows tokenized texts.

    Returns
    -------
    features : ndarray of shape (n_rows, hidden_size), float32
    """
    features = np.empty((len(tokens), model.head.in_features), dtype=np.float32)
    return _compute(model.encode, model, tokens, features)


@torch.no_grad()
def _compute(
    function: Callable[..., torch.Tensor],
    model: TextModel,
    tokens: TokenizedTexts,
    values: np.ndarray,
) -> np.ndarray:
    device = model.backbone.spec.device
    for rows in prediction_batches(tokens.lengths, PREDICTION_TOKENS):
        inputs = {name: x.to(device) for name, x in tokens.batch(rows).items()}
        values[rows] = function(**inputs).cpu().numpy()
    return values
