"""The preparation of a training: from checked texts and parameters to a trainer that may begin.

This module knows nothing of scores or callbacks, nor of what the labels mean.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import joblib
import numpy as np
import torch

from skqlora._utils.processes import check_not_forked
from skqlora.adapter import AdapterState, Footprint, OptimizerState
from skqlora.checkpoint.spec import BackboneSpec
from skqlora.memory.free import free_memory
from skqlora.memory.planning import PlannedFit, choose_checkpointing, fits
from skqlora.memory.tracing import UntraceableError
from skqlora.model.cache import count_bytes_of, drop_other_backbones, get_backbone
from skqlora.model.lora import resolve_lora
from skqlora.model.text_model import TextModel
from skqlora.settings.adapter_settings import TextSettings
from skqlora.settings.parameters import Parameters
from skqlora.settings.settings import Settings, resolve_settings, resolve_text_settings
from skqlora.settings.template import prompt_of_lines
from skqlora.text.batches import TokenizedTexts, rounded_up_length
from skqlora.text.columns import names_of_parts
from skqlora.text.cutting import Cuts
from skqlora.text.inputs import LabelledTexts
from skqlora.text.tokenization import load_tokenizer
from skqlora.text.weights import expand_windows
from skqlora.training import state_store
from skqlora.training.distributed import Ranks
from skqlora.training.head_start import check_class_names, start_head, warn_of_missing_prompt
from skqlora.training.prefix import CachedPrefix, cached_prefix
from skqlora.training.trainer import Trainer

# The settings that all ranks of a training must share. They share the base too, which is compared
# by its weights, wherever it is.
SHARED_SETTINGS = (
    "pooling",
    "init_head_weights",
    "lora_dropout",
    "num_train_epochs",
    "batch_size",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "learning_rate",
    "head_learning_rate",
    "weight_decay",
    "warmup_steps",
    "lr_scheduler_type",
    "max_grad_norm",
    "optim",
    "incremental",
)

# What to do if texts are cut, where the model takes more tokens, and where it does not.
LONGER = "a greater max_length, or truncation='windows' to use all of each text"
SAME_LENGTH = (
    "truncation='windows' to use all of each text, another truncation to keep another part of it, "
    "or a model that takes more tokens, which this one does not"
)


@dataclass(frozen=True)
class TrainingRun:
    """A training that may begin.

    Attributes
    ----------
    trainer : Trainer
    settings : Settings
    text_settings : TextSettings
    tokenizer_fingerprint : str
    footprint : Footprint
    """

    trainer: Trainer
    settings: Settings
    text_settings: TextSettings
    tokenizer_fingerprint: str
    footprint: Footprint

    def adapter_state(self) -> AdapterState:
        """Return a copy of the adapter as it is now."""
        return self.trainer.model.adapter_state(self.text_settings, self.tokenizer_fingerprint)


@contextmanager
def prepared_training(
    parameters: Parameters,
    table: LabelledTexts,
    weights: np.ndarray,
    seed: int,
    n_epochs: int,
    *,
    start: AdapterState | None = None,
    resumed: OptimizerState | None = None,
    incremental: bool = False,
) -> Iterator[TrainingRun]:
    """Prepare everything for training an adapter, and clean up after it.

    Parameters
    ----------
    parameters : Parameters
    table : LabelledTexts
    weights : ndarray of the shape of the targets
    seed : int
        The seed of the training, the same on all ranks.
    n_epochs : int
        The greatest number of epochs to train.
    start : AdapterState, optional
        The adapter to continue from.
    resumed : OptimizerState, optional
        The optimizer to continue from.
    incremental : bool, default=False
        Whether to train one epoch of an unknown number, with learning rates that do not decay.

    Yields
    ------
    run : TrainingRun

    Raises
    ------
    ValueError
        If the model, the texts and the parameters do not fit together. Where that is known before
        a base is loaded, none is loaded.
    MemoryError
        If the fit cannot fit into memory. No base is loaded then.
    """
    check_not_forked()
    ranks = Ranks.current()
    spec = BackboneSpec.of(parameters, start)
    architecture = spec.architecture(progress_bars=bool(parameters.verbose))
    lora = resolve_lora(parameters, architecture.skeleton)
    tokenizer = load_tokenizer(spec.model, spec.revision, spec.files)
    text_settings = resolve_text_settings(
        parameters,
        architecture.max_length(tokenizer.max_length),
        _resolve_prompt(
            parameters.prompt, table, pairs=architecture.is_encoder and tokenizer.separates_pairs
        ),
        token_type_ids=architecture.takes_token_type_ids and tokenizer.gives_token_type_ids,
    )
    check_class_names(parameters, table)
    if start is None and not architecture.is_encoder:
        warn_of_missing_prompt(parameters, text_settings.prompt)
    cuts = Cuts()
    tokens, counts = tokenizer.tokenize(table.texts, text_settings, architecture.vocab_size, cuts)
    longer = text_settings.max_length < architecture.max_length(tokenizer.max_length)
    cuts.warn(
        text_settings,
        f"Pass {LONGER if longer else SAME_LENGTH}.",
        names_of_parts(text_settings.prompt, table.inputs.columns),
    )
    rows, row_weights = expand_windows(table, weights, counts)
    target = table.target
    targets = target.to_training(rows.targets)
    longest = min(rounded_up_length(int(tokens.lengths.max())), text_settings.max_length)
    planned = PlannedFit(parameters, spec, architecture.skeleton, lora, target.n_outputs, longest)
    checkpointing = ranks.call_on_first(lambda: _choose_checkpointing(planned))

    backbone = get_backbone(spec, verbose=bool(parameters.verbose))
    settings = resolve_settings(
        parameters,
        device=str(spec.device),
        compute_dtype=str(spec.compute_dtype).removeprefix("torch."),
        max_length=text_settings.max_length,
        prompt=text_settings.prompt,
        pooling=parameters.pooling,
        num_train_epochs=n_epochs,
        gradient_checkpointing=checkpointing,
        model_type=architecture.model_type,
        hidden_size=backbone.hidden_size,
        incremental=incremental,
    )
    ranks.check_same_inputs(
        lambda: (
            (table.texts, target.identity, table.targets.tolist(), weights.tolist()),
            (lora, text_settings, [getattr(settings, name) for name in SHARED_SETTINGS]),
            (backbone.fingerprint, spec.quantization, spec.double_quant, spec.compute_dtype),
            joblib.hash((start, resumed)),
        )
    )
    with TextModel.for_training(
        backbone,
        lora,
        n_outputs=target.n_outputs,
        pooling=settings.pooling,
        seed=seed,
        lora_dropout=settings.lora_dropout,
        start=start,
    ) as model:
        settings = replace(settings, pooling=model.pooling)
        if start is None:
            start_head(
                settings.init_head_weights,
                model,
                tokenizer,
                target,
                tokens,
                targets,
                row_weights,
                seed,
            )
        with (
            _prefix(model, tokens, settings) as prefix,
            Trainer(
                model,
                tokens,
                targets,
                settings,
                weights=row_weights,
                loss=target.loss,
                prefix=prefix,
                seed=seed,
                resumed=resumed,
            ) as trainer,
        ):
            footprint = backbone.footprint(model.count_trainable())
            yield TrainingRun(trainer, settings, text_settings, tokenizer.fingerprint, footprint)


def _resolve_prompt(prompt: str | None, table: LabelledTexts, *, pairs: bool) -> str | None:
    """Choose a prompt for several columns if there is none; `pairs` are encoded without one."""
    first, columns = table.texts[0], table.inputs.columns
    if prompt is not None or isinstance(first, str):
        return prompt
    if len(first) == 2 and pairs and table.inputs.all_text:
        return None
    return prompt_of_lines(None if columns is None else columns.names, len(first))


def _choose_checkpointing(planned: PlannedFit) -> bool:
    """Decide by the free memory whether to checkpoint; raise MemoryError if the fit cannot fit."""
    spec, asked = planned.spec, planned.parameters.gradient_checkpointing is True
    n_sharing = Ranks.current().size if spec.device.type == "cpu" else 1

    def count_free() -> float:
        free = free_memory(spec.device, spread=spec.spread)
        return free / n_sharing + count_bytes_of(spec)

    try:
        if not fits(planned.estimate(checkpointing=asked), count_free()):
            # What is kept for later fits is worth less than this one.
            state_store.forget()
            drop_other_backbones(spec)
        return choose_checkpointing(planned, count_free())
    except UntraceableError:
        return asked


def _prefix(
    model: TextModel, tokens: TokenizedTexts, settings: Settings
) -> AbstractContextManager[CachedPrefix | None]:
    """Compute the layers before the adapted ones in advance, if that is wanted and worth it."""
    if settings.cache_dtype is None or settings.num_train_epochs == 1:
        return nullcontext()
    dtype = None if settings.cache_dtype == "auto" else getattr(torch, settings.cache_dtype)
    return cached_prefix(
        model, tokens, settings.max_length, batch_size=settings.batch_size, dtype=dtype
    )
