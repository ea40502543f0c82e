"""
Rare classes: weights and the threshold
=======================================

One text in eight is what we look for. Trained as it is, a classifier says "no" too often: that is
what a threshold of 0.5 asks for. Two remedies, both scikit-learn's: weights of the classes in
training, and a threshold that is tuned by cross-validation afterwards.
"""

import matplotlib.pyplot as plt
import numpy as np
from demo import QUICK, load_docstrings, minilm_folder
from sklearn.metrics import (
    PrecisionRecallDisplay,
    f1_score,
    make_scorer,
    precision_score,
    recall_score,
)
from sklearn.model_selection import TunedThresholdClassifierCV, train_test_split

from skqlora import QLoRAClassifier

# %%
# Is a function about statistics? Half of the texts are for training.

texts, areas = load_docstrings()
y = np.where(np.array(areas) == "statistics", "statistics", "other")
train, test, train_y, test_y = train_test_split(texts, y, test_size=0.5, stratify=y, random_state=0)
print(f"{np.mean(train_y == 'statistics'):.0%} of {len(train)} training texts are about statistics")

# %%
# `TunedThresholdClassifierCV` fits one classifier more for each fold and takes the threshold that
# gave the best F1 there. The base is loaded once for all.

params = {"random_state": 0, "num_train_epochs": 1 if QUICK else 3}
f1 = make_scorer(f1_score, pos_label="statistics", zero_division=0)
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
        metric(test_y, predicted, pos_label="statistics", zero_division=0)
        for metric in (recall_score, precision_score, f1_score)
    )
    points[name] = recall, precision
    print(f"{name:24}{precision:9.2f}{recall:8.2f}{score:7.2f}")
print(f"the tuned threshold is {classifiers['tuned threshold'].best_threshold_:.2f}")

# %%
# A threshold walks along one curve of precision over recall; weights make another curve.

figure, axes = plt.subplots(figsize=(5.5, 4.5), layout="constrained")
for name in ("as it is", 'class_weight="balanced"'):
    PrecisionRecallDisplay.from_estimator(
        classifiers[name], test, test_y, pos_label="statistics", name=name, ax=axes
    )
for (name, (recall, precision)), marker in zip(points.items(), "osD", strict=True):
    axes.plot(recall, precision, marker, color="black", label=f"{name}: what is predicted")
axes.set(title="Is it about statistics?", xlabel="recall", ylabel="precision")
axes.legend(loc="lower left", fontsize="small")
plt.show()
