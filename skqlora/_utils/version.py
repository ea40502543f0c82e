"""The version of this package, which is also noted in the files that it writes."""

__version__ = "0.1.0.dev0"
