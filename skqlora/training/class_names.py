"""A head that starts from a decoder's own guess: its output embeddings of the classes' names.

If the name of the class would follow the prompt, the first logits of a text are then those of the
causal language model for the tokens of each class, averaged, except for a bias, a scale or a cap
that some families put on them. So the classifier answers before it has learned.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from skqlora._utils.libraries import muted
from skqlora.checkpoint.configuration import read_config
from skqlora.checkpoint.spec import BackboneSpec
from skqlora.checkpoint.weight_files import tensor_names, weight_files
from skqlora.model.backbone import Backbone
from skqlora.text.tokenization import CachingTokenizer


def head_of_class_names(
    backbone: Backbone, tokenizer: CachingTokenizer, names: Sequence[str]
) -> dict[str, np.ndarray]:
    """Average the output embeddings of the tokens of each name.

    Parameters
    ----------
    backbone : Backbone
        The base, a causal model.
    tokenizer : CachingTokenizer
    names : sequence of str, of length n_classes
        The names of the classes. An underscore counts as a space.

    Returns
    -------
    head : dict of str to ndarray
        The float32 array "weight" of shape (n_classes, hidden_size).

    Raises
    ------
    ValueError
        If the model does not predict tokens, if its output embeddings are missing or do not fit the
        head, or if the tokenizer makes no token of a name or one that the model does not have.
    """
    tokens = [tokenizer.ids_of_word(name.replace("_", " ")) for name in names]
    nameless = [name for name, ids in zip(names, tokens, strict=True) if not ids]
    if nameless:
        raise ValueError(
            f"Got the class {nameless[0]!r}, of which the tokenizer makes no token. Wanted: names, "
            "or another init_head_weights than 'class_names'."
        )
    different = sorted({token for ids in tokens for token in ids})
    if different[-1] >= backbone.vocab_size:
        raise ValueError(
            f"The tokenizer makes the token id {different[-1]} of a class's name but the model has "
            f"only {backbone.vocab_size} token embeddings. Wanted: the tokenizer that belongs to "
            "the model, in its folder."
        )
    rows = dict(zip(different, _output_embeddings(backbone, different), strict=True))
    weight = np.stack([np.mean([rows[token] for token in ids], axis=0) for ids in tokens])
    if weight.shape[1] != backbone.hidden_size:
        raise ValueError(
            f"model={backbone.spec.model!r} has output embeddings of width {weight.shape[1]} and "
            f"hidden states of {backbone.hidden_size}. Wanted: the same, or another "
            "init_head_weights than 'class_names'."
        )
    return {"weight": weight}


def _output_embeddings(backbone: Backbone, tokens: list[int]) -> np.ndarray:
    """Read the float32 output embeddings of some tokens, of shape (n_tokens, width)."""
    spec = backbone.spec
    name, tied = _output_name(spec)
    alone = spec.architecture().whole
    files = [] if tied and alone else weight_files(spec.model, spec.revision)
    # A text tower's may have a prefix, such as "language_model.".
    found = [each for each in tensor_names(files) if f".{each}".endswith(f".{name}")]
    if len(found) > 1:
        raise ValueError(
            f"model={spec.model!r} has several output embeddings, {found[0]!r} and {found[1]!r}. "
            "Wanted: a checkpoint of one language model, or another init_head_weights than "
            "'class_names'."
        )
    if found:
        return _read_rows(spec.model, files, found[0], tokens)
    if not tied:
        raise ValueError(
            f"model={spec.model!r} has no {name} in its files. Wanted: the checkpoint of a whole "
            "causal language model, or another init_head_weights than 'class_names'."
        )
    inputs: torch.Tensor = backbone.module.get_input_embeddings().weight  # type: ignore[assignment]
    return inputs[torch.tensor(tokens, device=inputs.device)].float().cpu().numpy()


def _read_rows(model: str, files: Iterable[Path], name: str, tokens: list[int]) -> np.ndarray:
    for path in files:
        with safe_open(path, framework="pt") as file:
            if name in file.keys():  # noqa: SIM118
                table = file.get_slice(name)
                if table.get_dtype() not in ("F32", "F16", "BF16"):
                    raise ValueError(
                        f"model={model!r} has output embeddings {name!r} in fewer than 16 bits. "
                        "Wanted: its 16-bit checkpoint, or another init_head_weights than "
                        "'class_names'."
                    )
                rows = [table[token : token + 1] for token in tokens]
                return torch.cat(rows).float().numpy()
    raise AssertionError(name)


def _output_name(spec: BackboneSpec) -> tuple[str, bool]:
    """Return the parameter name of the output embeddings, and whether they may be the input's.

    A checkpoint of more than text can say of the text model or of the whole that they are, so that
    only its tensors tell.
    """
    text, whole = spec.architecture().config, read_config(spec.model, spec.revision)
    try:
        with torch.device("meta"), muted():
            if type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
                causal = AutoModelForCausalLM.from_config(text, trust_remote_code=False)
            else:  # a text tower that predicts tokens only as a part of the whole
                causal = AutoModelForImageTextToText.from_config(whole, trust_remote_code=False)
    except ValueError as error:
        raise ValueError(
            f"model={spec.model!r} ({text.model_type}) predicts no tokens. Wanted: a causal "
            "language model, or another init_head_weights than 'class_names'."
        ) from error
    output: nn.Module | None = causal.get_output_embeddings()
    if output is None:
        raise ValueError(
            f"model={spec.model!r} ({text.model_type}) has no output embeddings. Wanted: another "
            "init_head_weights than 'class_names'."
        )
    name = next(name for name, module in causal.named_modules() if module is output)
    tied = output.weight is causal.get_input_embeddings().weight
    of_whole = bool(getattr(whole, "tie_word_embeddings", False))
    return f"{name}.weight", tied or (of_whole and not spec.architecture().whole)
