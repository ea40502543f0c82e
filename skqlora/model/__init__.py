"""The frozen 4-bit base, the adapters on it, and the forward pass from token ids to logits.

This package knows nothing of how a model is trained, saved or fitted to a machine's memory.
"""
