"""The settings that an adapter depends on and that are therefore saved with it."""

import math
from dataclasses import dataclass

TRUNCATIONS = "head", "tail", "head+tail", "windows"


@dataclass(frozen=True)
class LoraSettings:
    """The settings that decide an adapter's shape and initial values, by their names in PEFT."""

    r: int
    lora_alpha: float  # PEFT annotates it as an int, but only divides it
    target_modules: str | tuple[str, ...]
    use_rslora: bool
    use_dora: bool
    init_lora_weights: bool | str

    @property
    def scaling(self) -> float:
        """The factor of LoRA's output: alpha / r, or alpha / sqrt(r) (arXiv 2312.03732)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)


@dataclass(frozen=True)
class TextSettings:
    """The settings for turning a text into token ids, named like the estimator's parameters.

    With `parse_special_tokens`, a literal "</s>" in a text is that token, as it is to other
    programs. It is so for adapters that were trained elsewhere, or before version 2 of the saved
    format. With `token_type_ids`, a text of two parts without a prompt comes with numbers that tell
    the model of which part each token is.
    """

    max_length: int
    truncation: str = "head"
    stride: int = 0
    prompt: str | None = None
    parse_special_tokens: bool = False
    token_type_ids: bool = False
