"""Reading a base from disk: its text model alone, quantized while it is read."""

import copy
from typing import Any

import torch
from bitsandbytes.nn import Params4bit
from transformers import PreTrainedConfig, PreTrainedModel

from skqlora.checkpoint.architecture import Architecture
from skqlora.checkpoint.configuration import read_config
from skqlora.checkpoint.fingerprint import fingerprint_source
from skqlora.checkpoint.modules import NoRandomInit, drop_pooler
from skqlora.checkpoint.quantizer import FourBitConfig
from skqlora.checkpoint.spec import BackboneSpec, describe_files
from skqlora.checkpoint.stored_quantization import check_packed_weights, is_bitsandbytes
from skqlora.checkpoint.text_weights import TextWeights, tensor_names, weight_files

# The share of a GPU's free memory for the weights. The rest is for activations and adapters.
SHARE_OF_WEIGHTS = 0.7


def load_base(spec: BackboneSpec) -> tuple[PreTrainedModel, str]:
    """Read the text model of a checkpoint, and hash what is read.

    Parameters
    ----------
    spec : BackboneSpec

    Returns
    -------
    module : transformers.PreTrainedModel
        The text model, quantized as `spec` says.
    fingerprint : str
        The hash of the source weights and the configuration; see `fingerprint_source`.

    Raises
    ------
    ValueError
        If the weights are missing, incomplete or not in safetensors format, if they are not those
        of the architecture, if the folder changes meanwhile, or if the base does not fit on the
        GPUs here.
    """
    whole = read_config(spec.model, spec.revision)  # raises with a remedy if a folder is gone
    architecture = spec.architecture()
    files = weight_files(spec.model, spec.revision)
    names = tensor_names(files)
    weights = None
    if not architecture.whole:
        weights = TextWeights.locate(architecture.skeleton, whole, names, spec.model)
        names = list(weights.places(names))
    if is_bitsandbytes(architecture.stored_quantization):
        check_packed_weights(
            files,
            model=spec.model,
            quantization=spec.quantization,
            double_quant=spec.double_quant,
        )
    fingerprint = fingerprint_source(spec.model, spec.revision, set(names))
    module, loading = _read(spec, architecture, weights)
    _check_all_on_gpus(spec, module)
    if describe_files(spec.model) != spec.files:
        raise ValueError(
            f"The folder model={spec.model!r} changed while it was read. Wanted: files that "
            "stay as they are. Call again once they are written."
        )
    _check_missing_weights(spec.model, module, loading["missing_keys"])
    _check_packed_shapes(spec.model, module, architecture.skeleton)
    if weights is not None:
        weights.check_unread(loading["unexpected_keys"], spec.model)
    return module, fingerprint


def _read(
    spec: BackboneSpec, architecture: Architecture, weights: TextWeights | None
) -> tuple[PreTrainedModel, dict[str, Any]]:
    with (
        torch.inference_mode(False),
        NoRandomInit(),  # a pooler that the checkpoint lacks is built before it is dropped
    ):
        text_class = type(architecture.skeleton)
        read_class: Any = text_class if weights is None else weights.readable_class()
        try:
            module, loading = read_class.from_pretrained(
                spec.model,
                config=_config(spec, architecture),
                revision=spec.revision,
                quantization_config=_quantization_config(spec, architecture),
                dtype=spec.storage_dtype,
                **_placement(spec),
                attn_implementation=spec.attn_implementation,
                use_safetensors=True,
                output_loading_info=True,
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # shapes that do not fit
            raise ValueError(
                f"model={spec.model!r}: transformers cannot make {text_class.__name__} of its "
                f"weights: {str(error).strip().splitlines()[0]} Wanted: a complete checkpoint of "
                "the architecture that its config.json names."
            ) from error
    module.__class__ = text_class
    return module, loading


def _config(spec: BackboneSpec, architecture: Architecture) -> PreTrainedConfig:
    """Return the text model's configuration, which says how a checkpoint in 4 bits is packed."""
    config, stored = copy.deepcopy(architecture.config), architecture.stored_quantization
    if is_bitsandbytes(stored):
        compute = {"bnb_4bit_compute_dtype": spec.compute_dtype}
        config.quantization_config = dict(stored or {}) | compute
    return config


def _quantization_config(spec: BackboneSpec, architecture: Architecture) -> FourBitConfig | None:
    stored = architecture.stored_quantization
    if spec.quantization is None or is_bitsandbytes(stored):
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
