"""One fit, epoch by epoch: train, score, tell the callbacks, stop; what comes of it is returned.

Knows nothing of torch; the estimator is only read.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.utils import check_random_state

from skqlora.adapter import AdapterState
from skqlora.callbacks import FitTasks
from skqlora.checkpoints import Checkpoint, Checkpoints, check_checkpoint_parameters
from skqlora.early_stopping import EarlyStopping, hold_out
from skqlora.inputs import LabelledTexts
from skqlora.quiet import import_libraries
from skqlora.weights import apply_class_weight

if TYPE_CHECKING:  # torch and transformers load at first use
    from skqlora.distributed import Ranks
    from skqlora.finetuning import Finetuning


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
    from skqlora.distributed import Ranks
    from skqlora.finetuning import finetuning

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
        tasks = FitTasks(estimator, estimator.num_train_epochs, table)
        start = estimator.adapter_ if goes_on else None
        with finetuning(estimator, table, weights, seed + len(losses), start=start) as run:
            fitted = partial(_attributes, table, run, losses, seed)
            if stopping is not None:
                # What is wrong with a scorer shows before the training.
                score = ranks.from_first(stopping.score(as_fitted(estimator, fitted())))
                if start is not None:
                    stopping.start_from(score, start)
            attributes: dict[str, Any] = {}  # of the last epoch
            saving = None
            if estimator.checkpoint_dir is not None:
                saving = _Saving(
                    estimator, (table, held_out, weights, start), run, losses, stopping
                )
                saving.resume(ranks)
            for _ in range(run.trainer.n_epochs, estimator.num_train_epochs):
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
                stop |= tasks.end_epoch(attributes)
                if ranks.from_first(stop):
                    break
        tasks.end(attributes)
        keep(attributes)
        if saving is not None and ranks.rank == 0:
            saving.checkpoints.remove()


def fit_piece(estimator: Any, table: LabelledTexts, *, goes_on: bool) -> dict[str, Any]:
    """Train one epoch on one piece of the data, as `fit_epochs` does, and keep the optimizer.

    It goes on from where an earlier piece left it, as the adapter does.
    """
    import_libraries()
    from skqlora.distributed import Ranks
    from skqlora.finetuning import finetuning

    with Ranks.current().one_fit_at_a_time() as ranks:
        seed = ranks.from_first(_choose_seed(estimator, goes_on))
        table, weights = apply_class_weight(table, estimator.class_weight, min_classes=1)
        losses = list(estimator.loss_curve_) if goes_on else []
        with finetuning(
            estimator,
            table,
            weights,
            seed + len(losses),
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
    """Writes a checkpoint every so many updates, and goes to the last one.

    Parameters
    ----------
    estimator : QLoRAClassifier
    data : tuple
        What is trained on, scored and gone on from.
    run : Finetuning
    losses : list of float
        Of the epochs that are over; of an earlier fit too.
    stopping : EarlyStopping or None
    """

    def __init__(
        self,
        estimator: Any,
        data: tuple[Any, ...],
        run: "Finetuning",
        losses: list[float],
        stopping: EarlyStopping | None,
    ):
        import torch

        self._every, self._run = estimator.checkpoint_every, run
        self._losses, self._stopping = losses, stopping
        fingerprint = run.trainer.model.backbone.fingerprint
        identity = (data, list(losses), fingerprint, run.tokenizer_fingerprint, run.max_length)
        self.checkpoints = Checkpoints(estimator, identity, torch.get_num_threads())

    def __call__(self) -> None:
        trainer = self._run.trainer
        if trainer.n_updates % self._every == 0:
            stopping = None if self._stopping is None else self._stopping.snapshot()
            checkpoint = Checkpoint(trainer.snapshot(), list(self._losses), stopping)
            if trainer.ranks.rank == 0:
                self.checkpoints.write(checkpoint)

    def resume(self, ranks: "Ranks") -> None:
        """Go to where an earlier call of this fit was when it wrote the last one, if it did."""
        checkpoint = ranks.from_first(
            self.checkpoints.read(self._run.capture) if ranks.rank == 0 else None
        )
        if checkpoint is not None:
            self._run.trainer.restore(checkpoint.trainer)
            self._losses[:] = checkpoint.losses
            if self._stopping is not None:
                self._stopping.restore(checkpoint.stopping)


def as_fitted(estimator: Any, attributes: dict[str, Any]) -> Any:
    """Return a copy of the estimator, fitted; what is fitted of the estimator stays as it is."""
    fitted = copy.copy(estimator)
    vars(fitted).update(attributes)
    return fitted


def _attributes(
    table: LabelledTexts, run: "Finetuning", losses: list[float], seed: int
) -> dict[str, Any]:
    """Collect what makes the estimator a fitted one, if its fit ended now."""
    adapter: AdapterState = run.capture()
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


def _choose_seed(estimator: Any, goes_on: bool) -> int:
    """Draw a seed; a fit that goes on keeps the first one's, so that the same texts stay held out.

    What it trains with is that plus the epochs before: each has another order and dropout.
    """
    if goes_on:
        return estimator._random_seed
    return check_random_state(estimator.random_state).randint(np.iinfo(np.int32).max)
