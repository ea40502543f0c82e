"""Ways to silence what the libraries print while they load, and nothing else."""

import functools
import importlib
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("bitsandbytes", "huggingface_hub")  # transformers' logger has a switch of its own

# transformers and PEFT patch and set process-wide state while they build a model, such as torch's
# default dtype and its initialisation functions, so only one thread at a time may build one.
library_lock = threading.RLock()


@functools.cache
def import_libraries() -> None:
    """Import the libraries that compute and silence them; only the first call does anything."""
    with muted():
        for name in ("torch", "transformers", "peft", "bitsandbytes"):
            importlib.import_module(name)


@contextmanager
def muted(*, progress_bars: bool = False) -> Iterator[None]:
    """Silence the notices and progress bars of the libraries, then restore them.

    The settings that do this are process-wide, so only one thread at a time is let in.

    Parameters
    ----------
    progress_bars : bool, default=False
        Whether to show the progress bars all the same, where bars can move, since a download can
        take minutes.
    """
    from transformers.utils import logging as transformers_logging  # loads torch

    from skqlora._utils.progress import bars_can_move

    # HF_HUB_DISABLE_PROGRESS_BARS overrides calls that switch the Hub's bars, and each one warns.
    with library_lock, warnings.catch_warnings(), _restored():
        warnings.filterwarnings("ignore", message="Cannot (dis|en)able progress bars")
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        transformers_logging.set_verbosity_error()
        if not (progress_bars and bars_can_move()):
            transformers_logging.disable_progress_bar()
        yield


@contextmanager
def _restored() -> Iterator[None]:
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )
    from transformers.utils import logging as transformers_logging

    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    hub_bars = not are_progress_bars_disabled()
    verbosity = transformers_logging.get_verbosity()
    progress_bar = transformers_logging.is_progress_bar_enabled()
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if progress_bar:
            transformers_logging.enable_progress_bar()
        if hub_bars:
            enable_progress_bars()
        else:
            disable_progress_bars()
