"""The versions of the packages that matter in a bug report."""

import importlib.metadata
import platform
import sys

PACKAGES = (
    "skqlora",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "scikit-learn",
    "numpy",
    "scipy",
    "joblib",
    "safetensors",
    "tokenizers",
    "huggingface_hub",
)


def show_versions() -> None:
    """Print the versions of Python and of the packages that matter, and what torch computes on.

    The output is to be pasted into a bug report, like that of `sklearn.show_versions`.
    """
    import torch

    blocks: dict[str, dict[str, object]] = {
        "System": {
            "python": sys.version.replace("\n", " "),
            "executable": sys.executable,
            "machine": platform.platform(),
        },
        "Python dependencies": {name: _version(name) for name in PACKAGES},
        "torch": {
            "threads": torch.get_num_threads(),
            "cpu capability": torch.backends.cpu.get_cpu_capability(),
            "cuda": torch.version.cuda,
            "devices": [
                torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())
            ],
        },
    }
    for title, lines in blocks.items():
        print(f"\n{title}:")
        for name, value in lines.items():
            print(f"{name:>15}: {value}")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
