"""
How many texts does it take?
============================

Accuracy over the number of labelled texts, compared with two cheap baselines, on two tasks: what
area a text is of (a topic), and whether it describes a class or a function (a manner of speaking).
Frozen embeddings know topics already; what else they know of a text is in no simple place.
"""

import time
from collections import defaultdict

import matplotlib.pyplot as plt
import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline

from skqlora import QLoRAClassifier
from skqlora.demo import FrozenEmbeddings, load_documented, minilm_folder

model = minilm_folder()
classifiers = {
    "TF-IDF": make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=10, max_iter=1000),
    ),
    "frozen embeddings": make_pipeline(
        FrozenEmbeddings(model), LogisticRegression(C=10, max_iter=1000)
    ),
    "QLoRAClassifier": QLoRAClassifier(model, random_state=0),
}

# %%
# For the manner each area has as many classes as functions, so that the topic tells nothing.

documented = load_documented()
groups = defaultdict(list)
for each in documented:
    groups[each.area, each.is_class].append(each)
balanced = []
for area in {each.area: None for each in documented}:
    pairs = zip(groups[area, True], groups[area, False], strict=False)
    balanced += [each for pair in pairs for each in pair]
tasks = {
    "area (12 topics)": (documented, [each.area for each in documented], [24, 96, 384]),
    "class or function": (
        balanced,
        ["class" if each.is_class else "function" for each in balanced],
        [16, 48, 120],
    ),
}

# %%
# Each size is drawn from the same training texts, with the same share of every class. It is a
# single draw: on the 128 test texts of the second task differences below 0.06 or so are chance.

figure, panels = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
for axes, (task, (chosen, labels, wanted)) in zip(panels, tasks.items(), strict=True):
    texts = np.array([each.text for each in chosen], dtype=object)
    y = np.array(labels)
    share = 0.3 if len(texts) > 500 else 0.5
    rows, test = train_test_split(
        np.arange(len(texts)), test_size=share, stratify=y, random_state=0
    )
    accuracies = {name: [] for name in classifiers}
    sizes = [size for size in wanted if size < len(rows)]
    for size in sizes:
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
        axes.plot(sizes, scores, marker="o", label=name)
    axes.axhline(np.unique(y, return_counts=True)[1].max() / len(y), color="0.7", label="guessing")
    axes.set_xscale("log")
    axes.set_xticks(sizes, sizes)
    axes.minorticks_off()
    axes.set(title=task, xlabel="labelled texts", ylabel="accuracy")
panels[0].legend()
plt.show()
