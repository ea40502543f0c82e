"""The layers before the first adapted one, computed once for each text instead of in every epoch.

They are frozen and have no adapter, so what enters the first adapted layer stays the same. The
model's own forward pass still runs around them, and takes care of masks, positions and scalings.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from skqlora.checkpoint.device import is_out_of_memory, to_device
from skqlora.model.backbone import Backbone
from skqlora.model.blocks import replaced_forwards, transformer_blocks
from skqlora.model.text_model import TextModel
from skqlora.model.trial import TOLERANCE
from skqlora.text.batches import TokenizedTexts, rounded_up_length
from skqlora.training import state_store

# The number of tokens of a pass, in which all rows are padded to one length. On a CPU the shape of
# the pass that a text is computed in depends on the length of the text alone, so that the same
# numbers come out whatever other texts there are.
CPU_PASS_TOKENS = 256
PASS_TOKENS = 4096
N_CHECKED = 4  # texts whose logits with and without a prefix are compared


class CachedPrefix:
    """The hidden states that enter the first adapted layer, for each text of a training.

    Parameters
    ----------
    states : list of torch.Tensor, each of shape (n_tokens, width)
        The hidden states in the order of the texts, on the CPU.
    """

    def __init__(self, states: list[torch.Tensor]):
        self._states = states
        self._fed = torch.empty(0)

    def feed(self, rows: Sequence[int] | np.ndarray) -> None:
        """Let the next forward pass, which is of these texts, begin at the first adapted layer."""
        states = [self._states[row] for row in rows]
        self._fed = nn.utils.rnn.pad_sequence(states, batch_first=True)

    def replace(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple:
        """Give the first adapted layer what was fed, as a forward pre-hook."""
        came = _hidden_states(args, kwargs)
        fed = self._fed.to(came.device, came.dtype)
        return ((fed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": fed})


@contextmanager
def cached_prefix(
    model: TextModel,
    tokens: TokenizedTexts,
    max_length: int,
    *,
    batch_size: int = 16,
    dtype: torch.dtype | None = None,
) -> Iterator[CachedPrefix | None]:
    """Compute what enters the first adapted layer, and skip the layers before it in the context.

    Parameters
    ----------
    model : TextModel
        The model. In the context, the prefix must be fed before each forward pass.
    tokens : TokenizedTexts
    max_length : int
        The greatest number of tokens that a text may have.
    batch_size : int, default=16
        The greatest number of texts in a pass if they have the greatest length.
    dtype : torch.dtype, optional
        The precision in which the states are kept. By default it is their own.

    Yields
    ------
    prefix : CachedPrefix or None
        The computed states. It is None, and nothing is changed, if the first layer is adapted too,
        if the layers cannot be determined or hand on more than hidden states, or if there is no
        room for the states.
    """
    blocks = transformer_blocks(model.encoder)
    first = _first_adapted(model.encoder, blocks)
    states: list[torch.Tensor] = []
    if blocks is not None and first > 0:
        max_tokens = batch_size * int(tokens.lengths.max())
        run = _PrefixRun(model, list(blocks[: first + 1]), tokens, max_length, max_tokens)
        try:
            if _can_be_cut(run, dtype):
                states = _fetch(run, (first, dtype))
        except RuntimeError as error:  # the training itself may continue in smaller passes
            if not is_out_of_memory(error):
                raise
    if not states:
        yield None
        return
    prefix = CachedPrefix(states)
    with run.skipped(prefix):
        yield prefix


def _first_adapted(encoder: nn.Module, blocks: nn.ModuleList | None) -> int:
    """Find the number of the first layer that has an adapter, or 0 if no prefix can be cut off."""
    shares_keys = getattr(encoder.config, "num_kv_shared_layers", None)
    if blocks is None or shares_keys:
        return 0
    adapted = {m for m in encoder.modules() if isinstance(m, LoraLayer)}
    in_blocks = [set(block.modules()) & adapted for block in blocks]
    pooler = getattr(encoder, "pooler", None)  # it runs after the layers
    elsewhere = adapted.difference(*in_blocks, [] if pooler is None else pooler.modules())
    numbers = [number for number, found in enumerate(in_blocks) if found]
    return 0 if elsewhere else min(numbers, default=0)


def _can_be_cut(run: "_PrefixRun", dtype: torch.dtype | None) -> bool:
    """Check on the first texts whether the model computes the same from what would be kept."""
    rows = np.arange(min(N_CHECKED, len(run.tokens)))
    expected = _logits(run, rows)
    try:
        width, kept_dtype = run.inspect()
        states = run.compute(rows.tolist(), state_store.in_memory(width, dtype or kept_dtype))
        prefix = CachedPrefix([states[row] for row in rows.tolist()])
        with run.skipped(prefix):
            prefix.feed(rows)
            found = _logits(run, rows)
    except Exception as error:  # this model calls its layers in another way
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        return False
    return _agree(found, expected, run.model.backbone, dtype)


@torch.no_grad()
def _logits(run: "_PrefixRun", rows: np.ndarray) -> torch.Tensor:
    return run.model(**to_device(run.tokens.batch(rows), run.model.backbone.spec.device))


def _agree(
    found: torch.Tensor, expected: torch.Tensor, backbone: Backbone, dtype: torch.dtype | None
) -> bool:
    coarsest = max(TOLERANCE[dtype or torch.float32], TOLERANCE[backbone.spec.compute_dtype])
    return bool((found - expected).norm() <= coarsest * expected.norm())


class _Reached(Exception):
    """Raised to end a pass when the first adapted layer is about to run."""


class _PrefixRun:
    """The layers before the first adapted one, run on tokenized texts.

    Parameters
    ----------
    model : TextModel
    blocks : list of torch.nn.Module
        The layers before the first adapted one, and that one at the end.
    tokens : TokenizedTexts
    max_length : int
    max_tokens : int
        The greatest number of tokens of a pass on an accelerator.
    """

    def __init__(
        self,
        model: TextModel,
        blocks: list[nn.Module],
        tokens: TokenizedTexts,
        max_length: int,
        max_tokens: int,
    ):
        self.model, self._blocks, self._last = model, blocks[:-1], blocks[-1]
        self.tokens, self._max_length = tokens, max_length
        on_cpu = model.backbone.spec.device.type == "cpu"
        self._pass_tokens = CPU_PASS_TOKENS if on_cpu else min(PASS_TOKENS, max_tokens)
        self._forms: list[int | None] = []  # the length of the tuple that each layer returns

    @torch.no_grad()
    def __call__(self, rows: list[int], n_rows: int, n_tokens: int) -> torch.Tensor:
        """Compute the hidden states of some texts in a pass of a given shape.

        Returns
        -------
        hidden : torch.Tensor of shape (n_rows, n_tokens, width)
        """
        full = rows + rows[-1:] * (n_rows - len(rows))  # a pass that is not full repeats a text
        inputs = self.tokens.batch(np.array(full), n_tokens)
        reached: list[torch.Tensor] = []

        def stop(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            reached.append(_hidden_states(args, kwargs))
            raise _Reached

        self._forms = []
        handles = [block.register_forward_hook(self._note_form) for block in self._blocks]
        handles.append(self._last.register_forward_pre_hook(stop, with_kwargs=True))
        try:
            self.model(**to_device(inputs, self.model.backbone.spec.device))
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return reached[0]

    def inspect(self) -> tuple[int, torch.dtype]:
        """Return the width and the dtype of what enters the first adapted layer."""
        hidden = self([0], 1, int(self.tokens.lengths[0]))
        return hidden.shape[-1], hidden.dtype

    def padded_length(self, length: int) -> int:
        """Compute the length to pad a text to, for few shapes of passes and little padding."""
        return min(rounded_up_length(length), self._max_length)

    def compute(
        self, rows: Iterable[int], allocate: Callable[[int], torch.Tensor]
    ) -> dict[int, torch.Tensor]:
        """Compute the states of texts, each in a pass whose shape follows from its length.

        Parameters
        ----------
        rows : iterable of int
            The numbers of the texts.
        allocate : callable
            A function of a number of tokens that returns a tensor of shape (n_tokens, width).

        Returns
        -------
        states : dict of int to torch.Tensor of shape (n_tokens, width)
        """
        lengths = self.tokens.lengths
        by_shape: dict[tuple[int, bool], list[int]] = {}
        for row in rows:
            n_tokens = self.padded_length(int(lengths[row]))
            # Attention takes another kernel where nothing is padded, so such texts stay apart.
            by_shape.setdefault((n_tokens, lengths[row] == n_tokens), []).append(row)
        states = {}
        for (n_tokens, _), alike in by_shape.items():
            n_rows = max(1, self._pass_tokens // n_tokens)
            for first in range(0, len(alike), n_rows):
                part = alike[first : first + n_rows]
                for row, hidden in zip(part, self(part, n_rows, n_tokens).cpu(), strict=False):
                    n = int(lengths[row])
                    states[row] = allocate(n).copy_(hidden[:n])
        return states

    @contextmanager
    def skipped(self, prefix: CachedPrefix) -> Iterator[None]:
        """Let the layers hand on their input, and give the first adapted one what is fed."""
        handle = self._last.register_forward_pre_hook(prefix.replace, with_kwargs=True)
        try:
            with replaced_forwards(self._blocks, [partial(_hand_on, f) for f in self._forms]):
                yield
        finally:
            handle.remove()

    def _note_form(self, block: nn.Module, args: tuple, output: Any) -> None:
        self._forms.append(len(output) if isinstance(output, tuple) else None)


def _hand_on(form: int | None, *args: Any, **kwargs: Any) -> Any:
    hidden = _hidden_states(args, kwargs)
    return hidden if form is None else (hidden, *[None] * (form - 1))


def _hidden_states(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _fetch(run: _PrefixRun, kind: tuple[int, torch.dtype | None]) -> list[torch.Tensor]:
    """Return the states of each text, kept or computed now; an empty list if there is no room."""
    backbone = run.model.backbone
    lengths = run.tokens.lengths.tolist()
    keys = [
        (*kind, run.padded_length(length), ids.shape, ids.tobytes())
        for length, ids in zip(lengths, run.tokens.sequences, strict=True)
    ]
    there = state_store.find(backbone, keys)
    missing = {key: row for row, key in enumerate(keys) if key not in there}
    if missing:
        width, dtype = run.inspect()
        dtype = kind[1] or dtype
        n_tokens = sum(lengths[row] for row in missing.values())
        n_bytes = n_tokens * width * dtype.itemsize
        with state_store.reserved_memory(n_bytes, backbone, there) as fits:
            if fits:
                computed = run.compute(missing.values(), state_store.in_memory(width, dtype))
                state_store.keep(backbone, {key: computed[row] for key, row in missing.items()})
            else:
                allocate = state_store.in_file(n_tokens, width, dtype)
                if allocate is None:
                    return []
                computed = run.compute(missing.values(), allocate)
        there |= {key: computed[row] for key, row in missing.items()}
    return [there[key] for key in keys]
