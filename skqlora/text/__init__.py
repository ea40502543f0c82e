"""The texts, labels and weights that a user passes, and the way from texts to token-id batches.

This package knows nothing about models.
"""
