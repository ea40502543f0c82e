"""Checkpoints that are quantized already: which are read as they are, and which anew."""

import json
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from skqlora.checkpoint.quantizer import dequantizer

BLOCK = 64  # weights that share a quantization constant
# What bitsandbytes keeps beside a packed weight, and what else if the constants are quantized too.
CONSTANTS = "absmax", "quant_map"
NESTED_CONSTANTS = "nested_absmax", "nested_quant_map"


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
    if is_packed(stored):
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


def is_packed(stored: Mapping[str, Any] | None) -> bool:
    """Return whether a checkpoint has 4 bits by bitsandbytes, and is read as it is."""
    return bool((stored or {}).get("load_in_4bit"))


def _is_nested(stored: Mapping[str, Any]) -> bool:
    return bool(stored.get("bnb_4bit_use_double_quant", False))


def find_packed_weights(
    files: Iterable[Path],
    names: Collection[str],
    *,
    model: str,
    quantization: str | None,
    double_quant: bool,
) -> list[str]:
    """Find the packed weights of a checkpoint, and check that they are as the parameters ask.

    Parameters
    ----------
    files : iterable of Path
        The safetensors files of the checkpoint.
    names : collection of str
        The names of the tensors that are to be read.
    model, quantization, double_quant
        The same as in `check_stored_quantization`.

    Returns
    -------
    weights : list of str
        The names of the packed weights.

    Raises
    ------
    ValueError
        If a weight is of another kind, if blocks of another size share a constant, or if one of its
        constants is missing.
    """
    weights, names = [], set(names)
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in names.intersection(file.keys()):
                weight, _, state_name = name.partition(".quant_state.")
                if not state_name:
                    continue
                weights.append(weight)
                state = _read_state(model, name, bytes(file.get_tensor(name).tolist()))
                has = state["quant_type"], "nested_blocksize" in state
                if has != (quantization, double_quant):
                    raise ValueError(_differs(model, *has, quantization, double_quant))
                if state["blocksize"] != BLOCK:
                    raise ValueError(
                        f"model={model!r} has a constant for each block of {state['blocksize']} "
                        f"weights in {weight!r}. Wanted: blocks of {BLOCK}. Take its 16-bit "
                        "checkpoint; `fit` quantizes it."
                    )
                constants = CONSTANTS + (NESTED_CONSTANTS if has[1] else ())
                _check_present(model, [f"{weight}.{each}" for each in constants], names)
    if weights:
        return weights
    raise ValueError(
        f"model={model!r} says that it is in 4 bits, but holds no packed weight. Wanted: a "
        "checkpoint that `save_pretrained` wrote, or no quantization_config in its config.json if "
        "its weights are in 16 bits."
    )


def check_scales(files: Iterable[Path], names: Collection[str], model: str) -> None:
    """Check that each weight in 8 bits has a scale; raise ValueError if one has none.

    transformers would read its codes as values.
    """
    scaled = {name.rpartition(".")[0] for name in names if "scale" in name.rpartition(".")[2]}
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in set(names).intersection(file.keys()):
                in_8_bits = file.get_slice(name).get_dtype().startswith("F8_E4")
                if in_8_bits and name.rpartition(".")[0] not in scaled:
                    _check_present(model, [f"{name}_scale_inv"], names)


def _check_present(model: str, wanted: Iterable[str], names: Collection[str]) -> None:
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ValueError(
            f"model={model!r}: the checkpoint lacks {missing[0]!r}, without which a quantized "
            "weight cannot be read. Wanted: a complete checkpoint."
        )


def _read_state(model: str, name: str, content: bytes) -> dict[str, Any]:
    try:
        state = json.loads(content)
        return {"quant_type": state["quant_type"], "blocksize": state["blocksize"]} | state
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"model={model!r}: {name!r} is damaged. Wanted: a checkpoint as `save_pretrained` "
            "wrote it. Fetch it again."
        ) from error


def _differs(
    model: str, has_type: str, has_double: bool, quantization: str | None, double_quant: bool
) -> str:
    return (
        f"Got quantization={quantization!r} and double_quant={double_quant}, but model={model!r} "
        f"is already quantized, with quantization={has_type!r} and double_quant={has_double}. "
        "Pass these, or its 16-bit checkpoint; `fit` quantizes that."
    )
