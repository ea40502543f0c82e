"""The models that can be adapted, checked by their configuration before any weight is read."""

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)
from transformers.pytorch_utils import Conv1D

from skqlora._utils.caches import registered_lru_cache
from skqlora._utils.torch_state import float32_by_default
from skqlora.checkpoint.configuration import read_config
from skqlora.checkpoint.experts import expert_matrices
from skqlora.checkpoint.quantizer import UNQUANTIZED_SHARE
from skqlora.checkpoint.text_part import NoTextPartError, build_text_part

# The kinds of rotary embeddings whose angles depend on the longest row of the batch, once that row
# is longer than the model was trained on. A text's result would then depend on its neighbours.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")

# Settings that some families change by themselves while they run, and what they stay at here:
# BigBird's attention, after a short text, and RWKV's weights, which it halves for float16.
PINNED: dict[str, dict[str, Any]] = {
    "big_bird": {"attention_type": "original_full"},
    "rwkv": {"rescale_every": 0},
}


@dataclass(frozen=True, eq=False)
class Architecture:
    """What is known about a model before it is loaded.

    Attributes
    ----------
    config : transformers.PreTrainedConfig
        The configuration of the text model, without how the checkpoint is quantized.
    whole : bool
        Whether the checkpoint is of the text model alone, and not of other towers too.
    stored_quantization : dict or None
        How the checkpoint is quantized, as its config.json says it.
    max_positions : int or None
        The greatest number of tokens that the model takes, or None if it sets no limit.
    vocab_size : int
        The number of tokens for which the model has an embedding.
    skeleton : transformers.PreTrainedModel
        The text model on the meta device, with every shape and no weight. It is never changed.
    """

    config: PreTrainedConfig
    whole: bool
    stored_quantization: Mapping[str, Any] | None
    max_positions: int | None
    vocab_size: int
    skeleton: PreTrainedModel

    @property
    def model_type(self) -> str:
        """The name of the text model's family in transformers, e.g. "llama"."""
        return self.config.model_type

    @property
    def is_encoder(self) -> bool:
        """Whether its family is known to read texts in both directions.

        This is told by the heads that transformers has for the family, since it has to be known
        before the model is loaded.
        """
        heads = MODEL_FOR_MASKED_LM_MAPPING_NAMES, MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        known = any(self.model_type in names for names in heads)
        return known and not getattr(self.config, "is_decoder", False)

    @property
    def takes_token_type_ids(self) -> bool:
        """Whether the model has more than one embedding for the part that a token is of."""
        arguments = inspect.signature(self.skeleton.forward).parameters
        return "token_type_ids" in arguments and getattr(self.config, "type_vocab_size", 2) > 1

    def max_length(self, tokenizer_max_length: int) -> int:
        """Return the greatest length of a text that the model and its tokenizer both take."""
        return min(self.max_positions or tokenizer_max_length, tokenizer_max_length)


@registered_lru_cache(maxsize=8)
def check_architecture(
    model: str,
    revision: str | None,
    *,
    quantized: bool,
    attn_implementation: str | None = None,
    files: tuple = (),
) -> Architecture:
    """Read a model's configuration, and refuse by name a model that cannot be adapted.

    The result is kept in the process for each model that is not refused.

    Parameters
    ----------
    model : str
        A Hub id or a local folder.
    revision : str or None
        The branch, tag or commit on the Hub.
    quantized : bool
        Whether the base is to be quantized.
    attn_implementation : str, optional
        The name of the attention kernel in transformers.
    files : tuple, default=()
        The description of a local folder's files, so that a changed folder is read again.

    Returns
    -------
    architecture : Architecture

    Raises
    ------
    ValueError
        If there is no configuration, or if the model is refused; see `describe_architecture`.
    """
    return describe_architecture(
        read_config(model, revision),
        model=model,
        quantized=quantized,
        attn_implementation=attn_implementation,
    )


