"""Fitted estimators written in the formats of PEFT and Transformers, and read from PEFT's.

This module knows nothing of how files are put in their place.
"""

import errno
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from transformers import (
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from skqlora._utils.libraries import library_lock, muted
from skqlora._utils.messages import warn
from skqlora._utils.torch_state import float32_by_default, plain_torch
from skqlora.adapter import AdapterState, Fitted, Footprint
from skqlora.checkpoint.experts import has_experts
from skqlora.checkpoint.modules import replicate
from skqlora.checkpoint.spec import BackboneSpec
from skqlora.model.backbone import Backbone
from skqlora.model.cache import get_backbone
from skqlora.model.lora import has_conv1d
from skqlora.model.text_model import TextModel, check_base
from skqlora.persistence.merging import HEADS, classification_config, merge, stock_model
from skqlora.persistence.peft_format import (
    CONFIG_FILE,
    PREFIX,
    WEIGHTS_FILE,
    adapted_modules,
    from_peft_name,
    write_adapter,
)
from skqlora.persistence.saved_format import check_head, check_lora, naming_the_file, typed
from skqlora.settings.adapter_settings import LoraSettings, TextSettings
from skqlora.settings.parameters import Parameters
from skqlora.settings.settings import resolve_text_settings
from skqlora.text.columns import Columns
from skqlora.text.targets import Classes, Numbers, Target
from skqlora.text.tokenization import check_tokenizer, load_tokenizer

# The entries of an adapter's configuration that are read here or do not affect its result.
UNDERSTOOD = {
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
    "r",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "lora_alpha",
    "lora_dropout",
    "fan_in_fan_out",
    "bias",
    "use_rslora",
    "use_dora",
    "modules_to_save",
    "init_lora_weights",
    "megatron_core",
    "qalora_group_size",
}
REQUIRED: dict[str, type | tuple[type, ...]] = {
    "r": int,
    "lora_alpha": (int, float),
    "target_modules": (list, str),
    "base_model_name_or_path": str,
}
HARMLESS_STARTS = (True, False, None, "gaussian")  # PiSSA, OLoRA and others change the base
AS_PEFT_WROTE = "files as `PeftModel.save_pretrained` wrote them. Copy or save them again"


@plain_torch()
@float32_by_default()
def to_transformers(
    parameters: Parameters, fitted: Fitted
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a dense float32 model and its tokenizer; see `QLoRAClassifier.to_transformers`."""
    backbone = _checked_base(parameters, fitted.adapter)
    spec = backbone.spec
    tokenizer = AutoTokenizer.from_pretrained(
        spec.model, revision=spec.revision, trust_remote_code=False
    )
    tokenizer.pad_token = _safe_padding(tokenizer, backbone.vocab_size)
    text_settings = fitted.adapter.text_settings
    _warn_of_what_is_not_kept(text_settings, kept=("head", "tail"))
    tokenizer.padding_side = "right"
    in_prompt = any(token in (text_settings.prompt or "") for token in tokenizer.all_special_tokens)
    tokenizer.split_special_tokens = not (text_settings.parse_special_tokens or in_prompt)
    tokenizer.truncation_side = "left" if text_settings.truncation == "tail" else "right"
    tokenizer.model_max_length = text_settings.max_length
    config = classification_config(
        backbone.module.config, fitted.target, pad_id=tokenizer.pad_token_id
    )
    return merge(backbone, _in_units(fitted), config), tokenizer


def _in_units(fitted: Fitted) -> AdapterState:
    """Return the adapter with a head whose outputs are in the user's units."""
    adapter, target = fitted.adapter, fitted.target
    if isinstance(target, Classes):
        return adapter
    head = {"weight": adapter.head_tensors["weight"] * target.scale[:, None]}
    if "bias" in adapter.head_tensors:
        head["bias"] = adapter.head_tensors["bias"] * target.scale + target.mean
    elif target.mean.any():
        warn(
            "Transformers' heads of decoders have no bias, so the mean of y cannot be written to "
            f"this format. Add {target.mean.tolist()} to what its model predicts, or use `save`.",
        )
    with np.errstate(over="ignore"):
        head = {name: value.astype(np.float32) for name, value in head.items()}
    _check_units(target, head)
    return replace(adapter, head_tensors=head)


def _check_units(target: Numbers, head: dict[str, np.ndarray]) -> None:
    """Refuse units that float32 cannot hold: too large, too small, or far from zero."""
    single, varies = np.finfo(np.float32), target.scale > 0
    scale, mean = target.scale[varies], np.abs(target.mean[varies])
    finite = all(np.isfinite(value).all() for value in head.values())
    # Rounding the mean may move a prediction by a ten-thousandth of the standard deviation.
    far = "bias" in head and (scale < 1e4 * single.eps * mean).any()
    if not finite or far or (scale < single.tiny / single.eps).any():
        raise ValueError(
            f"Got y with the mean {target.mean.tolist()} and the standard deviation "
            f"{target.scale.tolist()}, which the float32 of this format cannot tell apart. Wanted: "
            "units in which they are of one order, or `save`, which keeps them apart."
        )


def _checked_base(parameters: Parameters, adapter: AdapterState) -> Backbone:
    """Load the base; raise ValueError if the adapter was trained with another base or tokenizer."""
    spec = BackboneSpec.of(parameters, adapter)
    backbone = get_backbone(spec, verbose=bool(parameters.verbose))
    check_base(backbone, adapter)
    tokenizer = load_tokenizer(spec.model, spec.revision, spec.files)
    check_tokenizer(tokenizer, spec.model, adapter.tokenizer_fingerprint)
    return backbone


def _warn_of_what_is_not_kept(text_settings: TextSettings, kept: tuple[str, ...]) -> None:
    """Warn of settings that a format has no place for, such as a truncation not in `kept`."""
    lost = [] if text_settings.prompt is None else [f"prompt={text_settings.prompt!r}"]
    if text_settings.truncation not in kept:
        lost.append(f"truncation={text_settings.truncation!r}")
    if lost:
        warn(
            f"{' and '.join(lost)} cannot be written to this format. Put each text into the prompt "
            "and cut it yourself before you give it to the model, or use `save`, which keeps all.",
        )


def _safe_padding(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> str:
    """Choose a padding token that ends no text, since Transformers pools the last other token."""
    used = set(tokenizer("a")["input_ids"])
    for token in (tokenizer.pad_token, tokenizer.unk_token, tokenizer.eos_token):
        number = None if token is None else tokenizer.convert_tokens_to_ids(token)
        if isinstance(number, int) and number < vocab_size and number not in used:
            return token
    raise ValueError(
        "The tokenizer has no token to pad with that does not end its texts too, so Transformers "
        "would pool the wrong token. Wanted: a tokenizer with a padding token of its own. `save` "
        "writes any estimator."
    )


def write_merged(parameters: Parameters, fitted: Fitted, folder: Path, dtype: str) -> None:
    """Write the model of `to_transformers`, rounded to a dtype, and its tokenizer."""
    model, tokenizer = to_transformers(parameters, fitted)
    try:
        with muted():
            model.to(getattr(torch, dtype)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except safetensors.SafetensorError as error:  # raised for a full disk
        raise OSError(errno.EIO, f"The merged model could not be written: {error}") from error


@plain_torch()
@float32_by_default()
def write_peft(parameters: Parameters, fitted: Fitted, folder: Path) -> None:
    """Write an adapter for sequence classification; see `QLoRAClassifier.to_peft`."""
    adapter = fitted.adapter
    spec = _checked_base(parameters, adapter).spec
    _warn_of_what_is_not_kept(adapter.text_settings, kept=("head",))
    model, revision = parameters.model, spec.revision
    architecture = spec.architecture()
    if not architecture.whole:
        raise ValueError(
            f"model={model!r} holds more than the text model {architecture.model_type} that was "
            "adapted, and PEFT would put the adapter on all of it. Wanted: a checkpoint of the "
            "text model alone. `merge` writes one, with the adapter in it; `save` writes any."
        )
    stock, base, head_name = _stock_skeleton(architecture.config, adapter.pooling)
    _check_read_alike(stock, base, adapter)
    write_adapter(
        folder,
        adapter.lora,
        adapter.lora_tensors,
        model=model,
        revision=revision,
        lora_dropout=parameters.lora_dropout,
        fan_in_fan_out=parameters.quantization is None and has_conv1d(stock),
        within=base,
        head=_in_units(fitted).head_tensors,
        head_name=head_name,
    )


def _check_read_alike(stock: PreTrainedModel, base: str, adapter: AdapterState) -> None:
    """Refuse an adapter of a mixture of experts that PEFT would put on the experts, too.

    PEFT takes the name of a shared expert's layer for the matrices of that name in all experts.
    """
    if not has_experts(stock):
        return
    modules = [f"{base}.{name}" for name in adapted_modules(adapter.lora_tensors)]
    trial = replicate(stock)
    with library_lock, torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of names that PEFT makes up for experts and then misses
        inject_adapter_in_model(LoraConfig(target_modules=modules), trial)
    found = {name for name, layer in trial.named_modules() if isinstance(layer, LoraLayer)}
    if found != set(modules):
        raise ValueError(
            f"PEFT would read this adapter as one of {min(found ^ set(modules))!r} too, since it "
            f"takes the names of layers in {type(stock).__name__} for those of experts. Wanted: "
            "target_modules without such names, such as ['q_proj', 'v_proj']. `save` and `merge` "
            "write any."
        )


def peft_parameters(config: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of an estimator that an adapter's configuration decides, by name."""
    targets = config["target_modules"]
    return {
        "model": config["base_model_name_or_path"],
        "revision": config.get("revision"),
        "lora_r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "lora_dropout": config.get("lora_dropout", 0.0),
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "use_rslora": config.get("use_rslora", False),
        "use_dora": config.get("use_dora", False),
    }


@plain_torch()
@float32_by_default()
def read_peft(
    path: str | os.PathLike,
    config: dict[str, Any],
    parameters: Parameters,
    target: Callable[[int], tuple[Target, np.ndarray]],
) -> Fitted:
    """Read an adapter that PEFT wrote; see `QLoRAClassifier.from_peft`.

    Parameters
    ----------
    path : str or path
        A folder, or the id of a repository of the Hub.
    config : dict
        The configuration that `read_peft_config` returned.
    parameters : Parameters
    target : callable
        A function of the number of outputs that returns what they are, and their order.

    Returns
    -------
    fitted : Fitted
    """
    adapter, footprint = read_peft_weights(path, config, parameters)
    outputs, order = target(len(adapter.head_tensors["weight"]))
    head_tensors = {name: tensor[order] for name, tensor in adapter.head_tensors.items()}
    adapter = replace(adapter, head_tensors=head_tensors)
    return Fitted(
        columns=Columns(None, None),
        target=outputs,
        adapter=adapter,
        n_iter=0,
        n_samples_seen=0,
        loss_curve=[],
        validation_scores=None,
        best_validation_score=None,
        optimizer_state=None,
        footprint=footprint,
        settings=None,
        random_seed=0,
        weight_scale=None,
    )


def read_peft_config(path: str | os.PathLike) -> dict[str, Any]:
    """Read an adapter's configuration, and refuse all but LoRA for sequence classification.

    Parameters
    ----------
    path : str or path
        A folder, or the id of a repository of the Hub.

    Raises
    ------
    ValueError
        If there is no configuration, or the adapter is of another kind. The message names what.
    """
    file = _file_of(path, CONFIG_FILE)
    with naming_the_file(file, AS_PEFT_WROTE):
        config = json.loads(file.read_bytes())
        for key, kinds in REQUIRED.items():
            typed(config, key, kinds)
        for key in ("target_modules", "modules_to_save"):
            if not all(isinstance(name, str) for name in config.get(key) or []):
                raise ValueError(f"{key} holds what is no name of a module")
    wanted = {"peft_type": "LORA", "task_type": "SEQ_CLS", "bias": "none"}
    other = {name: config.get(name) for name in wanted if config.get(name) != wanted[name]}
    other |= {name: value for name, value in config.items() if value and name not in UNDERSTOOD}
    if config.get("init_lora_weights", True) not in HARMLESS_STARTS:
        other["init_lora_weights"] = config["init_lora_weights"]
    if not set(config.get("modules_to_save") or []) <= set(HEADS.values()):
        other["modules_to_save"] = config["modules_to_save"]
    if other.get("task_type") == "CAUSAL_LM":
        raise ValueError(
            f"{os.fspath(path)!r} is an adapter that writes text (task_type='CAUSAL_LM') and knows "
            "no classes. Wanted: an adapter for sequence classification. To train a classifier on "
            "top of it, merge it (`model.merge_and_unload().save_pretrained(folder)`, and the "
            "tokenizer's `save_pretrained`) and pass model=folder to `QLoRAClassifier`."
        )
    if other:
        name = min(other)
        raise ValueError(
            f"{os.fspath(path)!r} has {name}={other[name]!r}. Wanted: an adapter of LoRA alone for "
            "sequence classification (task_type='SEQ_CLS'), with a linear head named 'score' or "
            "'classifier'."
        )
    return config


def read_peft_weights(
    path: str | os.PathLike, config: dict[str, Any], parameters: Parameters
) -> tuple[AdapterState, Footprint]:
    """Read an adapter's weights, and try them on the base that the parameters name.

    Parameters
    ----------
    path : str or path
        A folder, or the id of a repository of the Hub.
    config : dict
        The configuration that `read_peft_config` returned.
    parameters : Parameters
        The estimator's parameters, which decide the base and how a text becomes token ids.

    Returns
    -------
    adapter : AdapterState
    footprint : Footprint

    Raises
    ------
    ValueError
        If a tensor is neither of LoRA nor of a linear head, or the tensors do not fit the base.
    """
    file = _file_of(path, WEIGHTS_FILE)
    with naming_the_file(file, AS_PEFT_WROTE):
        tensors = safetensors.torch.load(file.read_bytes())
        named = {name: tensor.float().numpy() for name, tensor in tensors.items()}
    head_name = next((h for h in HEADS.values() if f"{PREFIX}{h}.weight" in named), None)
    if head_name is None:
        raise ValueError(
            f"{os.fspath(path)!r} holds no head named 'score' or 'classifier'. Wanted: an adapter "
            "that was saved with its head (modules_to_save)."
        )
    pooling = next(pooling for pooling, head in HEADS.items() if head == head_name)
    spec = BackboneSpec.of(parameters)
    architecture = spec.architecture(progress_bars=bool(parameters.verbose))
    try:
        _, base, _ = _stock_skeleton(architecture.config, pooling)
    except ValueError as error:
        raise ValueError(
            f"{os.fspath(path)!r} has a head named {head_name!r}, which model={spec.model!r} has "
            "not. Wanted: the base that the adapter was trained on, a decoder or BERT."
        ) from error
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
    tokenizer = load_tokenizer(spec.model, spec.revision, spec.files)
    backbone = get_backbone(spec, verbose=bool(parameters.verbose))
    lora = LoraSettings(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        target_modules=tuple(adapted_modules(lora_tensors)),
        use_rslora=config.get("use_rslora", False),
        use_dora=config.get("use_dora", False),
        init_lora_weights=True,
    )
    with naming_the_file(file, AS_PEFT_WROTE):
        check_lora(lora_tensors, lora)
        check_head(head_tensors, len(head_tensors["weight"]))
    state = AdapterState(
        lora=lora,
        pooling=pooling,
        text_settings=replace(
            resolve_text_settings(
                parameters,
                architecture.max_length(tokenizer.max_length),
                parameters.prompt,
                token_type_ids=architecture.takes_token_type_ids and tokenizer.gives_token_type_ids,
            ),
            parse_special_tokens=True,  # as other programs do
        ),
        model=spec.model,
        revision=spec.revision,
        fingerprint=backbone.fingerprint_for(pooling),
        tokenizer_fingerprint=tokenizer.fingerprint,
        lora_tensors=lora_tensors,
        head_tensors=head_tensors,
    )
    with TextModel.for_prediction(backbone, state) as model:  # refuses what does not fit
        return state, backbone.footprint(model.count_trainable())


def _stock_skeleton(config: PreTrainedConfig, pooling: str) -> tuple[PreTrainedModel, str, str]:
    with torch.device("meta"):  # it has every shape and no weight
        return stock_model(config, pooling)


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
