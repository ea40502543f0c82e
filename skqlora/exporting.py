"""Fitted classifiers in the formats of PEFT and Transformers, and from PEFT's.

Knows nothing of how files are put in their place.
"""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from skqlora.adapter import AdapterState, LoraSettings
from skqlora.architecture import check_architecture, read_config
from skqlora.cache import get_backbone
from skqlora.clones import has_conv1d
from skqlora.finetuning import backbone_spec, choose_max_length
from skqlora.merging import HEADS, classification_config, merge, stock_model
from skqlora.model import TextClassifierModel, refuse_other_base
from skqlora.peft_format import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    adapted_modules,
    from_peft_name,
    write_adapter,
)
from skqlora.tokenization import load_tokenizer

# What PEFT can do to a base that an adapter here cannot.
UNSUPPORTED = (
    "rank_pattern",
    "alpha_pattern",
    "lora_bias",
    "layer_replication",
    "trainable_token_indices",
    "target_parameters",
    "use_qalora",
    "use_bdlora",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)


def to_transformers(estimator: Any) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a dense float32 model and its tokenizer; see `QLoRAClassifier.to_transformers`."""
    spec = backbone_spec(estimator, estimator.adapter_)
    backbone = get_backbone(spec, verbose=bool(estimator.verbose))
    refuse_other_base(backbone, estimator.adapter_)
    tokenizer = AutoTokenizer.from_pretrained(
        spec.model, revision=spec.revision, trust_remote_code=False
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = estimator.adapter_.max_length
    config = classification_config(
        backbone.module.config,
        [str(label) for label in estimator.classes_.tolist()],
        multilabel=estimator.multilabel_,
        pad_id=tokenizer.pad_token_id,
    )
    return merge(backbone, estimator.adapter_, config), tokenizer


def write_merged(estimator: Any, folder: Path, dtype: str) -> None:
    """Write that model, rounded to a dtype, and its tokenizer."""
    model, tokenizer = to_transformers(estimator)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_peft(estimator: Any, folder: Path) -> None:
    """Write an adapter for sequence classification; see `QLoRAClassifier.to_peft`."""
    adapter: AdapterState = estimator.adapter_
    model, revision = os.fspath(estimator.model), adapter.revision or estimator.revision
    stock, base, head_name = _stock_skeleton(model, revision, adapter.pooling)
    write_adapter(
        folder,
        adapter.lora,
        adapter.lora_tensors,
        model=model,
        revision=revision,
        lora_dropout=estimator.lora_dropout,
        fan_in_fan_out=estimator.quantization is None and has_conv1d(stock),
        within=base,
        head=adapter.head_tensors,
        head_name=head_name,
    )


def read_peft(
    kind: Any, path: str | os.PathLike, classes: Any, multilabel: bool, changes: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read an adapter of PEFT's; see `QLoRAClassifier.from_peft`.

    Parameters
    ----------
    kind : type
        Of the classifier.
    path, classes, multilabel
        As there.
    changes : dict
        Parameters that the adapter does not decide.

    Returns
    -------
    parameters, fitted : dict
        Of the classifier, by name.
    """
    config = read_peft_config(path)
    targets = config["target_modules"]
    parameters = {
        "model": config["base_model_name_or_path"],
        "revision": config.get("revision"),
        "lora_r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "lora_dropout": config.get("lora_dropout", 0.0),
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "use_rslora": config.get("use_rslora", False),
        "use_dora": config.get("use_dora", False),
    }
    estimator = kind(**parameters | changes)
    estimator._validate_params()
    adapter, footprint = read_peft_weights(path, config, estimator)
    labels, adapter = _sorted_by_class(adapter, classes)
    parameters |= {
        "target_modules": list(adapter.lora.target_modules),
        "pooling": adapter.pooling,
    }
    return parameters | changes, {
        "classes_": labels,
        "multilabel_": multilabel,
        "adapter_": adapter,
        "n_iter_": 0,
        "n_samples_seen_": 0,
        "loss_curve_": [],
        "validation_scores_": None,
        "best_validation_score_": None,
        "optimizer_state_": None,
        "footprint_": footprint,
        "_random_seed": 0,
    }


def read_peft_config(path: str | os.PathLike) -> dict[str, Any]:
    """Read an adapter's configuration and refuse what is no LoRA for sequence classification.

    Parameters
    ----------
    path : str or path
        A folder, or the id of a repository of the Hub.

    Raises
    ------
    ValueError
        If there is none, or of another kind: the message names it.
    """
    config = json.loads(_file_of(path, CONFIG_FILE).read_text(encoding="utf-8"))
    wanted = {"peft_type": "LORA", "task_type": "SEQ_CLS", "bias": "none"}
    other = {name: config.get(name) for name in wanted if config.get(name) != wanted[name]}
    other |= {name: config[name] for name in UNSUPPORTED if config.get(name)}
    if not set(config.get("modules_to_save") or []) <= set(HEADS.values()):
        other["modules_to_save"] = config["modules_to_save"]
    if other:
        name = min(other)
        raise ValueError(
            f"{os.fspath(path)!r} has {name}={other[name]!r}. Wanted: an adapter of LoRA alone for "
            "sequence classification (task_type='SEQ_CLS'), with a linear head named 'score' or "
            "'classifier'."
        )
    return config


