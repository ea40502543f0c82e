"""What a user passes as texts, labels and weights, and how texts become batches of token ids.

Knows nothing of models.
"""
