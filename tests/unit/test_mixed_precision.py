"""bf16 training steps: near fp32, and resumed to the last bit."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from realm_core.artifacts.store import Store, checkpoint_key
from realm_core.ports import MemorySink
from realm_core.stages import finetune
from tests import training
from tests.unit.test_pretrain import set_config, train

BF16, FP32 = "runtime.precision=bf16", "runtime.precision=fp32"


def assert_near_but_not_equal(half: list[float], full: list[float]) -> None:
    assert all(map(math.isfinite, half))
    assert half == pytest.approx(full, rel=0.05)
    assert half != full  # else nothing was computed in bf16


@pytest.mark.parametrize("steps", [training.trained_ict, training.warmed_up, training.pretrained])
def test_steps_in_bf16_have_the_losses_of_fp32_up_to_rounding(tiny_home: Store, steps: Callable) -> None:
    half, full = (steps(tiny_home, training.settings(precision))[1] for precision in (BF16, FP32))
    assert_near_but_not_equal(half, full)


def test_weights_stay_in_float32_and_move_in_bf16_as_they_do_in_fp32(tiny_home: Store) -> None:
    (half, _), (full, _) = (training.trained_ict(tiny_home, training.settings(precision)) for precision in (BF16, FP32))
    assert {weight.dtype for weight in half.values()} == {weight.dtype for weight in full.values()}
    assert training.farthest(half, full) < 0.02  # eight updates at a rate of 1e-3 and below, of either sign


def reader_rows(home: Store, precision: str, out: Path, dense: bool) -> list[dict[str, float]]:
    """What every step of the reader logs; with a dense retriever over all blocks, so that none is left out by rounding."""
    sink, key = MemorySink(), training.KEY
    finetune.run(
        training.settings(precision, "reader.searcher_beam=320"),
        index=home.path("indexes", key) if dense else None,
        snapshot=home.path("snapshots", key) if dense else None,
        checkpoint=home.path("checkpoints", key),
        corpus=home.newest("corpus"),
        questions=home.newest("questions"),
        out=out,
        sink=sink,
    )
    return [row for _, row in sink.rows]


@pytest.mark.slow
@pytest.mark.parametrize(("dense", "name"), [(False, "reader/loss"), (True, "reader/retriever_loss")])
def test_a_reader_in_bf16_has_the_losses_of_fp32_up_to_rounding(
    tiny_home: Store, tmp_path: Path, dense: bool, name: str
) -> None:
    half, full = (reader_rows(tiny_home, precision, tmp_path / precision, dense) for precision in (BF16, FP32))
    assert_near_but_not_equal([row[name] for row in half], [row[name] for row in full])
    assert all(math.isfinite(value) for row in half for value in row.values())


def test_a_run_in_bf16_in_parts_is_the_run_in_one_go_to_the_last_bit(home: Store) -> None:
    set_config(home, ("runtime", "precision", "bf16"))
    train(home, run="r2", until=8)
    for until in (0, 4, 8):
        train(home, run="r3", until=until)
    one, other = (home.manifest("checkpoints", checkpoint_key(run, 8)) for run in ("r2", "r3"))
    assert one.facts["precision"] == "bf16"
    assert one.files == other.files
