"""A layer's frozen weights and its adapter, to scale."""

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle

figure, axes = plt.subplots(figsize=(7, 2.6), layout="constrained")
d = o = 384
r = 16
axes.add_patch(Rectangle((0, 0), o, d, color="0.85"))
axes.text(o / 2, d / 2, "W: 147,456 weights,\n4 bits each, frozen", ha="center", va="center")
axes.text(o + 75, d / 2, "+", ha="center", va="center", size="x-large")
axes.add_patch(Rectangle((o + 150, 0), r, d, color="tab:blue"))
axes.text(o + 150 + r / 2, d + 12, "A", ha="center", color="tab:blue")
axes.add_patch(Rectangle((o + 200, d - r), o, r, color="tab:blue"))
axes.text(o + 200 + o / 2, d + 12, "B", ha="center", color="tab:blue")
axes.text(o + 200 + o / 2, d / 2, "2 x 6,144 numbers,\nfloat32, trained", ha="center", va="center")
axes.set(xlim=(-20, 2 * o + 240), ylim=(-20, d + 60), aspect="equal")
axes.axis("off")
