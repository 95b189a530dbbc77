"""When a checkpoint is worth an index, and what the estimate behind the decision measures."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from realm_core.artifacts.manifest import MANIFEST, file_sha256, read_manifest
from realm_core.artifacts.store import Store
from realm_core.config import Config, RefreshConfig
from realm_core.errors import ArtifactError, ConfigError
from realm_core.evaluate.refresh_estimate import estimate_refresh
from realm_core.model.bundle import EMBEDDER
from realm_core.params import load_config
from realm_core.train.refresh_policy import decide

FIRST, LATER = "r1-s0000000", "r1-s0000004"


@given(
    policy=st.sampled_from(["every_checkpoint", "every_steps", "drift"]),
    step=st.integers(0, 1000),
    last=st.integers(0, 1000),
    refreshed=st.none() | st.integers(0, 1000),
    overlap=st.none() | st.floats(0, 1),
)
def test_the_first_and_the_last_are_refreshed_and_every_decision_has_a_reason(
    policy: str, step: int, last: int, refreshed: int | None, overlap: float | None
) -> None:
    settings = RefreshConfig.model_validate({"policy": policy})
    estimate = None if overlap is None else {"step": step, "top_k_overlap": overlap}
    found = decide(settings, step=step, last_step=last, refreshed_step=refreshed, estimate=estimate)
    assert found.reason
    if refreshed is None or step >= last:
        assert found.what == "refresh"
    if overlap is not None:
        assert found.what != "estimate"
    if policy != "drift":
        assert found.what != "estimate"


@given(threshold=st.floats(0.01, 1), overlap=st.floats(0, 1), later=st.booleans())
def test_drift_refreshes_from_the_threshold_on_and_an_old_estimate_never_says_no(
    threshold: float, overlap: float, later: bool
) -> None:
    settings = RefreshConfig(policy="drift", drift_threshold=threshold)
    estimate = {"step": 4 if later else 8, "top_k_overlap": overlap}
    found = decide(settings, step=8, last_step=100, refreshed_step=0, estimate=estimate)
    enough = 1.0 - overlap >= threshold
    assert found.what == ("refresh" if enough else "estimate" if later else "pass over")


def estimate(store: Store, checkpoint: Path, config: Config | None = None, questions: tuple[str, ...] = ()) -> dict:
    return estimate_refresh(
        config or store.config(),
        checkpoint=checkpoint,
        live_index=store.path("indexes", FIRST),
        live_checkpoint=store.path("checkpoints", FIRST),
        corpus=store.newest("corpus"),
        questions=questions,
    )


@pytest.fixture
def far_away(tiny_home: Store, tmp_path: Path) -> Path:
    """A checkpoint whose retriever has little in common with the live one's."""
    folder = Path(shutil.copytree(tiny_home.path("checkpoints", LATER), tmp_path / LATER))
    weights = load_file(folder / EMBEDDER)
    noise = torch.Generator().manual_seed(0)
    changed = {
        name: value + value.std() * torch.randn(value.shape, generator=noise)
        for name, value in weights.items()
        if value.numel() > 1
    }
    save_file({**weights, **changed}, folder / EMBEDDER)
    made = read_manifest(folder)
    made = replace(made, files={**made.files, EMBEDDER: file_sha256(folder / EMBEDDER)})
    (folder / MANIFEST).write_text(made.to_json(), encoding="utf-8")
    return folder


def test_the_checkpoint_behind_the_live_index_has_not_drifted(tiny_home: Store) -> None:
    found = estimate(tiny_home, tiny_home.path("checkpoints", FIRST), questions=("Which ship?", "Who wrote it?"))
    assert found["top_k_overlap"] == 1.0
    assert found["distance_max"] == 0.0


def test_a_later_one_has_moved_and_the_sample_is_the_same_each_time(tiny_home: Store) -> None:
    later = tiny_home.path("checkpoints", LATER)
    found = estimate(tiny_home, later)
    assert 0.0 < found["distance_mean"] < float("inf")
    assert estimate(tiny_home, later) == found


def test_the_sample_is_as_large_as_set_and_never_larger_than_the_corpus(tiny_home: Store, far_away: Path) -> None:
    small = load_config(None, "tiny", ("refresh.drift_blocks=3", "refresh.drift_k=8", "refresh.drift_queries=2"))
    assert estimate(tiny_home, far_away, small)["top_k_overlap"] == 1.0  # three of three
    large = load_config(None, "tiny", ("refresh.drift_blocks=100000",))
    assert estimate(tiny_home, far_away, large)["top_k_overlap"] < 0.9


def test_an_altered_checkpoint_and_a_wrong_live_one_are_refused(tiny_home: Store, tmp_path: Path) -> None:
    torn = Path(shutil.copytree(tiny_home.path("checkpoints", LATER), tmp_path / LATER))
    weights = next(path for path in torn.rglob("*.safetensors") if "embedder" in path.as_posix())
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x55")
    base = {"live_index": tiny_home.path("indexes", FIRST), "corpus": tiny_home.newest("corpus")}
    live = tiny_home.path("checkpoints", FIRST)
    with pytest.raises(ArtifactError, match="sha256"):
        estimate_refresh(tiny_home.config(), checkpoint=torn, live_checkpoint=live, **base)
    with pytest.raises(ArtifactError, match="made from checkpoint"):
        estimate_refresh(
            tiny_home.config(), checkpoint=live, live_checkpoint=tiny_home.path("checkpoints", LATER), **base
        )


def test_settings_of_the_operation_are_checked() -> None:
    for override, text in (
        ("supervise.stale_seconds=5", "under three times heartbeat_seconds"),
        ("retrain.cron=weekly", "retrain.cron"),
        ("retrain.timezone=Mars/Base", "not known here"),
        ("refresh.policy=sometimes", "refresh.policy"),
        ("refresh.drift_threshold=0", "refresh.drift_threshold"),
    ):
        with pytest.raises(ConfigError, match=text):
            load_config(None, "tiny", (override,))
    assert load_config(None, "tiny", ("retrain.cron=0 3 * * 0",)).retrain.cron == "0 3 * * 0"


def test_settings_of_the_operation_may_change_under_a_home_that_trains(home: Store, tiny_sources: dict) -> None:
    changed = load_config(None, "tiny", ("refresh.policy=drift", "supervise.max_restarts=9", "retrain.cron=0 3 * * 0"))
    assert Store.create(home.home, changed, tiny_sources, "tiny").config() == changed
    with pytest.raises(ConfigError, match=r"pretrain\.lr is .* there"):
        Store.create(home.home, load_config(None, "tiny", ("pretrain.lr=0.5",)), tiny_sources, "tiny")
    assert Store(home.home).config() == changed
