"""A base with adapters, pooling and a head: token ids to logits; and the adapter on its own.

Knows nothing of texts or of how it is trained.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from skqlora.adapter import AdapterState, LoraSettings
from skqlora.backbone import ADAPTER, Backbone, lora_layers

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
    first_row, n_rows : int
        The ones that this micro-batch holds.
    """

    step: int = 0
    batch_rows: int = 0
    first_row: int = 0
    n_rows: int = 0


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

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop features, the last axis, of the activations of a micro-batch."""
        if not self.training:
            return x
        clock = self.clock
        words = np.random.SeedSequence([self.seed, clock.step, self.layer]).generate_state(2)
        generator = torch.Generator(x.device).manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)
        keep = torch.empty(clock.batch_rows, x.shape[-1], device=x.device)
        keep.bernoulli_(1 - self.p, generator=generator)
        keep = keep[clock.first_row : clock.first_row + clock.n_rows]
        # (n_rows, n_features), once for each token where rows and tokens share the axis
        scale = (keep / (1 - self.p)).repeat_interleave(x.shape[self.row_axis] // clock.n_rows, 0)
        shape = [1] * x.ndim
        shape[self.row_axis], shape[-1] = scale.shape
        return x * scale.to(x.dtype).view(shape)


class TextClassifierModel(nn.Module):
    """A clone of a base with LoRA layers, pooling and a float32 linear head.

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

    Raises
    ------
    ValueError
        If the base cannot be pooled this way, or PEFT finds none of the target modules.
    """

    def __init__(
        self,
        backbone: Backbone,
        lora: LoraSettings,
        n_classes: int,
        pooling: str,
        *,
        seed: int = 0,
        lora_dropout: float = 0.0,
    ):
        super().__init__()
        self.backbone = backbone
        self.lora = lora
        self.pooling = _resolve_pooling(pooling, backbone)
        self.encoder = backbone.lease(lora, seed=seed, keep_pooler=self.pooling == "pooler")
        self.head = _make_head(backbone, n_classes, seed, bias=self.pooling != "last")
        self.clock = RowClock()
        if lora_dropout > 0:
            self._drop_out_by_row(lora_dropout, seed)
        self.eval()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Compute float32 logits of shape (n_rows, n_classes).

        Parameters
        ----------
        input_ids, attention_mask : torch.Tensor of shape (n_rows, n_tokens)
            Padded on the right.
        """
        with self.backbone.autocast():
            output = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
            if self.pooling == "pooler":
                pooled = output.pooler_output
            else:
                pooled = pool(output[0], attention_mask, self.pooling)
        return self.head(pooled.float())

    def train(self, mode: bool = True) -> "TextClassifierModel":
        """Turn LoRA's dropout on or off. The base itself stays in evaluation mode for good."""
        super().train(False)
        self.training = mode
        for layer in lora_layers(self.encoder):
            layer.training = mode  # DoRA asks the layer, not its dropout
            layer.lora_dropout.train(mode)
        return self

    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """LoRA's parameters by name in the encoder."""
        return {name: p for name, p in self.encoder.named_parameters() if p.requires_grad}

    def count_trainable(self) -> int:
        """Count the parameters of the adapter and the head."""
        return sum(p.numel() for p in (*self.lora_parameters().values(), *self.head.parameters()))

    def capture(self, max_length: int) -> AdapterState:
        """Copy the adapter and the head out of the model, to NumPy and without the base."""
        return AdapterState(
            lora=self.lora,
            pooling=self.pooling,
            max_length=max_length,
            fingerprint=self.backbone.fingerprint,
            lora_tensors={name: _to_numpy(p) for name, p in self.lora_parameters().items()},
            head_tensors={name: _to_numpy(p) for name, p in self.head.named_parameters()},
        )

    @classmethod
    def restore(cls, backbone: Backbone, state: AdapterState) -> "TextClassifierModel":
        """Put a captured adapter and head onto a clone of the base, for prediction.

        Raises
        ------
        ValueError
            If the base is not the one that the adapter was trained on.
        """
        if backbone.fingerprint != state.fingerprint:
            raise ValueError(
                f"model={backbone.spec.model!r} (fingerprint {backbone.fingerprint[:12]}) is not "
                f"the base that was fitted (fingerprint {state.fingerprint[:12]}). "
                "Set `model` back to that base, or fit again."
            )
        n_classes = len(state.head_tensors["weight"])
        model = cls(backbone, state.lora, n_classes, state.pooling)
        parameters = model.lora_parameters()
        with torch.no_grad():
            for name, values in state.lora_tensors.items():
                parameters[name].copy_(torch.from_numpy(values))
            for name, parameter in model.head.named_parameters():
                parameter.copy_(torch.from_numpy(state.head_tensors[name]))
        return model

    def _drop_out_by_row(self, p: float, seed: int) -> None:
        for number, (layer, row_axes) in enumerate(self._row_axes().items()):
            # DeBERTa's queries and keys also serve relative positions, which all rows share and
            # no row's dropout may touch: such layers have none.
            row_axis = row_axes.pop() if len(row_axes) == 1 else None
            if row_axis is not None:
                layer.lora_dropout[ADAPTER] = RowDropout(p, seed, number, row_axis, self.clock)

    @torch.no_grad()
    def _row_axes(self) -> dict[Any, set[int | None]]:
        """Find the axis of the rows in the inputs of each adapted layer: run three rows of five."""
        n_rows, n_tokens = 3, 5
        axes: dict[Any, set[int | None]] = {layer: set() for layer in lora_layers(self.encoder)}

        def record(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            sizes = inputs[0].shape[:-1]
            rows = [i for i, size in enumerate(sizes) if size in (n_rows, n_rows * n_tokens)]
            axes[layer].add(rows[0] if rows else None)

        hooks = [layer.register_forward_pre_hook(record) for layer in axes]
        ids = torch.full((n_rows, n_tokens), 5, device=self.backbone.spec.device)
        self.eval()(ids, torch.ones_like(ids))
        for hook in hooks:
            hook.remove()
        return axes


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
    weights = mask[..., None].float()
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1)


def transformer_blocks(encoder: nn.Module) -> nn.ModuleList | None:
    """Find the stack of like blocks, or None where there is not exactly one of that length."""
    n_layers = getattr(encoder.config, "num_hidden_layers", None)
    stacks = [
        module
        for module in encoder.modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == n_layers
        and len({type(block) for block in module}) == 1
    ]
    return stacks[0] if len(stacks) == 1 else None


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


def _make_head(backbone: Backbone, n_classes: int, seed: int, *, bias: bool) -> nn.Linear:
    """Linear head as transformers starts one, drawn on the CPU whatever the device."""
    head = nn.utils.skip_init(nn.Linear, backbone.hidden_size, n_classes, bias=bias)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(head.weight, std=HEAD_INIT_STD, generator=generator)
    if bias:
        nn.init.zeros_(head.bias)
    return head.to(backbone.spec.device)


def _to_numpy(parameter: torch.Tensor) -> np.ndarray:
    return parameter.detach().cpu().numpy().copy()  # a view would keep the whole buffer alive