def read_peft_weights(
    path: str | os.PathLike, config: dict[str, Any], estimator: Any
) -> tuple[AdapterState, Any]:
    """Read an adapter's weights and try them on the estimator's base.

    Parameters
    ----------
    path : str or path
        A folder, or the id of a repository of the Hub.
    config : dict
        Of `read_peft_config`.
    estimator : QLoRAClassifier
        Its base and `max_length` are read.

    Returns
    -------
    adapter : AdapterState
    footprint : Footprint

    Raises
    ------
    ValueError
        If there is a tensor that is neither of LoRA nor of a linear head, or they do not fit the
        base.
    """
    named = safetensors.numpy.load_file(_file_of(path, WEIGHTS_FILE))
    named = {name: tensor.astype(np.float32) for name, tensor in named.items()}
    head_name = next((h for h in HEADS.values() if f"{PREFIX}{h}.weight" in named), None)
    if head_name is None:
        raise ValueError(
            f"{os.fspath(path)!r} holds no head named 'score' or 'classifier'. Wanted: an adapter "
            "that was saved with its head (modules_to_save)."
        )
    pooling = next(pooling for pooling, head in HEADS.items() if head == head_name)
    spec = backbone_spec(estimator)
    _, base, _ = _stock_skeleton(spec.model, spec.revision, pooling)
    prefixes = {"lora": f"{PREFIX}{base}.", "head": f"{PREFIX}{head_name}."}
    lora_tensors, head_tensors = {}, {}
    for name, tensor in named.items():
        if name.startswith(prefixes["head"]) and ".lora_" not in name:
            head_tensors[name.removeprefix(prefixes["head"])] = tensor
        elif name.startswith(prefixes["lora"]) and ".lora_" in name:
            lora_tensors[from_peft_name(name.removeprefix(prefixes["lora"]))] = tensor
        else:
            raise ValueError(
                f"{os.fspath(path)!r} holds {name!r}, which is neither LoRA on {base!r} nor a "
                f"linear layer {head_name!r}. Wanted: an adapter of these alone."
            )
    architecture = check_architecture(
        spec.model, spec.revision, quantized=spec.quantization is not None, files=spec.files
    )
    tokenizer = load_tokenizer(spec.model, spec.revision, spec.files)
    backbone = get_backbone(spec, verbose=bool(estimator.verbose))
    state = AdapterState(
        lora=LoraSettings(
            r=config["r"],
            lora_alpha=config["lora_alpha"],
            target_modules=tuple(adapted_modules(lora_tensors)),
            use_rslora=config.get("use_rslora", False),
            use_dora=config.get("use_dora", False),
            init_lora_weights=True,
        ),
        pooling=pooling,
        max_length=choose_max_length(estimator, architecture.max_positions, tokenizer.max_length),
        model=spec.model,
        revision=spec.revision,
        fingerprint=backbone.fingerprint,
        tokenizer_fingerprint=tokenizer.fingerprint,
        lora_tensors=lora_tensors,
        head_tensors=head_tensors,
    )
    with TextClassifierModel.restored(backbone, state) as model:  # refuses what does not fit
        return state, backbone.footprint(model.count_trainable())


def _sorted_by_class(adapter: AdapterState, classes: Any) -> tuple[np.ndarray, AdapterState]:
    """Sort labels, and the rows of the head with them."""
    n_classes = len(adapter.head_tensors["weight"])
    labels = np.arange(n_classes) if classes is None else np.asarray(classes)
    if n_classes < 2:
        raise ValueError(
            f"The adapter's head has {n_classes} output, as a regression or a reward model has. "
            "Wanted: one for each of at least two classes."
        )
    if labels.shape != (n_classes,) or len(np.unique(labels)) != n_classes:
        raise ValueError(
            f"Got classes={labels.tolist()} but the adapter's head has {n_classes} outputs. "
            "Wanted: a label for each, all different, in the order of the outputs."
        )
    order = np.argsort(labels)
    head_tensors = {name: tensor[order] for name, tensor in adapter.head_tensors.items()}
    return labels[order], replace(adapter, head_tensors=head_tensors)


def _stock_skeleton(
    model: str, revision: str | None, pooling: str
) -> tuple[PreTrainedModel, str, str]:
    with torch.device("meta"):  # every shape and no weight
        return stock_model(read_config(model, revision), pooling)


def _file_of(path: str | os.PathLike, name: str) -> Path:
    """Find a file in a folder or in a repository of the Hub."""
    try:
        return Path(cached_file(os.fspath(path), name))  # type: ignore[arg-type]
    except OSError as error:
        raise ValueError(
            f"{os.fspath(path)!r} has no {name}. Wanted: a folder that `PeftModel.save_pretrained` "
            "wrote, or its repository on the Hub; with safetensors, since other formats can run "
            "code when they are read."
        ) from error
