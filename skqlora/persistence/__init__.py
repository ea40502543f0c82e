"""Fitted estimators as files: our own format, PEFT's and Transformers'.

Knows nothing of how an adapter is trained.
"""
