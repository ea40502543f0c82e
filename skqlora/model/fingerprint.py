"""The identity of a base on disk: a hash of its configuration and its weights.

This module knows nothing of how a base is loaded.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

# The entries of a config.json that can change without changing what the model computes.
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


def fingerprint_source(model: str, revision: str | None) -> str:
    """Hash what identifies a base on disk, whatever device or dtype it is loaded to.

    The hash covers the configuration, and the name, dtype, shape and values of every tensor. It
    takes about a second for each gigabyte. How the tensors are spread over files does not change
    the hash.

    Parameters
    ----------
    model : str
        A Hub id or a local folder.
    revision : str or None

    Returns
    -------
    fingerprint : str
        The hash as 64 hexadecimal digits (SHA-256).

    Raises
    ------
    ValueError
        If there are no weights in safetensors format.
    OSError
        If the Hub cannot be reached, or refuses access.
    """
    config_file = cached_file(model, "config.json", revision=revision)
    assert config_file is not None
    config = json.loads(Path(config_file).read_text(encoding="utf-8"))
    for volatile in VOLATILE:
        config.pop(volatile, None)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    tensors = {}
    for path in weight_files(model, revision):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: _tensor_digest(file, name) for name in file.keys()})  # noqa: SIM118
    for name in sorted(tensors):
        digest.update(tensors[name])
    return digest.hexdigest()


def _tensor_digest(file: Any, name: str) -> bytes:
    tensor = file.get_tensor(name).contiguous()  # mapped, not read into memory
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.digest()


def weight_files(model: str, revision: str | None) -> list[Path]:
    """List the safetensors files of a base, or raise a ValueError that says what is missing."""
    single = _file_of(model, revision, "model.safetensors")
    if single is not None:
        return [single]
    index = _file_of(model, revision, "model.safetensors.index.json")
    if index is None:
        raise ValueError(
            f"model={model!r} has no weights in safetensors format (model.safetensors). Other "
            "formats can run code when they are read and are not loaded; "
            "`model.save_pretrained(folder)` writes safetensors."
        )
    names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    shards = [_file_of(model, revision, name) for name in names]
    if None in shards:
        raise ValueError(
            f"model={model!r} lacks {names[shards.index(None)]}, which its "
            "model.safetensors.index.json names. Wanted: all files of the checkpoint."
        )
    return [shard for shard in shards if shard is not None]


def _file_of(model: str, revision: str | None, name: str) -> Path | None:
    path = cached_file(model, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if path is None else Path(path)