@float32_by_default()
def describe_architecture(
    config: PreTrainedConfig,
    *,
    model: str,
    quantized: bool,
    attn_implementation: str | None = None,
) -> Architecture:
    """Determine a model's text part from its configuration, or refuse the model by name.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The configuration of the whole model.
    model : str
        What the messages call the model.
    quantized : bool
        Whether the base is to be quantized.
    attn_implementation : str, optional

    Returns
    -------
    architecture : Architecture

    Raises
    ------
    ValueError
        If transformers cannot build the text part, if that does not read text, or if it would stay
        unquantized in large part.
    """

    def refusal(what: str, remedy: str) -> ValueError:
        return ValueError(
            f"model={model!r} ({config.model_type}) {what}. Wanted: a text encoder such as BERT or "
            f"ModernBERT, or a decoder such as Llama, Qwen or Mistral. {remedy}"
        )

    config = copy.deepcopy(config)
    try:
        stored_quantization = _take_quantization(config)
        config.update(PINNED.get(config.model_type, {}))
        part = build_text_part(config, attn_implementation)
    except NoTextPartError as error:
        raise refusal(str(error), "Take another one.") from error
    except Exception as error:  # a configuration may be wrong in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise refusal(f"cannot be built by transformers: {reason}", "Take another one.") from error
    if not _reads_text(part.skeleton):
        raise refusal("does not read text", "Take another one.")
    embeddings: Any = part.skeleton.get_input_embeddings()
    kinds, share = _unquantizable(part.skeleton)
    if quantized and share > UNQUANTIZED_SHARE:
        raise refusal(
            f"keeps {share:.0%} of its weights in {', '.join(kinds)}, which bitsandbytes leaves "
            "unquantized",
            "Take a model whose matrices are in plain linear layers or in experts.",
        )
    return Architecture(
        config=part.config,
        whole=part.whole,
        stored_quantization=stored_quantization,
        max_positions=_max_positions(part.config, part.skeleton),
        vocab_size=embeddings.num_embeddings,
        skeleton=part.skeleton,
    )


def _take_quantization(config: PreTrainedConfig) -> Mapping[str, Any] | None:
    """Remove from a configuration how the checkpoint is quantized, and return it if it says so."""
    found = None
    for part in (config.get_text_config(), config):
        if hasattr(part, "quantization_config"):
            found = part.quantization_config or found
            del part.quantization_config
    return found


def _reads_text(skeleton: PreTrainedModel) -> bool:
    try:
        embeddings = skeleton.get_input_embeddings()
    except NotImplementedError:  # transformers found no embeddings
        return False
    return skeleton.main_input_name == "input_ids" and isinstance(embeddings, nn.Embedding)


def _unquantizable(skeleton: nn.Module) -> tuple[list[str], float]:
    """Name the modules, except embeddings, whose matrices stay unquantized, and find their share.

    transformers replaces `nn.Linear` and GPT-2's `Conv1D` by quantized layers, but not their
    subclasses. The stacks of matrices in which mixtures of experts keep their experts are quantized
    by this package.
    """
    kept = {
        parameter: type(module).__name__
        for module in skeleton.modules()
        if type(module) not in (nn.Linear, Conv1D)
        and not isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim >= 2 and name not in expert_matrices(module)
    }
    n_parameters = sum(p.numel() for p in skeleton.parameters())
    return sorted(set(kept.values())), sum(p.numel() for p in kept) / n_parameters


def _max_positions(config: PreTrainedConfig, skeleton: nn.Module) -> int | None:
    positions = getattr(config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions <= 0:
        return None
    limits = [positions - _position_offset(skeleton)]
    for rope in _rope_parameters(getattr(config, "rope_parameters", None)):
        if rope.get("rope_type") in LENGTH_DEPENDENT_ROPE:
            limits.append(rope.get("original_max_position_embeddings") or positions)
    return min(limits)


def _position_offset(skeleton: nn.Module) -> int:
    """Count the rows at the start of RoBERTa's position table that no token uses."""
    tables = [m for name, m in skeleton.named_modules() if name.endswith("position_embeddings")]
    padding = [getattr(table, "padding_idx", None) for table in tables]
    return max((index + 1 for index in padding if index is not None), default=0)


def _rope_parameters(parameters: dict | None) -> list[dict]:
    """Return one dict for each kind of layer; most models have one kind and nest nothing."""
    nested = [value for value in (parameters or {}).values() if isinstance(value, dict)]
    return nested or [parameters or {}]
