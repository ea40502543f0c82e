"""One fit, epoch by epoch: train, score, tell the callbacks, write a checkpoint, stop.

Of torch it asks the number of threads alone. The estimator is only read; its caller sets what comes
of the fit.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.utils import check_random_state

from skqlora._utils.libraries import import_libraries
from skqlora.adapter import AdapterState
from skqlora.settings.recipe import auto_epochs
from skqlora.text.inputs import LabelledTexts
from skqlora.text.weights import apply_class_weight
from skqlora.training.callbacks import FitTasks
from skqlora.training.checkpoints import (
    Checkpoint,
    Checkpoints,
    adapter_tensors,
    check_checkpoint_parameters,
    with_tensors,
)
from skqlora.training.early_stopping import EarlyStopping, hold_out

if TYPE_CHECKING:  # torch and transformers load at first use
    from skqlora.training.distributed import Ranks
    from skqlora.training.setup import Finetuning


def fit_epochs(
    estimator: Any,
    table: LabelledTexts,
    held_out: LabelledTexts | None,
    *,
    goes_on: bool,
    keep: Callable[[dict[str, Any]], None],
) -> None:
    """Train for the estimator's number of epochs, or until a score or a callback says stop.

    Parameters
    ----------
    estimator : QLoRAClassifier
    table : LabelledTexts
    held_out : LabelledTexts or None
        What early stopping scores. None holds a part of `table` out, if it is to stop early.
    goes_on : bool
        Start from the estimator's fitted adapter.
    keep : callable
        Given what makes the estimator a fitted one, once and all at the end.

    Raises
    ------
    FloatingPointError
        If the training diverges; what it was after the last epoch before that is kept.
    """
    import_libraries()
    from skqlora.training.distributed import Ranks
    from skqlora.training.setup import finetuning

    check_checkpoint_parameters(estimator)
    with Ranks.current().one_fit_at_a_time() as ranks:
        seed = ranks.from_first(_choose_seed(estimator, goes_on))
        if estimator.early_stopping and held_out is None:
            table, held_out = hold_out(table, estimator.validation_fraction, seed)
        losses = list(estimator.loss_curve_) if goes_on else []
        stopping = None
        if held_out is not None:
            earlier = estimator.validation_scores_ if goes_on else None
            stopping = EarlyStopping(estimator, held_out, earlier or [math.nan] * len(losses))
        table, weights = apply_class_weight(table, estimator.class_weight)
        weights = weights / weights.mean()  # only their ratios matter
        n_epochs = _choose_n_epochs(estimator, len(table))
        tasks = FitTasks(estimator, n_epochs, table)
        start = estimator.adapter_ if goes_on else None
        data = table, held_out, weights, start
        with (
            finetuning(estimator, table, weights, seed + len(losses), n_epochs, start=start) as run,
            _Saving(estimator, data, run, losses, stopping, ranks) as saving,
        ):
            fitted = partial(_attributes, table, run, losses, seed)
            if stopping is not None:
                # What is wrong with a scorer shows before the training.
                score = ranks.from_first(stopping.score(as_fitted(estimator, fitted())))
                if start is not None:
                    stopping.start_from(score, start)
            attributes = saving.resume(fitted)  # of the last epoch
            for _ in range(run.trainer.n_epochs, n_epochs):
                tasks.begin_epoch()
                try:
                    losses.append(run.trainer.train_epoch(saving))
                    current = fitted()
                except FloatingPointError:
                    keep(attributes)
                    raise
                stop = False
                if stopping is not None:
                    score = ranks.from_first(stopping.score(as_fitted(estimator, current)))
                    run.trainer.show(score=f"{score:.3f}")
                    stop = stopping.update(score, current["adapter_"])
                    current |= stopping.attributes()
                attributes = current
                saving.kept = attributes["adapter_"]
                stop |= tasks.end_epoch(attributes)
                if ranks.from_first(stop):
                    break
            tasks.end(attributes)
            keep(attributes)
            saving.remove()


def fit_piece(estimator: Any, table: LabelledTexts, *, goes_on: bool) -> dict[str, Any]:
    """Train one epoch on one piece of the data, as `fit_epochs` does, and keep the optimizer.

    It goes on from where an earlier piece left it, as the adapter does.
    """
    import_libraries()
    from skqlora.training.distributed import Ranks
    from skqlora.training.setup import finetuning

    with Ranks.current().one_fit_at_a_time() as ranks:
        seed = ranks.from_first(_choose_seed(estimator, goes_on))
        table, weights = apply_class_weight(table, estimator.class_weight, min_classes=1)
        losses = list(estimator.loss_curve_) if goes_on else []
        with finetuning(
            estimator,
            table,
            weights,
            seed + len(losses),
            n_epochs=1,
            start=estimator.adapter_ if goes_on else None,
            resumed=estimator.optimizer_state_ if goes_on else None,
            incremental=True,
        ) as run:
            losses.append(run.trainer.train_epoch())
            attributes = _attributes(table, run, losses, seed)
            n_before = estimator.n_samples_seen_ if goes_on else 0
            return attributes | {
                "n_samples_seen_": n_before + len(table),
                "optimizer_state_": run.trainer.state(),
            }


class _Saving:
    """Writes a checkpoint every so many updates, and goes to the last one; if that is asked for.

    A context manager: within it no other fit writes there.

    Parameters
    ----------
    estimator : QLoRAClassifier
    data : tuple
        What is trained on, scored and gone on from.
    run : Finetuning
    losses : list of float
        Of the epochs that are over; of an earlier fit too.
    stopping : EarlyStopping or None
    ranks : Ranks

    Attributes
    ----------
    kept : AdapterState or None
        What the fit would keep if it ended now; None before the first epoch is over.
    """

    def __init__(
        self,
        estimator: Any,
        data: tuple[Any, ...],
        run: "Finetuning",
        losses: list[float],
        stopping: EarlyStopping | None,
        ranks: "Ranks",
    ):
        import torch

        self._every, self._run, self._ranks = estimator.checkpoint_every, run, ranks
        self.kept: AdapterState | None = None
        self._losses, self._stopping = losses, stopping
        self._checkpoints = None
        if estimator.checkpoint_dir is not None:
            bases = run.trainer.model.backbone.fingerprint, run.tokenizer_fingerprint
            identity = data, list(losses), bases, run.text, ranks.size
            self._checkpoints = Checkpoints(estimator, identity, torch.get_num_threads())

    def __enter__(self) -> "_Saving":
        if self._checkpoints is not None and not self._ranks.call_on_first(self._checkpoints.lock):
            self._checkpoints = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._checkpoints is not None:
            self._checkpoints.unlock()

    def __call__(self) -> None:
        trainer, checkpoints = self._run.trainer, self._checkpoints
        if checkpoints is None or trainer.n_updates % self._every:
            return
        checkpoint = Checkpoint(
            trainer=trainer.snapshot(),
            losses=list(self._losses),
            kept=None if self.kept is None else adapter_tensors(self.kept),
            stopping=None if self._stopping is None else self._stopping.snapshot(),
        )
        self._ranks.call_on_first(lambda: checkpoints.write(checkpoint))

    def resume(self, fitted: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """Go to where an earlier call of this fit was when it wrote the last one, if it did.

        Parameters
        ----------
        fitted : callable
            Returns what makes an adapter a fitted estimator.

        Returns
        -------
        attributes : dict
            What makes the estimator a fitted one after the last epoch; empty before the first.
        """
        if self._checkpoints is None:
            return {}
        checkpoint = self._ranks.call_on_first(self._checkpoints.read)
        if checkpoint is None:
            return {}
        self._run.trainer.restore(checkpoint.trainer)
        self._losses[:] = checkpoint.losses
        if checkpoint.kept is not None:
            self.kept = with_tensors(self._run.template(), checkpoint.kept)
        if self._stopping is not None:
            # Before the first epoch the best is what the fit went on from.
            self._stopping.restore(checkpoint.stopping, self.kept or self._stopping.best)
        if self.kept is None:
            return {}
        attributes = fitted(adapter=self.kept)
        return attributes if self._stopping is None else attributes | self._stopping.attributes()

    def remove(self) -> None:
        """Take the checkpoint away: the fit is over."""
        if self._checkpoints is not None and self._ranks.rank == 0:
            self._checkpoints.remove()


def as_fitted(estimator: Any, attributes: dict[str, Any]) -> Any:
    """Return a copy of the estimator, fitted; what is fitted of the estimator stays as it is."""
    fitted = copy.copy(estimator)
    vars(fitted).update(attributes)
    return fitted


def _attributes(
    table: LabelledTexts,
    run: "Finetuning",
    losses: list[float],
    seed: int,
    adapter: AdapterState | None = None,
) -> dict[str, Any]:
    """Collect what makes the estimator a fitted one, if its fit ended now or with an adapter."""
    if adapter is None:
        adapter = run.capture()
    return {
        "classes_": table.classes,
        "multilabel_": table.multilabel,
        "adapter_": adapter,
        "n_iter_": len(losses),
        "n_samples_seen_": len(table),
        "loss_curve_": list(losses),
        "validation_scores_": None,
        "best_validation_score_": None,
        "optimizer_state_": None,
        "footprint_": run.footprint,
        "_random_seed": seed,
    }


def _choose_n_epochs(estimator: Any, n_texts: int) -> int:
    if estimator.num_train_epochs == "auto":
        return auto_epochs(n_texts, estimator.batch_size * estimator.gradient_accumulation_steps)
    return estimator.num_train_epochs


def _choose_seed(estimator: Any, goes_on: bool) -> int:
    """Draw a seed; a fit that goes on keeps the first one's, so that the same texts stay held out.

    What it trains with is that plus the epochs before: each has another order and dropout.
    """
    if goes_on:
        return estimator._random_seed
    return check_random_state(estimator.random_state).randint(np.iinfo(np.int32).max)
