"""The frozen 4-bit base, the adapters on it, the forward pass, and predictions of texts.

This package knows nothing of how a model is trained, saved or fitted to a machine's memory.
"""
