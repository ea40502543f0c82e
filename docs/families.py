"""Write families.md: which families of transformers can be adapted, and why the others cannot.

Each family is tried with its default configuration, on the meta device and so without weights::

    python docs/families.py
"""

import re
from collections import defaultdict
from pathlib import Path

import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from skqlora.checkpoint.architecture import describe_architecture
from skqlora.checkpoint.experts import has_experts

PAGE = Path(__file__).parent / "families.md"
FAMILIES = sorted(
    {
        *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
)
TEXT, TOWER, ENCODER = "text", "tower", "encoder"
UNBUILT = "cannot be built by transformers"
HEAD = """\
# Families of models

`skqlora` can adapt models of {accepted} of the {total} families of transformers {version} that
predict tokens, classify texts, or read texts and images. A *family* is an architecture for which
transformers has code. You find the family of a model as `model_type` in its config.json: that of
Qwen3.5 is qwen3_5, and that of SmolLM2 is llama. If you look for a model and not for a family,
read [Choosing a model](guide/models.md).

The list comes from `python docs/families.py`, which tries the default configuration of each family
without weights. A checkpoint may differ from the default. Whether it works is checked when it is
loaded, and if it does not, `fit` refuses it with the reason.

"""
TEXTS = """\
## Text models

{names}.

"""
TOWERS = """\
## Text models within others

A checkpoint of these families holds a text model together with other models, for images or sound.
Only the text model is read. Its own family is in parentheses.

{names}.

"""
ENCODERS = """\
## Encoders of encoder-decoders

These families turn one text into another by two models: an encoder that reads and a decoder that
writes. Only the encoder is read, and the mean of its outputs over the tokens is classified.

{names}.

"""
EXPERTS = """\
## Mixtures of experts

Layers of these families have many alternative parts, the *experts*, of which each token uses a few.
Most of the weights are in them, and they are quantized to 4 bits too.

{names}.

"""
REFUSED = """\
## Refused

`fit` refuses models of these families before it loads them, with the reason given here.

| family | why |
|---|---|
{refused}

## Unknown from the default configuration

transformers cannot build these families from their default configurations, in which something is
missing that a checkpoint has. So `skqlora` may well accept a checkpoint of such a family.

| family | why |
|---|---|
{unbuilt}
"""


def try_family(family):
    """Return a model's kind, the family of its text model, and whether it is a mixture of experts.

    Raises
    ------
    ValueError
        If skqlora refuses the model.
    """
    try:
        config = CONFIG_MAPPING[family]()
    except Exception as error:  # some have no default that is valid
        raise ValueError(
            f" no default configuration in transformers: {_first_line(error)}. "
        ) from error
    architecture = describe_architecture(config, model=family, quantized=True)
    part = ENCODER if config.is_encoder_decoder else TOWER
    kind = TEXT if architecture.whole else part
    return kind, architecture.model_type, has_experts(architecture.skeleton)


def try_all():
    """Return what `try_family` does for each family, and the reasons for those refused."""
    accepted, refused = {}, {}
    for family in FAMILIES:
        try:
            accepted[family] = try_family(family)
        except ValueError as error:
            refused[family] = _reason(error)
    return accepted, refused


def _reason(error):
    """Return what a message says of the model, without its name and the remedy."""
    what = re.sub(r"^model='[^']*' \([^)]*\) ", "", str(error).split(" Wanted: ")[0])
    return _first_line(what.strip()).replace("|", r"\|").rstrip(".")


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def page_of(accepted, refused):
    """Return the page as Markdown."""
    names = defaultdict(list)
    for family, (kind, text, experts) in accepted.items():
        names[kind].append(f"{family} ({text})" if kind == TOWER else family)
        if experts:
            names["experts"].append(family)
    rows = {True: [], False: []}
    for family, reason in refused.items():
        rows[reason.startswith(UNBUILT)].append(f"| {family} | {reason} |")
    count = {"total": len(FAMILIES), "accepted": len(accepted)}
    return (
        HEAD.format(version=transformers.__version__, **count)
        + TEXTS.format(names=", ".join(names[TEXT]))
        + TOWERS.format(names=", ".join(names[TOWER]))
        + ENCODERS.format(names=", ".join(names[ENCODER]))
        + EXPERTS.format(names=", ".join(names["experts"]))
        + REFUSED.format(refused="\n".join(rows[False]), unbuilt="\n".join(rows[True]))
    )


if __name__ == "__main__":
    PAGE.write_text(page_of(*try_all()), encoding="utf-8")
