"""Fine-tune a 4-bit language model for classes or numbers of texts, as scikit-learn estimators."""

from skqlora._utils.version import __version__ as __version__
from skqlora.classifier import QLoRAClassifier
from skqlora.display import LossCurveDisplay
from skqlora.estimate import estimate_memory
from skqlora.model.cache import backbone_cache_info, clear_backbone_cache
from skqlora.persistence.trusted_types import TRUSTED_TYPES as TRUSTED_TYPES
from skqlora.regressor import QLoRARegressor
from skqlora.versions import show_versions

__all__ = [
    "LossCurveDisplay",
    "QLoRAClassifier",
    "QLoRARegressor",
    "backbone_cache_info",
    "clear_backbone_cache",
    "estimate_memory",
    "show_versions",
]
