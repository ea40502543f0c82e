"""
Training on a GPU at the sizes that QLoRA is for: tokens a second and peak memory, against Trainer.

The bases are Llama-shaped with random weights, since only shapes matter here. They are made and
quantized one layer at a time, so that no 16-bit copy of the whole model ever exists. Every run is
a fresh process. ``--cap`` sets how much of the GPU torch may take; memory that the driver manages,
where paged optimizers keep their state, is not under it, and is in what the driver says is used::

    python bench_gpu.py --sizes 1b 8b              # both sides, batches of 16 x 512 tokens
    python bench_gpu.py --sizes 0.6b --tokens 32 --profile     # short texts, and where time goes
    python bench_gpu.py --sizes 65b --cap 48 --batch-size 1 --updates 4 --sides skqlora \
        --checkpointing
"""

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from profiling import print_profile, profile_work
from tasks import in_fresh_process

LORA = {"r": 16, "lora_alpha": 16, "lora_dropout": 0.05}
N_CLASSES = 4
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
SIZES = {  # hidden size, intermediate size, layers, heads, heads of keys and values
    "tiny": (64, 128, 2, 4, 2),
    "0.6b": (1024, 3072, 28, 16, 8),  # Qwen3, except for its width of a head
    "1b": (2048, 8192, 16, 32, 8),  # Llama 3.2
    "8b": (4096, 14336, 32, 32, 8),  # Llama 3.1, as 70b
    "33b": (6656, 17920, 60, 52, 52),  # LLaMA (arXiv 2302.13971, table 2), as 65b
    "65b": (8192, 22016, 80, 64, 64),
    "70b": (8192, 28672, 80, 64, 8),
}


def main():
    options = parse_arguments()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "torch sees no CUDA device here. Pass --device cpu --sizes tiny to try it."
        )
    runs = []
    for size in options.sizes:
        for repeat in range(options.repeats):
            for side in options.sides:
                print(f"{size}, {side}, {repeat}", file=sys.stderr)
                figures = in_fresh_process(run, side, size, options)
                runs.append({"size": size, "side": side} | run_settings(options) | figures)
                options.output.write_text(json.dumps(runs, indent=1))
    print_table(runs, options)
    for figures in runs:
        if "profile" in figures:
            print(f"\n{figures['size']}, {figures['side']}: an update under torch's profiler")
            print_profile(figures["profile"])


def run_settings(options):
    """Return what a run was of, other than its size and side."""
    names = ("batch_size", "tokens", "updates", "checkpointing", "cap")
    return {name: getattr(options, name) for name in names}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1b", "8b"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--updates", type=int, default=6, help="of which the first is not timed")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--profile", action="store_true", help="one more update, by kind")
    parser.add_argument("--cap", type=float, help="GB of the GPU that torch may take")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=Path("bench_gpu.json"))
    return parser.parse_args()


# Bases


def make_config(size, vocab_size=32000):
    """Build a Llama's configuration."""
    from transformers import LlamaConfig

    hidden_size, intermediate_size, n_layers, heads, key_value_heads = SIZES[size]
    return LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=n_layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        vocab_size=vocab_size,
        max_position_embeddings=4096,
        pad_token_id=0,
        use_cache=False,
        attn_implementation="sdpa",
    )


def make_base(size, device):
    """Build a Llama in NF4 with double quantization, one layer after the other."""
    from transformers import LlamaModel
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = make_config(size)
    n_layers, config.num_hidden_layers = config.num_hidden_layers, 0
    dtype = torch.bfloat16
    with torch.device(device):
        model = LlamaModel(config).to(dtype)
        for number in range(n_layers):
            model.layers.append(quantized(LlamaDecoderLayer(config, number).to(dtype), dtype))
    config.num_hidden_layers = n_layers
    return model.eval().requires_grad_(False)


