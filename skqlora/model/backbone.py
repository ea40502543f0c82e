"""The frozen 4-bit base: how it is loaded and measured, and how it lends replicas.

This module knows nothing of texts, labels or training. A base is only ever read. An adapter goes
onto a replica of the base's module tree, which shares every tensor with the base.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import AutoModel, BitsAndBytesConfig, PreTrainedModel

from skqlora.adapter import AdapterState, Footprint
from skqlora.model.architecture import read_config
from skqlora.model.fingerprint import fingerprint_source
from skqlora.model.modules import NoRandomInit, drop_pooler, replicate
from skqlora.model.replicas import AdaptedReplica, ReplicaPool
from skqlora.model.spec import BackboneSpec, describe_files
from skqlora.settings.adapter_settings import LoraSettings

# The share of a GPU's free memory for the weights. The rest is for activations and adapters.
SHARE_OF_WEIGHTS = 0.7
# The relative difference of hidden states that rounding alone explains, by compute dtype.
PADDING_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


@dataclass(frozen=True, eq=False)
class Backbone:
    """A frozen base, and what was determined about it when it was loaded.

    Attributes
    ----------
    module : transformers.PreTrainedModel
        The base itself. It is never changed after it is loaded; `lease` hands out replicas.
    spec : BackboneSpec
    fingerprint : str
        The hash of the source weights and the configuration; see `fingerprint_source`.
    hidden_size : int
        The number of features of a last hidden state.
    causal : bool
        Whether a token sees only the tokens before it.
    replicas : ReplicaPool
        The replicas that are not in use.
    """

    module: PreTrainedModel
    spec: BackboneSpec
    fingerprint: str
    hidden_size: int
    causal: bool
    replicas: ReplicaPool

    @classmethod
    def load(cls, spec: BackboneSpec) -> "Backbone":
        """Load and quantize a base; `skqlora.model.cache.get_backbone` returns a shared one.

        Parameters
        ----------
        spec : BackboneSpec

        Returns
        -------
        backbone : Backbone

        Raises
        ------
        ValueError
            If the weights are missing, incomplete or not in safetensors format, if the folder
            changes meanwhile, if the model cannot be run on text alone, or if padding changes the
            result of a text.
        """
        read_config(spec.model, spec.revision)  # raises with a remedy if a folder is gone
        fingerprint = fingerprint_source(spec.model, spec.revision)
        with (
            torch.inference_mode(False),
            NoRandomInit(),  # a pooler that the checkpoint lacks is built before it is dropped
        ):
            module, loading = AutoModel.from_pretrained(
                spec.model,
                revision=spec.revision,
                quantization_config=_quantization_config(spec),
                dtype=spec.storage_dtype,
                **_placement(spec),
                attn_implementation=spec.attn_implementation,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        _check_all_on_gpus(spec, module)
        if describe_files(spec.model) != spec.files:
            raise ValueError(
                f"The folder model={spec.model!r} changed while it was read. Wanted: files that "
                "stay as they are. Call again once they are written."
            )
        _check_missing_weights(spec.model, module, loading["missing_keys"])
        freeze(module, spec.compute_dtype)
        hidden_size, causal = _run_once(module, spec)
        replicas = ReplicaPool(module, _count_bytes(module))
        return cls(module, spec, fingerprint, hidden_size, causal, replicas)

    @property
    def nbytes(self) -> int:
        """The bytes in memory of the base and of the adapters on its free replicas."""
        return _count_bytes(self.module) + self.replicas.nbytes

    @property
    def vocab_size(self) -> int:
        """The number of tokens for which the base has an embedding."""
        embeddings: Any = self.module.get_input_embeddings()
        return embeddings.num_embeddings

    def lease(
        self,
        lora: LoraSettings,
        *,
        keep_pooler: bool = False,
        holding: AdapterState | None = None,
    ) -> AbstractContextManager[AdaptedReplica]:
        """Lend a replica of the base with LoRA layers, for the caller to train or fill.

        A free replica of the adapter's shape costs nothing, whereas PEFT has to inject its layers
        into a new one. A replica comes with the values that its last user left. After an exception
        it is not lent again.

        Parameters
        ----------
        lora : LoraSettings
        keep_pooler : bool, default=False
            Whether to keep the base's pooler, if it has one. LoRA on a pooler that is not used
            would never get a gradient.
        holding : AdapterState, optional
            The adapter whose values the replica should already hold, if a free one does.

        Returns
        -------
        replica : context manager of AdaptedReplica

        Raises
        ------
        ValueError
            If PEFT finds none of the target modules in the base.
        """
        return self.replicas.lease(lora, keep_pooler=keep_pooler, holding=holding)

    def autocast(self) -> AbstractContextManager:
        """Return the context of a forward pass: autocast on an accelerator, none on a CPU.

        On a CPU only the 4-bit layers compute in `compute_dtype`. This was measured to be faster
        than autocast, with the same error of the gradient.
        """
        device, dtype = self.spec.device.type, self.spec.compute_dtype
        if device == "cpu" or dtype == torch.float32:
            return nullcontext()
        return torch.autocast(device, dtype=dtype)

    def footprint(self, trainable_parameters: int) -> Footprint:
        """Measure the base, and report it together with the number of trained parameters."""
        layers = [m for m in self.module.modules() if isinstance(m, bnb.nn.Linear4bit)]
        packed: list[Any] = [layer.weight for layer in layers]
        packed_ids = {id(weight) for weight in packed}
        others = [p for p in self.module.parameters() if id(p) not in packed_ids]
        return Footprint(
            quantized_parameters=sum(math.prod(weight.quant_state.shape) for weight in packed),
            quantized_bytes=sum(_quantized_bytes(weight) for weight in packed),
            other_parameters=sum(p.numel() for p in others),
            other_bytes=sum(p.nbytes for p in others),
            trainable_parameters=trainable_parameters,
        )


def _quantization_config(spec: BackboneSpec) -> BitsAndBytesConfig | None:
    if spec.quantization is None:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=spec.quantization,
        bnb_4bit_use_double_quant=spec.double_quant,
        bnb_4bit_compute_dtype=spec.compute_dtype,
        llm_int8_skip_modules=[],  # a base without a head has no layer to leave out
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


def freeze(module: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Put a base into its final state, which nothing changes any more."""
    module.eval().requires_grad_(False)
    module.config.use_cache = False
    for layer in module.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            # bitsandbytes would cast the bias in place at the first forward pass, and repack the
            # weights for CPU inference, which makes later gradients wrong.
            layer.support_avx512bf16_for_cpu = False
            if layer.bias is not None:
                layer.bias.data = layer.bias.data.to(compute_dtype)


