"""The frozen bases of this process, shared by all of its estimators.

Loads torch at the first base only, so that `import skqlora` stays light.
"""

import gc
import os
import sys
import threading
import warnings
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from skqlora._utils.caches import clear_caches
from skqlora._utils.libraries import library_lock, muted

if TYPE_CHECKING:
    import torch

    from skqlora.model.backbone import Backbone
    from skqlora.model.spec import BackboneSpec

LIMIT_VARIABLE = "SKQLORA_BACKBONE_CACHE_BYTES"


@dataclass(frozen=True)
class BackboneCacheInfo:
    """What the cache of bases did so far in this process, and what it holds.

    Attributes
    ----------
    hits : int
        Times that a `fit` or `predict` found its base.
    misses : int
        Times that it had to load one.
    n_backbones : int
        Bases that are kept now.
    bytes : int
        Their size in memory, with the adapters on their free replicas.
    """

    hits: int
    misses: int
    n_backbones: int
    bytes: int


class _BackboneCache:
    """Bases by what makes them, the ones used longest ago first."""

    def __init__(self) -> None:
        self._bases: OrderedDict[BackboneSpec, Backbone] = OrderedDict()
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    def get(self, spec: "BackboneSpec", *, verbose: bool) -> "Backbone":
        backbone = self._find(spec)
        if backbone is None:
            with library_lock:
                # A thread that was faster may have loaded it.
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
        from skqlora._utils.processes import warn_if_gpu_is_shared

        limit = _limit()
        warn_if_gpu_is_shared(spec.device)
        with self._lock:
            self._misses += 1
            for other in [other for other in self._bases if _is_outdated(other, spec)]:
                del self._bases[other]
        _free_memory()  # also what a failed load left
        backbone = self._load_alone_if_memory_is_short(spec, verbose)
        n_bytes = backbone.nbytes
        if limit is not None and n_bytes > limit:
            warnings.warn(
                f"{LIMIT_VARIABLE} is {limit}, but model={spec.model!r} takes {n_bytes} bytes: it "
                "is not kept and will be loaded again at each fit and predict. Raise the limit, or "
                "remove it from the environment.",
                stacklevel=2,
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
            except torch.OutOfMemoryError:  # of an accelerator
                with self._lock:
                    there = [other for other in self._bases if other.device == spec.device]
                    for other in there:
                        del self._bases[other]
                if not there:
                    raise
            _free_memory()
            return Backbone.load(spec)

    def _evict(self, device: "torch.device", limit: int) -> None:
        """Drop bases of a device until the rest are within the limit, but for the newest."""
        there = {spec: b.nbytes for spec, b in self._bases.items() if spec.device == device}
        total = sum(there.values())
        for spec in list(there)[:-1]:
            if total <= limit:
                break
            total -= there[spec]
            del self._bases[spec]


def _is_outdated(other: "BackboneSpec", spec: "BackboneSpec") -> bool:
    """Whether `other` is what a folder held before its files changed."""
    return other.files != spec.files and replace(other, files=spec.files) == spec


def _limit() -> int | None:
    """Bytes for each device, from the environment."""
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
    """Bytes of the device's memory, used or not."""
    if device.type == "cpu":
        import psutil

        return psutil.virtual_memory().total
    import torch

    return getattr(torch, device.type).get_device_properties(device).total_memory


def _free_memory() -> None:
    """Free what nobody uses: bitsandbytes' layers and their weights refer to each other."""
    gc.collect()
    import torch

    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


_cache = _BackboneCache()


def get_backbone(spec: "BackboneSpec", *, verbose: bool = False) -> "Backbone":
    """Return the base of `spec`: that of the process, or a newly loaded one.

    Parameters
    ----------
    spec : BackboneSpec
    verbose : bool, default=False
        Show the libraries' progress bars while it loads.

    Returns
    -------
    backbone : Backbone

    Raises
    ------
    ValueError
        If the base cannot be loaded; see `Backbone.load`. Nothing of it is kept.
    """
    return _cache.get(spec, verbose=verbose)


def count_bytes_of(spec: "BackboneSpec") -> int:
    """Count the bytes of the base of `spec` if it is kept."""
    return _cache.count_bytes_of(spec)


def drop_other_backbones(spec: "BackboneSpec") -> None:
    """Forget the bases on the device of `spec`, except for its own."""
    _cache.drop_others(spec)
    _free_memory()


def clear_backbone_cache() -> None:
    """Forget the bases that this process keeps, their replicas, tokenizers and tokenized texts.

    And the hidden states of texts that fits with `layers` keep for later ones.

    Fitted classifiers stay as they are: their next prediction loads its base again. A base that a
    `fit` is using in another thread is freed when that ends.
    """
    clear_caches()
    if "torch" in sys.modules:  # otherwise no base was ever loaded
        _cache.clear()


def backbone_cache_info() -> BackboneCacheInfo:
    """Tell how often bases were found and loaded in this process, and what they take.

    Returns
    -------
    info : BackboneCacheInfo
        Its `hits`, `misses`, `n_backbones` and `bytes`.

    Notes
    -----
    The bases of a device are kept while they take at most half of its memory, and the one used last
    always; the one used longest ago goes first. The environment variable
    ``SKQLORA_BACKBONE_CACHE_BYTES`` sets another limit, in bytes for each device, such as ``8e9``,
    or ``0`` to keep none. It is read whenever a base is loaded. A base that is larger than this
    limit is loaded again at each `fit` and `predict`, with a warning.
    """
    return _cache.info()
