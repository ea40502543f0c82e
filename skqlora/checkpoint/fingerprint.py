"""The identity of a base on disk: a hash of its configuration and of the weights that are read.

This module knows nothing of how a base is loaded.
"""

import hashlib
import json
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.utils import cached_file

from skqlora.checkpoint.weight_files import weight_files

# The entries of a config.json that can change without changing what the model computes.
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


def fingerprint_source(model: str, revision: str | None, only: Container[str] | None = None) -> str:
    """Hash what identifies a base on disk, whatever device or dtype it is loaded to.

    The hash covers the configuration, and the name, dtype, shape and values of every tensor that is
    read. It takes about a second for each gigabyte. How the tensors are spread over files does not
    change the hash.

    Parameters
    ----------
    model : str
        A Hub id or a local folder.
    revision : str or None
    only : container of str, optional
        The names of the tensors that are read. By default these are all.

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
            names = [name for name in file.keys() if only is None or name in only]  # noqa: SIM118
            tensors.update({name: _tensor_digest(file, name) for name in names})
    for name in sorted(tensors):
        digest.update(tensors[name])
    return digest.hexdigest()


def _tensor_digest(file: Any, name: str) -> bytes:
    tensor = file.get_tensor(name).contiguous()  # mapped, not read into memory
    digest = hashlib.sha256(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.digest()
