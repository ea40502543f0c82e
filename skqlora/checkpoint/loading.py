"""Reading a base from disk: its text model alone, quantized while it is read."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from skqlora.checkpoint.architecture import Architecture
from skqlora.checkpoint.configuration import read_config, warn_of_adapter
from skqlora.checkpoint.experts import expert_matrices, quantize_matrices, use_packed_experts
from skqlora.checkpoint.fingerprint import (
    Fingerprint,
    fingerprint_base,
    fingerprint_of_version_1,
)
from skqlora.checkpoint.modules import NoRandomInit, drop_pooler
from skqlora.checkpoint.quantizer import FourBitConfig
from skqlora.checkpoint.spec import BackboneSpec, describe_files
from skqlora.checkpoint.stored_quantization import (
    check_scales,
    find_packed_weights,
    is_packed,
)
from skqlora.checkpoint.text_weights import TextWeights
from skqlora.checkpoint.weight_files import tensor_names, weight_files

# The share of a GPU's free memory for the weights. The rest is for activations and adapters.
SHARE_OF_WEIGHTS = 0.7
LINEAR = nn.Linear, Conv1D  # what bitsandbytes' integration of transformers packs


def load_base(spec: BackboneSpec) -> tuple[PreTrainedModel, Fingerprint]:
    """Read the text model of a checkpoint, and hash what is read.

    Parameters
    ----------
    spec : BackboneSpec

    Returns
    -------
    module : transformers.PreTrainedModel
        The text model, quantized as `spec` says.
    fingerprint : Fingerprint
        The hashes of the source weights and the configuration.

    Raises
    ------
    ValueError
        If the weights are missing, incomplete or not in safetensors format, if they are not those
        of the architecture, if the folder changes meanwhile, or if the base does not fit on the
        GPUs here.
    """
    warn_of_adapter(spec.model)
    source = _Source.of(spec)
    fingerprint = fingerprint_base(source.architecture.config, source.files, source.places)
    if is_packed(source.architecture.stored_quantization):
        module, loading = _read_packed(source)
    else:
        if source.architecture.stored_quantization:
            check_scales(source.files, list(source.places), spec.model)
        module, loading = _read(source, source.architecture.config)
    _check_all_on_gpus(spec, module)
    if describe_files(spec.model) != spec.files:
        raise ValueError(
            f"The folder model={spec.model!r} changed while it was read. Wanted: files that "
            "stay as they are. Call again once they are written."
        )
    _check_missing_weights(spec.model, module, loading["missing_keys"])
    _check_packed_shapes(spec.model, module, source.architecture.skeleton)
    if source.weights is not None:
        source.weights.check_unread(loading["unexpected_keys"], spec.model)
    return module, fingerprint


def hash_as_version_1(spec: BackboneSpec) -> str:
    """Hash a base as version 1 of the saved format did; see `fingerprint_of_version_1`."""
    source = _Source.of(spec)
    only = None
    if source.weights is not None:
        only = source.weights.places(tensor_names(source.files)).keys()
    return fingerprint_of_version_1(spec.model, spec.revision, only)


@dataclass(frozen=True)
class _Source:
    """What is read of a checkpoint.

    Attributes
    ----------
    spec : BackboneSpec
    architecture : Architecture
    files : list of Path
        The safetensors files.
    weights : TextWeights or None
        Where the text model is, or None if the checkpoint is of the text model alone.
    places : dict of str to str
        The names of the tensors that are read, and their places in the text model.
    """

    spec: BackboneSpec
    architecture: Architecture
    files: list[Path]
    weights: TextWeights | None
    places: dict[str, str]

    @classmethod
    def of(cls, spec: BackboneSpec) -> "_Source":
        """Find the tensors of the text model in the files of a checkpoint."""
        whole = read_config(spec.model, spec.revision)  # raises with a remedy if a folder is gone
        architecture = spec.architecture()
        files = weight_files(spec.model, spec.revision)
        names = tensor_names(files)
        weights = None
        if not architecture.whole:
            weights = TextWeights.locate(architecture.skeleton, whole, names, spec.model)
        here = weights or TextWeights(architecture.skeleton, [], "")
        places = here.places(names)
        if not architecture.stored_quantization:
            known = architecture.skeleton.state_dict()
            places = {name: place for name, place in places.items() if place in known}
        elif weights is None:  # the constants of quantized weights have no place
            places = {name: name for name in names}
        return cls(spec, architecture, files, weights, places)

    def describe_misfit(self) -> str:
        """Name a tensor whose shape is not that of its place, and its file, if there is one."""
        state = self.architecture.skeleton.state_dict()
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                for name in sorted(self.places.keys() & set(file.keys())):
                    has, place = file.get_slice(name).get_shape(), self.places[name]
                    wanted = state[place].shape if place in state else has
                    if tuple(has) != tuple(wanted):
                        return (
                            f": {name!r} in {str(path)!r} is of shape {tuple(has)}, and "
                            f"config.json says {tuple(wanted)}"
                        )
        return ""


def _read(source: _Source, config: PreTrainedConfig) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Let transformers read the text model; return it, and what it says of the names."""
    spec, architecture, weights = source.spec, source.architecture, source.weights
    text_class = type(architecture.skeleton)
    read_class: Any = text_class if weights is None else weights.readable_class()
    with NoRandomInit():  # a pooler that the checkpoint lacks is built before it is dropped
        try:
            module, loading = read_class.from_pretrained(
                spec.model,
                config=copy.deepcopy(config),
                revision=spec.revision,
                quantization_config=_quantization_config(spec, architecture),
                dtype=spec.storage_dtype,
                **_placement(spec),
                attn_implementation=spec.attn_implementation,
                use_safetensors=True,
                adapter_kwargs={"subfolder": "no adapter"},  # else it is read with the model
                output_loading_info=True,
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # shapes that do not fit
            raise ValueError(
                f"model={spec.model!r}: the tensors of the checkpoint do not have the names and "
                f"shapes of {text_class.__name__}{source.describe_misfit()}. Wanted: "
                "a complete checkpoint of the architecture that its config.json names, as "
                "transformers 5 writes it."
            ) from error
    module.__class__ = text_class
    return module, loading


def _read_packed(source: _Source) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Read a checkpoint that bitsandbytes packed, and pack its experts, which it left in 16 bits.

    Which linear layers it left in 16 bits, too, is told by the tensors. config.json names them as
    they are in the whole model.
    """
    spec, architecture = source.spec, source.architecture
    packed = find_packed_weights(
        source.files,
        list(source.places),
        model=spec.model,
        quantization=spec.quantization,
        double_quant=spec.double_quant,
    )
    here = source.weights or TextWeights(architecture.skeleton, [], "")
    places = set(here.renamed(packed).values())
    linear = (name for name, m in architecture.skeleton.named_modules() if type(m) in LINEAR)
    config = copy.deepcopy(architecture.config)
    config.quantization_config = dict(architecture.stored_quantization or {}) | {
        "bnb_4bit_compute_dtype": spec.compute_dtype,
        "llm_int8_skip_modules": [name for name in linear if f"{name}.weight" not in places],
    }
    module, loading = _read(source, config)
    for part in module.modules():
        matrices = expert_matrices(part)
        for name, parameter in part.named_parameters(recurse=False):
            if isinstance(parameter, Params4bit):
                continue
            value = parameter.data.to(spec.storage_dtype)
            if name in matrices:
                kind = str(spec.quantization), spec.double_quant
                setattr(part, name, quantize_matrices(value, *kind))
            elif parameter.is_floating_point():
                parameter.data = value
    use_packed_experts(module, spec.compute_dtype)
    return module, loading


def _quantization_config(spec: BackboneSpec, architecture: Architecture) -> FourBitConfig | None:
    stored = architecture.stored_quantization
    if spec.quantization is None or is_packed(stored):
        return None
    return FourBitConfig(
        stored=None if not stored else dict(stored),
        bnb_4bit_quant_type=spec.quantization,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=spec.compute_dtype,
    )


def _placement(spec: BackboneSpec) -> dict[str, Any]:
    """Choose where the weights go, as keyword arguments of `from_pretrained`.

    "sequential" fills one device after the other with whole blocks, and lets accelerate's hooks
    move the hidden states between the devices. There are no hooks if one device holds everything.
    """
    if not spec.spread:
        return {"device_map": {"": spec.device}}
    devices = range(torch.cuda.device_count())
    room = {i: int(SHARE_OF_WEIGHTS * torch.cuda.mem_get_info(i)[0]) for i in devices}
    return {"device_map": "sequential", "max_memory": room}


def _check_all_on_gpus(spec: BackboneSpec, module: PreTrainedModel) -> None:
    places = set(getattr(module, "hf_device_map", {}).values())
    if spec.spread and places & {"cpu", "disk"}:
        raise ValueError(
            f"model={spec.model!r} does not fit on the {torch.cuda.device_count()} GPUs here. "
            "Wanted: all of it on GPUs, since a training cannot use weights that lie elsewhere. "
            "Take a smaller model, or quantization='nf4'."
        )


def _check_missing_weights(model: str, module: PreTrainedModel, missing: set[str]) -> None:
    """Refuse a base whose checkpoint lacks weights; if it lacks only the pooler, drop that."""
    if any(key.startswith("pooler.") for key in missing):
        drop_pooler(module)
    missing = {key for key in missing if not key.startswith("pooler.")}
    if missing:
        raise ValueError(
            f"model={model!r}: the checkpoint lacks {len(missing)} weights of "
            f"{type(module).__name__}, e.g. {min(missing)!r}. Wanted: a complete checkpoint of the "
            "architecture that its config.json names."
        )


def _check_packed_shapes(model: str, module: PreTrainedModel, skeleton: PreTrainedModel) -> None:
    """Refuse packed weights of another shape, as of half of the experts.

    transformers compares only the shapes of what is not packed.
    """
    for name, parameter in module.named_parameters():
        if isinstance(parameter, Params4bit):
            has, wanted = parameter.quant_state.shape, skeleton.get_parameter(name).shape
            if sorted(has) != sorted(wanted):  # GPT-2's layers are packed transposed
                raise ValueError(
                    f"model={model!r}: {name!r} is of shape {tuple(has)} in the checkpoint. "
                    f"Wanted: {tuple(wanted)}, which its config.json says."
                )
