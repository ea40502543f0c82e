"""
What a fit costs against rows, length of the texts, classes and rank, and how near it is to the CPU.

Times fits on random words, one thing varied at a time, several times in turn, and fits the exponent
of a power law by least squares on logarithms. Then compares what the linear layers compute in a fit
with the rate of plain matrix products of the model's sizes, measured in the same run::

    python bench_scaling.py
    python bench_scaling.py --model my-base --repeats 1 --output figures.json
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from skqlora import QLoRAClassifier
from skqlora.demo import minilm_folder

# The values of each thing that is varied; meanwhile the others stay as in `main`.
VARIED = {
    "rows": [128, 256, 512, 1024],
    "tokens": [32, 64, 128, 256],
    "classes": [2, 16, 128],
    "rank": [4, 16, 64],
}
LABELS = {"rows": "texts", "tokens": "tokens of a text", "classes": "classes", "rank": "rank"}
BATCH_SIZE = 16


def main():
    options = parse_arguments()
    varied = VARIED | {"rows": options.rows, "tokens": options.tokens}
    base = {"rows": varied["rows"][1], "tokens": varied["tokens"][1], "classes": 4, "rank": 16}
    points = {}  # seconds by (rows, tokens, classes, rank)
    grid = [base | {name: value} for name, values in varied.items() for value in values]
    distinct = [dict(items) for items in dict.fromkeys(tuple(p.items()) for p in grid)]
    fit(options.model, base | {"rows": 32})  # loads the base
    for _ in range(options.repeats):
        for point in distinct:
            points.setdefault(tuple(point.values()), []).append(fit(options.model, point))
    machine = (
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"medians of {options.repeats}, one epoch in batches of {BATCH_SIZE}"
    )
    print(machine)
    curves = print_curves(points, varied, base)
    utilisation = print_utilisation(options.model, base, options.tokens[1:], options.repeats)
    figures = {"machine": machine, "curves": curves, "utilisation": utilisation}
    options.output.write_text(json.dumps(figures, indent=1))
    if options.picture:
        draw(curves, options.picture)
    if options.profile:
        print_profile(options.model, base | {"tokens": options.tokens[-1]})


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--model", help="folder or Hub id (default: the embedded MiniLM)")
    parser.add_argument("--repeats", type=int, default=3)
    for name in ("rows", "tokens"):
        parser.add_argument(
            f"--{name}", type=int, nargs="+", default=VARIED[name], help="two numbers or more"
        )
    parser.add_argument("--profile", action="store_true", help="print where the time of a fit goes")
    parser.add_argument("--output", type=Path, default=Path("bench_scaling.json"))
    parser.add_argument("--picture", type=Path, help="draw the curves, in logarithms")
    options = parser.parse_args()
    if min(len(options.rows), len(options.tokens)) < 2:
        parser.error("--rows and --tokens take two numbers or more")
    options.model = options.model or minilm_folder()
    return options


def make_table(rows, tokens, classes):
    """Texts of exactly so many tokens once cut, each class in turn."""
    rng = np.random.RandomState(0)
    words = ["time", "house", "river", "music", "paper", "green", "quick", "north"]
    texts = [" ".join(rng.choice(words, tokens)) for _ in range(rows)]
    return texts, [f"class {i % classes}" for i in range(rows)]


def make_classifier(model, point, **params):
    return QLoRAClassifier(
        model,
        lora_r=point["rank"],
        max_length=point["tokens"],
        batch_size=BATCH_SIZE,
        num_train_epochs=1,
        random_state=0,
        **params,
    )


def fit(model, point, **params):
    """Seconds of a fit on a base that is there."""
    texts, labels = make_table(point["rows"], point["tokens"], point["classes"])
    clf = make_classifier(model, point, **params)
    start = time.perf_counter()
    clf.fit(texts, labels)
    return time.perf_counter() - start


def print_curves(points, varied, base):
    """Print the times along each axis and the exponent of a power law."""
    print("\n| varied | values | seconds | exponent |\n|---|---|---|---|")
    curves = {}
    for name, values in varied.items():
        keys = [tuple((base | {name: value}).values()) for value in values]
        seconds = [statistics.median(points[key]) for key in keys]
        exponent = float(np.polyfit(np.log(values), np.log(seconds), 1)[0])
        curves[name] = {"values": values, "seconds": seconds, "exponent": exponent}
        shown = ", ".join(f"{s:.2f}" for s in seconds)
        print(f"| {name} | {', '.join(map(str, values))} | {shown} | {exponent:.2f} |")
    return curves


def draw(curves, path):
    """Draw each curve with its power law."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(10, 3), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True)
    for axes, (name, curve) in zip(panels, curves.items(), strict=True):
        values, seconds = np.array(curve["values"]), np.array(curve["seconds"])
        scale = np.exp(np.mean(np.log(seconds) - curve["exponent"] * np.log(values)))
        axes.loglog(values, scale * values ** curve["exponent"], color="0.7")
        axes.loglog(values, seconds, "o")
        axes.set(xlabel=LABELS[name], title=f"exponent {curve['exponent']:.2f}", xticks=values)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
    figure.axes[0].set(ylabel="seconds of a fit", yticks=[1, 2, 5, 10, 20])
    figure.savefig(path, dpi=150)


