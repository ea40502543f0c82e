"""One fit, epoch by epoch: train, score, tell the callbacks, write a checkpoint, stop.

This module loads torch when a fit begins, not when it is imported. It only reads the estimator,
which sets its own fitted attributes.
"""

import copy
import math
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from sklearn.utils import check_random_state

from skqlora._utils.libraries import import_libraries
from skqlora._utils.torch_state import plain_torch
from skqlora.adapter import AdapterState, Fitted
from skqlora.settings.parameters import read_parameters
from skqlora.settings.settings import resolve_epochs
from skqlora.text.inputs import LabelledTexts
from skqlora.text.weights import check_scale, mean_weight, weigh
from skqlora.training.callbacks import FitTasks
from skqlora.training.checkpoints import (
    Checkpoint,
    Checkpoints,
    adapter_tensors,
    check_checkpoint_parameters,
    with_tensors,
)
from skqlora.training.early_stopping import EarlyStopping, hold_out
from skqlora.training.estimator import FitEstimator

if TYPE_CHECKING:  # torch and transformers load at first use
    from skqlora.training.distributed import Ranks
    from skqlora.training.setup import TrainingRun


class DivergenceError(FloatingPointError):
    """The loss of a training is no longer finite, after epochs in which it was.

    Attributes
    ----------
    fitted : Fitted
        The fit as it was at the end of the last epoch before.
    """

    def __init__(self, message: str, fitted: Fitted):
        super().__init__(message)
        self.fitted = fitted


@plain_torch()
def fit_epochs(
    estimator: FitEstimator,
    table: LabelledTexts,
    held_out: LabelledTexts | None,
    start: Fitted | None,
) -> Fitted:
    """Train for the estimator's number of epochs, or until a score or a callback says stop.

    Parameters
    ----------
    estimator : QLoRAClassifier
        The estimator, whose parameters were validated. It is only read.
    table : LabelledTexts
    held_out : LabelledTexts or None
        The texts that early stopping scores. If None, early stopping holds out a part of `table`.
    start : Fitted or None
        An earlier fit that this one continues.

    Returns
    -------
    fitted : Fitted

    Raises
    ------
    DivergenceError
        If the loss stops being finite after the first epoch.
    FloatingPointError
        If the loss stops being finite in the first epoch.
    """
    table = _continued(table, start)
    import_libraries()
    from skqlora.training.distributed import Ranks
    from skqlora.training.setup import prepared_training

    parameters = read_parameters(estimator)
    check_checkpoint_parameters(estimator)
    with Ranks.current().one_fit_at_a_time() as ranks:
        seed = ranks.from_first(_choose_seed(estimator, start))
        table, stopping = _early_stopping(estimator, table, held_out, start, seed)
        table, weights = weigh(table, getattr(estimator, "class_weight", None))
        scale = mean_weight(weights)  # only their ratios matter
        weights = weights / scale
        n_epochs = resolve_epochs(parameters, len(table))
        tasks = FitTasks(estimator, n_epochs, table)
        losses = [] if start is None else start.loss_curve
        adapter = None if start is None else start.adapter
        held_out = None if stopping is None else stopping.held_out
        data = _identity(table), _identity(held_out), weights, adapter, losses
        with (
            prepared_training(
                parameters, table, weights, seed + len(losses), n_epochs, start=adapter
            ) as run,
            _Saving(estimator, data, run, stopping, ranks) as saving,
        ):
            now = partial(_fitted_now, table, run, seed, scale)
            if stopping is not None:
                # This shows before the training what is wrong with a scorer.
                score = ranks.from_first(stopping.score(as_fitted(estimator, now(losses))))
                if adapter is not None:
                    stopping.set_baseline(score, adapter)
            fitted = saving.resume(now)  # the fit after the last epoch
            stop = False
            while run.trainer.n_epochs < n_epochs and not stop:
                tasks.begin_epoch()
                losses = losses if fitted is None else fitted.loss_curve
                try:
                    loss = run.trainer.train_epoch(partial(saving.write_if_due, fitted, losses))
                    current = now([*losses, loss])
                except FloatingPointError as error:
                    if fitted is None:
                        raise
                    raise DivergenceError(str(error), fitted) from error
                if stopping is not None:
                    score = ranks.from_first(stopping.score(as_fitted(estimator, current)))
                    run.trainer.progress.show(score=f"{score:.3f}")
                    stop = stopping.update(score, current.adapter)
                    current = stopping.apply_to(current)
                run.trainer.progress.end_epoch()
                fitted = current
                stop |= tasks.end_epoch(as_fitted(estimator, fitted))
                stop = ranks.from_first(stop)
            run.trainer.progress.finish()
            assert fitted is not None  # there was at least one epoch
            tasks.end(as_fitted(estimator, fitted))
            saving.remove()
            return fitted


