"""The types that skops is to trust when it reads an estimator of this package.

They hold plain data, and making one runs nothing else.
"""

from pathlib import Path

# The class of `model` and `checkpoint_dir` if they are paths; its name depends on the platform,
# and in Python 3.13 on the version.
PATH = type(Path())

#: The names of all types in a fitted estimator that skops does not know, for its `trusted` and for
#: MLflow's `skops_trusted_types`.
TRUSTED_TYPES = [
    f"{PATH.__module__}.{PATH.__qualname__}",
    "skqlora.adapter.AdapterState",
    "skqlora.adapter.Footprint",
    "skqlora.adapter.OptimizerState",
    "skqlora.classifier.QLoRAClassifier",
    "skqlora.regressor.QLoRARegressor",
    "skqlora.settings.adapter_settings.LoraSettings",
    "skqlora.settings.adapter_settings.TextSettings",
    "skqlora.settings.settings.Settings",
    "skqlora.text.columns.Columns",
    "skqlora.text.targets.Classes",
    "skqlora.text.targets.Numbers",
]
