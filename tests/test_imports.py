"""Importing the package changes nothing and loads nothing heavy."""

import subprocess
import sys

SCRIPT = """
import logging, os, sys, warnings
import sklearn
def state():
    loggers = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict}
    return loggers, list(warnings.filters), dict(os.environ)
before = state()
import skqlora
clf = skqlora.QLoRAClassifier(lora_r=8)
clf.get_params(), clf._repr_html_(), repr(clf), dir(clf)
assert state() == before
heavy = {"torch", "transformers", "peft", "bitsandbytes"} & set(sys.modules)
assert not heavy, heavy
"""


def test_import_has_no_side_effects():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)


def test_fit_on_a_cpu_takes_no_cuda_context_and_prints_nothing(encoder):
    script = (
        "import sys; from skqlora import QLoRAClassifier\n"
        "clf = QLoRAClassifier(sys.argv[1], num_train_epochs=1, device='cpu')\n"
        "clf.fit(['a cat', 'red'], ['animal', 'colour']).predict(['blue'])\n"
        "import torch; assert not torch.cuda.is_initialized()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, encoder],
        check=True,
        capture_output=True,
        text=True,
    )
    assert result.stdout + result.stderr == ""
