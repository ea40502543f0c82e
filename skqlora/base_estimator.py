"""What the estimators share: save, load, export, the outputs of the head, and fitted attributes."""

import os
from collections.abc import Iterable
from dataclasses import fields
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils._param_validation import validate_parameter_constraints
from sklearn.utils.validation import check_is_fitted

from skqlora._utils.libraries import import_libraries
from skqlora.adapter import Fitted
from skqlora.persistence import saving
from skqlora.persistence.folders import written_folder
from skqlora.settings.constraints import PARAMETER_CONSTRAINTS, check_scoring
from skqlora.settings.names import check_names
from skqlora.settings.parameters import read_parameters
from skqlora.text.columns import Columns, check_fields, read_table
from skqlora.text.feature_names import NOTED, check_columns, find_columns, readable
from skqlora.text.inputs import (
    CheckedTexts,
    LabelledTexts,
    check_validation,
    is_validation_given,
)
from skqlora.text.targets import Classes, Target
from skqlora.training.callbacks import CALLBACK_ATTRIBUTES, CallbackSupportMixin
from skqlora.training.epochs import DivergenceError, fit_epochs

MERGE_DTYPES = ("float32", "bfloat16", "float16")
PREDICTION_CHUNK = 16_384  # texts whose token ids are held at a time
DOC_LINK = "https://skqlora.readthedocs.io/stable/generated/skqlora.{estimator_name}.html"


PARAMETERS_OF_THE_BASE = (
    "model",
    "revision",
    "quantization",
    "double_quant",
    "compute_dtype",
    "device",
    "attn_implementation",
    "verbose",
)
# The attributes of a fitted estimator, by the names of their values in `Fitted`.
ATTRIBUTES = {field.name: f"{field.name}_" for field in fields(Fitted)} | {
    "columns": "_columns_",
    "target": "_target_",
    "random_seed": "_random_seed_",
    "weight_scale": "_weight_scale_",
}