def quantized(block, dtype):
    """Replace the linear layers of a block by 4-bit ones."""
    import bitsandbytes as bnb

    for parent in list(block.modules()):
        for name, linear in list(parent.named_children()):
            if type(linear) is torch.nn.Linear:
                device = linear.weight.device
                with torch.device("meta"):
                    packed = bnb.nn.Linear4bit(
                        linear.in_features,
                        linear.out_features,
                        bias=False,
                        compute_dtype=dtype,
                        compress_statistics=True,
                        quant_type="nf4",
                    )
                packed.weight = bnb.nn.Params4bit(
                    linear.weight.data,
                    requires_grad=False,
                    compress_statistics=True,
                    quant_type="nf4",
                    module=packed,
                ).to(device)
                setattr(parent, name, packed)
    return block


# The two sides


def run(side, size, options):
    """Train on one side, and measure, or say that memory was too short."""
    device = start(options)
    with used_on_the_device(options) as used, warnings.catch_warnings():
        # This package would go on with less at once, which is not what is compared.
        warnings.filterwarnings("error", "Out of memory", RuntimeWarning)
        try:
            figures = SIDES[side](size, options, device)
        except (torch.OutOfMemoryError, RuntimeWarning):
            figures = {"out_of_memory": True}
    if options.device == "cuda":
        figures |= {
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "used_gb": max(used) / 1e9,
            "device": torch.cuda.get_device_name(),
        }
    return figures | {"versions": {name: version(name) for name in PACKAGES}}


def run_ours(size, options, device):
    """Train with this package."""
    import numpy as np

    from skqlora import QLoRAClassifier
    from skqlora.checkpoint.spec import BackboneSpec
    from skqlora.memory.estimate import estimate_training
    from skqlora.model.backbone import Backbone, freeze
    from skqlora.model.replicas import ReplicaPool
    from skqlora.model.text_model import TextModel
    from skqlora.settings.adapter_settings import LoraSettings
    from skqlora.settings.parameters import read_parameters
    from skqlora.settings.settings import resolve_settings
    from skqlora.text.batches import TokenizedTexts
    from skqlora.training.trainer import Trainer

    module = make_base(size, device)
    spec = BackboneSpec(f"random-{size}", None, "nf4", True, torch.bfloat16, device)
    freeze(module, spec.compute_dtype)
    backbone = Backbone(module, spec, size, module.config.hidden_size, True, ReplicaPool(module, 0))
    lora = LoraSettings(
        LORA["r"], LORA["lora_alpha"], "all-linear", False, False, init_lora_weights=True
    )
    rows = random_rows(options, module.config.vocab_size)
    clf = QLoRAClassifier(
        batch_size=options.batch_size,
        lora_dropout=LORA["lora_dropout"],
        warmup_steps=0,
        lr_scheduler_type="constant",
        max_grad_norm=0.3,
        learning_rate=2e-4,
        head_learning_rate=1e-3,
    )
    settings = resolve_settings(
        read_parameters(clf),
        device=str(device),
        compute_dtype="bfloat16",
        max_length=options.tokens,
        prompt=None,
        pooling="last",
        num_train_epochs=1,
        gradient_checkpointing=options.checkpointing,
        model_type="llama",
        hidden_size=module.config.hidden_size,
    )
    dropout = LORA["lora_dropout"]
    with (
        TextModel.for_training(backbone, lora, N_CLASSES, "last", lora_dropout=dropout) as model,
        Trainer(
            model, TokenizedTexts(rows, 0), np.arange(len(rows)) % N_CLASSES, settings
        ) as trainer,
    ):
        seconds = []
        model.train()
        for batch in np.split(np.arange(len(rows)), options.updates):
            began = time.perf_counter()
            trainer.step(batch)
            synchronize(device)
            seconds.append(time.perf_counter() - began)
        profiled = {}
        if options.profile:
            profiled["profile"] = profile_work(lambda: trainer.step(batch), device, LORA["r"])
    with torch.device("meta"):
        skeleton = type(module)(make_config(size))
    estimate = estimate_training(
        skeleton,
        spec,
        lora,
        optim=settings.optim,
        n_outputs=N_CLASSES,
        n_texts=options.batch_size,
        n_tokens=options.tokens,
        dropout=True,
        checkpointing=options.checkpointing,
    )
    print(estimate, file=sys.stderr)
    return rate(seconds, options) | profiled | {"estimate_gb": estimate.resident / 1e9}


