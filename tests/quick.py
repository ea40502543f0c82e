"""Make the examples quick: few texts, and one epoch.

``python tests/quick.py examples/06_imbalanced.py`` runs an example so. What it prints shows that it
runs, and not how well anything works.
"""

import runpy
import sys

from skqlora import demo
from skqlora.training import epochs


def make_quick():
    """Let this process load few texts, and train for one epoch whatever the parameters say."""
    demo.LARGEST_AREA = 12
    epochs.resolve_epochs = lambda parameters, n_texts: 1


if __name__ == "__main__":
    make_quick()
    runpy.run_path(sys.argv[1], run_name="__main__")
