"""Fitted estimators as files, in the formats of this package, of PEFT and of Transformers.

These modules know nothing of how an adapter is trained.
"""
