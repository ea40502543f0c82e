r"""
Predict a column that does not fit in memory
============================================

A fitted classifier is some megabytes, so it goes wherever the texts are. Here it labels a CSV file
twice without ever holding the file: a chunk at a time in this process with pandas, and in parallel
on a Dask cluster, whose workers write their parts to Parquet.

For a file of your own, set ``CSV`` to its path: it has a header and a column named text. The
example needs the extra ``dask``: ``pip install "skqlora[demo,dask]"``.
"""

import pickle
import tempfile
import time
from pathlib import Path

import dask
import dask.dataframe as dd
import pandas as pd
from dask.distributed import Client

from skqlora import QLoRAClassifier, backbone_cache_info
from skqlora.demo import load_docstrings, minilm_folder

MODEL = minilm_folder()
CSV = None  # or the path of a file; None writes one of docstrings, many times
N_ROWS = 3000  # of that file
OUTPUT = None  # or a folder; None makes a temporary one
READ = {"dtype": {"text": "str"}, "keep_default_na": False}  # an empty text is "", not missing

# %%
# A chunk at a time
# -----------------
# Memory is that of one chunk, whatever the size of the file. Large chunks are better sorted by
# length, hence faster; some thousand rows are enough.


def label_in_chunks(clf, path, output, chunksize=5000):
    """Copy a CSV file with a column more, the predicted label; return the number of rows."""
    n_rows = 0
    with pd.read_csv(path, chunksize=chunksize, **READ) as chunks:
        for chunk in chunks:
            chunk["label"] = clf.predict(chunk["text"])
            chunk.to_csv(output, mode="a" if n_rows else "w", header=not n_rows, index=False)
            n_rows += len(chunk)
    return n_rows


# %%
# On a cluster
# ------------
# The classifier travels to the workers in a pickle, without a base. Each worker loads the base at
# its first partition and keeps it. `dask.delayed` puts the pickle into the task graph once rather
# than once for each partition, which counts when adapters are large.
#
# `read_csv` cuts a file at line ends. Where texts hold line ends themselves, pass
# ``blocksize=None`` with several files, or read Parquet: `dd.read_parquet`.


def label_partition(part, clf):
    """Add the predicted label to one partition, a pandas DataFrame that may be empty."""
    return part.assign(label=clf.predict(part["text"]) if len(part) else [])


def label_on_cluster(clf, table, output):
    """Write a Dask DataFrame with a column more, the predicted label, to a folder of Parquet."""
    meta = table._meta.assign(label=pd.Series(dtype=pd.Series(clf.classes_).dtype))
    labelled = table.map_partitions(label_partition, dask.delayed(clf), meta=meta)
    labelled.to_parquet(output)


# %%
# Both
# ----
# A script that starts processes needs a function ``main`` that these do not run.


def main():
    texts, labels = load_docstrings()
    clf = QLoRAClassifier(MODEL, num_train_epochs=2, random_state=0)
    clf.fit(texts[::4], labels[::4])
    print(f"fitted; as a pickle {len(pickle.dumps(clf)) / 1e6:.1f} MB")

    folder = Path(OUTPUT or tempfile.mkdtemp())
    folder.mkdir(exist_ok=True)
    path = CSV
    if path is None:
        path = folder / "texts.csv"
        column = [texts[i % len(texts)] for i in range(N_ROWS)]
        pd.DataFrame({"text": column}).to_csv(path, index=False)

    start = time.perf_counter()
    n_rows = label_in_chunks(clf, path, folder / "labelled.csv")
    print(f"in chunks: {n_rows} rows, {time.perf_counter() - start:.1f} s")

    # By default a worker gives freed memory back at once, which the next layer asks for again.
    dask.config.set({"distributed.nanny.pre-spawn-environ.MALLOC_TRIM_THRESHOLD_": None})
    with Client(n_workers=2, threads_per_worker=1, dashboard_address=":0") as client:
        start = time.perf_counter()
        table = dd.read_csv(path, blocksize=Path(path).stat().st_size // 8, **READ)
        label_on_cluster(clf, table, folder / "labelled")
        print(f"on a cluster: {table.npartitions} parts, {time.perf_counter() - start:.1f} s")
        for worker, info in client.run(backbone_cache_info).items():
            print(f"{worker}: the base was loaded {info.misses} time(s), found {info.hits} times")
    labelled = dd.read_parquet(folder / "labelled").compute()
    print(labelled["label"].value_counts().head())
    print(f"written to {folder}")


if __name__ == "__main__":
    main()
