"""The model card, a page that says to people and to the Hub what a saved estimator is."""

import os

from skqlora.adapter import Fitted
from skqlora.settings.parameters import Parameters
from skqlora.text.columns import Columns
from skqlora.text.targets import Numbers, Target

MAX_CLASSES = 50  # the greatest number of classes, or of numbers, that the page names
TEMPLATE = """\
---
{header}
---

# {title} on {base}

| | |
|---|---|
{table}

{predicts}.

```python
from skqlora import {estimator}

{name} = {estimator}.load("{path}")
{name}.{call}
```

The base is not part of this repository: it is loaded at the first prediction.
"""


def model_card(parameters: Parameters, fitted: Fitted, path: str) -> str:
    """Write a model card in the form of the Hugging Face Hub.

    Parameters
    ----------
    parameters : Parameters
    fitted : Fitted
    path : str
        The folder or the repository that the card says to load the estimator from.

    Returns
    -------
    card : str
        The page, in Markdown with a header in YAML.
    """
    from huggingface_hub import ModelCardData  # its import changes logging

    model = parameters.model
    header = ModelCardData(
        base_model=None if os.path.isdir(model) else model,
        library_name="skqlora",
        pipeline_tag="text-classification",
        tags=["peft", "lora", "qlora", "scikit-learn"],
    )
    prompt, columns = fitted.adapter.text_settings.prompt, fitted.columns
    score, losses = fitted.best_validation_score, fitted.loss_curve
    rows = {
        "base": f"{model}, {parameters.quantization or 'not quantized'}",
        "adapter": f"LoRA of rank {fitted.adapter.lora.r}",
        "trained parameters": f"{fitted.footprint.trainable_parameters:,}",
        "training texts": f"{fitted.n_samples_seen:,}" if losses else None,
        "columns": list(columns.names) if columns and columns.names else None,
        "prompt": repr(prompt) if prompt else None,
        "epochs": fitted.n_iter,
        "training loss": f"{losses[-1]:.4f} ({fitted.target.loss})" if losses else None,
        "validation score": None if score is None else f"{score:.4f}",
    }
    return TEMPLATE.format(
        header=header.to_yaml(),
        base=os.path.basename(model),
        table="\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items() if value),
        call=_call(columns),
        path=path,
        **_words_of(fitted.target),
    )


def _words_of(target: Target) -> dict[str, str]:
    """Return what the page says of the estimator and what it predicts."""
    if isinstance(target, Numbers):
        each = zip(target.mean.tolist(), target.scale.tolist(), strict=True)
        shown = [f"{mean:.4g} ± {scale:.4g}" for mean, scale in each]
        if len(shown) > MAX_CLASSES:
            shown[MAX_CLASSES:] = [f"and {len(shown) - MAX_CLASSES} more"]
        spread = ", ".join(shown)
        return {
            "title": f"Text regressor: {target.n_outputs} number(s)",
            "predicts": f"Mean and standard deviation of what it was trained on: {spread}",
            "estimator": "QLoRARegressor",
            "name": "reg",
        }
    labels = [str(label) for label in target.values.tolist()]
    n_classes = len(labels)
    if n_classes > MAX_CLASSES:
        labels[MAX_CLASSES:] = [f"and {n_classes - MAX_CLASSES} more"]
    return {
        "title": f"Text classifier: {n_classes} classes",
        "predicts": f"Classes: {', '.join(labels)}",
        "estimator": "QLoRAClassifier",
        "name": "clf",
    }


def _cell(value: object) -> str:
    """Print a value in a cell of a table of Markdown, where a bar would begin another one."""
    return str(value).replace("|", "\\|")


def _call(columns: Columns | None) -> str:
    """Return a call of `predict`, with what `X` is."""
    if columns is None or columns.number in (None, 1):
        return 'predict(["..."])'
    if columns.names is None:
        return f"predict(X)  # a table with {columns.number} columns"
    return f"predict(X)  # a table with the columns {list(columns.names)}"
