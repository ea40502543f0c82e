"""Fitted classifiers on disk: what `QLoRAClassifier` can write and read."""

import os
import re
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from sklearn.utils.validation import check_is_fitted

from skqlora._utils.libraries import import_libraries
from skqlora.persistence.folders import find_aside, written_folder
from skqlora.persistence.model_card import model_card
from skqlora.persistence.peft_format import write_adapter
from skqlora.persistence.saved_format import ALL_FILES, FILES, read_classifier, write_classifier

MERGE_DTYPES = ("float32", "bfloat16", "float16")
REPOSITORY = re.compile(r"[\w.-]+(/[\w.-]+)?")  # an id of the Hub


class PersistenceMixin:
    """Methods that write a fitted classifier, and make one of what was written."""

    def save(self: Any, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write the fitted classifier to a folder, without the base and without pickle.

        The folder holds JSON and safetensors: parameters, classes, adapter and head. The adapter
        is under the names of PEFT, so that
        ``PeftModel.from_pretrained(AutoModel.from_pretrained(model), path)`` gives its hidden
        states. A kill at any moment leaves what was there before, or the whole new folder.

        Parameters
        ----------
        path : str or path
            A folder that does not exist yet, or is empty.
        overwrite : bool, default=False
            Replace a folder that `save` wrote.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            If the classifier is not fitted.
        ValueError
            If a parameter, such as a `scoring` function, cannot be written without pickle.
        OSError
            If something else is at `path`, or it cannot be written.
        """
        self._save(path, Path(path).name, overwrite=overwrite)

    @classmethod
    def load(cls: Any, path: str | os.PathLike, *, revision: str | None = None) -> Any:
        """Read a classifier that `save` wrote. The base is loaded at the first prediction.

        Parameters
        ----------
        path : str or path
            A folder, or the id of a repository of the Hugging Face Hub.
        revision : str, default=None
            Branch, tag or commit on the Hub.

        Returns
        -------
        classifier : QLoRAClassifier
            Fitted.

        Raises
        ------
        ValueError
            If a file is damaged, or of a newer version; the message names it.
        OSError
            If there is no such folder or repository, or a file is missing.
        """
        folder = _folder_of(path, revision)
        parameters, fitted = read_classifier(folder)
        unknown = parameters.keys() - set(cls._get_param_names())
        if unknown:
            raise ValueError(
                f"{str(folder)!r} holds the parameter {min(unknown)!r}, which this version of "
                "skqlora does not have. Wanted: the version that wrote it, or a newer one."
            )
        classifier = cls(**parameters)
        classifier._validate_params()
        vars(classifier).update(fitted)
        return classifier

    def push_to_hub(self: Any, repo_id: str, *, private: bool | None = None) -> str:
        """Write the fitted classifier to a repository of the Hugging Face Hub, as `save` does.

        `load` reads it from there. Log in first: ``hf auth login``. Everyone who reads it needs the
        base: where `model` is a folder, its path is what they get to see, and a warning says so.

        Parameters
        ----------
        repo_id : str
            "name" or "organisation/name". It is made if it does not exist.
        private : bool, default=None
            Whether a new repository is private. None leaves that to the organisation's settings.

        Returns
        -------
        url : str
            Of the commit.

        Raises
        ------
        huggingface_hub.errors.HfHubHTTPError, OfflineModeIsEnabled
            If the Hub refuses, or cannot be reached.
        """
        from huggingface_hub import HfApi

        check_is_fitted(self)
        if os.path.isdir(self.model):
            warnings.warn(
                f"Got model={os.fspath(self.model)!r}, a folder of this machine, and that path is "
                "published. If the base is on the Hub, call clf.set_params(model='its name there') "
                "before; else those who load the classifier set it to a folder of theirs.",
                stacklevel=2,
            )
        with tempfile.TemporaryDirectory() as parent:
            folder = os.path.join(parent, "classifier")
            self._save(folder, repo_id)  # what cannot be written shows before there is a repository
            repo_id = HfApi().create_repo(repo_id, private=private, exist_ok=True).repo_id
            self._write_card(Path(folder), repo_id)  # with the name of the organisation
            commit = HfApi().upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message="Text classifier of skqlora",
                delete_patterns=list(ALL_FILES),  # of an earlier one
            )
        return commit.commit_url

    def to_peft(self: Any, path: str | os.PathLike) -> None:
        """Write the adapter with its head as PEFT's own for sequence classification.

        ``AutoPeftModelForSequenceClassification.from_pretrained(path, num_labels=n_classes)`` loads
        it. The logits are the same on the same base: for a 4-bit one pass the
        `quantization_config`, with the head in its `llm_int8_skip_modules`.

        Parameters
        ----------
        path : str or path
            A folder that does not exist yet, or is empty.

        Raises
        ------
        ValueError
            If Transformers has no class for this base with this pooling: see `to_transformers`.
        OSError
            If something else is at `path`, or it cannot be written.
        """
        check_is_fitted(self)
        import_libraries()
        from skqlora.persistence.exporting import write_peft

        with written_folder(path) as folder:
            write_peft(self, folder)

    @classmethod
    def from_peft(
        cls: Any,
        path: str | os.PathLike,
        *,
        classes: Any = None,
        multilabel: bool = False,
        **parameters: Any,
    ) -> Any:
        """Make a fitted classifier of an adapter that PEFT or TRL trained.

        Parameters
        ----------
        path : str or path
            A folder that ``PeftModel.save_pretrained`` wrote for a decoder, or an encoder of the
            family of BERT, for sequence classification; or its repository on the Hub.
        classes : array-like of shape (n_classes,), default=None
            The labels in the order of the head's rows, which are put in that of `classes_`. None
            numbers them.
        multilabel : bool, default=False
            Whether a text has any number of labels.
        **parameters : dict
            Of the classifier, instead of what the adapter says, e.g. `model`, or
            ``quantization=None`` for an adapter that was trained on a 16-bit base.

        Returns
        -------
        classifier : QLoRAClassifier
            Fitted; `n_iter_` is 0.

        Raises
        ------
        ValueError
            If it is another kind of adapter, has another head than a linear layer, or does not fit
            the base; the message names what.
        """
        import_libraries()
        from skqlora.persistence.exporting import read_peft

        parameters, fitted = read_peft(cls, path, classes, multilabel, parameters)
        classifier = cls(**parameters)
        vars(classifier).update(fitted)
        return classifier

    def to_transformers(self: Any) -> tuple[Any, Any]:
        """Make a Transformers model and its tokenizer that predict the same.

        ``pipeline("text-classification", model=model, tokenizer=tokenizer)`` runs them. The weights
        are those of the base, dequantized in float32, plus the adapter: 4 bytes each, on the CPU.

        Returns
        -------
        model : transformers.PreTrainedModel
            Of `AutoModelForSequenceClassification`, with the classes in `config.id2label`.
        tokenizer : transformers.PreTrainedTokenizerBase
            Pads on the right, and cuts at the same length where truncation is asked for.

        Raises
        ------
        ValueError
            If Transformers has no class for this base with this pooling. It has for most decoders,
            and for BERT and ALBERT with ``pooling="pooler"``.
        """
        check_is_fitted(self)
        import_libraries()
        from skqlora.persistence.exporting import to_transformers

        return to_transformers(self)

    def merge(self: Any, path: str | os.PathLike, *, dtype: str = "float32") -> None:
        """Write the model of `to_transformers` and its tokenizer to a folder.

        Never merged onto the 16-bit weights, which the adapter did not see, nor quantized again.

        Parameters
        ----------
        path : str or path
            A folder that does not exist yet, or is empty.
        dtype : {"float32", "bfloat16", "float16"}, default="float32"
            That the sums are rounded to. float32 keeps the probabilities.

        Raises
        ------
        ValueError
            For another `dtype`, or as `to_transformers`.
        OSError
            If something else is at `path`, or it cannot be written.
        """
        check_is_fitted(self)
        if dtype not in MERGE_DTYPES:
            raise ValueError(f"Got dtype={dtype!r}. Wanted: one of {', '.join(MERGE_DTYPES)}.")
        import_libraries()
        from skqlora.persistence.exporting import write_merged

        with written_folder(path) as folder:
            write_merged(self, folder, dtype)

    def _save(self: Any, path: str | os.PathLike, name: str, *, overwrite: bool = False) -> None:
        """Save; `name` is where the model card says to load from."""
        from skqlora import __version__

        check_is_fitted(self)
        import_libraries()  # PEFT writes its own configuration
        parameters, model = self.get_params(deep=False), os.fspath(self.model)
        revision = self.adapter_.revision if self.adapter_.model == model else self.revision
        adapter = replace(self.adapter_, model=model, revision=revision)
        fitted = vars(self) | {"adapter_": adapter}
        with written_folder(path, ALL_FILES if overwrite else None) as folder:
            write_adapter(
                folder,
                self.adapter_.lora,
                self.adapter_.lora_tensors,
                model=model,
                revision=revision,
                lora_dropout=self.lora_dropout,
            )
            self._write_card(folder, name)
            write_classifier(folder, parameters, fitted, __version__)

    def _write_card(self: Any, folder: Path, name: str) -> None:
        card = model_card(self.get_params(deep=False), vars(self), name)
        (folder / FILES.model_card).write_text(card, "utf-8", errors="replace")


def _folder_of(path: str | os.PathLike, revision: str | None) -> Path:
    """Find a folder on the disk or, by the id of a repository, on the Hub."""
    folder = Path(path)
    if folder.is_dir():
        return folder
    aside = find_aside(folder)
    if aside is not None:
        raise NotADirectoryError(
            f"Got path={str(folder)!r}, where nothing is: a write to it was cut off between two "
            f"renames. What was there before may be {str(aside)!r}: if so, rename it."
        )
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
        if error.errno is not None:  # of the disk; the Hub's own have none, and name no path
            raise
        raise FileNotFoundError(
            f"Got path={os.fspath(path)!r}. There is no such folder in {os.getcwd()!r}, and it "
            f"could not be read from the Hugging Face Hub: {error}"
        ) from error
    return Path(found)
