"""Tests with other libraries, whose warnings about each other are not ours to mend."""


def pytest_configure(config):
    """Ignore warnings, also while the libraries are imported."""
    config.addinivalue_line("filterwarnings", "ignore")
