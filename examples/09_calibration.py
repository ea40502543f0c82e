"""
Do the probabilities mean what they say?
========================================

Of the texts that a classifier is 90% sure of, nine in ten should be right. A fine-tuned model that
has seen its few texts often is more sure than that. scikit-learn's `CalibratedClassifierCV` learns
one temperature on texts that were held out, by which the logits are divided: predictions stay, and
probabilities become honest (Guo et al., arXiv 1706.04599).
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.calibration import CalibratedClassifierCV
from sklearn.frozen import FrozenEstimator
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split

from skqlora import QLoRAClassifier
from skqlora.demo import load_docstrings, minilm_folder

# %%
# Three parts: to train, to calibrate, to test.

texts, areas = load_docstrings()
rest, test, rest_y, test_y = train_test_split(
    texts, areas, test_size=0.4, stratify=areas, random_state=0
)
train, held_out, train_y, held_out_y = train_test_split(
    rest, rest_y, test_size=0.3, stratify=rest_y, random_state=0
)
clf = QLoRAClassifier(minilm_folder(), random_state=0)
clf.fit(train, train_y)

# %%
# `FrozenEstimator` keeps what is fitted as it is; the one "fold" is all of the held-out texts.

rows = np.arange(len(held_out))
calibrated = CalibratedClassifierCV(
    FrozenEstimator(clf), method="temperature", cv=[(rows, rows)]
).fit(held_out, held_out_y)

# %%
# A reliability diagram: accuracy over confidence, in bins of equally many texts.

figure, axes = plt.subplots(figsize=(4.8, 4.5), layout="constrained")
axes.plot([0, 1], [0, 1], color="0.7", linestyle="--", label="honest")
for name, classifier in {"before": clf, "after": calibrated}.items():
    proba = classifier.predict_proba(test)
    hits = classifier.classes_[proba.argmax(axis=1)] == np.array(test_y)
    bins = np.array_split(np.argsort(proba.max(axis=1)), 8)
    confidence = np.array([proba.max(axis=1)[bin_].mean() for bin_ in bins])
    accuracy = np.array([hits[bin_].mean() for bin_ in bins])
    axes.plot(confidence, accuracy, marker="o", label=name)
    print(
        f"{name:7} accuracy {hits.mean():.3f}, mean confidence {proba.max(axis=1).mean():.3f}, "
        f"log loss {log_loss(test_y, proba, labels=classifier.classes_):.3f} nats"
    )
axes.set(xlabel="confidence", ylabel="accuracy", title="Temperature scaling")
axes.legend()
plt.show()
