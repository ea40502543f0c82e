"""Where the optimizer's state is, during three parts of a training; no measurement."""

import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(7, 2.4), layout="constrained")
parts = {
    "4-bit base": ([4, 4, 4], "0.75"),
    "adapter and its gradient": ([1, 1, 1], "tab:blue"),
    "optimizer's state": ([1, 0, 1], "tab:red"),
    "activations": ([2, 4.6, 0], "tab:orange"),
}
rows = ["short texts", "a long text", "update"]
left = [0.0, 0.0, 0.0]
for name, (sizes, color) in parts.items():
    axes.barh(rows, sizes, left=left, color=color, label=name)
    left = [start + size for start, size in zip(left, sizes, strict=True)]
axes.barh(["a long text"], [1], left=[11], color="tab:red")
axes.axvline(10, color="black")
axes.text(9.9, -0.62, "GPU", ha="right")
axes.text(10.1, -0.62, "host")
axes.set(xlim=(0, 12.5), xticks=[], ylim=(2.5, -0.9))
axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, fontsize="small", frameon=False)
