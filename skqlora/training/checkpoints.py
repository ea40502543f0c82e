"""Checkpoints, from which a fit resumes after a kill as if there had been none.

This module knows nothing of how a model is trained.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import safetensors.numpy

from skqlora._utils.messages import warn
from skqlora._utils.version import __version__
from skqlora.adapter import AdapterState, TrainerState
from skqlora.persistence.folders import find_temporary, read_folder, written_folder
from skqlora.persistence.saved_format import (
    checksum,
    naming_the_file,
    optimizer_arrays,
    optimizer_from_json,
    optimizer_to_json,
    read_tensors,
    scores_from_json,
    scores_to_json,
    typed,
)
from skqlora.training.estimator import FitEstimator

MANIFEST, TENSORS = "checkpoint.json", "checkpoint.safetensors"
PACKAGES = ("torch", "bitsandbytes", "numpy")  # another version may compute other values
# The parameters that do not change what is trained.
IRRELEVANT = {"verbose", "checkpoint_dir", "checkpoint_every"}


@dataclass(frozen=True)
class Checkpoint:
    """The state of a fit between two updates.

    Attributes
    ----------
    trainer : TrainerState
    losses : list of float
        The training losses of the epochs that are over.
    kept : dict of str to ndarray, or None
        The tensors of the adapter that the fit would keep if it ended now, as `adapter_tensors`
        names them. None before the first epoch is over.
    stopping : dict or None
        The state that `EarlyStopping.state_dict` returned. None without early stopping.
    """

    trainer: TrainerState
    losses: list[float]
    kept: dict[str, np.ndarray] | None
    stopping: dict[str, Any] | None


def adapter_tensors(adapter: AdapterState) -> dict[str, np.ndarray]:
    """Return all tensors of an adapter in one dict, named after LoRA or the head."""
    named = {f"lora.{name}": tensor for name, tensor in adapter.lora_tensors.items()}
    return named | {f"head.{name}": tensor for name, tensor in adapter.head_tensors.items()}


def with_tensors(adapter: AdapterState, tensors: dict[str, np.ndarray]) -> AdapterState:
    """Replace the tensors of an adapter by those of a dict as `adapter_tensors` returns it."""
    return replace(
        adapter,
        lora_tensors=_under("lora.", tensors),
        head_tensors=_under("head.", tensors),
    )


def check_checkpoint_parameters(estimator: FitEstimator) -> None:
    """Refuse parameters that rule checkpoints out, before a model is loaded.

    Raises
    ------
    ValueError
        If the seed or the scorer may be another one at the next call, so that the fit could not be
        recognized.
    OSError
        If the folder cannot be created.
    """
    if estimator.checkpoint_dir is None:
        return
    if not isinstance(estimator.random_state, Integral):
        raise ValueError(
            f"Got checkpoint_dir with random_state={estimator.random_state!r}. Wanted: an int, so "
            "that the same call of fit is recognized and continues to the same result."
        )
    if callable(estimator.scoring):
        raise ValueError(
            f"Got checkpoint_dir with scoring={estimator.scoring!r}. Wanted: the name of a scorer, "
            "since it is unknown whether a function will be the same at the next call."
        )
    os.makedirs(estimator.checkpoint_dir, exist_ok=True)


class Checkpoints:
    """The last checkpoint of one fit, in a folder that is named after a hash of what is fitted.

    So each fold and each candidate of a search has a folder of its own.

    Parameters
    ----------
    directory : str or path
        The folder for the folders of all fits.
    estimator : QLoRAClassifier
        The estimator, whose parameters are part of what the folder is named after.
    identity : object
        Everything else that decides the result of the fit.
    n_threads : int
        The number of threads that torch computes on. With another number the result is the same up
        to rounding.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        estimator: FitEstimator,
        identity: Any,
        n_threads: int,
    ):
        from skqlora._utils.processes import lock_of_machine  # this loads torch

        params = estimator.get_params(deep=False)
        relevant = {name: value for name, value in params.items() if name not in IRRELEVANT}
        versions = [__version__, *map(importlib.metadata.version, PACKAGES)]
        self._key = joblib.hash((sorted(relevant.items()), versions, identity))
        self._folder = Path(directory) / f"fit-{self._key}"
        self._n_threads = n_threads
        # The lock is not in the folder itself, which may be on a network disk without locks.
        self._lock = lock_of_machine(f"fit-{self._key}")

    def lock(self) -> bool:
        """Keep equal fits out until `unlock` is called or this process ends.

        Two candidates of a search may be equal, or a script may be started twice on a machine.

        Returns
        -------
        usable : bool
            Whether this fit may use the folder. If an equal fit is using it, a warning is issued.
        """
        try:
            self._lock.acquire()
        except TimeoutError:
            warn(
                f"Another fit, of the same data with the same parameters, has its checkpoints in "
                f"{str(self._folder)!r} now (and holds {self._lock.lock_file!r}). This one "
                "continues without any.",
                RuntimeWarning,
            )
            return False
        except OSError:  # the file is another user's, or cannot be written
            pass
        return True

    def unlock(self) -> None:
        """Let another fit use the folder."""
        if self._lock.is_locked:
            with suppress(OSError):  # on Windows it is the release that removes the file
                os.unlink(self._lock.lock_file)
            self._lock.release()

    def read(self) -> Checkpoint | None:
        """Read the checkpoint, or return None if there is none.

        Raises
        ------
        ValueError
            If the checkpoint is damaged.
        """
        try:
            return read_folder(self._folder, self._read)
        except _NoCheckpointError:
            return None

    def _read(self, folder: Path) -> Checkpoint:
        path = folder / MANIFEST
        if not path.exists():
            raise _NoCheckpointError
        text = path.read_bytes()
        with naming_the_file(path, f"a checkpoint; delete {str(self._folder)!r} to begin anew"):
            manifest = json.loads(text)
            if manifest.pop("checksum", None) != checksum(manifest):
                raise ValueError("its checksum is not that of its content")
            n_threads = typed(manifest, "n_threads", int)
            tensors = read_tensors(folder / TENSORS, typed(manifest, "sha256", dict))
            order = typed(manifest, "order", dict)
            order["state"]["key"] = tensors.pop("order")
            stopping = manifest["stopping"]
            if stopping is not None:
                best_score = stopping["best_score"]
                stopping |= {
                    "best_score": -math.inf if best_score is None else best_score,
                    "scores": scores_from_json(stopping["scores"]),
                }
            checkpoint = Checkpoint(
                trainer=TrainerState(
                    values=[tensors[f"values.{i}"] for i in range(manifest["n_buffers"])],
                    optimizer=optimizer_from_json(
                        manifest["optimizer"], _under("optimizer.", tensors)
                    ),
                    n_epochs=typed(manifest, "n_epochs", int),
                    micro_tokens=typed(manifest, "micro_tokens", int),
                    epoch_losses=tensors["epoch_losses"],
                    order=order,
                    scaler=typed(manifest, "scaler", dict),
                ),
                losses=typed(manifest, "losses", list),
                kept=_under("kept.", tensors) or None,
                stopping=stopping,
            )
        if n_threads != self._n_threads:
            warn(
                f"The checkpoint in {str(self._folder)!r} was computed on {n_threads} threads, and "
                f"torch has {self._n_threads} now: the result will be the same up to rounding, not "
                "bit for bit.",
                RuntimeWarning,
            )
        return checkpoint

    def write(self, checkpoint: Checkpoint) -> None:
        """Replace the previous checkpoint, or warn and keep it if that fails."""
        trainer, stopping = checkpoint.trainer, checkpoint.stopping
        state = dict(trainer.order["state"])
        kept = checkpoint.kept or {}
        tensors = {
            "order": state.pop("key"),
            "epoch_losses": trainer.epoch_losses,
            **{f"values.{i}": values for i, values in enumerate(trainer.values)},
            **{f"optimizer.{k}": v for k, v in optimizer_arrays(trainer.optimizer).items()},
            **{f"kept.{k}": v for k, v in kept.items()},
        }
        if stopping is not None:
            best_score = stopping["best_score"]
            stopping = stopping | {
                "best_score": best_score if math.isfinite(best_score) else None,
                "scores": scores_to_json(stopping["scores"]),
            }
        data = safetensors.numpy.save({k: np.asarray(v, order="C") for k, v in tensors.items()})
        manifest = {
            "n_threads": self._n_threads,
            "n_buffers": len(trainer.values),
            "n_epochs": trainer.n_epochs,
            "micro_tokens": trainer.micro_tokens,
            "losses": checkpoint.losses,
            "optimizer": optimizer_to_json(trainer.optimizer),
            "order": trainer.order | {"state": state},
            "scaler": trainer.scaler,
            "stopping": stopping,
            "sha256": {TENSORS: hashlib.sha256(data).hexdigest()},
        }
        text = json.dumps(manifest | {"checksum": checksum(manifest)}, allow_nan=False)
        try:
            with written_folder(self._folder, (MANIFEST, TENSORS), overwrite=True) as folder:
                (folder / TENSORS).write_bytes(data)
                (folder / MANIFEST).write_text(text, encoding="utf-8")
        except OSError as error:
            warn(
                f"A checkpoint could not be written: {error}. The training continues, and what "
                "was written before stays.",
                RuntimeWarning,
            )

    def remove(self) -> None:
        """Delete the checkpoint once the fit is over, and what a kill during a write has left."""
        for folder in (self._folder, *find_temporary(self._folder)):
            shutil.rmtree(folder, ignore_errors=True)


class _NoCheckpointError(Exception):
    """There is no checkpoint in a folder."""


def _under(prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
