"""Fitted estimators written to files and read back: JSON and safetensors, in a versioned format.

This module knows nothing of models. Whatever the files hold, reading them runs no code from them.

The version rises when a reader of the previous version would misread the files. A new key that an
older reader may ignore does not raise it. Every version that was ever released stays readable.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from sklearn.utils._param_validation import validate_parameter_constraints

from skqlora.adapter import AdapterState, Fitted, Footprint, OptimizerState
from skqlora.persistence.peft_format import PREFIX, from_peft_name
from skqlora.settings.adapter_settings import TRUNCATIONS, LoraSettings, TextSettings
from skqlora.settings.constraints import PARAMETER_CONSTRAINTS, REGRESSION_LOSSES
from skqlora.settings.settings import SETTLED, Settings
from skqlora.settings.template import check_prompt
from skqlora.text.columns import Columns
from skqlora.text.targets import Classes, Numbers, Target

# 2 has another fingerprint of the base than 1, and weight_scale; 3 has columns; 4 numbers.
FORMAT_VERSION = 4
VERSION_OF_CLASSES = 3  # what is written of a classifier, so that earlier versions read it


@dataclass(frozen=True)
class SavedFiles:
    """The names of the files of a saved estimator.

    Attributes
    ----------
    manifest : str
        The parameters, the classes or numbers, the other fitted attributes, and the SHA-256 of the
        files with tensors.
    adapter, adapter_config : str
        The LoRA adapter of the headless base under PEFT's names, which
        `PeftModel.from_pretrained(AutoModel...)` reads.
    head : str
        The linear layer over the pooled vector.
    optimizer : str
        The optimizer's moments for the next `partial_fit`. Only `partial_fit` leaves this file.
    model_card : str
        The page for people and the Hub.
    """

    manifest: str = "skqlora.json"
    adapter: str = "adapter_model.safetensors"
    adapter_config: str = "adapter_config.json"
    head: str = "head.safetensors"
    optimizer: str = "optimizer.safetensors"
    model_card: str = "README.md"


FILES = SavedFiles()
ALL_FILES = astuple(FILES)
LABEL_KINDS = "OUbiufM"  # str, bool, int, float and dates


def write_fitted(folder: Path, parameters: dict[str, Any], fitted: Fitted, version: str) -> None:
    """Write all files except PEFT's, which must be there already, and the model card.

    Parameters
    ----------
    folder : Path
    parameters : dict
        The parameters of the estimator, by name.
    fitted : Fitted
    version : str
        The version of this package.

    Raises
    ------
    ValueError
        If a parameter or a label cannot be written as JSON.
    """
    adapter, optimizer, settings = fitted.adapter, fitted.optimizer_state, fitted.settings
    target = _target_to_json(fitted.target)
    (folder / FILES.head).write_bytes(safetensors.numpy.save(dict(adapter.head_tensors)))
    if optimizer is not None:
        (folder / FILES.optimizer).write_bytes(safetensors.numpy.save(optimizer_arrays(optimizer)))
    manifest = {
        "format_version": VERSION_OF_CLASSES if "classes" in target else FORMAT_VERSION,
        "skqlora_version": version,
        "parameters": {name: _to_json(value, name) for name, value in parameters.items()},
        "columns": None if fitted.columns is None else asdict(fitted.columns),
        **target,
        "n_iter": fitted.n_iter,
        "n_samples_seen": fitted.n_samples_seen,
        "loss_curve": fitted.loss_curve,
        "validation_scores": scores_to_json(fitted.validation_scores),
        "best_validation_score": fitted.best_validation_score,
        "random_seed": fitted.random_seed,
        "weight_scale": fitted.weight_scale,
        "footprint": asdict(fitted.footprint),
        "settings": None if settings is None else asdict(settings),
        "adapter": {
            "lora": asdict(adapter.lora),
            "pooling": adapter.pooling,
            **asdict(adapter.text_settings),
            "model": adapter.model,
            "revision": adapter.revision,
            "fingerprint": adapter.fingerprint,
            "tokenizer_fingerprint": adapter.tokenizer_fingerprint,
        },
        "optimizer": None if optimizer is None else optimizer_to_json(optimizer),
        "sha256": {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in sorted(folder.glob("*.safetensors"))
        },
    }
    manifest["checksum"] = checksum(manifest)
    text = json.dumps(manifest, indent=1, allow_nan=False)
    (folder / FILES.manifest).write_text(text + "\n", encoding="utf-8")


def read_fitted(folder: Path) -> tuple[dict[str, Any], Fitted]:
    """Read what `write_fitted` wrote.

    Parameters
    ----------
    folder : Path

    Returns
    -------
    params : dict
        The estimator's parameters, by name.
    fitted : Fitted

    Raises
    ------
    ValueError
        If a file is not what was written, or is of a newer format. The message names the file.
    OSError
        If a file is missing or cannot be read.
    """
    path = folder / FILES.manifest
    if not path.exists():
        raise FileNotFoundError(
            f"{str(folder)!r} has no {FILES.manifest}. Wanted: a folder that `save` wrote; an "
            "adapter that PEFT wrote is read by `from_peft`."
        )
    text = path.read_bytes()
    with naming_the_file(path):
        manifest = json.loads(text)
        if typed(manifest, "format_version", int) > FORMAT_VERSION:
            raise ValueError(
                f"its format_version is {manifest['format_version']} and this version of skqlora "
                f"reads up to {FORMAT_VERSION}; upgrade skqlora"
            )
        if manifest.pop("checksum", None) != checksum(manifest):
            raise ValueError("its checksum is not that of its content")
        params = {
            name: _from_json(value) for name, value in typed(manifest, "parameters", dict).items()
        }
        fitted_with = partial(
            Fitted,
            columns=_columns_from_json(manifest),
            target=_target_from_json(manifest),
            n_iter=typed(manifest, "n_iter", int),
            n_samples_seen=typed(manifest, "n_samples_seen", int),
            loss_curve=[float(loss) for loss in typed(manifest, "loss_curve", list)],
            validation_scores=scores_from_json(manifest["validation_scores"]),
            best_validation_score=typed(manifest, "best_validation_score", (float, type(None))),
            footprint=Footprint(**typed(manifest, "footprint", dict)),
            settings=_settings_from_json(manifest.get("settings")),
            random_seed=typed(manifest, "random_seed", int),
            weight_scale=_weight_scale_from_json(manifest),
        )
        of_adapter = typed(manifest, "adapter", dict)
        lora = _lora_from_json(typed(of_adapter, "lora", dict))
        adapter_with = partial(
            AdapterState,
            lora=lora,
            pooling=typed(of_adapter, "pooling", str),
            text_settings=_text_from_json(of_adapter),
            model=typed(of_adapter, "model", str),
            revision=typed(of_adapter, "revision", (str, type(None))),
            fingerprint=typed(of_adapter, "fingerprint", str),
            tokenizer_fingerprint=typed(of_adapter, "tokenizer_fingerprint", str),
        )
        hashes = typed(manifest, "sha256", dict)
        needed = [FILES.adapter, FILES.head]
        if manifest["optimizer"] is not None:
            needed.append(FILES.optimizer)
    tensors = {name: read_tensors(folder / name, hashes) for name in needed}
    with naming_the_file(folder / FILES.adapter):
        named = tensors[FILES.adapter]
        lora_tensors = {from_peft_name(name.removeprefix(PREFIX)): named[name] for name in named}
        check_lora(lora_tensors, lora)
    with naming_the_file(folder / FILES.head):
        head_tensors = tensors[FILES.head]
        check_head(head_tensors, fitted_with.keywords["target"].n_outputs)
    optimizer = None
    if FILES.optimizer in tensors:
        with naming_the_file(folder / FILES.optimizer):
            optimizer = optimizer_from_json(manifest["optimizer"], tensors[FILES.optimizer])
    adapter = adapter_with(lora_tensors=lora_tensors, head_tensors=head_tensors)
    fitted = fitted_with(adapter=adapter, optimizer_state=optimizer)
    return params, fitted


def checksum(manifest: dict[str, Any]) -> str:
    """Compute the SHA-256 of a manifest without its checksum, however it is laid out."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


