"""The fit of an adapter to texts under given settings: its epochs, its updates, its checkpoints.

These modules know nothing of what the user calls a class, except where a head starts from the names
of the classes.
"""
