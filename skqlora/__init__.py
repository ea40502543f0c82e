"""Fine-tune a 4-bit language model for text classification behind one scikit-learn estimator."""

from skqlora.classifier import QLoRAClassifier

__all__ = ["QLoRAClassifier"]

__version__ = "0.1.0.dev0"
