"""Checkpoints that are quantized already: which are read as they are, and which anew."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from skqlora.checkpoint.quantizer import dequantizer

BLOCK = 64  # weights that share a quantization constant


def check_stored_quantization(
    stored: Mapping[str, Any] | None, *, model: str, quantization: str | None, double_quant: bool
) -> None:
    """Refuse a quantized checkpoint that cannot be had as the parameters ask for it.

    Parameters
    ----------
    stored : mapping or None
        The entry "quantization_config" of the checkpoint's config.json.
    model : str
        What the message calls the model.
    quantization : {"nf4", "fp4"} or None
    double_quant : bool

    Raises
    ------
    ValueError
        If the checkpoint is quantized and `quantization` is None, if it has 4 bits of another kind,
        or if transformers cannot dequantize it while it is read.
    """
    if not stored:
        return
    method = str(stored.get("quant_method", "another way"))
    if quantization is None:
        raise ValueError(
            f"Got quantization=None, but model={model!r} is already quantized ({method}). Wanted: "
            "its 16-bit checkpoint, or quantization='nf4'."
        )
    if is_bitsandbytes(stored):
        has = stored.get("bnb_4bit_quant_type", "fp4"), _is_nested(stored)
        if has != (quantization, double_quant):
            raise ValueError(_differs(model, *has, quantization, double_quant))
        return
    try:
        readable = dequantizer(dict(stored)) is not None
    except Exception:  # transformers may need a package that is not here, or know no such method
        readable = False
    if not readable:
        raise ValueError(
            f"model={model!r} is already quantized ({method}), and transformers cannot dequantize "
            "it while reading. Wanted: a checkpoint in 16 bits, or in 4 bits by bitsandbytes. Take "
            "its 16-bit checkpoint; `fit` quantizes it."
        )


def is_bitsandbytes(stored: Mapping[str, Any] | None) -> bool:
    """Return whether a checkpoint has 4 bits by bitsandbytes, and is read as it is."""
    return bool((stored or {}).get("load_in_4bit"))


def _is_nested(stored: Mapping[str, Any]) -> bool:
    return bool(stored.get("bnb_4bit_use_double_quant", False))


def check_packed_weights(
    files: Iterable[Path], *, model: str, quantization: str | None, double_quant: bool
) -> None:
    """Check by the first packed weight of a checkpoint what its config.json does not say.

    Raises
    ------
    ValueError
        If blocks of another size share a constant, or the weight is of another kind.
    """
    for path in files:
        with safe_open(path, framework="pt") as file:
            states = [name for name in file.keys() if ".quant_state." in name]  # noqa: SIM118
            if not states:
                continue
            state = json.loads(bytes(file.get_tensor(states[0]).tolist()))
        has = state["quant_type"], "nested_blocksize" in state
        if has != (quantization, double_quant):
            raise ValueError(_differs(model, *has, quantization, double_quant))
        if state["blocksize"] != BLOCK:
            raise ValueError(
                f"model={model!r} has a constant for each block of {state['blocksize']} weights. "
                f"Wanted: blocks of {BLOCK}. Take its 16-bit checkpoint; `fit` quantizes it."
            )
        return
    raise ValueError(
        f"model={model!r} says that it is in 4 bits, but holds no packed weight. Wanted: a "
        "checkpoint that `save_pretrained` wrote."
    )


def _differs(
    model: str, has_type: str, has_double: bool, quantization: str | None, double_quant: bool
) -> str:
    return (
        f"Got quantization={quantization!r} and double_quant={double_quant}, but model={model!r} "
        f"is already quantized, with quantization={has_type!r} and double_quant={has_double}. "
        "Pass these, or its 16-bit checkpoint; `fit` quantizes that."
    )
