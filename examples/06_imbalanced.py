"""
Rare classes: weights and the threshold
=======================================

One text in seventeen is what we look for. A classifier that is trained as it is makes few errors in
all, and most of these are misses of the rare class. Two remedies, both scikit-learn's: weights of
the classes in training, and a threshold that is tuned by cross-validation afterwards.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import (
    PrecisionRecallDisplay,
    f1_score,
    make_scorer,
    precision_score,
    recall_score,
)
from sklearn.model_selection import TunedThresholdClassifierCV, train_test_split

from skqlora import QLoRAClassifier
from skqlora.demo import load_docstrings, minilm_folder

# %%
# Is a function about interpolation? Half of the texts are for training.

texts, areas = load_docstrings()
RARE = "interpolation"
y = np.where(np.array(areas) == RARE, RARE, "other")
train, test, train_y, test_y = train_test_split(texts, y, test_size=0.5, stratify=y, random_state=0)
print(f"{np.sum(train_y == RARE)} of {len(train)} training texts are about {RARE}")

# %%
# `TunedThresholdClassifierCV` fits one classifier more for each fold and takes the threshold that
# gave the best F1 there. The base is loaded once for all.

params = {"random_state": 0, "num_train_epochs": 3}
f1 = make_scorer(f1_score, pos_label=RARE, zero_division=0)
classifiers = {
    "as it is": QLoRAClassifier(minilm_folder(), **params),
    'class_weight="balanced"': QLoRAClassifier(minilm_folder(), class_weight="balanced", **params),
    "tuned threshold": TunedThresholdClassifierCV(
        QLoRAClassifier(minilm_folder(), **params), scoring=f1, cv=3, random_state=0
    ),
}
points = {}
print(f"{'':24}precision  recall     F1")
for name, classifier in classifiers.items():
    predicted = classifier.fit(train, train_y).predict(test)
    recall, precision, score = (
        metric(test_y, predicted, pos_label=RARE, zero_division=0)
        for metric in (recall_score, precision_score, f1_score)
    )
    points[name] = recall, precision
    print(f"{name:24}{precision:9.2f}{recall:8.2f}{score:7.2f}")
print(f"the tuned threshold is {classifiers['tuned threshold'].best_threshold_:.2f}")

# %%
# A threshold walks along one curve of precision over recall; weights make another curve. There are
# few rare texts to test on: one more or less that is found moves recall by four percentage points.

figure, axes = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
for name in ("as it is", 'class_weight="balanced"'):
    PrecisionRecallDisplay.from_estimator(
        classifiers[name], test, test_y, pos_label=RARE, name=name, ax=axes
    )
for (name, (recall, precision)), marker in zip(points.items(), "osD", strict=True):
    axes.plot(recall, precision, marker, color="black", label=f"{name}: what is predicted")
axes.set(title=f"Is it about {RARE}?", xlabel="recall", ylabel="precision")
axes.legend(loc="lower left", fontsize="small")
plt.show()
