"""The version of this package, which files note that it writes."""

__version__ = "0.1.0.dev0"
