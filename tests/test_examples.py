"""The examples that are scripts run: one's own table, those on several processes, and benchmarks.

Those in processes of their own are slow: each imports torch and fits real classifiers. What they
show of the package other tests show too. test_gallery.py runs the other examples.
"""

import csv
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import joblib
import numpy as np
import pandas as pd
import pytest
import tiny

EXAMPLES = Path(__file__).parent.parent / "examples"
QUICK = Path(__file__).parent / "quick.py"  # few texts, and one epoch


def load_example(name):
    """Import an example by its file name."""
    spec = importlib.util.spec_from_file_location("example", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_own_table_and_model(tmp_path, encoder, corpus, monkeypatch, capsys):
    table, picture = tmp_path / "train.csv", tmp_path / "matrix.png"
    with table.open("w", newline="") as file:
        csv.writer(file).writerows([("words", "topic"), *zip(*corpus, strict=True)])
    options = ["--model", encoder, "--csv", table, "--text", "words", "--label", "topic"]
    monkeypatch.setattr(sys, "argv", ["own_table", *map(str, options), "--output", str(picture)])
    load_example("own_table").main()
    printed = capsys.readouterr().out
    assert "36 training texts, 12 test texts, 3 classes" in printed
    assert "QLoRAClassifier" in printed
    assert "bits each" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (None, "There is no file .*table.csv"),
        (["text,label"], "table.csv has no rows"),
        (["text,class", "a,b"], "has no column 'label'. Its columns: text, class"),
        (["text,label", *["a,b"] * 5, "c,d"], "No test texts can be held out: .* --test-csv"),
        (["text,label", "a,b", "c,d"] * 2, "No test texts can be held out: .* --test-csv"),
        (["text,label", *["a,b"] * 5], "All texts are of one class, 'b'"),
        (["text,label", "a,b", "c,", "d"], r"2 row\(s\) without a 'label', the first is row 2"),
        (["text,label", "\udcff,b"], "is not in UTF-8"),
        (["text,label", "a,b", "slow, but ok,c"], "Row 2 of .* has more cells than the header"),
    ],
)
def test_own_tables_that_cannot_work_are_refused(tmp_path, monkeypatch, rows, message):
    table = tmp_path / "table.csv"
    if rows is not None:
        table.write_text("\n".join(rows), errors="surrogateescape")
    monkeypatch.setattr(sys, "argv", ["own_table.py", "--csv", str(table)])
    with pytest.raises(SystemExit, match=message):
        load_example("own_table").main()


