"""The choices that a user has, the rules behind "auto", and the settings of one fit.

This package knows nothing about texts, models or files: plain values come in and go out.
"""