@contextmanager
def naming_the_file(
    path: str | os.PathLike,
    wanted: str = "the folder as `save` wrote it. Copy or save it again",
) -> Iterator[None]:
    """Turn any error about the content of a file into a ValueError that names the file."""
    try:
        yield
    except Exception as error:  # parsers raise a dozen types: KeyError, RecursionError ...
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(
            f"{os.fspath(path)!r} is not what it should be: {reason}. Wanted: {wanted}."
        ) from error


def read_tensors(path: Path, hashes: dict[str, str]) -> dict[str, np.ndarray]:
    """Read a safetensors file, and check its SHA-256 against that of its name in `hashes`."""
    data = path.read_bytes()
    with naming_the_file(path):
        if hashes.get(path.name) != hashlib.sha256(data).hexdigest():
            raise ValueError("its SHA-256 is not the one that was noted when it was written")
        return safetensors.numpy.load(data)


def check_lora(tensors: dict[str, np.ndarray], lora: LoraSettings) -> None:
    """Refuse tensors that no adapter with the rank of `lora` has."""
    kinds: dict[str, set[str]] = {}
    for name, tensor in tensors.items():
        _check_numbers(name, tensor)
        module, _, kind = name.rpartition(".lora_")
        kinds.setdefault(module, set()).add(kind.partition(".")[0])
        axis = {"A": 0, "B": 1, "embedding_A": 0, "embedding_B": 1}.get(kind.partition(".")[0])
        if axis is not None and (tensor.ndim != 2 or tensor.shape[axis] != lora.r):
            raise ValueError(f"{name!r} has the shape {tensor.shape}, but the rank is {lora.r}")
    magnitude = {"magnitude_vector"} if lora.use_dora else set()
    wanted = [{"A", "B"} | magnitude, {"embedding_A", "embedding_B"} | magnitude]
    incomplete = [module for module, found in kinds.items() if found not in wanted]
    if incomplete or not kinds:
        raise ValueError(f"it does not hold A and B of {incomplete or 'any layer'}")


