"""The choices that a user has, the rules behind "auto", and the settings of one fit.

This package knows nothing of models or files: plain values come in and go out.
"""
