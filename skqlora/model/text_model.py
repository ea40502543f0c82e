"""The forward pass in one piece: token ids, hidden states, one vector a text, outputs.

This module knows nothing of texts or of how the model is trained. In the shapes below, a pass has b
texts of t tokens, a hidden state has d features, and the head has k outputs.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from skqlora.adapter import AdapterState, check_shapes
from skqlora.model.backbone import Backbone
from skqlora.model.dropout import DropoutOfUpdates, LoraDropout
from skqlora.model.lora import ADAPTER
from skqlora.model.replicas import AdaptedReplica
from skqlora.settings.adapter_settings import LoraSettings, TextSettings

HEAD_INIT_STD = 0.02  # the standard deviation of a new classification head in transformers


class TextModel(nn.Module):
    """A quantized base with LoRA layers, pooling and a float32 linear head.

    It is made by `for_training` or `for_prediction`. Both are context managers, which give the
    replica of the base back at their end.

    Parameters
    ----------
    backbone : Backbone
    replica : AdaptedReplica
    lora : LoraSettings
    pooling : {"last", "mean", "cls", "pooler"}
    n_outputs : int
    """

    def __init__(
        self,
        backbone: Backbone,
        replica: AdaptedReplica,
        lora: LoraSettings,
        pooling: str,
        n_outputs: int,
    ):
        super().__init__()
        self.backbone = backbone
        self.replica = replica
        self.lora = lora
        self.pooling = pooling
        self.encoder = replica.module
        self.head = nn.Linear(
            backbone.hidden_size,
            n_outputs,
            bias=pooling != "last",  # transformers' heads of decoders have none
            dtype=torch.float32,
            device="meta",  # it draws no random numbers there
        ).to_empty(device=backbone.spec.device)
        self._dropout: DropoutOfUpdates | None = None
        self.head.eval()
        self.training = False  # like all of the replica

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        *,
        update: int = 0,
    ) -> torch.Tensor:
        """Compute the outputs of the head for some texts, such as the logits of their classes.

        Parameters
        ----------
        input_ids, attention_mask : torch.Tensor of int64, of shape (b, t)
            The token ids and their mask, padded on the right.
        token_type_ids : torch.Tensor of int64, of shape (b, t), optional
            Of which of two texts each token is, for models that are told so.
        update : int, default=0
            In training, the number of the update, which has a mask of dropout of its own.

        Returns
        -------
        outputs : torch.Tensor of float32, of shape (b, k)
        """
        if self.training and self._dropout is not None:
            self._dropout.draw(update)
        features = self.encode(input_ids, attention_mask, token_type_ids)
        return self.head(features)  # (b, d) @ (d, k)

    def encode(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Compute the input of the head: one float32 vector a text, of shape (b, d)."""
        self.replica.refresh()
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:  # not every model has this argument
            inputs["token_type_ids"] = token_type_ids
        with self.backbone.autocast(by_peft=self.lora.use_dora):
            # Each adapted linear layer computes dequantize(W) x + scaling * B A dropout(x): W is
            # frozen and has 4 bits, A and B are trained in float32. See lora_layer.py.
            output = self.encoder(**inputs)
            if self.pooling == "pooler":  # a trained layer over the first token, as BERT's
                pooled = output.pooler_output  # (b, d)
            else:
                pooled = pool(output[0], attention_mask, self.pooling)  # (b, t, d) to (b, d)
        return pooled.float()

    @classmethod
    @contextmanager
    def for_training(
        cls,
        backbone: Backbone,
        lora: LoraSettings,
        n_outputs: int,
        pooling: str,
        *,
        seed: int = 0,
        lora_dropout: float = 0.0,
        start: AdapterState | None = None,
    ) -> "Iterator[TextModel]":
        """Lease a replica with an adapter and a head to be trained.

        Parameters
        ----------
        backbone : Backbone
        lora : LoraSettings
        n_outputs : int
        pooling : {"auto", "last", "mean", "cls", "pooler"}
            How hidden states become one vector a text. "auto" is "last" for a causal base and
            "mean" for any other.
        seed : int, default=0
            The seed of the first values of LoRA and of the head, and of dropout.
        lora_dropout : float, default=0.0
        start : AdapterState, optional
            The values that the adapter and the head begin with, instead of random ones.

        Yields
        ------
        model : TextModel

        Raises
        ------
        ValueError
            If the base cannot be pooled this way, if PEFT finds none of the target modules, or if
            `start` is of another base or another shape.
        """
        pooling = _resolve_pooling(pooling, backbone)
        keep_pooler = pooling == "pooler"
        with backbone.lease(lora, keep_pooler=keep_pooler) as replica:
            model = cls(backbone, replica, lora, pooling, n_outputs)
            if start is None:
                replica.reset_parameters(lora, seed)
                _reset_head(model.head, seed)
            else:
                check_base(backbone, start)
                _check_adapter_settings(lora, pooling, start)
                replica.load_adapter(start)
                model.load_head(start.head_tensors)
            with model._with_dropout(lora_dropout, seed):
                yield model

    @classmethod
    @contextmanager
    def for_prediction(cls, backbone: Backbone, adapter: AdapterState) -> "Iterator[TextModel]":
        """Lease a replica that carries a fitted adapter and its head.

        Yields
        ------
        model : TextModel

        Raises
        ------
        ValueError
            If the base is not the one that the adapter was trained on.
        """
        check_base(backbone, adapter)
        keep_pooler = adapter.pooling == "pooler"
        with backbone.lease(adapter.lora, keep_pooler=keep_pooler, holding=adapter) as replica:
            replica.load_adapter(adapter)
            n_outputs = len(adapter.head_tensors["weight"])
            model = cls(backbone, replica, adapter.lora, adapter.pooling, n_outputs)
            model.load_head(adapter.head_tensors)
            yield model

    @torch.no_grad()
    def load_head(self, tensors: dict[str, np.ndarray]) -> None:
        """Give the head these values, named as in `AdapterState.head_tensors`."""
        parameters = dict(self.head.named_parameters())
        check_shapes(tensors, {name: tuple(p.shape) for name, p in parameters.items()})
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(tensors[name]))

    def train(self, mode: bool = True) -> "TextModel":
        """Turn LoRA's dropout on or off. The base itself stays in evaluation mode for good."""
        self.training = mode
        for layer in self.replica.lora_layers:
            layer.training = mode  # DoRA looks at the layer, not at its dropout
            layer.lora_dropout.train(mode)
        return self

    def count_trainable(self) -> int:
        """Count the parameters of the adapter and the head."""
        return self.replica.n_parameters + sum(p.numel() for p in self.head.parameters())

    def adapter_state(
        self, text_settings: TextSettings, tokenizer_fingerprint: str = ""
    ) -> AdapterState:
        """Copy the adapter and the head out of the model, to NumPy and without the base.

        The replica still holds the adapter, for a prediction that follows. The model itself does
        not use `text_settings` and `tokenizer_fingerprint`; they are only noted in the state.
        """
        state = AdapterState(
            lora=self.lora,
            pooling=self.pooling,
            text_settings=text_settings,
            model=self.backbone.spec.model,
            revision=self.backbone.spec.revision,
            fingerprint=self.backbone.fingerprint_for(self.pooling),
            tokenizer_fingerprint=tokenizer_fingerprint,
            lora_tensors=self.replica.state_dict(),
            head_tensors={name: _to_numpy(p) for name, p in self.head.named_parameters()},
        )
        self.replica.mark_holding(state)
        return state

    @contextmanager
    def _with_dropout(self, p: float, seed: int) -> Iterator[None]:
        """Put dropout before the adapted layers, for the time of a training."""
        if p == 0:
            yield
            return
        # An embedding, which has an adapter of another kind, has no dropout.
        layers = [layer for layer in self.replica.lora_layers if ADAPTER in layer.lora_A]
        for layer in layers:
            where = layer.lora_A[ADAPTER].weight.device, self.backbone.spec.compute_dtype
            layer.lora_dropout[ADAPTER] = LoraDropout(p, layer.in_features, *where).eval()
        dropouts = [layer.lora_dropout[ADAPTER] for layer in layers]
        self._dropout = DropoutOfUpdates(dropouts, seed) if dropouts else None
        yield
        self._dropout = None
        for layer in layers:
            layer.lora_dropout[ADAPTER] = nn.Identity()


