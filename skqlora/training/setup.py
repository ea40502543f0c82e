"""From an estimator's parameters to what computes: one training, or the logits of one prediction.

Knows nothing of labels' meaning, of scores or of callbacks. The estimator is only read.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral
from typing import Any

import joblib
import numpy as np
import torch

from skqlora._utils.libraries import muted
from skqlora._utils.processes import refuse_fork_of_threads
from skqlora.adapter import (
    TEXT_FIELD,
    AdapterState,
    Footprint,
    LoraSettings,
    OptimizerState,
    TextSettings,
)
from skqlora.memory.estimate import (
    MemoryEstimate,
    choose_checkpointing,
    estimate_training,
    fits,
    free_memory,
)
from skqlora.memory.tracing import UntraceableError
from skqlora.model.architecture import Architecture, check_architecture, pin_revision
from skqlora.model.backbone import BackboneSpec, describe_files
from skqlora.model.blocks import modules_in_layers
from skqlora.model.cache import count_bytes_of, free_what_is_idle, get_backbone
from skqlora.model.device import may_spread, resolve_compute_dtype, resolve_device
from skqlora.model.replicas import targeted_modules
from skqlora.model.text_classifier import TextClassifierModel, refuse_other_base
from skqlora.settings.recipe import AUTO_MAX_LENGTH, HEAD_RATE_FACTOR, auto_learning_rate
from skqlora.text.batches import TokenizedTexts, rounded_up_length
from skqlora.text.inputs import PREDICTION_CHUNK, LabelledTexts
from skqlora.text.tokenization import CachingTokenizer, load_tokenizer
from skqlora.training.distributed import Ranks
from skqlora.training.head_start import refuse_unnamed_classes, start_head
from skqlora.training.prefix import CachedPrefix, cached_prefix
from skqlora.training.trainer import (
    Trainer,
    TrainingSettings,
    largest_pass,
    predict_logits,
)


@dataclass(frozen=True)
class Finetuning:
    """A training that has begun.

    Attributes
    ----------
    trainer : Trainer
    text : TextSettings
    tokenizer_fingerprint : str
    footprint : Footprint
    """

    trainer: Trainer
    text: TextSettings
    tokenizer_fingerprint: str
    footprint: Footprint

    def capture(self) -> AdapterState:
        """Copy the adapter as it is now.

        Raises
        ------
        FloatingPointError
            If the last update made the loss infinite or no number.
        """
        self.trainer.refuse_divergence()
        return self.template()

    def template(self) -> AdapterState:
        """Copy the adapter, whatever its values are."""
        return self.trainer.model.capture(self.text, self.tokenizer_fingerprint)


@contextmanager
def finetuning(
    params: Any,
    table: LabelledTexts,
    weights: np.ndarray,
    seed: int,
    n_epochs: int,
    *,
    start: AdapterState | None = None,
    resumed: OptimizerState | None = None,
    incremental: bool = False,
) -> Iterator[Finetuning]:
    """Prepare everything for training an adapter, and clean up after it.

    Parameters
    ----------
    params : QLoRAClassifier
    table : LabelledTexts
    weights : ndarray of the shape of the targets
    seed : int
        The same on all ranks.
    n_epochs : int
        That are to be trained at most.
    start : AdapterState, optional
        To go on from.
    resumed : OptimizerState, optional
        To go on from.
    incremental : bool, default=False
        Train one epoch of unknown many: no decay of the learning rates.

    Yields
    ------
    run : Finetuning
    """
    refuse_fork_of_threads()
    spec = backbone_spec(params, start)
    architecture, lora = architecture_and_lora(params, spec)
    tokenizer = load_tokenizer(spec.model, spec.revision, spec.files)
    max_length = choose_max_length(params, architecture.max_positions, tokenizer.max_length)
    text = text_settings(params, max_length)
    how = params.init_head_weights
    refuse_unnamed_classes(how, table, params.pooling)
    tokens, counts = tokenizer.tokenize(table.texts, text, architecture.vocab_size)
    rows, row_weights = by_window(table, weights, counts)
    n_classes = len(table.classes)
    longest = min(rounded_up_length(int(tokens.lengths.max())), max_length)
    checkpointing = Ranks.current().call_on_first(
        lambda: _choose_checkpointing(params, spec, architecture, lora, n_classes, longest)
    )

    backbone = get_backbone(spec, verbose=bool(params.verbose))
    settings = training_settings(
        params,
        architecture.model_type,
        backbone.hidden_size,
        n_epochs,
        incremental=incremental,
        checkpointing=checkpointing,
    )
    Ranks.current().refuse_differences(
        lambda: (
            (table.texts, table.classes.tolist(), table.targets.tolist(), weights.tolist()),
            (lora, settings, params.lora_dropout, params.pooling, how, text),
            (backbone.fingerprint, spec.quantization, spec.double_quant, spec.compute_dtype),
            joblib.hash((start, resumed)),
        )
    )
    with TextClassifierModel.fresh(
        backbone,
        lora,
        n_classes=n_classes,
        pooling=params.pooling,
        seed=seed,
        lora_dropout=params.lora_dropout,
        start=start,
    ) as model:
        if start is None:
            start_head(
                "normal" if how == "probe" and incremental else how,
                model,
                tokenizer,
                table.classes,
                tokens,
                rows.targets,
                row_weights,
                seed,
            )
        with (
            _prefix(params, model, tokens, max_length, settings) as prefix,
            Trainer(
                model,
                tokens,
                rows.targets,
                settings,
                weights=row_weights,
                prefix=prefix,
                seed=seed,
                resumed=resumed,
                verbose=params.verbose,
            ) as trainer,
        ):
            footprint = backbone.footprint(model.count_trainable())
            yield Finetuning(trainer, text, tokenizer.fingerprint, footprint)


def _prefix(
    params: Any,
    model: TextClassifierModel,
    tokens: TokenizedTexts,
    max_length: int,
    settings: TrainingSettings,
) -> AbstractContextManager[CachedPrefix | None]:
    """Compute the layers before the adapted ones beforehand, if that is wanted and worth it."""
    if params.cache_dtype is None or settings.num_train_epochs == 1:
        return nullcontext()
    dtype = None if params.cache_dtype == "auto" else getattr(torch, params.cache_dtype)
    return cached_prefix(model, tokens, max_length, batch_size=params.batch_size, dtype=dtype)


def estimate_fit(params: Any, n_classes: int) -> MemoryEstimate:
    """Estimate what a fit takes whose texts are as long as its parameters let them be.

    Parameters
    ----------
    params : QLoRAClassifier
        Its device need not be there; "auto" checkpointing counts as none.
    n_classes : int

    Returns
    -------
    estimate : MemoryEstimate
    """
    spec = backbone_spec(params, here=False)
    architecture, lora = architecture_and_lora(params, spec)
    tokenizer = load_tokenizer(spec.model, spec.revision, spec.files)
    n_tokens = choose_max_length(params, architecture.max_positions, tokenizer.max_length)
    return _estimate(params, spec, architecture, lora, n_classes, n_tokens)(
        n_texts=largest_pass(params.batch_size, n_tokens, spec.device),
        checkpointing=params.gradient_checkpointing not in ("auto", False),
    )


def _estimate(
    params: Any,
    spec: BackboneSpec,
    architecture: Architecture,
    lora: LoraSettings,
    n_classes: int,
    n_tokens: int,
) -> Callable[..., MemoryEstimate]:
    return partial(
        estimate_training,
        architecture.skeleton,
        spec,
        lora,
        optim=params.optim,
        n_classes=n_classes,
        n_tokens=n_tokens,
        dropout=params.lora_dropout > 0,
        keep_pooler=params.pooling == "pooler",
        batch_rows=params.batch_size * params.gradient_accumulation_steps,
    )


def _choose_checkpointing(
    params: Any,
    spec: BackboneSpec,
    architecture: Architecture,
    lora: LoraSettings,
    n_classes: int,
    longest: int,
) -> bool:
    """Decide by the memory that is there; refuse what cannot fit, by MemoryError."""
    n_texts = largest_pass(params.batch_size, longest, spec.device)
    wanted = params.gradient_checkpointing
    wanted = wanted if isinstance(wanted, str) else bool(wanted)
    estimate = _estimate(params, spec, architecture, lora, n_classes, longest)
    n_sharing = Ranks.current().size if spec.device.type == "cpu" else 1

    def count_free() -> float:
        free = free_memory(spec.device, spread=spec.spread)
        return free / n_sharing + count_bytes_of(spec)

    try:
        if not fits(estimate(n_texts=n_texts, checkpointing=wanted is True), count_free()):
            free_what_is_idle(spec)
        return choose_checkpointing(wanted, estimate, n_texts, spec.device, count_free())
    except UntraceableError:
        return wanted is True


def compute_logits(params: Any, adapter: AdapterState, texts: list[str]) -> np.ndarray:
    """Compute the logits of texts, from the base of the process and an adapter.

    A text that is there several times is computed once. Token ids are made for some texts after
    the other, so that beside texts and logits the memory stays bounded.

    Parameters
    ----------
    params : QLoRAClassifier
    adapter : AdapterState
    texts : list of str, of length n_texts

    Returns
    -------
    logits : ndarray of shape (n_texts, n_classes), float64

    Raises
    ------
    ValueError
        If the base or its tokenizer is not the one that the adapter was trained with.
    """
    refuse_fork_of_threads()
    spec = backbone_spec(params, adapter)
    backbone = get_backbone(spec, verbose=bool(params.verbose))
    refuse_other_base(backbone, adapter)
    tokenizer = load_tokenizer(spec.model, spec.revision, spec.files)
    refuse_other_tokenizer(spec, tokenizer, adapter)
    places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
    different = list(places)
    logits = []
    with TextClassifierModel.restored(backbone, adapter) as model:
        for start in range(0, len(different), PREDICTION_CHUNK):
            chunk = different[start : start + PREDICTION_CHUNK]
            tokens, counts = tokenizer.tokenize(chunk, adapter.text, backbone.vocab_size)
            sums = np.add.reduceat(predict_logits(model, tokens), np.cumsum(counts) - counts)
            logits.append(sums / counts[:, None])
    return np.concatenate(logits)[[places[text] for text in texts]]


def refuse_other_tokenizer(
    spec: BackboneSpec, tokenizer: CachingTokenizer, adapter: AdapterState
) -> None:
    """Refuse a tokenizer that an adapter was not trained with, by ValueError."""
    if tokenizer.fingerprint != adapter.tokenizer_fingerprint:
        raise ValueError(
            f"The tokenizer of model={spec.model!r} (fingerprint {tokenizer.fingerprint[:12]}) is "
            f"not the one that was fitted with (fingerprint {adapter.tokenizer_fingerprint[:12]}). "
            "Put the tokenizer's files back beside the base, or call `fit` with warm_start=False."
        )


def architecture_and_lora(params: Any, spec: BackboneSpec) -> tuple[Architecture, LoraSettings]:
    """Say what an estimator adapts, and how; refuse by ValueError what cannot be."""
    lora = lora_settings(params)
    with muted(progress_bars=bool(params.verbose)):
        architecture = check_architecture(
            spec.model,
            spec.revision,
            quantized=spec.quantization is not None,
            attn_implementation=spec.attn_implementation,
            files=spec.files,
        )
        targets = targeted_modules(lora.target_modules, architecture.skeleton)
    if params.layers != "all":
        layers = int(params.layers) if isinstance(params.layers, Integral) else params.layers
        chosen = modules_in_layers(targets, layers, architecture.skeleton)
        lora = replace(lora, target_modules=chosen)
    return architecture, lora


def backbone_spec(
    params: Any, adapter: AdapterState | None = None, *, here: bool = True
) -> BackboneSpec:
    """Say which base an estimator means: for an adapter the very commit that it was trained on.

    `here` says whether its device has to be on this machine.
    """
    device = resolve_device(params.device, here=here)
    files = describe_files(os.fspath(params.model))
    model = str(files[0]) if files else os.fspath(params.model)  # however a path is written
    if adapter is not None and adapter.revision is not None and adapter.model == model:
        revision = adapter.revision
    else:
        revision = params.revision if files else pin_revision(model, params.revision)
    return BackboneSpec(
        model=model,
        revision=revision,
        quantization=params.quantization,
        double_quant=bool(params.double_quant) and params.quantization is not None,
        compute_dtype=resolve_compute_dtype(params.compute_dtype, device),
        device=device,
        spread=params.device == "auto" and may_spread(device),
        attn_implementation=params.attn_implementation,
        files=files,
    )


def lora_settings(params: Any) -> LoraSettings:
    """Say which adapter an estimator means."""
    targets, alpha = params.target_modules, float(params.lora_alpha)
    return LoraSettings(
        r=int(params.lora_r),  # plain numbers, to be written as JSON
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        target_modules=targets if isinstance(targets, str) else tuple(targets),
        use_rslora=bool(params.use_rslora),
        use_dora=bool(params.use_dora),
        init_lora_weights=params.init_lora_weights,
    )


def training_settings(
    params: Any,
    model_type: str,
    hidden_size: int,
    n_epochs: int,
    *,
    incremental: bool = False,
    checkpointing: bool = False,
) -> TrainingSettings:
    """Say which recipe an estimator means for a base of that family and width."""
    rate, head_rate = params.learning_rate, params.head_learning_rate
    if rate == "auto":
        rate = auto_learning_rate(model_type, hidden_size)
    if head_rate == "auto":
        head_rate = HEAD_RATE_FACTOR * rate
    return TrainingSettings(
        num_train_epochs=n_epochs,
        batch_size=params.batch_size,
        gradient_accumulation_steps=params.gradient_accumulation_steps,
        gradient_checkpointing=checkpointing,
        learning_rate=rate,
        head_learning_rate=head_rate,
        weight_decay=params.weight_decay,
        warmup_steps=params.warmup_steps,
        lr_scheduler_type="constant_with_warmup" if incremental else params.lr_scheduler_type,
        incremental=incremental,
        max_grad_norm=params.max_grad_norm,
        optim=params.optim,
    )


def text_settings(params: Any, max_length: int) -> TextSettings:
    """Say how an estimator's texts become token ids; refuse by ValueError a prompt without them."""
    prompt = params.prompt
    if prompt is not None and prompt.count(TEXT_FIELD) != 1:
        raise ValueError(
            f"Got prompt={prompt!r}. Wanted: a template with one {TEXT_FIELD}, the place of the "
            f"text, e.g. {TEXT_FIELD + chr(10) + 'Label:'!r}."
        )
    return TextSettings(max_length, params.truncation, int(params.stride), prompt)


