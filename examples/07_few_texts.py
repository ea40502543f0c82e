"""
How many texts does it take?
============================

Accuracy over the number of labelled texts, beside the two cheap baselines, on two tasks with the
same texts: what area a function is of (a topic), and which of its siblings wrote it, SciPy or
scikit-learn (a manner). Frozen embeddings know topics already; for anything else the model must
learn what to look at.
"""

import time

import matplotlib.pyplot as plt
import numpy as np
from demo import QUICK, FrozenEmbeddings, load_documented, minilm_folder
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

from skqlora import QLoRAClassifier

SIZES = [24, 48] if QUICK else [24, 96, 384]
model = minilm_folder()
classifiers = {
    "TF-IDF": make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=10, max_iter=1000),
    ),
    "frozen embeddings": make_pipeline(
        FrozenEmbeddings(model), LogisticRegression(C=10, max_iter=1000)
    ),
    "QLoRAClassifier": QLoRAClassifier(
        model, random_state=0, num_train_epochs=1 if QUICK else "auto"
    ),
}

# %%
# The texts, and two labels of each.

documented = load_documented()
texts = np.array([each.text for each in documented], dtype=object)
tasks = {
    "area (12 topics)": np.array([each.area for each in documented]),
    "SciPy or scikit-learn": np.array([each.library for each in documented]),
}

# %%
# Each size is drawn from the same training texts, with the same share of every class.

figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for axes, (task, y) in zip(panels, tasks.items(), strict=True):
    rows, test = train_test_split(np.arange(len(texts)), test_size=0.3, stratify=y, random_state=0)
    accuracies = {name: [] for name in classifiers}
    for size in SIZES:
        few, _ = train_test_split(rows, train_size=size, stratify=y[rows], random_state=0)
        for name, classifier in classifiers.items():
            start = time.perf_counter()
            score = classifier.fit(texts[few], y[few]).score(texts[test], y[test])
            accuracies[name].append(score)
            print(
                f"{task:22}{size:4} texts  {name:18}{score:6.3f}"
                f"{time.perf_counter() - start:7.1f} s"
            )
    for name, scores in accuracies.items():
        axes.plot(SIZES, scores, marker="o", label=name)
    axes.set_xscale("log")
    axes.set_xticks(SIZES, SIZES)
    axes.minorticks_off()
    axes.set(title=task, xlabel="labelled texts", ylabel="accuracy")
panels[0].legend()
plt.show()