def _run_once(module: PreTrainedModel, spec: BackboneSpec) -> tuple[int, bool]:
    """Determine the width of the hidden states, and whether a token sees only those before it.

    Configurations do not say whether it does: `is_decoder` is unset for Llama. So the model is run
    on two inputs that differ in their last token. A third input, which is padded, shows whether a
    text's result depends on its neighbours.
    """
    vocabulary = module.config.get_text_config().vocab_size
    ids = torch.arange(5, 13, device=spec.device)[None] % vocabulary
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % vocabulary
    padded = torch.cat([ids, ids[:, :5]], dim=1)
    mask = torch.ones_like(padded)
    mask[:, ids.shape[1] :] = 0

    @torch.no_grad()
    def hidden_states(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return module(input_ids=ids, attention_mask=mask)[0][0]

    name = f"model={spec.model!r} ({module.config.model_type})"
    module = replicate(module)
    drop_pooler(module)  # as for most adapters
    try:
        plain = hidden_states(ids, torch.ones_like(ids))
        causal = torch.equal(plain[:-1], hidden_states(changed, torch.ones_like(ids))[:-1])
        beside_padding = hidden_states(padded, mask)[: len(plain)]
    except (AttributeError, IndexError, NotImplementedError, TypeError) as error:
        raise ValueError(
            f"{name} cannot be run on token ids and a mask alone: {error}. Wanted: a text encoder "
            "such as BERT, or a decoder such as Llama."
        ) from error
    error = (beside_padding - plain).float().norm() / plain.float().norm()
    if plain.ndim != 2 or error > PADDING_TOLERANCE[spec.compute_dtype]:
        raise ValueError(
            f"{name} gives a text another result when it is padded to a longer one's length "
            f"(relative difference {error:.1e}). Wanted: a model that heeds the attention mask, "
            "such as BERT."
        )
    return plain.shape[-1], causal


def _count_bytes(module: PreTrainedModel) -> int:
    """Count the bytes of all parameters, buffers and quantization constants."""
    tensors = [*module.parameters(), *module.buffers()]
    constants = sum(
        _quantized_bytes(weight) - weight.nbytes
        for weight in module.parameters()
        if isinstance(weight, bnb.nn.Params4bit)
    )
    return sum(tensor.nbytes for tensor in tensors) + constants


def _quantized_bytes(weight: Any) -> int:
    """Count the bytes of a packed weight and its constants.

    The code tables, which all layers could share, are not counted.
    """
    state = weight.quant_state
    constants = [state.absmax] + ([state.state2.absmax] if state.nested else [])
    return weight.nbytes + sum(tensor.nbytes for tensor in constants)
