"""What is shown of a long computation: a bar, or lines where a bar cannot move.

A bar is drawn again and again over itself. That needs a notebook or a terminal; in a file it would
be one long line.
"""

import os
import sys
import time
from types import TracebackType
from typing import Self

from tqdm.auto import tqdm
from tqdm.notebook import tqdm_notebook


def text_bar(what: str, n_texts: int, *, shown: bool, delay: float = 0, leave: bool = True) -> tqdm:
    """Make a progress bar over texts, which shows nothing where a bar cannot move.

    Parameters
    ----------
    what : str
        The name of the computation.
    n_texts : int
    shown : bool
        Whether the user wants to see it.
    delay : float, default=0
        The number of seconds after which the bar appears, if it is not full by then.
    leave : bool, default=True
        Whether the bar stays when the computation is over.

    Returns
    -------
    bar : tqdm
        A context manager.
    """
    return tqdm(
        total=n_texts,
        desc=what,
        unit=" texts",
        disable=not (shown and bars_can_move()),
        delay=delay,
        leave=leave,
    )


def bars_can_move() -> bool:
    """Tell whether tqdm draws in a notebook, or in a terminal."""
    if os.environ.get("RANK", "0") not in (
        "",
        "0",
    ):  # torchrun starts several processes on one terminal
        return False
    return issubclass(tqdm, tqdm_notebook) or (_stderr_is_open() and sys.stderr.isatty())


def _stderr_is_open() -> bool:
    return sys.stderr is not None and not sys.stderr.closed  # there is none without a console


class FitProgress:
    """The progress of a fit: a bar over its texts, or a line after each epoch.

    It is a context manager.

    Parameters
    ----------
    n_texts : int
        The number of texts of an epoch.
    n_epochs : int
    shown : bool
        Whether the user wants to see it.
    """

    def __init__(self, n_texts: int, n_epochs: int, *, shown: bool):
        self._bar = text_bar("fit", n_texts * n_epochs, shown=shown)
        self._writes_lines = shown and not bars_can_move() and _stderr_is_open()
        self._figures: dict[str, object] = {}
        self._began = time.perf_counter()  # the epoch

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()

    def update(self, n_texts: int) -> None:
        """Count texts as trained on."""
        self._bar.update(min(n_texts, self._bar.total - self._bar.n))

    def show(self, **figures: object) -> None:
        """Show figures, besides those that are shown already."""
        self._figures |= figures
        self._bar.set_postfix(self._figures)

    def end_epoch(self) -> None:
        """Write the line of an epoch, if there is no bar."""
        began, self._began = self._began, time.perf_counter()
        if self._writes_lines:
            figures = ", ".join(f"{name} {figure}" for name, figure in self._figures.items())
            print(f"fit: {figures}, {self._began - began:.1f} s", file=sys.stderr, flush=True)

    def finish(self) -> None:
        """Fill the bar, because the fit is over, after all epochs or fewer.

        A notebook shows a bar in red that ends before it is full.
        """
        bar = self._bar
        if bar.disable or bar.n == bar.total:
            return
        n_texts, start = bar.n, bar.start_t
        bar.reset(total=n_texts)
        bar.start_t = start
        bar.update(n_texts)
