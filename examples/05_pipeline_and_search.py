"""
Clean the texts, and search over the rank
=========================================

Texts come with markup, and nobody knows the best rank. Both are what scikit-learn's own tools are
for: a `Pipeline` whose first step cleans, and `GridSearchCV` over any parameter of any step. The
frozen model is loaded once for all fits of the search.
"""

import re

import matplotlib.pyplot as plt
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from skqlora import QLoRAClassifier, backbone_cache_info
from skqlora.demo import load_documented, minilm_folder

# %%
# The texts: how functions of SciPy and scikit-learn describe themselves, with the markup of their
# documentation; the class is the area. A fifth of them is trained on.

documented = load_documented()
texts = [each.markup for each in documented]
areas = [each.area for each in documented]
train, test, train_y, test_y = train_test_split(
    texts, areas, train_size=0.2, stratify=areas, random_state=0
)
example = next(text for text in train if "`" in text)
print(example)

# %%
# A step that cleans is a function of a list of texts. Here it takes away what would give the class
# away, which are names of modules and signatures, as well as the markup.

MARKUP = re.compile(
    r"^(\w+\([^)]*\)\s*)+"  # signatures
    r"|:\w+:`[^`]*`|`+[^`]*`+"  # roles and code
    r"|\S*\b(scipy|sklearn)\.\S*"  # modules
    r"|\.\. [\w-]+::|\*+"  # directives, emphasis
)


def clean(texts):
    """Leave the prose."""
    return [" ".join(MARKUP.sub(" ", text).split()) for text in texts]


print(clean([example])[0])

# %%
# Parameters of a step are named as in every pipeline. Three ranks and three learning rates in two
# folds are 18 fits, and one more with the best.

clf = QLoRAClassifier(minilm_folder(), num_train_epochs=3, random_state=0)
pipeline = make_pipeline(FunctionTransformer(clean), clf)
grid = {
    "qloraclassifier__lora_r": [2, 8, 32],
    "qloraclassifier__learning_rate": [3e-4, 1e-3, 3e-3],
}
search = GridSearchCV(pipeline, grid, cv=2).fit(train, train_y)
print(search.best_params_)
print(f"accuracy on {len(test)} other texts: {search.score(test, test_y):.3f}")
print(f"the base was loaded {backbone_cache_info().misses} time(s)")

# %%
# As a heat map. The learning rate matters more than the rank; with this few epochs a low rate does
# not get far.

ranks, rates = grid["qloraclassifier__lora_r"], grid["qloraclassifier__learning_rate"]
# GridSearchCV goes through the parameters by name, the last fastest.
scores = search.cv_results_["mean_test_score"].reshape(len(rates), len(ranks))
figure, axes = plt.subplots(figsize=(5, 4), layout="constrained")
image = axes.imshow(scores, cmap="viridis", origin="lower")
axes.set_xticks(range(len(ranks)), ranks)
axes.set_yticks(range(len(rates)), rates)
axes.set(xlabel="rank (lora_r)", ylabel="learning_rate", title="Accuracy, mean of two folds")
for row, of_rate in enumerate(scores):
    for column, score in enumerate(of_rate):
        color = "black" if score > scores.mean() else "white"
        axes.text(column, row, f"{score:.2f}", ha="center", va="center", color=color)
figure.colorbar(image)
plt.show()
