"""One fit on two ranks of `torchrun`: the same weights on both, and those of one process."""

import os
import subprocess
import sys
from pathlib import Path

import joblib
import numpy as np
import pytest
import ranks
import tiny
from helpers import assert_equal_adapters, make_classifier

EXTRA = {
    "steps without a row": {"batch_size": 1},
    "checkpoints": {"early_stopping": True, "scoring": "loss"},
}


@pytest.fixture(scope="module", params=["bert", pytest.param("llama", marks=pytest.mark.slow)])
def fitted(request, tiny_model, tmp_path_factory):
    """A model's folder, and what two ranks that trained on it wrote."""
    model, folder = tiny_model(request.param), tmp_path_factory.mktemp("ranks")
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(ranks.__file__, model, folder),
        ],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        check=True,
        timeout=300,
    )
    return model, [joblib.load(folder / f"{rank}.joblib") for rank in (0, 1)]


@pytest.mark.parametrize("case", [*ranks.CASES, "steps without a row", "checkpoints"])
def test_ranks_end_with_the_same_bits(fitted, case):
    _, (first, second) = fitted
    assert_equal_adapters(first[case], second[case])
    assert first[case].loss_curve_ == second[case].loss_curve_
    assert first[case].validation_scores_ == second[case].validation_scores_


@pytest.mark.parametrize(
    "case", ["dropout", "micro-batches and weights", "steps without a row", "checkpoints"]
)
def test_ranks_end_where_one_process_does(fitted, case):
    model, (ours, _) = fitted
    n_rows = 5 if case == "steps without a row" else ranks.N_ROWS
    texts, labels = (values[:n_rows] for values in tiny.corpus(ranks.N_ROWS))
    params = ranks.CASES.get(case, EXTRA.get(case, {}))
    alone = make_classifier(model, **params).fit(texts, labels)
    assert ours[case].loss_curve_ == pytest.approx(alone.loss_curve_, abs=1e-5)
    for kind in ("lora_tensors", "head_tensors"):
        for name, expected in getattr(alone.adapter_, kind).items():
            value = getattr(ours[case].adapter_, kind)[name]
            np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5)


def test_every_rank_predicts(fitted):
    _, (first, second) = fitted
    np.testing.assert_array_equal(first["predictions"], second["predictions"])


def test_ranks_keep_to_the_thread_that_they_were_given(fitted):
    _, results = fitted
    assert [result["threads"] for result in results] == [1, 1]


@pytest.mark.parametrize(
    "case",
    ["other labels", "other order", "other rank of LoRA", "other dtype", "other quantization"],
)
def test_ranks_with_different_calls_are_refused(fitted, case):
    _, results = fitted
    for result in results:
        assert (
            "The texts, labels, weights or parameters of rank 1 are not those of rank 0"
            in result[case]
        )


def test_second_fit_at_once_on_a_rank_is_refused(fitted):
    _, results = fitted
    for result in results:
        assert "Wanted: one fit after the other" in result["two at once"]
