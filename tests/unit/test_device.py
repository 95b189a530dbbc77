"""The device layer: what is resolved, what is refused, and the place of devices that compile their programs."""

import importlib
import sys
from types import ModuleType

import pytest
import torch

from realm_core.config import RuntimeConfig
from realm_core.errors import ConfigError
from realm_core.model.device import resolve
from realm_core.model.world import World


class CountedSteps(ModuleType):
    """Stands where torch_xla would: its device is the processor, and it counts the steps it is told of."""

    steps = 0

    def device(self) -> torch.device:
        return torch.device("cpu")

    def sync(self) -> None:
        self.steps += 1


def test_xla_without_its_library_is_refused_with_the_next_move(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_xla", None)
    with pytest.raises(ConfigError, match=r"runtime\.device=xla: torch_xla cannot be imported .*; install it"):
        resolve(RuntimeConfig(device="xla"))


def test_xla_devices_have_static_shapes_whatever_the_settings_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_xla", CountedSteps("torch_xla"))
    device = resolve(RuntimeConfig(device="xla", precision="fp32"))
    assert device.static and device.torch_device == torch.device("cpu")
    assert not resolve(RuntimeConfig(device="cpu", precision="fp32")).static
    assert resolve(RuntimeConfig(device="cpu", precision="fp32", static_shapes=True)).static


def test_an_xla_device_is_told_of_every_step_and_no_other_device_asks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    library = CountedSteps("torch_xla")
    monkeypatch.setitem(sys.modules, "torch_xla", library)
    from realm_core.model.device import Device

    for kind in ("cpu", "xla", "xla"):
        Device(torch.device(kind), "fp32").end_step()
    assert library.steps == 2 and importlib.import_module("torch_xla") is library


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it would be found")
def test_a_missing_cuda_device_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"runtime\.device=cuda: torch sees no CUDA device"):
        resolve(RuntimeConfig(device="cuda"))


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr("os.cpu_count", lambda: 16)
    resolve(RuntimeConfig(device="cpu"), world=World(1, 4))
    resolve(RuntimeConfig(device="cpu", threads=2), world=World(1, 4))
    resolve(RuntimeConfig(device="cpu"))
    assert set_to == [4, 2]
