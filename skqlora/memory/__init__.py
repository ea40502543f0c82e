"""The memory that a fit needs, computed from shapes before a model is loaded.

This package works with numbers of tokens and classes, and never sees a text or a label.
"""
