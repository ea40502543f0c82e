"""The identity of a base on disk: a hash of its computation and of the weights that are read.

This module knows nothing of how a base is loaded.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedConfig
from transformers.utils import cached_file

from skqlora.checkpoint.weight_files import weight_files

# The entries of a configuration that can change without changing the hidden states of texts.
NO_COMPUTATION = (
    "_name_or_path",
    "architectures",
    "auto_map",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "finetuning_task",
    "id2label",
    "initializer_range",
    "label2id",
    "num_labels",
    "problem_type",
    "task_specific_params",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers.js_config",
    "transformers_version",
    "use_cache",
)
# Those that version 1 of the saved format left out.
VOLATILE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache")


@dataclass(frozen=True)
class Fingerprint:
    """Two hashes of a base, each as 64 hexadecimal digits (SHA-256).

    A checkpoint without a pooler, once it is loaded and saved again, has a random one.

    Attributes
    ----------
    without_pooler : str
        The hash for adapters that do not use the base's pooler.
    with_pooler : str
        The hash for adapters that do.
    """

    without_pooler: str
    with_pooler: str


def fingerprint_base(
    config: PreTrainedConfig, files: Iterable[Path], places: Mapping[str, str]
) -> Fingerprint:
    """Hash what a base computes with, whatever device or dtype it is loaded to.

    The hashes cover the settings that are not the family's defaults, and the dtype, shape and
    values of every tensor that is read, under its name in the text model. So they are the same if
    the model is saved again, alone or as a part of another one. They take about a second for each
    gigabyte.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The configuration of the text model.
    files : iterable of Path
        The safetensors files of the checkpoint.
    places : mapping of str to str
        The names of the tensors that are read, and where each belongs in the text model. Several
        may belong together, such as those of experts.

    Returns
    -------
    fingerprint : Fingerprint
    """
    settings = config.to_diff_dict()
    of_computation = {
        key: value
        for key, value in settings.items()
        if key not in NO_COMPUTATION and "dropout" not in key  # a base's own dropout is off
    }
    parts = defaultdict(list)
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in places.keys() & set(file.keys()):
                parts[places[name]].append((name, _digest_of_values(file, name)))
    digest = hashlib.sha256(json.dumps(of_computation, sort_keys=True, default=str).encode())
    of_pooler = sorted(place for place in parts if place.startswith("pooler."))
    for place in sorted(parts.keys() - set(of_pooler)):
        _add(digest, place, parts[place])
    without_pooler = digest.hexdigest()
    for place in of_pooler:
        _add(digest, place, parts[place])
    return Fingerprint(without_pooler, digest.hexdigest())


def _add(digest: Any, place: str, parts: list[tuple[str, bytes]]) -> None:
    """Add the digests of the tensors that belong to one place, in the order of their names."""
    digest.update(place.encode())
    for _, values in sorted(parts):
        digest.update(values)


def _digest_of_values(file: Any, name: str, prefix: str = "") -> bytes:
    tensor = file.get_tensor(name).contiguous()  # mapped, not read into memory
    digest = hashlib.sha256(f"{prefix}{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.view(-1).view(torch.uint8).numpy())
    return digest.digest()


def fingerprint_of_version_1(
    model: str, revision: str | None, only: Container[str] | None = None
) -> str:
    """Hash a base as version 1 of the saved format did: config.json, and all tensors by name.

    Parameters
    ----------
    model : str
        A Hub id or a local folder.
    revision : str or None
    only : container of str, optional
        The names of the tensors of the text model, if it is a part of another model.

    Returns
    -------
    fingerprint : str
        The hash as 64 hexadecimal digits (SHA-256).
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
            tensors.update({name: _digest_of_values(file, name, f"{name} ") for name in names})
    for name in sorted(tensors):
        digest.update(tensors[name])
    return digest.hexdigest()
