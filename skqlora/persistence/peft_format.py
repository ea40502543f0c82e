"""Adapters under PEFT's names: of a headless base, and of a sequence-classification model.

Knows nothing of estimators. The same parameter has three names: ours, in the base; PEFT's on
`AutoModel`, with a prefix; PEFT's on `AutoModelForSequenceClassification`, with that and the name
of the base within the model.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np
import safetensors.numpy

from skqlora.settings.adapter_settings import LoraSettings

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
INFIX = ".default"  # PEFT's name of a model's only adapter, which files leave out
MAGNITUDE = ".lora_magnitude_vector"  # of DoRA, which files keep without ".weight"


def write_adapter(
    folder: Path,
    lora: LoraSettings,
    tensors: Mapping[str, np.ndarray],
    *,
    model: str,
    revision: str | None,
    lora_dropout: float,
    fan_in_fan_out: bool = False,
    within: str = "",
    head: Mapping[str, np.ndarray] | None = None,
    head_name: str = "",
) -> None:
    """Write an adapter as `PeftModel.save_pretrained` would.

    Parameters
    ----------
    folder : Path
    lora : LoraSettings
    tensors : mapping of str to ndarray
        LoRA's parameters by their names in the base.
    model, revision : str
        The base, for PEFT to find.
    lora_dropout : float
        For whoever trains on.
    fan_in_fan_out : bool, default=False
        Whether the base has GPT-2's transposed layers, which it has unquantized alone. PEFT finds
        that out too, and warns.
    within : str, default=""
        Name of the base within the model that PEFT is to load, e.g. "bert".
    head : mapping of str to ndarray, optional
        The head's parameters; with them it is an adapter for sequence classification.
    head_name : str, default=""
        Name of the head in that model: "score" or "classifier".
    """
    from peft import LoraConfig, TaskType

    config = LoraConfig(
        task_type=None if head is None else TaskType.SEQ_CLS,
        base_model_name_or_path=model,
        revision=revision,
        inference_mode=True,
        **asdict(lora) | {"target_modules": adapted_modules(tensors), "lora_dropout": lora_dropout},
        fan_in_fan_out=fan_in_fan_out,
        modules_to_save=None if head is None else [head_name],
    ).to_dict()
    # A set has another order in each process.
    config = {key: sorted(v) if isinstance(v, set) else v for key, v in config.items()}
    text = json.dumps(config, indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    prefix = PREFIX + (within and f"{within}.")
    named = {prefix + to_peft_name(name): tensor for name, tensor in tensors.items()}
    for name, tensor in (head or {}).items():
        named[f"{PREFIX}{head_name}.{name}"] = tensor
    data = safetensors.numpy.save(named, metadata={"format": "pt"})
    (folder / WEIGHTS_FILE).write_bytes(data)


def adapted_modules(names: Iterable[str]) -> list[str]:
    """Name the modules of the base that carry an adapter, in full and sorted.

    In full, since the end of a name may fit other modules of another model around the same base.
    """
    return sorted({name.split(".lora_")[0] for name in names})


def to_peft_name(name: str) -> str:
    """Turn the name of a parameter in a base into that in a file."""
    before, _, after = name.rpartition(INFIX)
    return before + (after.removesuffix(".weight") if before.endswith(MAGNITUDE) else after)


def from_peft_name(name: str) -> str:
    """Turn the name of a parameter in a file, without prefix, into that in a base.

    Raises
    ------
    ValueError
        If it is no parameter of LoRA.
    """
    module, lora, kind = name.rpartition(".lora_")
    if not lora:
        raise ValueError(f"{name!r} is no parameter of LoRA")
    kind, _, ending = kind.partition(".")
    if lora + kind == MAGNITUDE:
        ending = "weight"
    return f"{module}{lora}{kind}{INFIX}" + (ending and f".{ending}")
