"""Fine-tune a 4-bit language model for text classification behind one scikit-learn estimator."""

from skqlora._utils.version import __version__ as __version__
from skqlora.classifier import QLoRAClassifier
from skqlora.display import LossCurveDisplay
from skqlora.estimate import estimate_memory
from skqlora.model.cache import backbone_cache_info, clear_backbone_cache
from skqlora.versions import show_versions

__all__ = [
    "LossCurveDisplay",
    "QLoRAClassifier",
    "backbone_cache_info",
    "clear_backbone_cache",
    "estimate_memory",
    "show_versions",
]
