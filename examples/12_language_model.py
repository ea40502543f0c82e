"""
A language model, a prompt, and few texts
=========================================

A decoder has read more than an encoder has, and it can be asked. Here SmolLM2-135M, a language
model that a CPU can train, reads what a function of SciPy or scikit-learn does and learns what area
it is of, from four texts an area. It does so three times: as it is; with a prompt; and with a
prompt and a head that starts as the model's own guess at the words that follow. TF-IDF is there for
comparison.

The model comes from the Hugging Face Hub, 270 MB the first time. Without a network, pass
``--model FOLDER`` with a folder that ``save_pretrained`` wrote.
"""

import argparse
import os
import time

import numpy as np
from demo import QUICK, load_docstrings
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

from skqlora import QLoRAClassifier

parser = argparse.ArgumentParser(description="Few texts, and a language model that is asked.")
parser.add_argument(
    "--model", default="HuggingFaceTB/SmolLM2-135M", help="a model id of the Hub, or a folder"
)
options = parser.parse_args()
PROMPT = "What the function does: {text}\nThe area of the function is"

# %%
# The classes are words, such as "linear algebra", so that the model can guess them.

texts, areas = map(np.array, load_docstrings())
n_areas = len(np.unique(areas))
train, test, y_train, y_test = train_test_split(
    texts,
    areas,
    train_size=4 * n_areas,
    test_size=3 * n_areas if QUICK else 20 * n_areas,
    stratify=areas,
    random_state=0,
)
print(f"{len(train)} training texts, {len(test)} test texts, {n_areas} areas")
if QUICK:
    print("One epoch shows that the example runs, and is too little to compare the methods.")

# %%
# The head that starts as a guess is for a prompt at whose end the name of the class would follow.

few = {"random_state": 0, "num_train_epochs": 1 if QUICK else 8}
classifiers = {
    "TF-IDF": make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=10, max_iter=1000),
    ),
    "language model": QLoRAClassifier(options.model, **few),
    "... with a prompt": QLoRAClassifier(options.model, prompt=PROMPT, **few),
    "... and class names": QLoRAClassifier(
        options.model, prompt=PROMPT, init_head_weights="class_names", **few
    ),
}
for name, classifier in classifiers.items():
    start = time.perf_counter()
    try:
        classifier.fit(train, y_train)
    except ValueError as error:
        if os.path.isdir(options.model):
            raise
        raise SystemExit(f"{error}\nWithout a network: --model FOLDER") from None
    seconds = time.perf_counter() - start
    print(f"{name:19} accuracy {classifier.score(test, y_test):.3f}  fit {seconds:6.1f} s")
