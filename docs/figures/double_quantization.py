"""What quantization keeps beside the weights' own four bits."""

import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(7, 1.7), layout="constrained")
axes.barh("NF4", 32 / 64, color="tab:orange", label="32-bit constant of 64 weights")
axes.barh("NF4 + double quantization", 8 / 64, color="tab:blue", label="8-bit constant")
axes.barh(
    "NF4 + double quantization",
    32 / (64 * 256),
    left=8 / 64,
    color="tab:red",
    label="32-bit constant of 256 constants",
)
axes.invert_yaxis()
axes.set(xlabel="bits a weight beside its own four", xlim=(0, 1.1))
axes.legend(loc="center right", fontsize="small")
