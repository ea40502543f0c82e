"""The layers before the first adapted one, computed once for each text and not in every epoch.

They are frozen and bare, so what enters the first adapted layer stays the same. The model's own
forward pass goes on around them: masks, positions and scalings stay its business.
"""

import os
import tempfile
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from skqlora.backbone import PADDING_TOLERANCE, Backbone
from skqlora.data import TokenizedTexts
from skqlora.layers import transformer_blocks
from skqlora.memory import free_memory
from skqlora.model import TextClassifierModel

# Of a pass, all of whose rows are padded to one length. On a CPU the shape of the pass that a text
# is computed in depends on the text's length alone, so that the same numbers come out whatever
# other texts there are.
CPU_PASS_TOKENS = 256
PASS_TOKENS = 4096
MEMORY_SHARE = 0.25  # of what memory is free or holds states; more goes to a file
N_CHECKED = 4  # texts


class CachedPrefix:
    """What enters the first adapted layer, for each text of a training.

    Parameters
    ----------
    states : list of torch.Tensor, each of shape (n_tokens, width)
        In the order of the texts, on the CPU.
    """

    def __init__(self, states: list[torch.Tensor]):
        self._states = states
        self._fed = torch.empty(0)

    def feed(self, rows: Sequence[int] | np.ndarray) -> None:
        """Make the next forward pass, of these texts, begin at the first adapted layer."""
        states = [self._states[row] for row in rows]
        self._fed = nn.utils.rnn.pad_sequence(states, batch_first=True)

    def replace(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """Give the first adapted layer what was fed; a forward pre-hook."""
        came = _hidden_states(args, kwargs)
        fed = self._fed.to(came.device, came.dtype)
        return ((fed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": fed})


@contextmanager
def cached_prefix(
    model: TextClassifierModel,
    tokens: TokenizedTexts,
    max_length: int,
    dtype: torch.dtype | None = None,
) -> Iterator[CachedPrefix | None]:
    """Compute what enters the first adapted layer, and skip the layers before it from then on.

    Parameters
    ----------
    model : TextClassifierModel
        Until the end it has to be fed before each forward pass.
    tokens : TokenizedTexts
    max_length : int
        Greatest number of tokens that a text may have.
    dtype : torch.dtype, optional
        To keep it in; as it is by default.

    Yields
    ------
    prefix : CachedPrefix or None
        None where the first layer is adapted too, where the layers cannot be told or hand on more
        than hidden states, and where there is no room: then nothing is changed.
    """
    blocks = transformer_blocks(model.encoder)
    first = _first_adapted(model.encoder, blocks)
    prefix = None
    with ExitStack() as stack:
        if blocks is not None and first > 0:
            run = _PrefixRun(model, list(blocks[: first + 1]), tokens.pad_id, max_length)
            kind = first, max_length, dtype
            states = _store_of(model.backbone).fetch(run, tokens.sequences, kind)
            prefix = CachedPrefix(states) if states else None
        if prefix is not None:
            rows = np.arange(min(N_CHECKED, len(tokens)))
            expected = _logits(model, tokens, rows)
            stack.enter_context(run.skipped(prefix))
            prefix.feed(rows)
            if not _agree(_logits(model, tokens, rows), expected, model.backbone, dtype):
                stack.close()
                prefix = None
        yield prefix


def _first_adapted(encoder: nn.Module, blocks: nn.ModuleList | None) -> int:
    """Tell which layer is the first that has an adapter; 0 where a prefix cannot be cut off."""
    shares_keys = getattr(encoder.config, "num_kv_shared_layers", None)
    if blocks is None or shares_keys:
        return 0
    adapted = {m for m in encoder.modules() if isinstance(m, LoraLayer)}
    in_blocks = [set(block.modules()) & adapted for block in blocks]
    pooler = getattr(encoder, "pooler", None)  # comes last
    elsewhere = adapted.difference(*in_blocks, [] if pooler is None else pooler.modules())
    numbers = [number for number, found in enumerate(in_blocks) if found]
    return 0 if elsewhere else min(numbers, default=0)


@torch.no_grad()
def _logits(model: TextClassifierModel, tokens: TokenizedTexts, rows: np.ndarray) -> torch.Tensor:
    device = model.backbone.spec.device
    ids, mask = tokens.batch(rows)
    return model(ids.to(device), mask.to(device))


def _agree(
    found: torch.Tensor, expected: torch.Tensor, backbone: Backbone, dtype: torch.dtype | None
) -> bool:
    coarsest = max(
        PADDING_TOLERANCE[dtype or torch.float32], PADDING_TOLERANCE[backbone.spec.compute_dtype]
    )
    return bool((found - expected).norm() <= coarsest * expected.norm())


class _Reached(Exception):
    """The first adapted layer is about to run."""


class _PrefixRun:
    """The layers before the first adapted one, run on token ids.

    Parameters
    ----------
    model : TextClassifierModel
    blocks : list of torch.nn.Module
        Those layers, and the first adapted one.
    pad_id, max_length : int
    """

    def __init__(
        self, model: TextClassifierModel, blocks: list[nn.Module], pad_id: int, max_length: int
    ):
        self._model, self._blocks, self._last = model, blocks[:-1], blocks[-1]
        self._pad_id, self._max_length = pad_id, max_length
        self._forms: list[int | None] = []  # of what each layer returns: a tuple of that length

    @torch.no_grad()
    def __call__(self, sequences: list[np.ndarray], n_rows: int, n_tokens: int) -> torch.Tensor:
        """Compute the hidden states of some texts in a pass of a given shape.

        Returns
        -------
        hidden : torch.Tensor of shape (n_rows, n_tokens, width)
        """
        device = self._model.backbone.spec.device
        ids = np.full((n_rows, n_tokens), self._pad_id, dtype=np.int64)
        mask = np.zeros_like(ids)
        for row in range(n_rows):  # a pass that is not full has its last text several times
            sequence = sequences[min(row, len(sequences) - 1)]
            ids[row, : len(sequence)], mask[row, : len(sequence)] = sequence, 1
        reached: list[torch.Tensor] = []

        def stop(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            reached.append(_hidden_states(args, kwargs))
            raise _Reached

        self._forms = []
        handles = [block.register_forward_hook(self._note_form) for block in self._blocks]
        handles.append(self._last.register_forward_pre_hook(stop, with_kwargs=True))
        try:
            self._model(torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device))
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return reached[0]

    def compute(
        self, texts: Mapping[tuple, np.ndarray], buffer: torch.Tensor
    ) -> dict[tuple, torch.Tensor]:
        """Compute the states of texts into a buffer of shape (n_tokens of all, width).

        Returns
        -------
        states : dict of tuple to torch.Tensor of shape (n_tokens, width)
            Views of the buffer.
        """
        on_cpu = self._model.backbone.spec.device.type == "cpu"
        by_shape: dict[tuple[int, bool], list[tuple]] = {}
        for key, ids in texts.items():
            n_tokens = min(_rounded_up(len(ids)), self._max_length)
            # Attention takes another kernel where nothing is padded: apart, then.
            by_shape.setdefault((n_tokens, len(ids) == n_tokens), []).append(key)
        states, start = {}, 0
        for (n_tokens, _), keys in by_shape.items():
            n_rows = max(1, (CPU_PASS_TOKENS if on_cpu else PASS_TOKENS) // n_tokens)
            for first in range(0, len(keys), n_rows):
                part = keys[first : first + n_rows]
                hidden = self([texts[key] for key in part], n_rows, n_tokens).to(buffer)
                for key, row in zip(part, hidden, strict=False):
                    end = start + len(texts[key])
                    states[key] = buffer[start:end].copy_(row[: end - start])
                    start = end
        return states

    @contextmanager
    def skipped(self, prefix: CachedPrefix) -> Iterator[None]:
        """Let the layers hand on what they get, and the first adapted one get what is fed."""
        # accelerate's hooks, too, are a `forward` of the block itself, over that of its class.
        hooked = [block.__dict__.get("forward") for block in self._blocks]
        handle = self._last.register_forward_pre_hook(prefix.replace, with_kwargs=True)
        for block, form in zip(self._blocks, self._forms, strict=True):
            block.forward = partial(_hand_on, form)
        try:
            yield
        finally:
            handle.remove()
            for block, forward in zip(self._blocks, hooked, strict=True):
                if forward is None:
                    del block.forward
                else:
                    block.forward = forward

    def _note_form(self, block: nn.Module, args: tuple, output: Any) -> None:
        self._forms.append(len(output) if isinstance(output, tuple) else None)


def _hand_on(form: int | None, *args: Any, **kwargs: Any) -> Any:
    hidden = _hidden_states(args, kwargs)
    return hidden if form is None else (hidden, *[None] * (form - 1))


def _hidden_states(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


class _Store:
    """States of one base's texts: those of earlier fits too, while there is memory."""

    def __init__(self) -> None:
        self._states: dict[tuple, torch.Tensor] = {}
        self._lock = threading.Lock()

    def fetch(
        self,
        run: _PrefixRun,
        sequences: list[np.ndarray],
        kind: tuple[int, int, torch.dtype | None],
    ) -> list[torch.Tensor]:
        """Return the states of each text, computed where they are not there; none without room."""
        keys = [(*kind, ids.tobytes()) for ids in sequences]
        with self._lock:
            there = {key: self._states[key] for key in keys if key in self._states}
        missing = {k: s for k, s in zip(keys, sequences, strict=True) if k not in there}
        probe = run(sequences[:1], 1, len(sequences[0]))  # tells the width and the forms
        dtype, width = kind[-1] or probe.dtype, probe.shape[-1]
        n_tokens = sum(len(ids) for ids in missing.values())
        n_bytes = n_tokens * width * dtype.itemsize
        with self._lock:
            held = _count_bytes(self._states)
            room = MEMORY_SHARE * (free_memory(torch.device("cpu")) + held)
            if held + n_bytes > room:  # forget what this fit does not use
                self._states = there.copy()
        in_file = _count_bytes(there) + n_bytes > room
        buffer = _allocate(n_tokens, width, dtype, in_file=in_file)
        if buffer is None:
            return []
        there |= run.compute(missing, buffer)
        with self._lock:
            self._states |= there
        return [there[key] for key in keys]


_stores: "weakref.WeakKeyDictionary[Backbone, _Store]" = weakref.WeakKeyDictionary()
_stores_lock = threading.Lock()


def _count_bytes(states: Mapping[tuple, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in states.values())


def _store_of(backbone: Backbone) -> _Store:
    with _stores_lock:
        return _stores.setdefault(backbone, _Store())


def _rounded_up(length: int) -> int:
    """Round up by at most a sixteenth: fewer shapes of passes, little padding."""
    step = 1 << max(0, length.bit_length() - 5)
    return -(-length // step) * step


def _allocate(n_tokens: int, width: int, dtype: torch.dtype, *, in_file: bool) -> Any:
    """Reserve memory, or a file that nobody else sees; None where the disk has no room."""
    if not in_file:
        return torch.empty(n_tokens, width, dtype=dtype)
    n_bytes = n_tokens * width * dtype.itemsize
    try:
        with tempfile.TemporaryFile() as file:
            # Room is taken now: a full disk would end the process at a later write.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, n_bytes)
            else:
                file.write(bytes(n_bytes))
            mapped = np.memmap(file, dtype=np.uint8, mode="r+", shape=(n_bytes,))
    except OSError as error:
        warnings.warn(
            f"There are no {n_bytes / 1e9:.1f} GB in {tempfile.gettempdir()!r} to keep what the "
            f"layers before the first adapted one compute ({error}), so each epoch computes it "
            "again: the result is the same. Set TMPDIR to a larger disk, or pass "
            "cache_dtype=None to do without.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return torch.from_numpy(mapped).view(dtype).view(n_tokens, width)
