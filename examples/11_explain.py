"""
Why this class? One word away at a time
=======================================

What a word was worth is what is lost without it: each word is left out in turn, and the drop of the
class's log-odds is its weight (occlusion). It needs no gradients, only `predict_proba` of as many
texts as there are words, and so works for every classifier of texts.
"""

import html

import matplotlib.pyplot as plt
import numpy as np
from scipy.special import logit
from sklearn.model_selection import train_test_split

from skqlora import QLoRAClassifier
from skqlora.demo import load_docstrings, minilm_folder

texts, areas = load_docstrings()
train, test, train_y, test_y = train_test_split(
    texts, areas, train_size=0.4, stratify=areas, random_state=0
)
clf = QLoRAClassifier(minilm_folder(), random_state=0)
clf.fit(train, train_y)

# %%
# The weights of one text's words.


def explain(clf, text):
    """Return the predicted class, the words, and by how much each raises the class's log-odds."""
    words = text.split()
    without = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
    proba = clf.predict_proba([text, *without])
    best = proba[0].argmax()
    log_odds = logit(np.clip(proba[:, best], 1e-6, 1 - 1e-6))
    return clf.classes_[best], words, log_odds[0] - log_odds[1:]


chosen = test[int(np.argmax([len(text) for text in test[:50]]))]
label, words, weights = explain(clf, chosen)
print(f"Predicted: {label}")

# %%
# As a picture.

figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
positions = range(len(words))
axes.barh(positions, weights, color=np.where(weights > 0, "tab:blue", "tab:orange"))
axes.set_yticks(positions, words)
axes.invert_yaxis()
axes.axvline(0, color="0.5", linewidth=0.8)
axes.set(xlabel="log-odds that the word adds", title=f"Predicted: {label}")
plt.show()

# %%
# As a text, coloured: blue speaks for the class, orange against it.


class Explained:
    """Words on backgrounds as strong as their weights, where HTML is shown."""

    def __init__(self, label, words, weights):
        self.label, self.words, self.weights = label, words, weights

    def _repr_html_(self):
        strongest = np.abs(self.weights).max() or 1
        spans = []
        for word, weight in zip(self.words, self.weights, strict=True):
            color = "31, 119, 180" if weight > 0 else "255, 127, 14"
            style = f"background: rgba({color}, {abs(weight) / strongest:.2f}); padding: 0 2px"
            spans.append(f'<span style="{style}">{html.escape(word)}</span>')
        return f"<p><b>{html.escape(self.label)}</b>: {' '.join(spans)}</p>"


Explained(label, words, weights)