def run_peer(size, options, device):
    """Train with transformers' Trainer and PEFT."""
    import transformers
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import LlamaForSequenceClassification, Trainer, TrainingArguments

    transformers.logging.set_verbosity_error()
    config = make_config(size)
    config.num_labels, config.num_hidden_layers = N_CLASSES, 0
    model = LlamaForSequenceClassification(config).to(device)
    model.model = make_base(size, device)
    model.config = model.model.config
    model.config.num_labels = N_CLASSES
    model.is_loaded_in_4bit = True
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=options.checkpointing)
    lora = LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", **LORA)
    model = get_peft_model(model, lora)
    rows = random_rows(options, config.vocab_size)
    dataset = [{"input_ids": r, "labels": i % N_CLASSES} for i, r in enumerate(rows)]
    seconds = []

    class Clock(transformers.TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            synchronize(device)
            self.began = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            synchronize(device)
            seconds.append(time.perf_counter() - self.began)

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=1,
            per_device_train_batch_size=options.batch_size,
            learning_rate=2e-4,
            bf16=True,
            gradient_checkpointing=options.checkpointing,
            optim="paged_adamw_32bit" if device.type == "cuda" else "adamw_torch",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            use_cpu=device.type == "cpu",
        )
        Trainer(model, arguments, train_dataset=dataset, callbacks=[Clock()]).train()
    return rate(seconds, options)


SIDES = {"skqlora": run_ours, "Trainer + PEFT": run_peer}


# Figures


def start(options):
    torch.manual_seed(0)
    device = torch.device(options.device, 0) if options.device == "cuda" else torch.device("cpu")
    if options.cap is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(options.cap * 1e9 / total, device)
    return device


def random_rows(options, vocab_size):
    """Token ids of texts for all updates, all of one length."""
    n_rows = options.batch_size * options.updates
    return torch.randint(1, vocab_size, (n_rows, options.tokens)).tolist()


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rate(seconds, options):
    """Turn the seconds of the updates, of which the first warms up, into tokens a second."""
    return {"tokens_per_s": options.batch_size * options.tokens / statistics.median(seconds[1:])}


@contextmanager
def used_on_the_device(options, period=0.1):
    """Read every tenth of a second how many bytes the driver says are used, of all processes."""
    used, over = [], threading.Event()

    def read():
        free, total = torch.cuda.mem_get_info()
        used.append(total - free)

    def watch():
        while not over.wait(period):
            read()

    watcher = threading.Thread(target=watch, daemon=True)
    if options.device == "cuda":
        watcher.start()
    try:
        yield used
    finally:
        over.set()
    if options.device == "cuda":
        watcher.join()
        read()


MEMORY = ("peak_gb", "used_gb", "estimate_gb")


def print_table(runs, options):
    shape = f"{options.batch_size} x {options.tokens} tokens"
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    capped = f", capped at {options.cap} GB" if options.cap else ""
    print(
        f"{name}{capped}; {shape}, checkpointing {options.checkpointing}, torch {torch.__version__}"
    )
    print("\n| base | side | tokens/s | peak of torch, GB | of the device, GB | estimate, GB |")
    print("|---|---|---|---|---|---|")
    for run in runs:
        cells = [
            "out of memory" if "out_of_memory" in run else f"{run['tokens_per_s']:,.0f}",
            *(f"{run[key]:.1f}" if key in run else "-" for key in MEMORY),
        ]
        print(f"| {run['size']} | {run['side']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
