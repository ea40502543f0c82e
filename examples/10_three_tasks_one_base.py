"""
Three tasks, one model
======================

A fitted classifier is its adapter: some megabytes. The frozen base, which is the bulk, is loaded
once in a process for all of them. Here three tasks are learned, saved, loaded in what could be a
server, and asked about the same text.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
from sklearn.model_selection import train_test_split

from skqlora import QLoRAClassifier, backbone_cache_info
from skqlora.demo import load_documented, minilm_folder

# %%
# The same texts with three labels.

documented = load_documented()
tasks = {
    "area": [each.area for each in documented],
    "library": [each.library for each in documented],
    "kind": ["class" if each.is_class else "function" for each in documented],
}
folder = Path(tempfile.mkdtemp())
for task, y in tasks.items():
    train, test, train_y, test_y = train_test_split(
        [each.text for each in documented], y, train_size=0.3, stratify=y, random_state=0
    )
    clf = QLoRAClassifier(minilm_folder(), num_train_epochs=4, random_state=0)
    accuracy = clf.fit(train, train_y).score(test, test_y)
    clf.save(folder / task)
    print(f"{task:8} accuracy {accuracy:.3f} on {len(test)} texts")

# %%
# What a server does: load by name, without pickle. The base is read at the first prediction, and
# the three share it.

loaded = {path.name: QLoRAClassifier.load(path) for path in sorted(folder.iterdir())}
text = "Fit the regularized model by coordinate descent along a path of penalties."
for task, clf in loaded.items():
    proba = clf.predict_proba([text])[0]
    print(f"{task:8} {clf.classes_[proba.argmax()]} ({proba.max():.2f})")
print(f"the base was loaded {backbone_cache_info().misses} time(s)")

# %%
# What each takes on disk. A fourth task would add one more small bar.

megabytes = {
    "base, as it comes": (Path(minilm_folder()) / "model.safetensors").stat().st_size / 1e6
}
for task in tasks:
    size = sum(path.stat().st_size for path in (folder / task).iterdir())
    megabytes[f"task: {task}"] = size / 1e6
figure, axes = plt.subplots(figsize=(6, 2.8), layout="constrained")
bars = axes.barh(list(megabytes), list(megabytes.values()))
axes.bar_label(bars, fmt="%.1f MB", padding=3)
axes.set(xlabel="MB on disk", xlim=(0, 1.15 * max(megabytes.values())))
axes.invert_yaxis()
plt.show()
