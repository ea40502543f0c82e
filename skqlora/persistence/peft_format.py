"""Adapters under PEFT's names, for a headless base and for a sequence-classification model.

The same parameter has three names. This package uses its name in the base. PEFT's name on
`AutoModel` has a prefix, and its name on `AutoModelForSequenceClassification` has that prefix and
the name of the base within the model. This module knows nothing of estimators.
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
MAGNITUDE = ".lora_magnitude_vector"  # of DoRA; files leave out its ".weight"


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
        The parameters of LoRA, by their names in the base.
    model, revision : str
        The name and the revision by which PEFT finds the base.
    lora_dropout : float
        The dropout for those who continue the training.
    fan_in_fan_out : bool, default=False
        Whether the base has GPT-2's transposed layers, which it has only if it is not quantized.
        PEFT finds that out too, and warns.
    within : str, default=""
        The name of the base within the model that PEFT is to load, e.g. "bert".
    head : mapping of str to ndarray, optional
        The parameters of the head, which make this an adapter for sequence classification.
    head_name : str, default=""
        The name of the head in that model: "score" or "classifier".
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
    # Sets are sorted, because they have another order in each process.
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
    """Return the sorted full names of the base's modules that carry an adapter.

    The names are full, since the end of a name may fit other modules of another model around the
    same base.
    """
    return sorted({name.split(".lora_")[0] for name in names})


def to_peft_name(name: str) -> str:
    """Turn the name of a parameter in a base into its name in a file."""
    before, _, after = name.rpartition(INFIX)
    return before + (after.removesuffix(".weight") if before.endswith(MAGNITUDE) else after)


def from_peft_name(name: str) -> str:
    """Turn the name of a parameter in a file, without the prefix, into its name in a base.

    Raises
    ------
    ValueError
        If the name is not that of a parameter of LoRA.
    """
    module, lora, kind = name.rpartition(".lora_")
    if not lora:
        raise ValueError(f"{name!r} is no parameter of LoRA")
    kind, _, ending = kind.partition(".")
    if lora + kind == MAGNITUDE:
        ending = "weight"
    return f"{module}{lora}{kind}{INFIX}" + (ending and f".{ending}")
