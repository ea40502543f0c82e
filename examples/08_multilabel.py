"""
Several labels of a text
========================

Which parameters will a function take, told from the first words of its description? A text may have
several labels, or none: `y` is a table of 0 and 1, a column for each label, and each column has a
probability of its own.
"""

import matplotlib.pyplot as plt
import numpy as np
from sklearn.metrics import average_precision_score, f1_score
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import MultiLabelBinarizer

from skqlora import LossCurveDisplay, QLoRAClassifier
from skqlora.demo import load_documented, minilm_folder

# sphinx_gallery_thumbnail_number = 2
LABELS = ["axis", "tol", "random_state", "n_jobs", "sample_weight", "check_finite", "where"]

# %%
# `MultiLabelBinarizer` makes the table. Most texts have none of these labels. Some texts are held
# out for choices, and others for the test.

documented = load_documented()
texts = [each.text for each in documented]
y = MultiLabelBinarizer(classes=LABELS).fit_transform(
    [set(LABELS).intersection(each.parameters) for each in documented]
)
rest, test, rest_y, test_y = train_test_split(texts, y, test_size=0.4, random_state=0)
train, valid, train_y, valid_y = train_test_split(rest, rest_y, test_size=0.3, random_state=0)
print(f"{len(train)} training texts, of which {np.mean(train_y.any(axis=1)):.0%} have a label")

# %%
# How long to train is the first choice. Early stopping scores the held-out texts after each epoch,
# stops when the score no longer rises, and keeps the adapter of the best epoch. With labels as rare
# as these, the average precision says more than accuracy.

clf = QLoRAClassifier(
    minilm_folder(),
    num_train_epochs=6,
    early_stopping=True,
    scoring="average_precision",
    random_state=0,
)
clf.fit(train, train_y, X_val=valid, y_val=valid_y)
print(f"{clf.n_iter_} epochs, best average precision {clf.best_validation_score_:.2f}")
LossCurveDisplay.from_estimator(clf)
plt.show()

# %%
# The threshold is the second choice. Labels are rare, so 0.5 is too high. One for all of them is
# chosen on the held-out texts.

thresholds = np.linspace(0.05, 0.6, 12)
valid_proba = clf.predict_proba(valid)
scores = [f1_score(valid_y, valid_proba >= t, average="macro", zero_division=0) for t in thresholds]
threshold = thresholds[np.argmax(scores)]
proba = clf.predict_proba(test)
for name, predicted in {"0.5": clf.predict(test), f"{threshold:.2f}": proba >= threshold}.items():
    score = f1_score(test_y, predicted, average="macro", zero_division=0)
    print(f"macro-F1 with a threshold of {name}: {score:.2f}")

# %%
# How well each label is found, compared with guessing, whose average precision is the label's share
# of the texts.

precision = average_precision_score(test_y, proba, average=None)
order = np.argsort(precision)
figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.barh(np.array(LABELS)[order], precision[order], label="QLoRAClassifier")
axes.barh(np.array(LABELS)[order], test_y.mean(axis=0)[order], label="guessing", color="0.6")
axes.set(xlabel="average precision", title="Which parameters does it take?", xlim=(0, 1))
axes.legend(loc="lower right")
plt.show()