def check_head(tensors: dict[str, np.ndarray], n_outputs: int) -> None:
    """Refuse tensors that no linear head of `n_outputs` outputs has."""
    if not {"weight"} <= tensors.keys() <= {"weight", "bias"}:
        raise ValueError(f"it holds {sorted(tensors)} instead of a weight and a bias")
    for name, tensor in tensors.items():
        _check_numbers(name, tensor)
        if tensor.ndim != (2 if name == "weight" else 1) or len(tensor) != n_outputs:
            raise ValueError(f"{name!r} has the shape {tensor.shape} for {n_outputs} outputs")


def _check_numbers(name: str, tensor: np.ndarray) -> None:
    if tensor.dtype != np.float32:
        raise ValueError(f"{name!r} is of {tensor.dtype} instead of float32")
    if not np.isfinite(tensor).all():
        raise ValueError(f"{name!r} holds values that are not finite")


def typed(mapping: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """Look up a value and check its exact type, since a bool is an int to `isinstance`."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(mapping, dict) or key not in mapping or type(mapping[key]) not in kinds:
        raise ValueError(f"it has no {key!r} of type {kinds[0].__name__}")
    return mapping[key]


def _to_json(value: Any, name: str) -> Any:
    """Turn a parameter into JSON, and a dict into its items, since JSON has only str as keys."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [_to_json(entry, name) for entry in value]
    if isinstance(value, Mapping):
        return {"items": [[_to_json(k, name), _to_json(v, name)] for k, v in value.items()]}
    raise ValueError(
        f"Got {name}={value!r}, which cannot be written without pickle. Wanted: text, numbers, "
        f"lists and dicts. Call set_params({name}=None) before, or use joblib.dump."
    )


def _from_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {_from_json(key): _from_json(entry) for key, entry in value["items"]}
    return [_from_json(entry) for entry in value] if isinstance(value, list) else value


def _target_to_json(target: Target) -> dict[str, Any]:
    """Return what is predicted, in entries of the manifest."""
    if isinstance(target, Classes):
        return {"classes": _classes_to_json(target.values), "multilabel": target.multilabel}
    numbers = {"mean": target.mean.tolist(), "scale": target.scale.tolist()}
    kind = {"one_dimensional": target.one_dimensional, "loss": target.loss}
    return {"numbers": numbers | kind}


def _target_from_json(manifest: dict[str, Any]) -> Target:
    if "numbers" not in manifest:
        classes = _classes_from_json(typed(manifest, "classes", dict))
        return Classes(classes, typed(manifest, "multilabel", bool))
    numbers = typed(manifest, "numbers", dict)
    lists = [typed(numbers, name, list) for name in ("mean", "scale")]
    if not all(type(value) in (int, float) for values in lists for value in values):
        raise ValueError("the numbers are not those of a fit")
    mean, scale = (np.array(values, np.float64) for values in lists)
    target = Numbers(
        mean, scale, typed(numbers, "one_dimensional", bool), typed(numbers, "loss", str)
    )
    right = mean.ndim == 1 and mean.shape == scale.shape and len(mean) > 0 and (scale >= 0).all()
    right = right and (len(mean) == 1 or not target.one_dimensional)
    if not right or not np.isfinite([mean, scale]).all() or target.loss not in REGRESSION_LOSSES:
        raise ValueError("the numbers are not those of a fit")
    return target


def _classes_to_json(classes: np.ndarray) -> dict[str, Any]:
    if classes.dtype.kind not in LABEL_KINDS:
        raise ValueError(
            f"Got labels of dtype {classes.dtype}, which cannot be written without pickle. Wanted: "
            "str, int, bool or dates, or use joblib.dump."
        )
    values = classes.astype(np.int64) if classes.dtype.kind == "M" else classes
    return {"dtype": classes.dtype.str, "values": values.tolist()}


def _classes_from_json(classes: dict[str, Any]) -> np.ndarray:
    dtype = np.dtype(typed(classes, "dtype", str))
    if dtype.kind not in LABEL_KINDS:
        raise ValueError(f"the labels are of {dtype}")
    values = typed(classes, "values", list)
    labels = np.array(values, dtype=np.int64 if dtype.kind == "M" else dtype).astype(dtype)
    if labels.ndim != 1 or len(labels) < 2 or labels.tolist() != np.unique(labels).tolist():
        raise ValueError("the classes are not sorted labels, each once")
    if dtype.kind == "O" and not all(isinstance(label, str) for label in values):
        raise ValueError("the labels are not all text")
    return labels


def scores_to_json(scores: list[float] | None) -> list[float | None] | None:
    """Turn NaN, which JSON lacks, into None."""
    return None if scores is None else [None if math.isnan(score) else score for score in scores]


def scores_from_json(scores: list[float | None] | None) -> list[float] | None:
    """Turn None back into NaN."""
    return None if scores is None else [math.nan if s is None else float(s) for s in scores]


def _weight_scale_from_json(manifest: dict[str, Any]) -> float | None:
    """Read the weight that counts as one; earlier versions trained with weights as they came."""
    scale = typed({"weight_scale": 1.0} | manifest, "weight_scale", (float, type(None)))
    if scale is not None and not 0 < scale < math.inf:
        raise ValueError(f"weight_scale is {scale!r}")
    return scale


def _columns_from_json(manifest: dict[str, Any]) -> Columns | None:
    """Read what is known of the columns; before version 3 only texts were taken."""
    saved = typed({"columns": None} | manifest, "columns", (dict, type(None)))
    if saved is None and (manifest["format_version"] < 3 or "columns" in manifest):
        return None
    names, number = typed(saved, "names", (list, type(None))), saved["number"]
    if names is not None and not all(isinstance(name, str) for name in names):
        raise ValueError(f"the names of the columns are {names}")
    known = type(number) is int and number > 0 and number == len(set(names or range(number)))
    if not known and (number, names) != (None, None):
        raise ValueError(f"the number of columns is {number!r}")
    return Columns(None if names is None else tuple(names), number)


def _settings_from_json(saved: Any) -> Settings | None:
    """Read the settings of a fit; None if they are not those of this version, or not there."""
    names = {field.name for field in fields(Settings)}
    if not isinstance(saved, dict) or not names <= saved.keys():
        return None
    values: dict[str, Any] = {
        name: tuple(saved[name]) if isinstance(saved[name], list) else saved[name] for name in names
    }
    constraints = {
        name: allowed for name, allowed in PARAMETER_CONSTRAINTS.items() if name in names
    }
    asked = {name: value for name, value in values.items() if name in constraints}
    validate_parameter_constraints(constraints, asked, "Settings")
    settings = Settings(**values)
    hash(settings)  # raises where a list is within a list
    numbers = [value for value in values.values() if isinstance(value, float)]
    still_open = [name for name in SETTLED if values[name] == "auto"]
    if (
        still_open
        or not all(map(math.isfinite, numbers))
        or set(settings.chosen) - {*SETTLED, "prompt"}
    ):
        raise ValueError("its settings are not those of a fit")
    return settings


def _lora_from_json(lora: dict[str, Any]) -> LoraSettings:
    settings = LoraSettings(**lora)
    if type(settings.r) is not int or settings.r < 1:
        raise ValueError(f"the rank is {settings.r!r}")
    if type(settings.lora_alpha) not in (int, float) or not 0 < settings.lora_alpha < math.inf:
        raise ValueError(f"lora_alpha is {settings.lora_alpha!r}")
    targets = settings.target_modules
    return replace(settings, target_modules=targets if isinstance(targets, str) else tuple(targets))


def _text_from_json(of_adapter: dict[str, Any]) -> TextSettings:
    known = [name for name in TextSettings.__dataclass_fields__ if name in of_adapter]
    settings = TextSettings(
        **{"parse_special_tokens": True} | {name: of_adapter[name] for name in known}
    )
    if type(settings.parse_special_tokens) is not bool:
        raise ValueError(f"parse_special_tokens is {settings.parse_special_tokens!r}")
    if type(settings.max_length) is not int or settings.max_length < 1:
        raise ValueError(f"max_length is {settings.max_length!r}")
    if type(settings.stride) is not int or settings.stride < 0:
        raise ValueError(f"stride is {settings.stride!r}")
    if settings.truncation not in TRUNCATIONS:
        raise ValueError(f"truncation is {settings.truncation!r}")
    if type(settings.token_type_ids) is not bool:
        raise ValueError(f"token_type_ids is {settings.token_type_ids!r}")
    if type(settings.prompt) not in (str, type(None)):
        raise ValueError(f"prompt is {settings.prompt!r}")
    check_prompt(settings.prompt)
    return settings


def optimizer_arrays(optimizer: OptimizerState) -> dict[str, np.ndarray]:
    """Return the arrays of an optimizer's state, named by the number of their tensor."""
    return {
        f"{number}.{name}": value
        for number, state in enumerate(optimizer.states)
        for name, value in state.items()
        if isinstance(value, np.ndarray)
    }


def optimizer_to_json(optimizer: OptimizerState) -> dict[str, Any]:
    """Return the part of an optimizer's state that is not arrays, as JSON."""
    scalars = [
        {name: value for name, value in state.items() if not isinstance(value, np.ndarray)}
        for state in optimizer.states
    ]
    return {
        "optim": optimizer.optim,
        "n_updates": optimizer.n_updates,
        "schedule_step": optimizer.schedule_step,
        "scalars": scalars,
    }


def optimizer_from_json(
    optimizer: dict[str, Any], moments: dict[str, np.ndarray]
) -> OptimizerState:
    """Put an optimizer's state together again from its JSON and its arrays."""
    states: list[dict[str, Any]] = [dict(scalars) for scalars in optimizer["scalars"]]
    for key, value in moments.items():
        number, _, name = key.partition(".")
        states[int(number)][name] = value
    return OptimizerState(
        optim=typed(optimizer, "optim", str),
        n_updates=typed(optimizer, "n_updates", int),
        schedule_step=typed(optimizer, "schedule_step", int),
        states=states,
    )
