"""Forward passes over many texts, which compute the outputs or the inputs of the head."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from typing import TypeVar

import numpy as np
import torch

from skqlora._utils.processes import check_not_forked
from skqlora._utils.progress import text_bar
from skqlora._utils.torch_state import plain_torch
from skqlora.adapter import AdapterState
from skqlora.checkpoint.device import empty_cache, is_out_of_memory, to_device
from skqlora.checkpoint.spec import BackboneSpec
from skqlora.model.cache import get_backbone
from skqlora.model.text_model import TextModel, check_base
from skqlora.settings.parameters import Parameters
from skqlora.text.batches import TokenizedTexts, prediction_batches
from skqlora.text.cutting import Cuts
from skqlora.text.encoding import Row
from skqlora.text.tokenization import check_tokenizer, load_tokenizer

# The most tokens of a padded batch. On a CPU they fill two cores.
TOKENS_ON_CPU = 4096
TOKENS_ON_ACCELERATOR = 32_768
# The most texts that an accelerator computes while the next are tokenized.
TEXTS_ON_ACCELERATOR = 4096
SECONDS_WITHOUT_BAR = 2  # a prediction that is done by then shows none

Item = TypeVar("Item")
Result = TypeVar("Result")


@plain_torch()
def compute_outputs(
    parameters: Parameters, adapter: AdapterState, texts: Sequence[Row], *, chunk_size: int
) -> np.ndarray:
    """Compute outputs of the head for texts, with an adapter on the base that the process keeps.

    A text that occurs several times is computed once. Token ids are made chunk by chunk, so that
    the memory stays bounded, except for that of the texts and outputs. While an accelerator
    computes one chunk, the next is tokenized.

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

    Warns
    -----
    UserWarning
        If texts were cut. The message says how large a share of them.
    """
    check_not_forked()
    spec = BackboneSpec.of(parameters, adapter)
    backbone = get_backbone(spec, verbose=bool(parameters.verbose))
    check_base(backbone, adapter)
    tokenizer = load_tokenizer(spec.model, spec.revision, spec.files)
    check_tokenizer(tokenizer, spec.model, adapter.tokenizer_fingerprint)
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    different = list(places)
    on_cpu = spec.device.type == "cpu"
    size = chunk_size if on_cpu else min(chunk_size, TEXTS_ON_ACCELERATOR)
    chunks = (different[start : start + size] for start in range(0, len(different), size))

    cuts = Cuts()

    def tokenize(chunk: list[Row]) -> tuple[TokenizedTexts, np.ndarray]:
        return tokenizer.tokenize(chunk, adapter.text_settings, backbone.vocab_size, cuts)

    outputs, n_done = [], 0
    tokenized = (tokenize(chunk) for chunk in chunks) if on_cpu else one_ahead(tokenize, chunks)
    with (
        TextModel.for_prediction(backbone, adapter) as model,
        closing(tokenized),
        text_bar(
            "predict",
            len(different),
            shown=bool(parameters.verbose),
            delay=SECONDS_WITHOUT_BAR,
            leave=False,
        ) as bar,
    ):

        def show(share: float) -> None:  # of the texts of a chunk, which may be several rows each
            bar.update(n_done + int(share * len(counts)) - bar.n)

        for tokens, counts in tokenized:
            # The outputs of a text are the mean over its windows, which lie one after the other.
            sums = np.add.reduceat(predict_outputs(model, tokens, show), np.cumsum(counts) - counts)
            outputs.append(sums / counts[:, None])
            n_done += len(counts)
    cuts.warn(adapter.text_settings, "To use all of each text, fit with truncation='windows'.")
    return np.concatenate(outputs)[[places[text] for text in texts]]


def predict_outputs(
    model: TextModel, tokens: TokenizedTexts, show: Callable[[float], object] | None = None
) -> np.ndarray:
    """Compute the outputs of the head for each row, in the order of the rows.

    Parameters
    ----------
    model : TextModel
    tokens : TokenizedTexts
        The n_rows tokenized texts.
    show : callable, optional
        A function that is told, batch by batch, which share of the rows is done.

    Returns
    -------
    outputs : ndarray of shape (n_rows, n_outputs), float64
    """
    return _compute(model, model, tokens, show).astype(np.float64)


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
    return _compute(model.encode, model, tokens)


@torch.no_grad()
def _compute(
    function: Callable[..., torch.Tensor],
    model: TextModel,
    tokens: TokenizedTexts,
    show: Callable[[float], object] | None = None,
) -> np.ndarray:
    """Compute a float32 vector for each row, in the order of the rows.

    The vectors stay on the device until all are there, so that it does not wait for each copy.
    """
    device = model.backbone.spec.device
    max_tokens = TOKENS_ON_CPU if device.type == "cpu" else TOKENS_ON_ACCELERATOR
    batches = deque(prediction_batches(tokens.lengths, max_tokens))
    order: list[np.ndarray] = []
    computed: list[torch.Tensor] = []
    n_done = 0
    while batches:
        rows = batches.popleft()
        vectors = _unless_out_of_memory(function, to_device(tokens.batch(rows), device))
        if vectors is None:
            max_tokens = (len(rows) + 1) // 2 * int(tokens.lengths[rows].max())
            left = np.concatenate([rows, *batches])
            batches = deque(
                left[part] for part in prediction_batches(tokens.lengths[left], max_tokens)
            )
            empty_cache(device)
        else:
            order.append(rows)
            computed.append(vectors)
            n_done += len(rows)
            if show is not None:
                show(n_done / len(tokens))
    values = torch.cat([vectors.cpu() for vectors in computed]).numpy()
    return values[np.argsort(np.concatenate(order))]


def _unless_out_of_memory(
    function: Callable[..., torch.Tensor], inputs: dict[str, torch.Tensor]
) -> torch.Tensor | None:
    """Call a function; return None if memory ran out and the inputs can be halved."""
    try:
        return function(**inputs)
    except RuntimeError as error:
        if not is_out_of_memory(error) or len(inputs["input_ids"]) < 2:
            raise
    return None  # outside of the handler, whose traceback holds the activations


def one_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Generator[Result]:
    """Yield a function of each item; another thread computes the next one meanwhile."""
    with ThreadPoolExecutor(1) as executor:
        coming: Future[Result] | None = None
        for item in items:
            coming, ready = executor.submit(function, item), coming
            if ready is not None:
                yield ready.result()
        if coming is not None:
            yield coming.result()
