"""Checkpoints of a fit: what it takes to go on after a kill as if there had been none.

Knows nothing of how a model is trained.
"""

import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import safetensors.numpy

from skqlora.adapter import AdapterState, TrainerState
from skqlora.folders import written_folder
from skqlora.saved_format import (
    naming_the_file,
    optimizer_arrays,
    optimizer_from_json,
    optimizer_to_json,
    read_tensors,
    scores_from_json,
    scores_to_json,
    typed,
)

MANIFEST, TENSORS = "checkpoint.json", "checkpoint.safetensors"
# What changes nothing of what is trained.
IRRELEVANT = {"verbose", "checkpoint_dir", "checkpoint_every"}


@dataclass(frozen=True)
class Checkpoint:
    """Where a fit stands between two updates.

    Attributes
    ----------
    trainer : TrainerState
    losses : list of float
        Of the epochs that are over.
    stopping : dict or None
        Of `EarlyStopping.snapshot`.
    """

    trainer: TrainerState
    losses: list[float]
    stopping: dict[str, Any] | None


def check_checkpoint_parameters(estimator: Any) -> None:
    """Refuse a fit that could not be known again, by ValueError."""
    if estimator.checkpoint_dir is not None and not isinstance(estimator.random_state, Integral):
        raise ValueError(
            f"Got checkpoint_dir with random_state={estimator.random_state!r}. Wanted: an int, so "
            "that the same call of fit is known again and goes on to the same result."
        )


class Checkpoints:
    """The checkpoints of one fit: the last one, in a folder named after what is fitted.

    Folds and candidates of a search have a folder each.

    Parameters
    ----------
    estimator : QLoRAClassifier
        Its parameters are read.
    identity : object
        Everything else that decides what the fit comes to.
    n_threads : int
        That torch computes on. With another number the result is the same up to rounding.
    """

    def __init__(self, estimator: Any, identity: Any, n_threads: int):
        params = estimator.get_params(deep=False)
        scoring = params.pop("scoring")
        named = getattr(scoring, "__qualname__", repr(scoring))  # a function has no stable repr
        relevant = {name: value for name, value in params.items() if name not in IRRELEVANT}
        self._key = joblib.hash((sorted(relevant.items()), named, identity))
        self._folder = Path(os.fspath(estimator.checkpoint_dir)) / f"fit-{self._key}"
        self._n_threads = n_threads

    def read(self, template: Callable[[], AdapterState]) -> Checkpoint | None:
        """Read the checkpoint, if there is one.

        Parameters
        ----------
        template : callable
            Returns an adapter of this fit, for what all its adapters share.

        Raises
        ------
        ValueError
            If it is damaged.
        """
        path = self._folder / MANIFEST
        if not path.exists():
            return None
        text = path.read_bytes()
        with naming_the_file(path):
            manifest = json.loads(text)
            if typed(manifest, "n_threads", int) != self._n_threads:
                warnings.warn(
                    f"The checkpoint in {str(self._folder)!r} was computed on "
                    f"{manifest['n_threads']} threads, and torch has {self._n_threads} now: the "
                    "result will be the same up to rounding, not bit for bit.",
                    RuntimeWarning,
                    stacklevel=2,
                )
            tensors = read_tensors(self._folder / TENSORS, typed(manifest, "sha256", dict))
            order = typed(manifest, "order", dict)
            order["state"]["key"] = tensors.pop("order")
            return Checkpoint(
                trainer=TrainerState(
                    values=[tensors[f"values.{i}"] for i in range(manifest["n_buffers"])],
                    optimizer=optimizer_from_json(
                        manifest["optimizer"], _under("optimizer.", tensors)
                    ),
                    n_epochs=typed(manifest, "n_epochs", int),
                    epoch_losses=tensors["epoch_losses"],
                    order=order,
                    scaler=typed(manifest, "scaler", dict),
                ),
                losses=typed(manifest, "losses", list),
                stopping=_stopping_from_json(manifest["stopping"], tensors, template),
            )

    def write(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint in the place of the one before."""
        trainer = checkpoint.trainer
        order = dict(trainer.order)
        state = dict(order["state"])
        tensors = {
            "order": state.pop("key"),
            "epoch_losses": trainer.epoch_losses,
            **{f"values.{i}": values for i, values in enumerate(trainer.values)},
            **{f"optimizer.{k}": v for k, v in optimizer_arrays(trainer.optimizer).items()},
        }
        stopping = None
        if checkpoint.stopping is not None:
            stopping = dict(checkpoint.stopping)
            best = stopping.pop("best")
            stopping["scores"] = scores_to_json(stopping["scores"])
            if best is None:
                stopping["best_score"] = None  # minus infinity, which JSON lacks
            else:
                tensors |= {f"best.lora.{k}": v for k, v in best.lora_tensors.items()}
                tensors |= {f"best.head.{k}": v for k, v in best.head_tensors.items()}
        data = safetensors.numpy.save({k: np.asarray(v, order="C") for k, v in tensors.items()})
        manifest = {
            "n_threads": self._n_threads,
            "n_buffers": len(trainer.values),
            "n_epochs": trainer.n_epochs,
            "losses": checkpoint.losses,
            "optimizer": optimizer_to_json(trainer.optimizer),
            "order": order | {"state": state},
            "scaler": trainer.scaler,
            "stopping": stopping,
            "sha256": {TENSORS: hashlib.sha256(data).hexdigest()},
        }
        with written_folder(self._folder, (MANIFEST, TENSORS)) as folder:
            (folder / TENSORS).write_bytes(data)
            text = json.dumps(manifest, allow_nan=False)
            (folder / MANIFEST).write_text(text, encoding="utf-8")

    def remove(self) -> None:
        """Take the checkpoint away, once the fit is over."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _stopping_from_json(
    stopping: dict[str, Any] | None,
    tensors: dict[str, np.ndarray],
    template: Callable[[], AdapterState],
) -> dict[str, Any] | None:
    if stopping is None:
        return None
    best = None
    if stopping["best_score"] is None:
        stopping["best_score"] = -math.inf
    else:
        best = replace(
            template(),
            lora_tensors=_under("best.lora.", tensors),
            head_tensors=_under("best.head.", tensors),
        )
    return stopping | {"best": best, "scores": scores_from_json(stopping["scores"])}


def _under(prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
