"""The model card, a page that says to people and to the Hub what a saved classifier is."""

import os

from skqlora.adapter import Fitted
from skqlora.settings.parameters import Parameters
from skqlora.text.columns import Columns

MAX_CLASSES = 50  # the greatest number of classes that the page names
TEMPLATE = """\
---
{header}
---

# Text classifier: {n_classes} classes on {base}

| | |
|---|---|
{table}

Classes: {classes}.

```python
from skqlora import QLoRAClassifier

clf = QLoRAClassifier.load("{path}")
{example}
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
        The folder or the repository that the card says to load the classifier from.

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
        "training loss": f"{losses[-1]:.4f} nats" if losses else None,
        "validation score": None if score is None else f"{score:.4f}",
    }
    labels = [str(label) for label in fitted.classes.tolist()]
    if len(labels) > MAX_CLASSES:
        labels[MAX_CLASSES:] = [f"and {len(labels) - MAX_CLASSES} more"]
    return TEMPLATE.format(
        header=header.to_yaml(),
        n_classes=len(fitted.classes),
        base=os.path.basename(model),
        table="\n".join(f"| {name} | {_cell(value)} |" for name, value in rows.items() if value),
        example=_example(columns),
        classes=", ".join(labels),
        path=path,
    )


def _cell(value: object) -> str:
    """Print a value in a cell of a table of Markdown, where a bar would begin another one."""
    return str(value).replace("|", "\\|")


def _example(columns: Columns | None) -> str:
    """Return a call of `predict`."""
    if columns is None or columns.number in (None, 1):
        return 'clf.predict(["..."])'
    return "clf.predict(X)  # " + (
        f"a table with {columns.number} columns"
        if columns.names is None
        else f"a table with the columns {list(columns.names)}"
    )