def pool(hidden: torch.Tensor, mask: torch.Tensor, pooling: str) -> torch.Tensor:
    """Reduce hidden states to one vector a row, by the mask and never by the padding's id.

    Parameters
    ----------
    hidden : torch.Tensor of shape (n_rows, n_tokens, hidden_size)
    mask : torch.Tensor of shape (n_rows, n_tokens)
        The mask, which is 1 for tokens and then 0 for padding.
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
    """Choose how hidden states become one vector a text; raise ValueError where they cannot."""
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


def check_base(backbone: Backbone, adapter: AdapterState) -> None:
    """Check that a base is the one that an adapter was trained on; raise ValueError otherwise."""
    if not backbone.is_base_of(adapter):
        found = backbone.fingerprint_for(adapter.pooling)
        raise ValueError(
            f"model={backbone.spec.model!r} (fingerprint {found[:12]}) is not "
            f"the base that was fitted (fingerprint {adapter.fingerprint[:12]}). "
            f"That was {adapter.model!r} when it was fitted. Set `model` back to that base, or "
            "call `fit` with warm_start=False."
        )


def _check_adapter_settings(lora: LoraSettings, pooling: str, start: AdapterState) -> None:
    if (lora, pooling) != (start.lora, start.pooling):
        raise ValueError(
            f"Got {lora} and pooling={pooling!r}, but the fitted adapter to continue from has "
            f"{start.lora} and pooling={start.pooling!r}. Set the parameters back, or call `fit` "
            "with warm_start=False."
        )


@torch.no_grad()
def _reset_head(head: nn.Linear, seed: int) -> None:
    """Set the first values that transformers would give a head, drawn on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.empty(head.weight.shape, dtype=torch.float32)
    head.weight.copy_(weight.normal_(std=HEAD_INIT_STD, generator=generator))
    if head.bias is not None:
        head.bias.zero_()


def _to_numpy(parameter: torch.Tensor) -> np.ndarray:
    return parameter.detach().cpu().numpy().copy()  # a view would keep the whole buffer alive
