"""
A number instead of a class: how much do two descriptions have in common?
=========================================================================

`QLoRARegressor` predicts numbers and has the parameters of the classifier. Here it reads the
descriptions of two functions or classes of SciPy and scikit-learn, and is to say how similar their
parameters are: the share of names that both have, of those that one of them has.
"""

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.model_selection import train_test_split

from skqlora import QLoRARegressor
from skqlora.demo import load_documented, minilm_folder

# %%
# Pairs of one area, since others have little in common. There are so many of them that some are
# drawn: a twentieth, and no more than 1,500.

rng = np.random.default_rng(0)
by_area = {}
for each in load_documented():
    if each.parameters:
        by_area.setdefault(each.area, []).append(each)
pairs = [pair for area in by_area.values() for pair in combinations(area, 2)]
rows = []
for number in rng.choice(len(pairs), min(len(pairs) // 20, 1500), replace=False):
    first, second = pairs[number]
    names = set(first.parameters), set(second.parameters)
    rows.append((first.text, second.text, len(names[0] & names[1]) / len(names[0] | names[1])))
table = pd.DataFrame(rows, columns=["first", "second", "similarity"])
table.head()

# %%
# Training and test pairs share descriptions, but no pair.

train, test = train_test_split(table, test_size=0.3, random_state=0)
reg = QLoRARegressor(minilm_folder(), random_state=0)
reg.fit(train[["first", "second"]], train["similarity"])
print(f"R² on the test pairs: {reg.score(test[['first', 'second']], test['similarity']):.3f}")

# %%
# Predicted against true.

predicted = reg.predict(test[["first", "second"]])
figure, axes = plt.subplots(figsize=(4.5, 4.5), layout="constrained")
axes.scatter(test["similarity"], predicted, s=10, alpha=0.5)
axes.plot([0, 1], [0, 1], color="0.5", linewidth=0.8)
axes.set(xlabel="true", ylabel="predicted", title="Share of parameters in common", aspect="equal")
plt.show()

# %%
# Predictions are in the units of ``y``, whatever these are. What was learned from is kept.

print(f"mean {reg.target_mean_[0]:.3f}, standard deviation {reg.target_scale_[0]:.3f}")