def test_own_table_may_be_as_spreadsheets_write_it(tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("text,label\na,b\n", encoding="utf-8-sig")
    assert load_example("own_table").read_csv(table, "text", "label") == (["a"], ["b"])


@pytest.mark.slow
def test_search_on_a_cluster(encoder, monkeypatch, capsys):
    example = load_example("02_search_on_a_cluster")
    monkeypatch.setattr(example, "MODEL", encoder)
    monkeypatch.setattr(example, "N_TEXTS", 60)
    example.main()
    printed = capsys.readouterr().out
    assert "the base was loaded 1 time(s)" in printed
    assert "the base was loaded 2 time(s)" not in printed
    assert "'lora_r': 16, 'num_train_epochs': 2}: 0." in printed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The inplace keyword in DataFrame")  # in dask
@pytest.mark.filterwarnings("ignore:.*texts have more than max_length")  # of the tiny model
def test_large_tables(encoder, monkeypatch, tmp_path, capsys):
    example = load_example("03_large_tables")
    for name, value in {"MODEL": encoder, "N_ROWS": 500, "OUTPUT": tmp_path}.items():
        monkeypatch.setattr(example, name, value)
    example.main()
    assert "in chunks: 500 rows" in capsys.readouterr().out
    in_chunks = pd.read_csv(tmp_path / "labelled.csv")
    on_cluster = pd.read_parquet(tmp_path / "labelled")
    assert in_chunks["text"].tolist() == on_cluster["text"].tolist()
    # On one thread a worker rounds otherwise, so that a few texts may tip over.
    assert (in_chunks["label"].to_numpy() == on_cluster["label"].to_numpy()).mean() > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("n_processes", [1, 2])
def test_data_parallel_training(tmp_path, n_processes):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
    command = [sys.executable, *launcher] if n_processes > 1 else [sys.executable]
    script = [QUICK, EXAMPLES / "04_data_parallel.py"]
    result = subprocess.run(
        [*command, *script], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert f"{n_processes} process(es): fit" in result.stdout
    assert len(joblib.load(tmp_path / "data_parallel.joblib").classes_) == 12


@pytest.mark.slow
def test_benchmark_of_a_search(encoder, tmp_path):
    output = tmp_path / "figures.json"
    script = [EXAMPLES / "benchmarks" / "bench_search.py", "--model", encoder, "--output", output]
    options = [
        "--rows",
        "96",
        "--epochs",
        "1",
        "--repeats",
        "1",
        "--estimators",
        "4",
        "--fits",
        "6",
    ]
    result = subprocess.run(
        [sys.executable, *script, *options], capture_output=True, text=True, check=True
    )
    assert "| loads of the base in 10 fits of a search | 1 | 1 |" in result.stdout
    assert "| injections of LoRA for 3 ranks | 3 | 3 |" in result.stdout
    assert (
        "| a fit here equals one in a fresh process | bit for bit | bit for bit |" in result.stdout
    )
    assert len(json.loads(output.read_text())["rows"]) == 14


@pytest.mark.slow
def test_benchmark_of_fit_and_predict(encoder, corpus, tmp_path):
    (tmp_path / "trec6").mkdir()
    for part in ("train", "test"):
        with (tmp_path / "trec6" / f"{part}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("text", "label"), *zip(*corpus, strict=True)])
    output = tmp_path / "figures.json"
    script = EXAMPLES / "benchmarks" / "bench_fit_predict.py"
    options = ["--data", tmp_path, "--model", encoder, "--repeats", "1"]
    options += ["--works", "trec6", "trec6-last-2"]
    result = subprocess.run(
        [sys.executable, script, *options, "--output", output],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "| trec6 against Trainer + PEFT | fit, s | " in result.stdout
    assert "| trec6-last-2 against skqlora, all layers | fit, s | " in result.stdout
    assert "| trec6 against Trainer + PEFT, grouped | fit, s | " in result.stdout
    runs = json.loads(output.read_text())["runs"][:3]
    assert runs[0]["side"] == "skqlora"
    assert all(0 < run["padded_share"] < 1 for run in runs)
    # All see each token once an epoch.
    n_tokens = [run["tokens_per_s"] * run["fit_s"] for run in runs]
    assert n_tokens == pytest.approx([n_tokens[0]] * 3, rel=0.05)


@pytest.fixture
def tables(corpus, tmp_path):
    """A folder with a table of one label a text, and one of several."""
    texts, labels = corpus
    several = ["|".join(sorted({a, b})) for a, b in zip(labels, labels[::-1], strict=True)]
    columns = {"trec6": ("label", labels), "goemotions": ("labels", several)}
    for table, (name, column) in columns.items():
        (tmp_path / table).mkdir()
        for part in ("train", "test", "valid"):
            with (tmp_path / table / f"{part}.csv").open("w", newline="") as file:
                rows = zip(texts, column, strict=True)
                csv.writer(file).writerows([("text", name), *rows])
    return tmp_path


def run_benchmark(script, *options):
    result = subprocess.run(
        [sys.executable, EXAMPLES / "benchmarks" / script, *map(str, options)],
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


@pytest.mark.slow
def test_benchmark_of_methods_resumes(encoder, tables):
    output = tables / "runs.jsonl"
    options = ["--data", tables, "--model", encoder, "--output", output, "--seeds", "0"]
    few = ["TF-IDF + LR", "frozen + LR", "LoRA", "QLoRA NF4 + DQ"]
    stdout = run_benchmark(
        "bench_methods.py", *options, "--tasks", "trec6-100", "goemotions", "--methods", *few
    )
    runs = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(runs) == 8
    assert all(run["trained"] > 0 and run["bytes"] > 0 and run["fit_s"] > 0 for run in runs)
    assert "### trec6-100" in stdout
    assert "QLoRA NF4 + DQ minus LoRA: " in stdout
    dense = ["head only", "last 2 layers", "full fine-tuning"]
    run_benchmark("bench_methods.py", *options, "--tasks", "trec6-100", "--methods", *few, *dense)
    runs = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(runs) == 11  # those that were there are not run again
    trained = {run["run"]["method"]: run["trained"] for run in runs[8:]}
    assert trained["head only"] == 3 * (64 + 1)
    assert trained["head only"] < trained["last 2 layers"] < trained["full fine-tuning"]
    learned = [run for run in runs[8:] if run["run"]["method"] != "head only"]
    assert min(run["accuracy"] for run in learned) > 0.8  # of three classes
    report = run_benchmark(
        "bench_methods.py", "--report", "--model", encoder, "--output", output, "--seeds", "0"
    )
    assert [line for line in report.splitlines() if line.startswith("###")] == [
        "### trec6-100",
        "### goemotions",
        "### Over all",
    ]
    assert len(output.read_text().splitlines()) == 11


@pytest.mark.slow
def test_benchmarks_of_pairs(model, tables):
    texts, labels = tiny.corpus()
    (tables / "sick").mkdir()
    rows = [
        (text, texts[-1 - i], label, len(label))
        for i, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    names = "sentence_a", "sentence_b", "label", "relatedness"
    for part in ("train", "test"):
        pd.DataFrame(rows, columns=names).to_csv(tables / "sick" / f"{part}.csv", index=False)
    options = ["--data", tables, "--model", model, "--seeds", "0"]
    few = ["TF-IDF + LR", "frozen + LR", "full fine-tuning", "QLoRA NF4 + DQ"]
    output = tables / "methods.jsonl"
    run_benchmark(
        "bench_methods.py", *options, "--output", output, "--tasks", "sick", "--methods", *few
    )
    assert len(output.read_text().splitlines()) == 4
    printed = run_benchmark("bench_regression.py", *options, "--output", tables / "numbers.jsonl")
    assert [line.split("|")[1].strip() for line in printed.splitlines()[2:]] == [
        "TF-IDF + ridge",
        "frozen + ridge",
        "QLoRARegressor",
    ]


def test_ranks_and_differences_of_methods(monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    bench = load_example("benchmarks/bench_methods")
    accuracies = dict.fromkeys(bench.CHEAP, 0.5)
    accuracies |= {bench.PRODUCT: 0.9, "LoRA": 0.88, "QLoRA NF4": 0.88}
    runs = [
        {"run": {"method": method, "task": task, "seed": seed}, "accuracy": accuracy + shift}
        for method, accuracy in accuracies.items()
        for task, shift in (("trec6", 0), ("banking77", 0.02 * (method == bench.PRODUCT)))
        for seed in (0, 1)
        if (method, task, seed) != ("head only", "banking77", 1)
    ]
    scores = bench.primary_scores(runs)
    tasks = ["trec6", "banking77", "r8"]
    ranks, ranked = bench.mean_ranks(scores, tasks)
    assert ranked == ["trec6"]  # a seed is missing on the other
    assert (ranks[bench.PRODUCT], ranks["LoRA"], ranks["QLoRA NF4"]) == (1, 2.5, 2.5)
    assert ranks["TF-IDF + LR"] == 5.5
    bench.print_difference(scores, tasks, "LoRA")
    # Differences of 2 and 4: standard error 1, and Student's t of 12.71 for two.
    assert "minus LoRA: +3.00 ± 12.71 percentage points" in capsys.readouterr().out


def test_settings_can_be_scored_on_held_out_training_texts(monkeypatch, corpus, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    tasks = load_example("benchmarks/tasks")
    (tmp_path / "trec6").mkdir()
    for part in ("train", "test"):
        with (tmp_path / "trec6" / f"{part}.csv").open("w", newline="") as file:
            rows = [
                (f"{text} {part} {i}", y) for i, (text, y) in enumerate(zip(*corpus, strict=True))
            ]
            csv.writer(file).writerows([("text", "label"), *rows])
    monkeypatch.setitem(tasks.TASKS, "few", tasks.Task("trec6", rows=20))
    table = tasks.held_out("few", tmp_path, seed=0)
    assert (len(table.texts), len(table.test_texts)) == (20, len(corpus[0]) - 20)
    assert not set(table.texts) & set(table.test_texts)
    assert all(" train " in text for text in table.test_texts)
    everything = tasks.load_table("trec6", tmp_path, seed=0)
    truth = dict(zip(everything.texts, everything.y, strict=True))
    assert [truth[text] for text in table.test_texts] == table.test_y.tolist()
    with pytest.raises(SystemExit, match="trec6 trains on all of its texts"):
        tasks.held_out("trec6", tmp_path, seed=0)


def test_a_run_that_was_cut_off_is_run_again(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    tasks = load_example("benchmarks/tasks")
    output = tmp_path / "new" / "runs.jsonl"
    output.parent.mkdir()
    output.write_text('{"run": {"seed": 0}, "accuracy": 0.5}\n{"run": {"se')
    monkeypatch.setattr(tasks, "in_fresh_process", lambda run, key: run(key))
    keys = [{"seed": 0}, {"seed": 1}]
    assert len(tasks.run_missing(keys, None, output)) == 1
    runs = tasks.run_missing(keys, lambda key: {"accuracy": float(key["seed"])}, output)
    assert [run["accuracy"] for run in runs] == [0.5, 1.0]
    assert tasks.run_missing(keys, None, output) == runs


@pytest.mark.slow
def test_benchmark_of_settings_draws_a_picture(encoder, tables):
    output, picture = tables / "runs.jsonl", tables / "rank.png"
    options = ["--data", tables, "--model", encoder, "--output", output, "--seeds", "0"]
    stdout = run_benchmark(
        "bench_settings.py",
        *options,
        *("--tasks", "trec6-100", "--plot", picture),
        *("--try", '{"lora_r": 1}', '{"lora_r": 4}'),
    )
    assert "| lora_r=4 | " in stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_benchmark_of_calibration_draws_a_picture(encoder, tables):
    output, picture = tables / "runs.jsonl", tables / "reliability.png"
    options = ["--data", tables, "--model", encoder, "--output", output, "--seeds", "0", "1"]
    stdout = run_benchmark(
        "bench_calibration.py", *options, "--tasks", "trec6-1000", "--plot", picture
    )
    runs = [json.loads(line) for line in output.read_text().splitlines()]
    assert len(runs) == 2
    for run in runs:
        assert sum(run["before"]["counts"]) == sum(run["after"]["counts"]) == 48
        assert 0 <= run["before"]["ece"] <= 1
    assert "| trec6-1000 | " in stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_tables_of_the_hub(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    columns = {
        "DeepPavlov/clinc150": {"utterance": ["hi", "?", "bye"], "label": [7, None, 3]},
        "google-research-datasets/go_emotions": {"text": ["wow", "so"], "labels": [[26, 3], [27]]},
    }
    asked = []

    def load_dataset(name, split):
        asked.append(split)
        return columns[name]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    tasks = load_example("benchmarks/tasks")
    intents = tasks.load_table("clinc150-1shot", None, seed=0)
    assert sorted(zip(intents.texts, intents.y.tolist(), strict=True)) == [("bye", 3), ("hi", 7)]
    emotions = tasks.load_table("goemotions", None, seed=0)
    assert emotions.multilabel
    assert emotions.y[emotions.texts.index("wow")].tolist() == [1, 1, 0]
    assert emotions.valid_y.shape == (2, 3)
    assert asked == ["train", "test", "validation"] * 2
    with pytest.raises(SystemExit, match=r"r8 is not on the Hub\. Pass its folder by --data\."):
        tasks.load_table("r8", None, seed=0)


def test_expected_calibration_error_is_that_of_its_definition(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "benchmarks")
    bench = load_example("benchmarks/bench_calibration")
    confidence = np.array([0.99, 0.98, 0.5, 0.52, 1.0])
    hits = np.array([True, False, True, False, True])
    counts, confidences, accuracies = bench.reliability(confidence, hits)
    assert counts.sum() == 5
    assert counts[-1] == 3
    assert confidences[-1] == pytest.approx(0.99)
    assert accuracies[-1] == pytest.approx(2 / 3)
    assert (counts[7], accuracies[7]) == (2, 0.5)


@pytest.mark.slow
def test_benchmark_of_scaling(encoder, tmp_path):
    output, picture = tmp_path / "figures.json", tmp_path / "curves.png"
    script = [EXAMPLES / "benchmarks" / "bench_scaling.py", "--model", encoder, "--repeats", "1"]
    options = ["--rows", "128", "256", "--tokens", "8", "16", "--profile"]
    options += ["--output", output, "--picture", picture]
    result = subprocess.run(
        [sys.executable, *script, *options], capture_output=True, text=True, check=True
    )
    figures = json.loads(output.read_text())
    assert set(figures["curves"]) == {"rows", "tokens", "classes", "rank"}
    assert all(0 < row["share"] < 2 for row in figures["utilisation"])
    assert "| float32 | 16 | " in result.stdout
    assert "aten::addmm" in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_benchmark_of_a_gpu_runs_without_one(tmp_path, checkpointing):
    output = tmp_path / "figures.json"
    script = [EXAMPLES / "benchmarks" / "bench_gpu.py", "--device", "cpu", "--sizes", "tiny"]
    options = ["--batch-size", "2", "--tokens", "16", "--updates", "3", "--output", output]
    options += ["--profile"] + ["--checkpointing"] * checkpointing
    result = subprocess.run(
        [sys.executable, *script, *options], capture_output=True, text=True, check=True
    )
    ours, peer = json.loads(output.read_text())
    assert {"products", "products of LoRA", "dequantization"} < ours["profile"]["calls"].keys()
    assert "| products of LoRA | " in result.stdout
    assert (ours["side"], peer["side"]) == ("skqlora", "Trainer + PEFT")
    assert min(ours["tokens_per_s"], peer["tokens_per_s"]) > 0
    assert "| tiny | skqlora | " in result.stdout
