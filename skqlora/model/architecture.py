"""The models that can be adapted, checked by their configuration before any weight is read."""

import functools
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import is_offline_mode
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from skqlora._utils.caches import registered_lru_cache

# The kinds of rotary embeddings whose angles depend on the longest row of the batch, once that row
# is longer than the model was trained on. A text's result would then depend on its neighbours.
LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")
# The share of its weights that a 4-bit model may keep in layers that cannot be quantized.
UNQUANTIZED_SHARE = 0.02


@dataclass(frozen=True)
class Architecture:
    """What is known about a model before it is loaded.

    Attributes
    ----------
    model_type : str
        The name of the model's family in transformers, e.g. "llama".
    max_positions : int or None
        The greatest number of tokens that the model takes, or None if it sets no limit.
    vocab_size : int
        The number of tokens for which the model has an embedding.
    skeleton : transformers.PreTrainedModel
        The model on the meta device, with every shape and no weight. It is never changed.
    """

    model_type: str
    max_positions: int | None
    vocab_size: int
    skeleton: PreTrainedModel

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
        If there is no configuration, or if the model is an encoder-decoder, takes something other
        than text, cannot be built by transformers, is already quantized, or would stay unquantized
        in part, as a mixture of experts would.
    """
    config = read_config(model, revision)

    def refusal(what: str, remedy: str) -> ValueError:
        return ValueError(
            f"model={model!r} ({config.model_type}) {what}. Wanted: a text encoder such as BERT or "
            f"ModernBERT, or a decoder such as Llama, Qwen or Mistral. {remedy}"
        )

    if config.is_encoder_decoder:
        raise refusal("is an encoder-decoder", "Take an encoder or a decoder of that size.")
    if config.get_text_config() is not config:
        raise refusal("takes more than text", "Take the text model that it was built from.")
    if getattr(config, "quantization_config", None):
        raise refusal("is already quantized", "Take its 16-bit checkpoint; `fit` quantizes it.")
    try:
        with torch.device("meta"):  # every shape and no weight
            skeleton = AutoModel.from_config(
                config, attn_implementation=attn_implementation, trust_remote_code=False
            )
    except (AttributeError, ImportError, NotImplementedError, TypeError, ValueError) as error:
        raise refusal(f"cannot be built by transformers: {error}", "Take another one.") from error
    if not _reads_text(skeleton):
        raise refusal("does not read text", "Take another one.")
    kinds, share = _unquantizable(skeleton)
    if quantized and share > UNQUANTIZED_SHARE:
        raise refusal(
            f"keeps {share:.0%} of its weights in {', '.join(kinds)}, which bitsandbytes leaves "
            "unquantized",
            "Take a dense model of plain linear layers, no mixture of experts.",
        )
    return Architecture(
        config.model_type,
        _max_positions(config, skeleton),
        skeleton.get_input_embeddings().num_embeddings,
        skeleton,
    )


def read_config(model: str, revision: str | None) -> PretrainedConfig:
    """Read a model's configuration, or raise a ValueError that says why this is not possible."""
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise ValueError(
            f"model={model!r} is a folder without a config.json. Wanted: a folder that "
            "`model.save_pretrained` wrote, or a model id of the Hugging Face Hub."
        )
    if not Path(model).exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ValueError(
            f"model={model!r} is a folder that does not exist. Wanted: a folder that "
            "`model.save_pretrained` wrote, or a model id of the Hugging Face Hub."
        )
    try:
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as error:  # hub, network, JSON and registry errors share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if is_offline_mode() and isinstance(error.__cause__, LocalEntryNotFoundError):
            reason = "It is not in the Hub's cache, and this process is offline (HF_HUB_OFFLINE)."
        raise ValueError(
            f"model={model!r} could not be read: {reason} Wanted: a local folder (if it has "
            "moved: clf.set_params(model=folder)), or a model id of the Hugging Face Hub "
            "('organisation/name') that transformers knows without running code from its "
            "repository."
        ) from error


def pin_revision(model: str, revision: str | None) -> str | None:
    """Resolve a branch or tag on the Hub to the commit that it stands for, once in a process.

    Parameters
    ----------
    model : str
        A Hub id.
    revision : str or None

    Returns
    -------
    revision : str or None
        The commit, or the revision unchanged if the Hub gives no answer. What is wrong then shows
        when the model is read.
    """
    try:
        return _commit_of(model, revision)
    except (OSError, ValueError):
        return revision


@functools.lru_cache(maxsize=32)  # all folds of a search must use the same commit
def _commit_of(model: str, revision: str | None) -> str | None:
    file = cached_file(model, "config.json", revision=revision)
    return extract_commit_hash(file, None) or revision


def _reads_text(skeleton: PreTrainedModel) -> bool:
    try:
        embeddings = skeleton.get_input_embeddings()
    except NotImplementedError:  # transformers found no embeddings
        return False
    return skeleton.main_input_name == "input_ids" and isinstance(embeddings, nn.Embedding)


def _unquantizable(skeleton: nn.Module) -> tuple[list[str], float]:
    """Name the modules, except embeddings, whose matrices stay unquantized, and find their share.

    transformers replaces `nn.Linear` and GPT-2's `Conv1D` by quantized layers. It replaces neither
    their subclasses nor the stacks of matrices in which mixtures of experts keep their experts.
    """
    kept = {
        parameter: type(module).__name__
        for module in skeleton.modules()
        if type(module) not in (nn.Linear, Conv1D)
        and not isinstance(module, (nn.Embedding, nn.modules.conv._ConvNd))
        for parameter in module.parameters(recurse=False)
        if parameter.ndim >= 2
    }
    n_parameters = sum(p.numel() for p in skeleton.parameters())
    return sorted(set(kept.values())), sum(p.numel() for p in kept) / n_parameters


def _max_positions(config: PretrainedConfig, skeleton: nn.Module) -> int | None:
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
