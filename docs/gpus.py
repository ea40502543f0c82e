"""Print what fits on GPUs of five sizes: the tables of guide/gpus.md.

A cell has the largest pass of texts that fits with a tenth of the memory to spare, up to the
default of 16. Activations are kept if that fits, as `gradient_checkpointing="auto"` decides. Only
the shapes of the models are needed. Rows that were measured come from benchmarks/results/gpu.json::

    python docs/gpus.py
"""

import json
from pathlib import Path

from sizes import MODELS, estimator_of

from skqlora.memory.planning import AUTO_SHARE

RUNS = Path(__file__).parent.parent / "examples" / "benchmarks" / "results" / "gpu.json"
GPUS = 8, 16, 24, 48, 80  # GB
CONTEXT = 0.6  # GB that CUDA itself takes
LENGTHS = 128, 512  # tokens
PASSES = 16, 8, 4, 2, 1  # texts
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
SHOWN = {
    "Qwen/Qwen3-0.6B-Base": MODELS["Qwen/Qwen3-0.6B-Base"],
    "Qwen/Qwen3-1.7B-Base": MODELS["Qwen/Qwen3-1.7B-Base"],
    "Qwen/Qwen3-4B-Base": MODELS["Qwen/Qwen3-4B-Base"],
    "Qwen/Qwen3-8B-Base": MODELS["Qwen/Qwen3-8B-Base"],
    "meta-llama/Llama-3.1-8B": ("llama", LLAMA_8B),
    "Qwen/Qwen3-14B-Base": MODELS["Qwen/Qwen3-14B-Base"],
    "Qwen/Qwen3-32B": MODELS["Qwen/Qwen3-32B"],
    "meta-llama/Llama-3.1-70B": MODELS["meta-llama/Llama-3.3-70B-Instruct"],
}


def sizes_of(model_type, settings):
    """Return the GB of a training for each number of tokens and texts, kept and computed again."""
    estimate = estimator_of(model_type, settings)

    def taken(n_texts, n_tokens, checkpointing):
        return estimate(n_texts, n_tokens, checkpointing).resident / 1e9

    return {
        n_tokens: {
            "kept": taken(PASSES[0], n_tokens, False),
            "again": {n_texts: taken(n_texts, n_tokens, True) for n_texts in PASSES},
        }
        for n_tokens in LENGTHS
    }


def cell(sizes, free):
    """Return the largest pass that fits into so many GB, and what it takes; None if none does."""
    if sizes["kept"] <= AUTO_SHARE * free:
        return f"{PASSES[0]} texts: {sizes['kept']:.1f}"
    for n_texts, taken in sizes["again"].items():
        if taken <= AUTO_SHARE * free:
            return f"{n_texts} text{'s' * (n_texts > 1)}, again: {taken:.1f}"
    return None


def row_of(name, sizes, gpu):
    """Return a model's row in the table of a GPU of so many GB; None if nothing fits."""
    cells = [cell(sizes[n_tokens], gpu - CONTEXT) for n_tokens in LENGTHS]
    if any(cells):
        return f"| `{name}` | {' | '.join(c or 'no' for c in cells)} | estimated | |"
    return None


def measured_rows():
    """Return a row for each run of this package, by the GB of its GPU."""
    rows = {gpu: [] for gpu in GPUS}
    for run in json.loads(RUNS.read_text()):
        if run["side"] == "skqlora":
            again = ", again" if run["checkpointing"] else ""
            texts = f"{run['batch_size']} text{'s' * (run['batch_size'] > 1)}"
            rate = float(f"{run['tokens_per_s']:.3g}")
            rows[int(run["cap"] or GPUS[-1])].append(
                f"| a Llama of {run['size'].upper()} | | {texts}{again}: {run['peak_gb']:.1f} | "
                f"measured | {rate:,.0f} |"
            )
    return rows


def main():
    sizes = {name: sizes_of(*of_model) for name, of_model in SHOWN.items()}
    measured = measured_rows()
    for gpu in GPUS:
        print(f"\n## {gpu} GB\n")
        print(
            "| model | 128 tokens, GB | 512 tokens, GB | | tokens a second |\n|---|---|---|---|---|"
        )
        for name, of_model in sizes.items():
            if row := row_of(name, of_model, gpu):
                print(row)
        print("\n".join(measured[gpu]))


if __name__ == "__main__":
    main()
