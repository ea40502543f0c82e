"""The values of NF4 and FP4 under the density of normal weights."""

import matplotlib.pyplot as plt
import numpy as np
from bitsandbytes.functional import get_4bit_type
from scipy import stats

figure, axes = plt.subplots(figsize=(7, 2.8), layout="constrained")
x = np.linspace(-1, 1, 400)
axes.fill_between(x, stats.norm.pdf(2.5 * x), color="0.9", label="weights of a block")
for height, kind, color in ((0.12, "nf4", "tab:blue"), (0.05, "fp4", "tab:orange")):
    values = get_4bit_type(kind, device="cpu").numpy()
    axes.plot(values, np.full(16, height), "|", color=color, markersize=16, label=kind.upper())
axes.set(yticks=[], xlabel="weight / greatest absolute weight of its block")
axes.legend(loc="upper right")