def by_window(
    table: LabelledTexts, weights: np.ndarray, counts: np.ndarray
) -> tuple[LabelledTexts, np.ndarray]:
    """Give each window of a text the text's label and its part of the weight.

    Parameters
    ----------
    table : LabelledTexts
        Of n_texts texts.
    weights : ndarray of the shape of the targets
    counts : ndarray of int, of shape (n_texts,)
        Windows of each text.

    Returns
    -------
    table : LabelledTexts
        Of as many rows as there are windows.
    weights : ndarray of the shape of its targets
        On average what they were.
    """
    if counts.max() == 1:
        return table, weights
    owners = np.repeat(np.arange(len(counts)), counts)
    parts = (counts.mean() / counts)[owners]
    return table.take(owners), weights[owners] * parts.reshape(-1, *[1] * (weights.ndim - 1))


def choose_max_length(params: Any, max_positions: int | None, tokenizer_max_length: int) -> int:
    """Resolve "auto"; refuse by ValueError what is longer than the model takes."""
    limit = min(max_positions or tokenizer_max_length, tokenizer_max_length)
    if params.max_length == "auto":
        return min(AUTO_MAX_LENGTH, limit)
    if params.max_length > limit:
        raise ValueError(
            f"Got max_length={params.max_length} but model={os.fspath(params.model)!r} takes "
            f"{limit} tokens. Pass at most that, or 'auto'."
        )
    return int(params.max_length)
