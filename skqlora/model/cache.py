"""The frozen bases of this process, shared by all of its estimators.

The module loads torch only with the first base, so that `import skqlora` stays light.
"""

import gc
import os
import sys
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from skqlora._utils.caches import clear_caches
from skqlora._utils.libraries import library_lock, muted
from skqlora._utils.messages import warn

if TYPE_CHECKING:
    import torch

    from skqlora.checkpoint.spec import BackboneSpec
    from skqlora.model.backbone import Backbone

LIMIT_VARIABLE = "SKQLORA_BACKBONE_CACHE_BYTES"


@dataclass(frozen=True)
class BackboneCacheInfo:
    """What the cache of bases has done so far in this process, and what it holds.

    Attributes
    ----------
    hits : int
        The number of times that a `fit` or `predict` found its base in the cache.
    misses : int
        The number of times that a `fit` or `predict` had to load its base.
    n_backbones : int
        The number of bases that are kept now.
    bytes : int
        The size of these bases in memory, with the adapters on their free replicas.
    """

    hits: int
    misses: int
    n_backbones: int
    bytes: int


class _BackboneCache:
    """The kept bases by their specification, the least recently used ones first."""

    def __init__(self) -> None:
        self._bases: OrderedDict[BackboneSpec, Backbone] = OrderedDict()
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    def get(self, spec: "BackboneSpec", *, verbose: bool) -> "Backbone":
        backbone = self._find(spec)
        if backbone is None:
            with library_lock:
                # Another thread may have loaded the base in the meantime.
                backbone = self._find(spec) or self._load(spec, verbose)
        return backbone

    def count_bytes_of(self, spec: "BackboneSpec") -> int:
        with self._lock:
            return self._bases[spec].nbytes if spec in self._bases else 0

    def drop_others(self, spec: "BackboneSpec") -> None:
        with self._lock:
            for other in [b for b in self._bases if b.device == spec.device and b != spec]:
                del self._bases[other]

    def clear(self) -> None:
        with self._lock:
            self._bases.clear()
            self._hits = self._misses = 0
        _free_memory()

    def info(self) -> BackboneCacheInfo:
        with self._lock:
            n_bytes = sum(backbone.nbytes for backbone in self._bases.values())
            return BackboneCacheInfo(self._hits, self._misses, len(self._bases), n_bytes)

    def _find(self, spec: "BackboneSpec") -> "Backbone | None":
        with self._lock:
            backbone = self._bases.get(spec)
            if backbone is not None:
                self._bases.move_to_end(spec)
                self._hits += 1
            return backbone

    def _load(self, spec: "BackboneSpec", verbose: bool) -> "Backbone":
        from skqlora._utils.processes import warn_if_gpu_is_shared, warn_of_waiting_threads

        limit = _limit()
        warn_if_gpu_is_shared(spec.device)
        warn_of_waiting_threads(spec.device)
        with self._lock:
            self._misses += 1
            for other in [other for other in self._bases if _is_outdated(other, spec)]:
                del self._bases[other]
        _free_memory()  # also what a failed load left behind
        backbone = self._load_alone_if_memory_is_short(spec, verbose)
        n_bytes = backbone.nbytes
        if limit is not None and n_bytes > limit:
            warn(
                f"{LIMIT_VARIABLE} is {limit}, but model={spec.model!r} takes {n_bytes} bytes: it "
                "is not kept and will be loaded again at each fit and predict. Raise the limit, or "
                "remove it from the environment.",
            )
            return backbone
        with self._lock:
            self._bases[spec] = backbone
            self._evict(spec.device, _memory(spec.device) // 2 if limit is None else limit)
        _free_memory()
        return backbone

    def _load_alone_if_memory_is_short(self, spec: "BackboneSpec", verbose: bool) -> "Backbone":
        import torch

        from skqlora.model.backbone import Backbone

        with muted(progress_bars=verbose):
            try:
                return Backbone.load(spec)
            except torch.OutOfMemoryError:  # an accelerator's memory ran out
                with self._lock:
                    there = [other for other in self._bases if other.device == spec.device]
                    for other in there:
                        del self._bases[other]
                if not there:
                    raise
            _free_memory()
            return Backbone.load(spec)

    def _evict(self, device: "torch.device", limit: int) -> None:
        """Drop bases of a device, except for the newest, until the rest are within the limit."""
        there = {spec: b.nbytes for spec, b in self._bases.items() if spec.device == device}
        total = sum(there.values())
        for spec in list(there)[:-1]:
            if total <= limit:
                break
            total -= there[spec]
            del self._bases[spec]


def _is_outdated(other: "BackboneSpec", spec: "BackboneSpec") -> bool:
    """Return whether `other` is what a folder held before its files changed."""
    return other.files != spec.files and replace(other, files=spec.files) == spec


def _limit() -> int | None:
    """Read the limit in bytes for each device from the environment, or None if it is not set."""
    text = os.environ.get(LIMIT_VARIABLE, "")
    if not text:
        return None
    try:
        limit = int(float(text))
    except (ValueError, OverflowError):
        limit = -1
    if limit < 0:
        raise ValueError(
            f"Got {LIMIT_VARIABLE}={text!r} in the environment. Wanted: a number of bytes such as "
            "8e9, or 0 to keep no base."
        )
    return limit


def _memory(device: "torch.device") -> int:
    """Count the bytes of the device's memory, used or not."""
    if device.type == "cpu":
        import psutil

        return psutil.virtual_memory().total
    import torch

    return getattr(torch, device.type).get_device_properties(device).total_memory


def _free_memory() -> None:
    """Free the memory that nobody uses.

    bitsandbytes' layers and their weights refer to each other, so they have to be collected.
    """
    gc.collect()
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


_cache = _BackboneCache()


def get_backbone(spec: "BackboneSpec", *, verbose: bool = False) -> "Backbone":
    """Return the base of `spec`, which is loaded unless the process already keeps it.

    Parameters
    ----------
    spec : BackboneSpec
    verbose : bool, default=False
        Whether to show the libraries' progress bars while the base loads.

    Returns
    -------
    backbone : Backbone

    Raises
    ------
    ValueError
        If the base cannot be loaded; see `Backbone.load`. Nothing of it is kept then.
    """
    return _cache.get(spec, verbose=verbose)


def count_bytes_of(spec: "BackboneSpec") -> int:
    """Count the bytes of the base of `spec`, which are 0 if it is not kept."""
    return _cache.count_bytes_of(spec)


def drop_other_backbones(spec: "BackboneSpec") -> None:
    """Forget the bases on the device of `spec`, except for its own."""
    _cache.drop_others(spec)
    _free_memory()


def clear_backbone_cache() -> None:
    """Forget the bases that this process keeps, and what it keeps together with them.

    These are the replicas, the tokenizers, the tokenized texts, and the hidden states of texts that
    fits with `layers` keep for later fits.

    Fitted classifiers stay as they are, and their next prediction loads the base again. A base that
    a `fit` is using in another thread is freed when this `fit` ends.
    """
    clear_caches()
    if "torch" in sys.modules:  # otherwise no base was ever loaded
        _cache.clear()


def backbone_cache_info() -> BackboneCacheInfo:
    """Return how often bases were found and loaded in this process, and how large they are.

    Returns
    -------
    info : BackboneCacheInfo
        The counts `hits`, `misses` and `n_backbones`, and the size `bytes`.

    Notes
    -----
    The bases of a device are kept as long as they take at most half of its memory. If they take
    more, the least recently used ones are dropped first, and the most recently used one always
    stays. The environment variable ``SKQLORA_BACKBONE_CACHE_BYTES`` sets another limit, in bytes
    for each device, such as ``8e9``, or ``0`` to keep none. It is read whenever a base is loaded. A
    base that is larger than this limit is loaded again at each `fit` and `predict`, with a warning.
    """
    return _cache.info()
