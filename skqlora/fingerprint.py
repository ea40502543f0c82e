"""The identity of a base on disk: a hash of its configuration and its weights.

Knows nothing of how a base is loaded.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

# Entries of a config.json that change without changing what the model computes.
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


def fingerprint_source(model: str, revision: str | None) -> str:
    """Hash what identifies a base on disk, whatever device or dtype it is loaded to.

    It covers the configuration and, of every tensor, the name, the dtype, the shape, and the first
    and last rows: enough to tell two checkpoints of one architecture apart at a cost that does not
    grow with the width of the layers. How the tensors are spread over files does not count.

    Parameters
    ----------
    model : str
        A Hub id or a local folder.
    revision : str or None

    Returns
    -------
    fingerprint : str
        64 hexadecimal digits (SHA-256).

    Raises
    ------
    ValueError
        If there are no weights in safetensors format.
    """
    config = json.loads(_file_of(model, revision, "config.json").read_text(encoding="utf-8"))
    for volatile in VOLATILE:
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    tensors = {}
    for path in _weight_files(model, revision):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: _tensor_digest(file, name) for name in file.keys()})  # noqa: SIM118
    for name in sorted(tensors):
        digest.update(tensors[name])
    return digest.hexdigest()


def _tensor_digest(file: Any, name: str) -> bytes:
    view = file.get_slice(name)
    shape = view.get_shape()
    digest = hashlib.sha256(f"{name} {view.get_dtype()} {shape}".encode())
    whole = len(shape) < 2
    last = shape[0] - 1 if shape else 0
    for rows in [file.get_tensor(name)] if whole else [view[:1], view[last:]]:
        digest.update(rows.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _weight_files(model: str, revision: str | None) -> list[Path]:
    try:
        return [_file_of(model, revision, "model.safetensors")]
    except OSError:
        pass
    try:
        index = _file_of(model, revision, "model.safetensors.index.json")
    except OSError as error:
        raise ValueError(
            f"model={model!r} has no weights in safetensors format (model.safetensors). Other "
            "formats can run code when they are read and are not loaded; "
            "`model.save_pretrained(folder)` writes safetensors."
        ) from error
    shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return [_file_of(model, revision, shard) for shard in sorted(shards)]


def _file_of(model: str, revision: str | None, name: str) -> Path:
    path = cached_file(model, name, revision=revision)
    if path is None:
        raise OSError(f"{model} has no {name}")
    return Path(path)
