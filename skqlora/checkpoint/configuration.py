"""A model's configuration on disk or on the Hub, and the commit that it is of."""

import functools
import os
from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash

from skqlora._utils.hub import plain_reason
from skqlora._utils.messages import warn

# What else a folder without a config.json may be: a file that shows it, and what to do then.
OTHER_FOLDERS = {
    "skqlora.json": "a folder that `save` wrote. Call `QLoRAClassifier.load(folder)`",
    "adapter_config.json": (
        "a folder that holds only an adapter of PEFT. Call `QLoRAClassifier.from_peft(folder)` for "
        "the adapter, or pass the model that it was trained on"
    ),
    "*.gguf": (
        "a folder that holds only a GGUF file, which is not read. Pass the model in safetensors "
        "format that the file was made of"
    ),
}


def read_config(model: str, revision: str | None) -> PreTrainedConfig:
    """Read a model's configuration, or raise a ValueError that says why this is not possible."""
    if Path(model).is_dir() and not (Path(model) / "config.json").is_file():
        raise ValueError(
            f"model={model!r} is {_other_folder(Path(model))}. Wanted: a folder that "
            "`model.save_pretrained` wrote, or a model id of the Hugging Face Hub."
        )
    if Path(model).is_file():
        kind = "a GGUF file, which is not read" if model.endswith(".gguf") else "a file"
        raise ValueError(
            f"model={model!r} is {kind}. Wanted: the folder of a model in safetensors format, with "
            "its config.json and its tokenizer, or a model id of the Hugging Face Hub."
        )
    if not Path(model).exists() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        at_hub = model.partition("huggingface.co/")[2].strip("/")
        what = f"a web address. Pass {at_hub!r}" if at_hub else "a folder that does not exist"
        raise ValueError(
            f"model={model!r} is {what}. Wanted: a folder that "
            "`model.save_pretrained` wrote, or a model id of the Hugging Face Hub."
        )
    try:
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=False)
    except Exception as error:  # hub, network, JSON and registry errors share no base class
        reason = (
            plain_reason(error, model, revision)
            or _why_unknown(model, revision)
            or " ".join((str(error) or type(error).__name__).split())[:400]
        )
        raise ValueError(
            f"model={model!r} could not be read: {reason} Wanted: a local folder (relative paths "
            f"start at {os.getcwd()!r}; if it has moved: clf.set_params(model=folder)), or a "
            "model id of the Hugging Face Hub ('organisation/name') that transformers knows "
            "without running code from its repository."
        ) from error


def _why_unknown(model: str, revision: str | None) -> str | None:
    """Say why transformers has no class for a configuration that can be read."""
    try:
        config, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
    except Exception:  # the file is damaged, or is not there
        return None
    if config == {} and not _has_config(model, revision):
        return (
            "Its repository has no config.json. Repositories of adapters or GGUF files have none."
        )
    if not isinstance(config, dict):
        return "Its config.json is no JSON object."
    return _why_unfit(config)


def _has_config(model: str, revision: str | None) -> bool:
    return bool(
        cached_file(
            model, "config.json", revision=revision, _raise_exceptions_for_missing_entries=False
        )
    )


def _why_unfit(config: dict) -> str | None:
    """Say why a configuration is of no known family, or None if it is of one."""
    family, code = config.get("model_type"), config.get("auto_map")
    if isinstance(family, str) and family in CONFIG_MAPPING:
        return None
    if isinstance(code, dict) and "AutoConfig" in code:
        return "Its repository comes with code of its own, which is never run."
    if family is None:
        return "Its config.json names no model_type."
    if not isinstance(family, str):
        return f"Its config.json has the model_type {family!r}, which is no text."
    return (
        f"Its config.json is of the family {family!r}, which transformers "
        f"{transformers.__version__} does not know. A newer version may."
    )


def warn_of_adapter(model: str) -> None:
    """Warn if a folder holds an adapter of PEFT next to the model, which transformers would add."""
    if (Path(model) / "adapter_config.json").is_file():
        warn(
            f"model={model!r} holds an adapter of PEFT next to the model (adapter_config.json). It "
            "is not read. To train on top of it, merge it into the model "
            "(`merge_and_unload`) and save that; otherwise remove its files."
        )


def _other_folder(folder: Path) -> str:
    """Say what a folder is that holds no configuration of a model, and what to do."""
    for pattern, what in OTHER_FOLDERS.items():
        if any(folder.glob(pattern)):
            return what
    return "a folder without a config.json"


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
