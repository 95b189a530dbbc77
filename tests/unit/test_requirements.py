"""What a machine cannot do is said before the first stage begins."""

import sys

import pytest

from realm_core.errors import ConfigError, RealmError
from realm_core.index.backends import known_backends, require_backend
from realm_core.params import load_config
from realm_core.stages.requirements import require_possible


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["runtime.device=cuda"], "runtime.device=cuda: torch sees no CUDA device"),
        (["runtime.device=xla"], "runtime.device=xla: torch_xla cannot be imported"),
        (["index.params={chunk: 0}"], "index exact: chunk=0; give a whole number at least 1"),
        (["index.params={nprobe: 3}"], "index exact: unknown parameter nprobe; it takes chunk"),
        (["index.backend=faiss_ivf", "index.params={nlist: 0}"], "index faiss_ivf: nlist=0"),
        (
            ["index.backend=alsh", "index.params={bits: 31}"],
            "index alsh: bits=31; give a whole number between 1 and 30",
        ),
        (["model.weights=folder:/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_be_had_here_is_refused(monkeypatch: pytest.MonkeyPatch, settings: list[str], said: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(RealmError) as refusal:
        require_possible(load_config(None, "tiny", settings))
    assert said in str(refusal.value) and "\n" not in str(refusal.value)


def test_the_profiles_that_need_no_hub_are_possible_here() -> None:
    for profile in ("tiny", "demo"):
        require_possible(load_config(None, profile))


@pytest.mark.parametrize("backend", [name for name in known_backends() if name.startswith("faiss")])
def test_an_index_of_faiss_needs_faiss(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    require_backend(backend, {})
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match="FAISS is not installed; install the extra"):
        require_backend(backend, {})
