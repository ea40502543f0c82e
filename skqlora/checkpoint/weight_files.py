"""The safetensors files of a model, and the names of the tensors in them."""

import json
from collections.abc import Iterable
from pathlib import Path

from huggingface_hub import is_offline_mode
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file


def weight_files(model: str, revision: str | None) -> list[Path]:
    """List the safetensors files of a base, or raise a ValueError that says what is missing."""
    single = _file_of(model, revision, "model.safetensors")
    if single is not None:
        return [single]
    index = _file_of(model, revision, "model.safetensors.index.json")
    if index is None and Path(model).is_dir() and not any(Path(model).glob("*.bin")):
        raise ValueError(
            f"model={model!r} holds a config.json but no weights. Wanted: all files of a model, as "
            "`hf download organisation/name --local-dir folder` fetches them."
        )
    if index is None and not Path(model).is_dir() and is_offline_mode():
        raise ValueError(
            f"model={model!r}: its weights (model.safetensors) are not in the Hub's cache, and "
            "this process is offline (HF_HUB_OFFLINE). Wanted: all of its files, as "
            f"`hf download {model}` fetches them."
        )
    if index is None:
        raise ValueError(
            f"model={model!r} has no weights in safetensors format (model.safetensors). Other "
            "formats can run code when they are read and are not loaded; "
            "`model.save_pretrained(folder)` writes safetensors."
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{index} is damaged: it has no valid weight_map. Wanted: the file as it was "
            "downloaded or as `save_pretrained` wrote it. Fetch it again."
        ) from error
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


def tensor_names(files: Iterable[Path]) -> list[str]:
    """List the names of the tensors in safetensors files, which are read from their headers."""
    names: list[str] = []
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names += file.keys()
        except SafetensorError as error:
            raise ValueError(
                f"{path} is no whole safetensors file: {error}. Wanted: the file as it was "
                "downloaded or as `save_pretrained` wrote it. Fetch it again; a file of a few "
                "hundred bytes is a pointer of Git LFS (`git lfs pull`)."
            ) from error
    return names
