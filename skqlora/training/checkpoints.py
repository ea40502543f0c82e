"""Checkpoints of a fit: what it takes to go on after a kill as if there had been none.

Knows nothing of how a model is trained.
"""

import hashlib
import importlib.metadata
import json
import math
import os
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import safetensors.numpy

from skqlora._utils.version import __version__
from skqlora.adapter import AdapterState, TrainerState
from skqlora.persistence.folders import written_folder
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

MANIFEST, TENSORS = "checkpoint.json", "checkpoint.safetensors"
PACKAGES = ("torch", "bitsandbytes", "numpy")  # another version may compute otherwise
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
    kept : dict of str to ndarray, or None
        Tensors of the adapter that the fit would keep if it ended now, by `adapter_tensors`.
    stopping : dict or None
        Of `EarlyStopping.state_dict`.
    """

    trainer: TrainerState
    losses: list[float]
    kept: dict[str, np.ndarray] | None
    stopping: dict[str, Any] | None


def adapter_tensors(adapter: AdapterState) -> dict[str, np.ndarray]:
    """Name all tensors of an adapter."""
    named = {f"lora.{name}": tensor for name, tensor in adapter.lora_tensors.items()}
    return named | {f"head.{name}": tensor for name, tensor in adapter.head_tensors.items()}


def with_tensors(adapter: AdapterState, tensors: dict[str, np.ndarray]) -> AdapterState:
    """Put tensors so named in place of an adapter's own."""
    return replace(
        adapter,
        lora_tensors=_under("lora.", tensors),
        head_tensors=_under("head.", tensors),
    )


def check_checkpoint_parameters(params: Mapping[str, Any]) -> None:
    """Refuse what could not be known again or not be written, before a model is loaded.

    Raises
    ------
    ValueError
        If the seed or the scorer would not be the same at the next call.
    OSError
        If the folder cannot be made.
    """
    if params["checkpoint_dir"] is None:
        return
    if not isinstance(params["random_state"], Integral):
        raise ValueError(
            f"Got checkpoint_dir with random_state={params['random_state']!r}. Wanted: an int, so "
            "that the same call of fit is known again and goes on to the same result."
        )
    if callable(params["scoring"]):
        raise ValueError(
            f"Got checkpoint_dir with scoring={params['scoring']!r}. Wanted: the name of a scorer, "
            "since nobody can tell whether a function is the same at the next call."
        )
    os.makedirs(params["checkpoint_dir"], exist_ok=True)


class Checkpoints:
    """The checkpoints of one fit: the last one, in a folder named after what is fitted.

    Folds and candidates of a search have a folder each.

    Parameters
    ----------
    params : mapping of str to object
        The estimator's parameters.
    identity : object
        Everything else that decides what the fit comes to.
    n_threads : int
        That torch computes on. With another number the result is the same up to rounding.
    """

    def __init__(self, params: Mapping[str, Any], identity: Any, n_threads: int):
        from skqlora._utils.processes import lock_of_machine  # loads torch

        relevant = {name: value for name, value in params.items() if name not in IRRELEVANT}
        versions = [__version__, *map(importlib.metadata.version, PACKAGES)]
        self._key = joblib.hash((sorted(relevant.items()), versions, identity))
        self._folder = Path(os.fspath(params["checkpoint_dir"])) / f"fit-{self._key}"
        self._n_threads = n_threads
        # Not in the folder itself, which may be on a network disk that knows no locks.
        self._lock = lock_of_machine(f"fit-{self._key}")

    def lock(self) -> bool:
        """Keep equal fits out until `unlock`, or until this process ends; or warn and return False.

        Two candidates of a search may be equal, or a script started twice on a machine.
        """
        try:
            self._lock.acquire()
        except TimeoutError:
            warnings.warn(
                f"Another fit, of the same data with the same parameters, has its checkpoints in "
                f"{str(self._folder)!r} now (and holds {self._lock.lock_file!r}). This one goes on "
                "without any.",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        except OSError:  # another user's file, or no folder to write to
            pass
        return True

    def unlock(self) -> None:
        """Let another fit have the folder."""
        if self._lock.is_locked:
            with suppress(OSError):  # Windows removes it itself
                os.unlink(self._lock.lock_file)
            self._lock.release()

    def read(self) -> Checkpoint | None:
        """Read the checkpoint, if there is one.

        Raises
        ------
        ValueError
            If it is damaged.
        """
        path = self._folder / MANIFEST
        if not path.exists():
            return None
        text = path.read_bytes()
        with naming_the_file(path, f"a checkpoint; delete {str(self._folder)!r} to begin anew"):
            manifest = json.loads(text)
            if manifest.pop("checksum", None) != checksum(manifest):
                raise ValueError("its checksum is not that of its content")
            n_threads = typed(manifest, "n_threads", int)
            tensors = read_tensors(self._folder / TENSORS, typed(manifest, "sha256", dict))
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
            warnings.warn(
                f"The checkpoint in {str(self._folder)!r} was computed on {n_threads} threads, and "
                f"torch has {self._n_threads} now: the result will be the same up to rounding, not "
                "bit for bit.",
                RuntimeWarning,
                stacklevel=2,
            )
        return checkpoint

    def write(self, checkpoint: Checkpoint) -> None:
        """Put a checkpoint in the place of the one before; where that fails, warn and keep that."""
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
            with written_folder(self._folder, (MANIFEST, TENSORS)) as folder:
                (folder / TENSORS).write_bytes(data)
                (folder / MANIFEST).write_text(text, encoding="utf-8")
        except OSError as error:
            warnings.warn(
                f"A checkpoint could not be written: {error}. The training goes on; what was "
                "written before stays.",
                RuntimeWarning,
                stacklevel=2,
            )

    def remove(self) -> None:
        """Take the checkpoint away, once the fit is over, and what a kill while writing left."""
        for folder in (self._folder, *self._folder.parent.glob(f".{self._folder.name}.*.tmp")):
            shutil.rmtree(folder, ignore_errors=True)


def _under(prefix: str, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
