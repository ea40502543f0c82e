"""A base with adapters, pooling and a head: token ids to logits; and the adapter on its own.

Knows nothing of texts or of how it is trained.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from skqlora.adapter import AdapterState, LoraSettings, TextSettings
from skqlora.model.backbone import Backbone
from skqlora.model.replicas import ADAPTER, AdaptedClone, refuse_other_shapes

HEAD_INIT_STD = 0.02  # what transformers gives a fresh classification head


@dataclass
class RowClock:
    """Where training stands: which rows of which effective batch a forward pass holds.

    Attributes
    ----------
    step : int
        Number of the update.
    batch_rows : int
        Rows of the effective batch, over all its micro-batches.
    rows : ndarray of int
        The ones that this micro-batch holds.
    """

    step: int = 0
    batch_rows: int = 0
    rows: np.ndarray = field(default_factory=lambda: np.arange(0))


class RowDropout(nn.Module):
    """Dropout of LoRA's input with one mask for each row, shared by the row's tokens.

    The mask follows from the seed, the step, the layer and the row's place in the effective batch,
    never from a global generator. So the cut into micro-batches, recomputation under checkpointing
    and threads beside this one change nothing.

    Parameters
    ----------
    p : float
        Share of the features that is dropped.
    seed, layer : int
    row_axis : int
        Axis of the input along which the rows lie; it may hold several tokens of each row in turn.
    clock : RowClock
        Shared by all layers of a model.
    """

    def __init__(self, p: float, seed: int, layer: int, row_axis: int, clock: RowClock):
        super().__init__()
        self.p, self.seed, self.layer = p, seed, layer
        self.row_axis, self.clock = row_axis, clock
        self._keep, self._step = torch.empty(0), -1  # the mask of an update, and which it is of

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop features, the last axis, of the activations of a micro-batch."""
        if not self.training:
            return x
        if self._step != self.clock.step:
            self._keep, self._step = self._draw(x), self.clock.step
        rows = self.clock.rows
        keep = self._keep[torch.from_numpy(rows).to(x.device)]
        # (n_rows, n_features), once for each token where rows and tokens share the axis
        scale = (keep / (1 - self.p)).repeat_interleave(x.shape[self.row_axis] // len(rows), 0)
        shape = [1] * x.ndim
        shape[self.row_axis], shape[-1] = scale.shape
        return x * scale.to(x.dtype).view(shape)

    def _draw(self, x: torch.Tensor) -> torch.Tensor:
        """Draw what is kept of all rows of the update, of shape (batch_rows, n_features), bool."""
        clock = self.clock
        words = np.random.SeedSequence([self.seed, clock.step, self.layer]).generate_state(2)
        generator = torch.Generator(x.device).manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        keep = torch.empty(clock.batch_rows, x.shape[-1], dtype=torch.float32, device=x.device)
        return keep.bernoulli_(1 - self.p, generator=generator).bool()


class TextClassifierModel(nn.Module):
    """A leased clone of a base with LoRA layers, pooling and a float32 linear head.

    Made by `fresh`, to be trained, or `restored`, to predict; both are context managers, which
    give the clone back.

    Parameters
    ----------
    backbone : Backbone
    clone : AdaptedClone
    lora : LoraSettings
    pooling : {"last", "mean", "cls", "pooler"}
    n_classes : int
    """

    def __init__(
        self,
        backbone: Backbone,
        clone: AdaptedClone,
        lora: LoraSettings,
        pooling: str,
        n_classes: int,
    ):
        super().__init__()
        self.backbone = backbone
        self.clone = clone
        self.lora = lora
        self.pooling = pooling
        self.encoder = clone.module
        self.head = nn.utils.skip_init(
            nn.Linear,
            backbone.hidden_size,
            n_classes,
            bias=pooling != "last",
            dtype=torch.float32,
            device=backbone.spec.device,
        )
        self.clock = RowClock()
        self.head.eval()
        self.training = False  # as all of the clone is

    @classmethod
    @contextmanager
    def fresh(
        cls,
        backbone: Backbone,
        lora: LoraSettings,
        n_classes: int,
        pooling: str,
        *,
        seed: int = 0,
        lora_dropout: float = 0.0,
        start: AdapterState | None = None,
    ) -> "Iterator[TextClassifierModel]":
        """Lease a clone with an adapter and a head to be trained.

        Parameters
        ----------
        backbone : Backbone
        lora : LoraSettings
        n_classes : int
        pooling : {"auto", "last", "mean", "cls", "pooler"}
            "auto" is "last" for a causal base and "mean" for another.
        seed : int, default=0
            Of LoRA's and the head's first values, and of dropout.
        lora_dropout : float, default=0.0
        start : AdapterState, optional
            Go on from this adapter instead of from first values.

        Yields
        ------
        model : TextClassifierModel

        Raises
        ------
        ValueError
            If the base cannot be pooled this way, PEFT finds none of the target modules, or
            `start` is of another base or another shape.
        """
        pooling = _resolve_pooling(pooling, backbone)
        keep_pooler = pooling == "pooler"
        with (
            torch.inference_mode(False),  # whatever the caller computes in
            torch.enable_grad(),
            backbone.lease(lora, keep_pooler=keep_pooler) as clone,
        ):
            model = cls(backbone, clone, lora, pooling, n_classes)
            if start is None:
                clone.start(lora, seed)
                _start_head(model.head, seed)
            else:
                refuse_other_base(backbone, start)
                _refuse_other_settings(lora, pooling, start)
                clone.activate(start)
                _write_head(model.head, start.head_tensors)
            with model._row_dropout(lora_dropout, seed):
                yield model

    @classmethod
    @contextmanager
    def restored(cls, backbone: Backbone, state: AdapterState) -> "Iterator[TextClassifierModel]":
        """Lease a clone with a captured adapter and head.

        Yields
        ------
        model : TextClassifierModel

        Raises
        ------
        ValueError
            If the base is not the one that the adapter was trained on.
        """
        refuse_other_base(backbone, state)
        keep_pooler = state.pooling == "pooler"
        with backbone.lease(state.lora, keep_pooler=keep_pooler, holding=state) as clone:
            clone.activate(state)
            n_classes = len(state.head_tensors["weight"])
            model = cls(backbone, clone, state.lora, state.pooling, n_classes)
            _write_head(model.head, state.head_tensors)
            yield model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Compute float32 logits of shape (n_rows, n_classes).

        Parameters
        ----------
        input_ids, attention_mask : torch.Tensor of shape (n_rows, n_tokens)
            Padded on the right.
        """
        return self.head(self.embed(input_ids, attention_mask))

    def embed(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Compute what the head is given: float32 vectors of shape (n_rows, hidden_size)."""
        with self.backbone.autocast():
            output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
            if self.pooling == "pooler":
                pooled = output.pooler_output
            else:
                pooled = pool(output[0], attention_mask, self.pooling)
        return pooled.float()

    def start_head(self, tensors: dict[str, np.ndarray]) -> None:
        """Let the head begin with these values.

        Parameters
        ----------
        tensors : dict of str to ndarray
            As `AdapterState.head_tensors`.
        """
        _write_head(self.head, tensors)

    def train(self, mode: bool = True) -> "TextClassifierModel":
        """Turn LoRA's dropout on or off. The base itself stays in evaluation mode for good."""
        self.training = mode
        for layer in self.clone.layers:
            layer.training = mode  # DoRA asks the layer, not its dropout
            layer.lora_dropout.train(mode)
        return self

    def count_trainable(self) -> int:
        """Count the parameters of the adapter and the head."""
        return self.clone.n_parameters + sum(p.numel() for p in self.head.parameters())

    def capture(self, text: TextSettings, tokenizer_fingerprint: str = "") -> AdapterState:
        """Copy the adapter and the head out of the model, to NumPy and without the base.

        The clone keeps the adapter active, for a prediction that follows. What a text becomes is
        not the model's business, only noted.
        """
        state = AdapterState(
            lora=self.lora,
            pooling=self.pooling,
            text=text,
            model=self.backbone.spec.model,
            revision=self.backbone.spec.revision,
            fingerprint=self.backbone.fingerprint,
            tokenizer_fingerprint=tokenizer_fingerprint,
            lora_tensors=self.clone.read(),
            head_tensors={name: _to_numpy(p) for name, p in self.head.named_parameters()},
        )
        self.clone.note_active(state)
        return state

    @contextmanager
    def _row_dropout(self, p: float, seed: int) -> Iterator[None]:
        """Put dropout before the layers whose rows can be told, for the time of a training."""
        if p == 0:
            yield
            return
        layers = self.clone.layers
        for number, (layer, row_axis) in enumerate(zip(layers, self.clone.row_axes, strict=True)):
            if row_axis is not None:
                dropout = RowDropout(p, seed, number, row_axis, self.clock)
                layer.lora_dropout[ADAPTER] = dropout.eval()
        yield
        for layer in layers:
            layer.lora_dropout[ADAPTER] = nn.Identity()


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Reduce hidden states to one vector a row, by the mask and never by the padding's id.

    Parameters
    ----------
    hidden : torch.Tensor of shape (n_rows, n_tokens, hidden_size)
    mask : torch.Tensor of shape (n_rows, n_tokens)
        1 for tokens, then 0 for padding.
    pooling : {"last", "mean", "cls"}

    Returns
    -------
    pooled : torch.Tensor of shape (n_rows, hidden_size)
    """
    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]
    if pooling != "mean":
        raise ValueError(f"Got pooling={pooling!r}. Wanted: 'last', 'mean' or 'cls'.")
    weights = mask[..., None].float()
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)


def _resolve_pooling(pooling: str, backbone: Backbone) -> str:
    if pooling == "auto":
        return "last" if backbone.causal else "mean"
    if pooling == "cls" and backbone.causal:
        raise ValueError(
            f"Got pooling='cls' with the decoder {backbone.spec.model!r}, whose first token sees "
            "no other. Pass pooling='last', or 'auto'."
        )
    if pooling == "pooler" and getattr(backbone.module, "pooler", None) is None:
        raise ValueError(
            f"Got pooling='pooler' but {backbone.spec.model!r} has no trained pooler. Pass "
            "pooling='mean', 'cls' or 'auto'."
        )
    return pooling


@torch.no_grad()
def _start_head(head: nn.Linear, seed: int) -> None:
    """Start a head as transformers does, drawn on the CPU whatever the device."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(head.weight.shape, dtype=torch.float32)
    head.weight.copy_(weight.normal_(std=HEAD_INIT_STD, generator=generator))
    if head.bias is not None:
        head.bias.zero_()


@torch.no_grad()
def _write_head(head: nn.Linear, tensors: dict[str, np.ndarray]) -> None:
    refuse_other_shapes(tensors, {name: tuple(p.shape) for name, p in head.named_parameters()})
    for name, parameter in head.named_parameters():
        parameter.copy_(torch.tensor(tensors[name]))


def refuse_other_base(backbone: Backbone, state: AdapterState) -> None:
    """Refuse an adapter on another base than it was trained on, by ValueError."""
    if backbone.fingerprint != state.fingerprint:
        raise ValueError(
            f"model={backbone.spec.model!r} (fingerprint {backbone.fingerprint[:12]}) is not "
            f"the base that was fitted (fingerprint {state.fingerprint[:12]}). "
            "Set `model` back to that base, or call `fit` with warm_start=False."
        )


def _refuse_other_settings(lora: LoraSettings, pooling: str, start: AdapterState) -> None:
    if (lora, pooling) != (start.lora, start.pooling):
        raise ValueError(
            f"Got {lora} and pooling={pooling!r}, but the fitted adapter to go on from has "
            f"{start.lora} and pooling={start.pooling!r}. Set the parameters back, or call `fit` "
            "with warm_start=False."
        )


def _to_numpy(parameter: torch.Tensor) -> np.ndarray:
    return parameter.detach().cpu().numpy().copy()  # a view would keep the whole buffer alive