def check_incremental(estimator: FitEstimator) -> None:
    """Refuse parameters that need all data at once; raise ValueError that names one."""
    for name, value in [("early_stopping", True), ("class_weight", "balanced")]:
        if getattr(estimator, name, None) == value:
            raise ValueError(
                f"partial_fit does not support {name}={value!r}, which needs all data at once. "
                "Wanted: fit, or another value (for class weights a dict of numbers)."
            )


@plain_torch()
def fit_piece(estimator: FitEstimator, table: LabelledTexts, start: Fitted | None) -> Fitted:
    """Train one epoch on one piece of the data, as `fit_epochs` does, and keep the optimizer.

    Parameters
    ----------
    estimator : QLoRAClassifier
    table : LabelledTexts
    start : Fitted or None
        The fit of the earlier pieces, with its adapter and its optimizer.

    Returns
    -------
    fitted : Fitted
    """
    table = _continued(table, start)
    import_libraries()
    from skqlora.training.distributed import Ranks
    from skqlora.training.setup import prepared_training

    parameters = read_parameters(estimator)
    with Ranks.current().one_fit_at_a_time() as ranks:
        seed = ranks.from_first(_choose_seed(estimator, start))
        class_weight = getattr(estimator, "class_weight", None)
        table, weights = weigh(table, class_weight, min_classes=1)
        scale = None if start is None else start.weight_scale
        if scale is None:  # that of the first piece, which all later ones share
            scale = mean_weight(weights)
        check_scale(weights, scale)
        losses = [] if start is None else start.loss_curve
        with prepared_training(
            parameters,
            table,
            weights / scale,
            seed + len(losses),
            n_epochs=1,
            start=None if start is None else start.adapter,
            resumed=None if start is None else start.optimizer_state,
            incremental=True,
        ) as run:
            loss = run.trainer.train_epoch()
            run.trainer.progress.end_epoch()
            fitted = _fitted_now(table, run, seed, scale, [*losses, loss])
            n_before = 0 if start is None else start.n_samples_seen
            return replace(
                fitted,
                n_samples_seen=n_before + len(table),
                optimizer_state=run.trainer.optimizer_state(),
            )


class _Saving:
    """A writer and reader of a fit's checkpoints, which does nothing if they are not asked for.

    It is a context manager, within which no other fit writes to the same folder.

    Parameters
    ----------
    estimator : QLoRAClassifier
    data : tuple
        The data that is trained on, scored and continued from.
    run : TrainingRun
    stopping : EarlyStopping or None
    ranks : Ranks
    """

    def __init__(
        self,
        estimator: FitEstimator,
        data: tuple[Any, ...],
        run: "TrainingRun",
        stopping: EarlyStopping | None,
        ranks: "Ranks",
    ):
        import torch

        self._every, self._run, self._ranks = estimator.checkpoint_every, run, ranks
        self._stopping = stopping
        self._checkpoints = None
        directory = estimator.checkpoint_dir
        if directory is not None:
            model = run.trainer.model
            bases = model.backbone.fingerprint_for(model.pooling), run.tokenizer_fingerprint
            identity = data, bases, run.text_settings, ranks.size
            self._checkpoints = Checkpoints(directory, estimator, identity, torch.get_num_threads())

    def __enter__(self) -> "_Saving":
        if self._checkpoints is not None and not self._ranks.call_on_first(self._checkpoints.lock):
            self._checkpoints = None
        return self

    def __exit__(self, *_: object) -> None:
        if self._checkpoints is not None:
            self._checkpoints.unlock()

    def write_if_due(self, fitted: Fitted | None, losses: list[float]) -> None:
        """Write a checkpoint between two updates, every `checkpoint_every` updates.

        Parameters
        ----------
        fitted : Fitted or None
            The fit as it would be if it ended now; None before the first epoch is over.
        losses : list of float
            The losses of the epochs that are over, an earlier fit's included.
        """
        trainer, checkpoints, stopping = self._run.trainer, self._checkpoints, self._stopping
        if checkpoints is None or trainer.n_updates % self._every:
            return
        checkpoint = Checkpoint(
            trainer=trainer.state_dict(),
            losses=losses,
            kept=None if fitted is None else adapter_tensors(fitted.adapter),
            stopping=None if stopping is None else stopping.state_dict(),
        )
        self._ranks.call_on_first(lambda: checkpoints.write(checkpoint))

    def resume(self, fitted_with: "partial[Fitted]") -> Fitted | None:
        """Resume from the last checkpoint that an earlier call of this fit wrote, if there is one.

        Parameters
        ----------
        fitted_with : callable
            A function that makes a `Fitted` from losses and an adapter.

        Returns
        -------
        fitted : Fitted or None
            The fit after the last epoch that was over; None if there was none.
        """
        if self._checkpoints is None:
            return None
        checkpoint = self._ranks.call_on_first(self._checkpoints.read)
        if checkpoint is None:
            return None
        self._run.trainer.load_state_dict(checkpoint.trainer)
        kept = None
        if checkpoint.kept is not None:
            kept = with_tensors(self._run.adapter_state(), checkpoint.kept)
        if self._stopping is not None:
            # Before the first epoch the best adapter is the one that the fit started from.
            self._stopping.load_state_dict(checkpoint.stopping, kept or self._stopping.best)
        if kept is None:
            return None
        fitted = fitted_with(checkpoint.losses, adapter=kept)
        return fitted if self._stopping is None else self._stopping.apply_to(fitted)

    def remove(self) -> None:
        """Delete the checkpoint, because the fit is over."""
        if self._checkpoints is not None and self._ranks.rank == 0:
            self._checkpoints.remove()


