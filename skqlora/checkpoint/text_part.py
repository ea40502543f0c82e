"""The part of a model that reads text: all of it, a decoder beside other towers, or an encoder.

A checkpoint of more than text holds a text decoder like any other, and beside it the towers of
other modalities. An encoder-decoder holds an encoder. Which part it is follows from the
configuration and from what transformers builds of it. There is no table of models.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_TEXT_ENCODING_MAPPING,
    MODEL_MAPPING,
    AutoModel,
    AutoModelForImageTextToText,
    AutoModelForTextEncoding,
    PreTrainedConfig,
    PreTrainedModel,
)


class NoTextPartError(ValueError):
    """transformers has no model of the part of a model that reads text."""


@dataclass(frozen=True)
class TextPart:
    """The text model of a checkpoint.

    Attributes
    ----------
    config : transformers.PreTrainedConfig
        The configuration of the text model alone.
    skeleton : transformers.PreTrainedModel
        The text model on the meta device, with every shape and no weight.
    whole : bool
        Whether the checkpoint is of the text model alone, so that all of it is read.
    """

    config: PreTrainedConfig
    skeleton: PreTrainedModel
    whole: bool


def build_text_part(config: PreTrainedConfig, attn_implementation: str | None = None) -> TextPart:
    """Build the text model of a configuration on the meta device.

    Parameters
    ----------
    config : transformers.PreTrainedConfig
        The configuration of the whole model.
    attn_implementation : str, optional
        The name of the attention kernel in transformers.

    Returns
    -------
    part : TextPart

    Raises
    ------
    NoTextPartError
        If transformers has no model of the part alone.
    Exception
        Whatever transformers raises if it cannot build the model.
    """
    options = {"attn_implementation": attn_implementation}
    with torch.device("meta"):
        if config.is_encoder_decoder or _is_encoder_alone(config):
            encoder = _encoder_config(config)
            skeleton = AutoModelForTextEncoding.from_config(encoder, **options)
            return TextPart(encoder, skeleton, whole=False)
        text = config.get_text_config()
        if type(text) in MODEL_MAPPING or text is config:
            skeleton = AutoModel.from_config(text, trust_remote_code=False, **options)
        else:
            skeleton = _decoder_class(config)._from_config(text, **options)
    return TextPart(text, skeleton, whole=text is config)


def _is_encoder_alone(config: PreTrainedConfig) -> bool:
    """Return whether a checkpoint is of an encoder-decoder's encoder, such as T5EncoderModel."""
    if type(config) not in MODEL_FOR_TEXT_ENCODING_MAPPING or type(config) not in MODEL_MAPPING:
        return False
    encoder: Any = MODEL_FOR_TEXT_ENCODING_MAPPING[type(config)]
    is_another = encoder is not MODEL_MAPPING[type(config)]
    return is_another and encoder.__name__ in (config.architectures or ())


def _encoder_config(config: PreTrainedConfig) -> PreTrainedConfig:
    if type(config) not in MODEL_FOR_TEXT_ENCODING_MAPPING:
        raise NoTextPartError("is an encoder-decoder, of whose encoder transformers has no model")
    config = copy.deepcopy(config)
    config.is_encoder_decoder = False
    return config


def _decoder_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Find the class of a text decoder that only the whole model knows, as that of Ernie 4.5 VL."""
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise NoTextPartError("holds a text model of which transformers has no class")
    whole = AutoModelForImageTextToText.from_config(config, trust_remote_code=False)
    return type(whole.get_decoder())
