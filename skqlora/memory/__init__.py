"""How much memory a fit needs, told from shapes before a model is loaded.

Knows nothing of texts or labels.
"""
