"""LoRA by PEFT: its configuration, and the modules of a model that it is put on."""

from dataclasses import replace

import bitsandbytes as bnb
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from skqlora._utils.caches import registered_lru_cache
from skqlora._utils.libraries import library_lock, muted
from skqlora.checkpoint.experts import find_routers, has_experts
from skqlora.checkpoint.modules import NoRandomInit, replicate
from skqlora.model.blocks import modules_in_layers
from skqlora.model.lora_layer import FusedLinear, FusedLinear4bit
from skqlora.settings.adapter_settings import LoraSettings
from skqlora.settings.parameters import Parameters

ADAPTER = "default"  # PEFT's own name for the only adapter of a model


def resolve_lora(parameters: Parameters, skeleton: PreTrainedModel) -> LoraSettings:
    """Return the settings of the adapter that a fit trains.

    If only some layers are adapted, its target modules are narrowed to those in these layers.

    Parameters
    ----------
    parameters : Parameters
    skeleton : transformers.PreTrainedModel
        The model on the meta device, which is not changed.

    Returns
    -------
    lora : LoraSettings

    Raises
    ------
    ValueError
        If `target_modules` or `layers` do not fit the model.
    """
    alpha = parameters.lora_alpha
    lora = LoraSettings(
        r=parameters.lora_r,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        target_modules=parameters.target_modules,
        use_rslora=parameters.use_rslora,
        use_dora=parameters.use_dora,
        init_lora_weights=parameters.init_lora_weights,
    )
    with muted(progress_bars=bool(parameters.verbose)):
        _check_names(lora.target_modules, skeleton)
        targets = targeted_modules(lora.target_modules, skeleton)
    if isinstance(parameters.layers, str):  # "all"
        return lora
    chosen = modules_in_layers(targets, parameters.layers, skeleton)
    return replace(lora, target_modules=chosen)


def peft_config(lora: LoraSettings, module: nn.Module) -> LoraConfig:
    """Convert the settings to PEFT's configuration for a base or its skeleton."""
    targets = lora.target_modules
    if has_experts(module):
        targets = _names_of_targets(targets, module)
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        init_lora_weights=lora.init_lora_weights,  # type: ignore[arg-type]
        fan_in_fan_out=has_conv1d(module),
    )
    fused: dict[type[nn.Module], type[nn.Module]] = {bnb.nn.Linear4bit: FusedLinear4bit}
    if not has_conv1d(module):  # `fan_in_fan_out` is for all layers, and only PEFT looks at each
        fused[nn.Linear] = FusedLinear
    config._register_custom_module(fused)
    return config


def inject_lora(lora: LoraSettings, module: PreTrainedModel) -> None:
    """Put new LoRA layers on a replica of a base, or on a copy of its skeleton."""
    with library_lock, NoRandomInit():
        inject_adapter_in_model(peft_config(lora, module), shown_to_peft(module), ADAPTER)


def shown_to_peft(module: nn.Module) -> nn.Module:
    """Return what PEFT may see of a module: all of it, but no mixture of experts as such.

    An adapter that was made with transformers 4 names the experts' matrices like linear layers, so
    PEFT takes the name "gate_proj" for the matrices of that name in all experts, too. It does so
    for a module whose configuration names such a family.
    """
    return _Unnamed(module) if has_experts(module) else module


class _Unnamed(nn.Module):
    """A module around a base, without the base's configuration."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base = base
        self.is_loaded_in_4bit = getattr(base, "is_loaded_in_4bit", False)


def _names_of_targets(targets: str | tuple[str, ...], module: nn.Module) -> tuple[str, ...]:
    """Name the target modules in full: linear layers, and routers only if they are asked for."""
    every = targets == "all-linear"
    config = LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets))
    routers = find_routers(module) if every else ()
    names = tuple(
        name
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | Conv1D)
        and (every or check_target_module_exists(config, name))
        and name not in routers
    )
    if not names:
        raise ValueError("No linear layer has such a name, and experts have no adapter.")
    return names


def targeted_modules(
    target_modules: str | tuple[str, ...], skeleton: PreTrainedModel
) -> tuple[str, ...]:
    """Find the modules that an adapter would be on, by trying it on a skeleton without weights.

    Target modules that a base would refuse later are refused here.

    Parameters
    ----------
    target_modules : str or tuple of str
    skeleton : transformers.PreTrainedModel
        The model on the meta device, which is not changed.

    Returns
    -------
    names : tuple of str

    Raises
    ------
    ValueError
        If `target_modules` matches no layer, or a layer that cannot have an adapter.
    """
    try:
        if not all(isinstance(target, str) for target in target_modules):
            raise TypeError("a name is not a str.")
        return _try_targets(target_modules, skeleton)
    except Exception as error:  # a user's choice may raise PEFT's ValueError, re.error ...
        raise ValueError(
            f"Got target_modules={target_modules!r}, which cannot be adapted in "
            f"{type(skeleton).__name__}: {error} {_wanted(target_modules, skeleton)}"
        ) from error


def _check_names(target_modules: str | tuple[str, ...], skeleton: PreTrainedModel) -> None:
    """Refuse a list with a name that no module has; PEFT leaves such names out.

    Raises
    ------
    ValueError
    """
    if isinstance(target_modules, str):
        return
    names = [f".{name}" for name, _ in skeleton.named_modules()]
    for target in target_modules:
        if not any(name.endswith(f".{target}") for name in names):
            raise ValueError(
                f"Got target_modules={list(target_modules)!r}, which cannot be adapted: "
                f"{type(skeleton).__name__} has no module {target!r}. "
                f"{_wanted(target_modules, skeleton)}"
            )


def _wanted(target_modules: str | tuple[str, ...], skeleton: PreTrainedModel) -> str:
    """Say what `target_modules` may be for a model."""
    names = _names_of_linear_layers(skeleton)
    if target_modules in names:
        return f"Wanted: a list of names, [{target_modules!r}]. A str is a regular expression."
    shown = [*names[:20], "..."] if len(names) > 20 else names
    return f"Wanted: 'all-linear', or a list of names of linear layers: {', '.join(shown)}."


def _names_of_linear_layers(skeleton: PreTrainedModel) -> list[str]:
    """List the ends of the names of linear layers, without routers, each end once."""
    routers, ends = find_routers(skeleton), []
    for name, layer in skeleton.named_modules():
        if isinstance(layer, nn.Linear | Conv1D) and name not in routers:
            *before, last = name.split(".")
            # A number says nothing without the name before it.
            ends.append(".".join([*before[-1:], last]) if last.isdecimal() else last)
    return list(dict.fromkeys(ends))


@registered_lru_cache(maxsize=8)  # the candidates of a search differ in other parameters
def _try_targets(
    target_modules: str | tuple[str, ...], skeleton: PreTrainedModel
) -> tuple[str, ...]:
    module = replicate(skeleton)
    lora = LoraSettings(1, 1.0, target_modules, False, False, True)
    with torch.device("meta"):
        inject_lora(lora, module)
    return tuple(name for name, m in module.named_modules() if isinstance(m, LoraLayer))


def has_conv1d(module: nn.Module) -> bool:
    """Return whether a base has GPT-2's transposed layers, which it keeps only unquantized."""
    return any(isinstance(m, Conv1D) for m in module.modules())