class BaseQLoRA(CallbackSupportMixin, BaseEstimator):
    """Base class of estimators that fine-tune a 4-bit language model.

    A fitted estimator consists of its parameters and an adapter. The base model belongs to the
    process, which loads it at the first `fit` or `predict`.
    """

    _target: ClassVar[type[Target]]  # the kind of what the estimator predicts

    _doc_link_module = "skqlora"
    _doc_link_template = DOC_LINK

    def save(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write the fitted estimator to a folder, without the base and without pickle.

        The folder holds the parameters, what is predicted, the adapter and the head as JSON and
        safetensors. The adapter's tensors have the names that PEFT gives them, so that
        ``PeftModel.from_pretrained(AutoModel.from_pretrained(model), path)`` computes its hidden
        states, if the model is a text model alone. `load` finds the folder as it was before or
        complete and new, even while it is written and after a kill.

        Parameters
        ----------
        path : str or path
            A folder that does not exist yet, or is empty.
        overwrite : bool, default=False
            Whether to replace a folder that `save` wrote.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            If the estimator is not fitted.
        ValueError
            If a parameter, such as a `scoring` function, cannot be written without pickle.
        OSError
            If something else is at `path`, or it cannot be written.
        """
        fitted = self._get_fitted()
        saving.save(
            path,
            self.get_params(deep=False),
            read_parameters(self),
            fitted,
            Path(os.path.abspath(path)).name,
            overwrite=overwrite,
        )

    @classmethod
    def load(cls, path: str | os.PathLike, *, revision: str | None = None) -> Self:
        """Read an estimator that `save` wrote. The base is loaded at the first prediction.

        Parameters
        ----------
        path : str or path
            A folder, or the id of a repository of the Hugging Face Hub.
        revision : str, default=None
            The branch, tag or commit on the Hub.

        Returns
        -------
        estimator : QLoRAClassifier or QLoRARegressor
            The fitted estimator.

        Raises
        ------
        ValueError
            If a file is damaged, was written by a newer version, or is of the other estimator. The
            message names the file.
        OSError
            If there is no such folder or repository, or if a file is missing.
        """
        params, fitted = saving.load(
            path, revision, known=cls._get_param_names(), target=cls._target
        )
        estimator = cls(**params)
        estimator._validate_params()
        estimator._set_fitted(fitted)
        return estimator

    def push_to_hub(self, repo_id: str, *, private: bool | None = None) -> str:
        """Write the fitted estimator to a repository of the Hugging Face Hub, as `save` does.

        `load` reads it from there. Log in first: ``hf auth login``. Everyone who loads the
        estimator needs the base. If `model` is a folder, its path becomes public, and a warning
        says so.

        Parameters
        ----------
        repo_id : str
            The repository, "name" or "organisation/name". It is created if it does not exist.
        private : bool, default=None
            Whether a new repository is private. None leaves this to the organisation's settings.

        Returns
        -------
        url : str
            The address of the commit.

        Raises
        ------
        huggingface_hub.errors.HfHubHTTPError, OfflineModeIsEnabled
            If the Hub refuses the upload or cannot be reached.
        """
        fitted = self._get_fitted()
        return saving.push_to_hub(
            repo_id,
            self.get_params(deep=False),
            read_parameters(self),
            fitted,
            private=private,
        )

    def to_peft(self, path: str | os.PathLike) -> None:
        """Write the adapter and its head in PEFT's format for sequence classification.

        ``AutoPeftModelForSequenceClassification.from_pretrained(path, num_labels=n_outputs)`` loads
        it. The outputs are the same if the base is the same: for a 4-bit base, pass its
        `quantization_config` with the head in `llm_int8_skip_modules`.

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
        fitted = self._get_fitted()
        import_libraries()
        from skqlora.persistence.exporting import write_peft

        with written_folder(path, last="adapter_config.json") as folder:
            write_peft(read_parameters(self), fitted, folder)

    @classmethod
    def from_peft(
        cls,
        path: str | os.PathLike,
        *,
        classes: Any = None,
        multilabel: bool = False,
        **parameters: Any,
    ) -> Self:
        """Make a fitted estimator from an adapter that PEFT or TRL trained.

        Parameters
        ----------
        path : str or path
            A folder that ``PeftModel.save_pretrained`` wrote for a decoder or for an encoder of the
            BERT family, for sequence classification, or its repository on the Hub.
        classes : array-like of shape (n_classes,), default=None
            For a classifier, the labels in the order of the head's rows. The rows are then sorted
            like `classes_`. None numbers the rows.
        multilabel : bool, default=False
            For a classifier, whether a text has any number of labels.
        **parameters : dict
            The parameters of the estimator that replace those of the adapter, e.g. `model`, or
            ``quantization=None`` for an adapter that was trained on a 16-bit base.

        Returns
        -------
        estimator : QLoRAClassifier or QLoRARegressor
            The fitted estimator. Its `n_iter_` is 0.

        Raises
        ------
        ValueError
            If the adapter is of another kind, if its head is not a linear layer, if it does not fit
            the base, or if `classes` do not fit the head. The message names the mismatch.
        """
        import_libraries()
        from skqlora.persistence.exporting import peft_parameters, read_peft, read_peft_config

        config = read_peft_config(path)
        estimator = cls(**peft_parameters(config) | parameters)
        estimator._validate_params()
        target = partial(cls._target.of_outputs, labels=classes, multilabel=multilabel)
        fitted = read_peft(path, config, read_parameters(estimator), target)
        found = {
            "target_modules": list(fitted.adapter.lora.target_modules),
            "pooling": fitted.adapter.pooling,
        }
        estimator.set_params(**found | parameters)
        estimator._set_fitted(fitted)
        return estimator

    def to_transformers(self) -> tuple[Any, Any]:
        """Make a Transformers model and its tokenizer that predict the same.

        ``pipeline("text-classification", model=model, tokenizer=tokenizer)`` runs them. The weights
        are those of the base, dequantized to float32, plus the adapter. They take 4 bytes each and
        are on the CPU. A pair of texts goes in as ``{"text": first, "text_pair": second}``.

        Returns
        -------
        model : transformers.PreTrainedModel
            A model of `AutoModelForSequenceClassification`, with the classes in `config.id2label`,
            or with `config.problem_type` "regression".
        tokenizer : transformers.PreTrainedTokenizerBase
            The tokenizer. It pads on the right, and with truncation it cuts at the same length.

        Raises
        ------
        ValueError
            If Transformers has no class for this base with this pooling. It has one for most
            decoders, and for BERT and ALBERT with ``pooling="pooler"``.
        """
        fitted = self._get_fitted()
        import_libraries()
        from skqlora.persistence.exporting import to_transformers

        return to_transformers(read_parameters(self), fitted)

    def merge(self, path: str | os.PathLike, *, dtype: str = "float32") -> None:
        """Write the model of `to_transformers` and its tokenizer to a folder.

        The adapter is never merged into the 16-bit weights, because it was not trained on them, and
        the result is not quantized again. A regressor's numbers are in the units of `y`; of a
        decoder without the mean of `y`, which a warning tells.

        Parameters
        ----------
        path : str or path
            A folder that does not exist yet, or is empty.
        dtype : {"float32", "bfloat16", "float16"}, default="float32"
            The precision to which the weights are rounded. float32 keeps the predictions. 16 bits
            round the mean of a regressor's numbers, too.

        Raises
        ------
        ValueError
            If `dtype` is another one, or if `to_transformers` would raise it.
        OSError
            If something else is at `path`, or it cannot be written.
        """
        fitted = self._get_fitted()
        if dtype not in MERGE_DTYPES:
            raise ValueError(f"Got dtype={dtype!r}. Wanted: one of {', '.join(MERGE_DTYPES)}.")
        import_libraries()
        from skqlora.persistence.exporting import write_merged

        with written_folder(path, last="config.json") as folder:
            write_merged(read_parameters(self), fitted, folder, dtype)

    def set_params(self, **params: Any) -> Self:
        """Set parameters by name.

        Parameters
        ----------
        **params : dict
            The parameters and their new values.

        Returns
        -------
        self : QLoRAClassifier or QLoRARegressor
            The estimator.

        Raises
        ------
        ValueError
            If there is no such parameter. The message suggests one.
        """
        names = (name.partition("__")[0] for name in params)  # `name__inner` is scikit-learn's
        message = check_names(names, self._get_param_names(), type(self).__name__)
        if message is not None:
            raise ValueError(message)
        return super().set_params(**params)

    def _validate_params(self) -> None:
        super()._validate_params()
        check_scoring(self.scoring)

    def _compute_outputs(self, X: Any) -> tuple[Fitted, np.ndarray]:
        """Return the fit, and its outputs of shape (n_texts, n_outputs)."""
        fitted = self._get_fitted()
        # As in scikit-learn, parameters of the fit are not looked at; here only those of the base.
        asked = {name: getattr(self, name) for name in PARAMETERS_OF_THE_BASE}
        constraints = {name: PARAMETER_CONSTRAINTS[name] for name in asked}
        validate_parameter_constraints(constraints, asked, type(self).__name__)
        parameters = read_parameters(self)

        def outputs_of(X: Any) -> np.ndarray:
            prompt = fitted.adapter.text_settings.prompt
            texts = self._check_texts_with(X, fitted.columns, prompt).texts
            import_libraries()
            from skqlora.model.prediction import compute_outputs

            return compute_outputs(parameters, fitted.adapter, texts, chunk_size=PREDICTION_CHUNK)

        if not isinstance(X, Iterable) or hasattr(X, "__len__"):
            return fitted, outputs_of(X)
        # An iterator, or a column that is streamed: only a chunk of it is held at a time.
        texts = iter(X)
        chunks = iter(lambda: list(islice(texts, PREDICTION_CHUNK)), [])
        outputs = [outputs_of(chunk) for chunk in chunks]
        return fitted, np.concatenate(outputs or [outputs_of([])])

    def _check_texts(self, X: Any, start: Fitted | None) -> CheckedTexts:
        """Turn the `X` of a fit into texts, and note its columns or compare them with `start`."""
        if start is not None:
            return self._check_texts_with(X, start.columns, self.prompt)
        X = readable(X)
        table = read_table(X)
        columns = find_columns(self, X, table)
        check_fields(table, self.prompt)
        return CheckedTexts.of(table, columns, self.prompt)

    def _check_texts_with(
        self, X: Any, known: Columns | None, prompt: str | None, name: str = "X"
    ) -> CheckedTexts:
        """Turn `X` into texts after a check that its columns are those which are known."""
        X = readable(X)
        table = read_table(X, name)
        columns = check_columns(self, X, table, known, name)
        return CheckedTexts.of(table, columns, prompt, name)

    def _fit_table(
        self, table: LabelledTexts, held_out: LabelledTexts | None, start: Fitted | None
    ) -> Self:
        """Train on a table, and set what comes of it."""
        try:
            fitted = fit_epochs(self, table, held_out, start)
        except DivergenceError as error:
            self._set_fitted(error.fitted)
            raise FloatingPointError(str(error)) from None
        self._set_fitted(fitted)
        return self

    def _set_fitted(self, fitted: Fitted) -> None:
        """Set all attributes of a fit at once, so that another thread sees one fit or the other."""
        values = {name: _own(getattr(fitted, name)) for name in ATTRIBUTES}
        columns = {} if fitted.columns is None else fitted.columns.attributes
        attributes = {ATTRIBUTES[name]: value for name, value in values.items()}
        self.__dict__.update(attributes | columns | fitted.target.attributes)
        for attribute in set(NOTED) - columns.keys():
            self.__dict__.pop(attribute, None)

    def _get_fitted(self) -> Fitted:
        """Return the attributes that `_set_fitted` has set, all of one fit.

        Raises
        ------
        sklearn.exceptions.NotFittedError
            If the estimator is not fitted.
        """
        check_is_fitted(self)
        attributes = vars(self).copy()
        # A pickle of an earlier version lacks the newest ones.
        values = {name: _own(attributes.get(key)) for name, key in ATTRIBUTES.items()}
        if values["target"] is None:
            values["target"] = Classes(attributes["classes_"], attributes["multilabel_"])
        return Fitted(**values)

    def _check_validation(
        self, training: LabelledTexts, X_val: Any, y_val: Any, sample_weight_val: Any
    ) -> LabelledTexts | None:
        """Check what early stopping scores in the same way as what is trained on."""
        if not is_validation_given(X_val, y_val, sample_weight_val, self.early_stopping):
            return None
        inputs = self._check_texts_with(X_val, training.inputs.columns, self.prompt, "X_val")
        return check_validation(inputs, y_val, sample_weight_val, training.target)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the callbacks out of a fitted estimator; a worker that is to fit one needs them."""
        state = dict(super().__getstate__())  # a copy, which no other thread's fit changes
        if "adapter_" in state:
            state = {key: value for key, value in state.items() if key not in CALLBACK_ATTRIBUTES}
        return state

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that `X` is text.

        It may be a table, but not of numbers alone, which tables are to scikit-learn's checks.
        """
        tags = super().__sklearn_tags__()
        tags.input_tags.string = True
        tags.input_tags.one_d_array = True
        tags.input_tags.two_d_array = False
        return tags


def _own(value: Any) -> Any:
    """Copy a list, which a user may change; everything else in a `Fitted` is never changed."""
    return list(value) if isinstance(value, list) else value
