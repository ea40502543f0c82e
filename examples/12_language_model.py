"""
A language model, a prompt, and few texts
=========================================

A decoder has read more than an encoder has, and it can be asked. Here SmolLM2-135M, a language
model that a CPU can train, reads what a function of SciPy or scikit-learn does and learns what area
it is of, from four texts an area. It does so three times: as it is; with a prompt; and with a
prompt and a head that starts as the model's own guess at the words that follow. TF-IDF is there for
comparison.

The model comes from the Hugging Face Hub, 270 MB the first time. Without a network, set ``MODEL``
to a folder that holds it, as ``save_pretrained`` writes one.
"""

import time

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

from skqlora import QLoRAClassifier
from skqlora.demo import load_docstrings

MODEL = "HuggingFaceTB/SmolLM2-135M"
PROMPT = "What the function does: {text}\nThe area of the function is"

# %%
# The classes are words, such as "linear algebra", so that the model can guess them.

texts, areas = load_docstrings()
n_areas = len(set(areas))
train, test, train_y, test_y = train_test_split(
    texts, areas, train_size=4 * n_areas, test_size=0.25, stratify=areas, random_state=0
)
print(f"{len(train)} training texts, {len(test)} test texts, {n_areas} areas")

# %%
# The head that starts as a guess is for a prompt at whose end the name of the class would follow.

few = {"random_state": 0, "num_train_epochs": 8}
classifiers = {
    "TF-IDF": make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=10, max_iter=1000),
    ),
    "language model": QLoRAClassifier(MODEL, **few),
    "... with a prompt": QLoRAClassifier(MODEL, prompt=PROMPT, **few),
    "... and class names": QLoRAClassifier(
        MODEL, prompt=PROMPT, init_head_weights="class_names", **few
    ),
}
for name, classifier in classifiers.items():
    start = time.perf_counter()
    classifier.fit(train, train_y)
    seconds = time.perf_counter() - start
    print(f"{name:19} accuracy {classifier.score(test, test_y):.3f}  fit {seconds:6.1f} s")
