"""The fit of an adapter to labelled texts: its epochs, its updates, its checkpoints.

These modules know nothing of how an estimator is called or saved.
"""