# Utilisation


def print_utilisation(model, base, lengths, repeats):
    """Compare the rate of a fit's linear layers with that of plain products of their sizes."""
    print("\n| precision | tokens a text | fit, GFLOP/s | products, GFLOP/s | share |")
    print("|---|---|---|---|---|")
    dtypes = ["float32"] + (["bfloat16"] if torch.cpu._is_avx512_bf16_supported() else [])
    found = []
    for dtype in dtypes:
        for n_tokens in lengths:
            point = base | {"tokens": n_tokens}
            pairs = [
                (
                    fit_rate(model, point, compute_dtype=dtype),
                    product_rate(model, getattr(torch, dtype)),
                )
                for _ in range(repeats)
            ]
            ours, products = (statistics.median(side) for side in zip(*pairs, strict=True))
            share = statistics.median(a / b for a, b in pairs)
            found.append({"dtype": dtype, "tokens": n_tokens, "share": share})
            print(
                f"| {dtype} | {n_tokens} | {ours / 1e9:.0f} | {products / 1e9:.0f} | {share:.2f} |"
            )
    return found


def linear_weights(model):
    """Shapes (n_out, n_in) of the weights that are quantized."""
    from skqlora.checkpoint.architecture import check_architecture

    skeleton = check_architecture(str(model), None, quantized=True).skeleton
    names = dict(skeleton.named_modules())
    return [
        tuple(module.weight.shape)
        for name, module in names.items()
        if isinstance(module, torch.nn.Linear) and not name.startswith("pooler")
    ]


def fit_rate(model, point, **params):
    """FLOP/s of a fit: 2 a weight and token forward, as many for the gradient of the input."""
    fit(model, point | {"rows": 32}, **params)
    n_weights = sum(n_out * n_in for n_out, n_in in linear_weights(model))
    return 4 * n_weights * point["rows"] * point["tokens"] / fit(model, point, **params)


def product_rate(model, dtype, n_tokens=2048):
    """FLOP/s of plain products of the layers' sizes, forward and for the gradient of the input."""
    n_flop, seconds = 0, 0.0
    for n_out, n_in in linear_weights(model):
        weight, x = torch.randn(n_out, n_in).to(dtype), torch.randn(n_tokens, n_in).to(dtype)
        gradient = torch.randn(n_tokens, n_out).to(dtype)
        start = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        torch.mm(gradient, weight)
        seconds += time.perf_counter() - start
        n_flop += 4 * n_out * n_in * n_tokens
    return n_flop / seconds


def print_profile(model, point):
    """Print which operations take the time of a fit."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu) as profiler:
        fit(model, point, compute_dtype="float32")
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


if __name__ == "__main__":
    main()
