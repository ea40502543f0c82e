"""From texts and settings to a trained adapter: one fit, its epochs, its updates, and its safety.

Knows nothing of what the user calls a class, except where a head starts from the classes' names.
"""
