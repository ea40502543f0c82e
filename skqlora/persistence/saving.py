"""Fitted estimators written to folders and to the Hugging Face Hub, and read from there."""

import os
import re
import tempfile
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from skqlora._utils.libraries import import_libraries
from skqlora._utils.messages import warn
from skqlora._utils.version import __version__
from skqlora.adapter import Fitted
from skqlora.persistence.folders import read_folder, written_folder
from skqlora.persistence.model_card import model_card
from skqlora.persistence.peft_format import write_adapter
from skqlora.persistence.saved_format import ALL_FILES, FILES, read_fitted, write_fitted
from skqlora.settings.parameters import Parameters
from skqlora.text.targets import Classes, Numbers

REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")  # an id of the Hub


def save(
    path: str | os.PathLike,
    params: dict[str, Any],
    parameters: Parameters,
    fitted: Fitted,
    name: str,
    *,
    overwrite: bool = False,
) -> None:
    """Write a fitted estimator to a folder; see `QLoRAClassifier.save`.

    Parameters
    ----------
    path : str or path
    params : dict
        The estimator's parameters, by name, as the user gave them.
    parameters : Parameters
    fitted : Fitted
    name : str
        The folder or the repository that the model card says to load from.
    overwrite : bool, default=False
    """
    import_libraries()  # PEFT writes its own configuration
    # The base may have moved since the fit, or gone to the Hub.
    adapter, model = fitted.adapter, parameters.model
    revision = adapter.revision if adapter.model == model else parameters.revision
    settings = fitted.settings
    if settings is not None:
        settings = replace(settings, model=model, revision=revision)
    base = adapter.find_base(model)
    if os.path.isdir(base):
        base = os.path.realpath(base)  # for those who load it from another current folder
    adapter = replace(adapter, model=base, revision=revision)
    fitted = replace(fitted, adapter=adapter, settings=settings)
    with written_folder(path, ALL_FILES, overwrite=overwrite) as folder:
        write_adapter(
            folder,
            adapter.lora,
            adapter.lora_tensors,
            model=model,
            revision=revision,
            lora_dropout=parameters.lora_dropout,
        )
        _write_card(folder, parameters, fitted, name)
        write_fitted(folder, params, fitted, __version__)


def load(
    path: str | os.PathLike, revision: str | None, *, known: Collection[str], target: type
) -> tuple[dict[str, Any], Fitted]:
    """Read an estimator that `save` wrote; see `QLoRAClassifier.load`.

    Parameters
    ----------
    path : str or path
    revision : str or None
    known : collection of str
        The names of the estimator's parameters.
    target : {Classes, Numbers}
        What the estimator predicts.

    Returns
    -------
    params : dict
        The estimator's parameters, by name, not validated.
    fitted : Fitted
    """
    folder = _folder_of(path, revision)
    params, fitted = read_folder(folder, read_fitted)
    if type(fitted.target) is not target:
        kinds = {Classes: "QLoRAClassifier", Numbers: "QLoRARegressor"}
        raise ValueError(
            f"{str(folder)!r} holds a {kinds[type(fitted.target)]}. Wanted: a {kinds[target]}, or "
            f"{kinds[type(fitted.target)]}.load, which reads it."
        )
    unknown = params.keys() - set(known)
    if unknown:
        raise ValueError(
            f"{str(folder)!r} holds the parameter {min(unknown)!r}, which this version of "
            "skqlora does not have. Wanted: the version that wrote it, or a newer one."
        )
    return params, fitted


def push_to_hub(
    repo_id: str,
    params: dict[str, Any],
    parameters: Parameters,
    fitted: Fitted,
    *,
    private: bool | None,
) -> str:
    """Write a fitted estimator to the Hugging Face Hub; see `QLoRAClassifier.push_to_hub`."""
    from huggingface_hub import HfApi

    base = fitted.adapter.find_base(parameters.model)
    if os.path.isdir(base):
        warn(
            f"Got model={parameters.model!r}, a folder of this machine, and its path "
            f"{os.path.realpath(base)!r} is published. If the base is on the Hub, call "
            "set_params(model='its name there') before; otherwise those who load the "
            "estimator set it to a folder of theirs.",
        )
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "estimator"
        # What cannot be written shows here, before there is a repository.
        save(folder, params, parameters, fitted, repo_id)
        repo_id = HfApi().create_repo(repo_id, private=private, exist_ok=True).repo_id
        # Now the card gets the name of the organisation too.
        _write_card(folder, parameters, fitted, repo_id)
        commit = HfApi().upload_folder(
            repo_id=repo_id,
            folder_path=str(folder),
            commit_message="Written by skqlora",
            delete_patterns=list(ALL_FILES),  # the files of an earlier one
        )
    return commit.commit_url


def _write_card(folder: Path, parameters: Parameters, fitted: Fitted, name: str) -> None:
    card = model_card(parameters, fitted, name)
    (folder / FILES.model_card).write_text(card, "utf-8", errors="replace")


def _folder_of(path: str | os.PathLike, revision: str | None) -> Path:
    """Find a folder on the disk or, by the id of a repository, on the Hub."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or folder.is_absolute() or not REPOSITORY.fullmatch(os.fspath(path)):
        raise NotADirectoryError(
            f"Got path={str(folder)!r}, which is no folder. Wanted: one that `save` wrote, or the "
            "id of a repository of the Hugging Face Hub."
        )
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            os.fspath(path), revision=revision, allow_patterns=list(ALL_FILES)
        )
    except OSError as error:
        if error.errno is not None:  # of the disk: the Hub's own have none and name no path
            raise
        raise FileNotFoundError(
            f"Got path={os.fspath(path)!r}. There is no such folder in {os.getcwd()!r}, and it "
            f"could not be read from the Hugging Face Hub: {error}"
        ) from error
    return Path(found)