def _early_stopping(
    estimator: FitEstimator,
    table: LabelledTexts,
    held_out: LabelledTexts | None,
    start: Fitted | None,
    seed: int,
) -> tuple[LabelledTexts, EarlyStopping | None]:
    """Return the texts to train on, and an `EarlyStopping` if that is asked for."""
    if not estimator.early_stopping:
        return table, None
    if held_out is None:
        table, held_out = hold_out(table, estimator.validation_fraction, seed)
    scores: list[float] = []
    if start is not None:
        scores = start.validation_scores or [math.nan] * len(start.loss_curve)
    return table, EarlyStopping(estimator, held_out, scores)


def _identity(table: LabelledTexts | None) -> tuple[Any, ...] | None:
    """Return what a table is to a training, without columns that the prompt does not use."""
    if table is None:
        return None
    inputs = table.inputs
    return inputs.texts, inputs.columns, table.target, table.targets, table.sample_weight


def as_fitted(estimator: FitEstimator, fitted: Fitted) -> FitEstimator:
    """Return a fitted copy of the estimator, which itself stays as it is.

    The copy is silent: a bar of its predictions would break into that of the fit.
    """
    copied = copy.copy(estimator)
    copied.verbose = 0
    copied._set_fitted(fitted)
    return copied


def _fitted_now(
    table: LabelledTexts,
    run: "TrainingRun",
    seed: int,
    scale: float,
    losses: list[float],
    adapter: AdapterState | None = None,
) -> Fitted:
    """Return the fit as it would be if it ended now, with its current adapter or another one."""
    if adapter is None:
        run.trainer.check_finite()
        adapter = run.adapter_state()
    return Fitted(
        columns=table.inputs.columns,
        target=table.target,
        adapter=adapter,
        n_iter=len(losses),
        n_samples_seen=len(table),
        loss_curve=losses,
        validation_scores=None,
        best_validation_score=None,
        optimizer_state=None,
        footprint=run.footprint,
        settings=run.settings,
        random_seed=seed,
        weight_scale=scale,
    )


def _continued(table: LabelledTexts, start: Fitted | None) -> LabelledTexts:
    """Return the table as a fit that continues another one, if there is one, reads it.

    Raises
    ------
    ValueError
        If the earlier fit predicts something else.
    """
    if start is None:
        return table
    return replace(table, target=table.target.continue_from(start.target))


def _choose_seed(estimator: FitEstimator, start: Fitted | None) -> int:
    """Draw a seed, or return that of the fit to continue, so that the same texts stay held out.

    A fit that continues another one trains with this seed plus the number of the epochs before, so
    that each fit has another order of the texts and another dropout.
    """
    if start is not None:
        return start.random_seed
    return check_random_state(estimator.random_state).randint(np.iinfo(np.int32).max)
