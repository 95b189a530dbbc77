"""The device layer: which device computes, in which precision, with how many threads and in which shapes.

CPU and CUDA run here. XLA devices are resolved through torch_xla where that is installed: they compile one program for each
set of shapes, so they get static shapes, and every step ends with `Device.end_step`, where such a device does its work.
Every stage asks this module for its device, its autocast context and whether to trim its batches.
"""

import importlib
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from realm_core.config import RuntimeConfig
from realm_core.errors import ConfigError
from realm_core.model.world import World

_ALONE = World()


@dataclass(frozen=True)
class Device:
    """A resolved device. `static`: batches are padded to their longest possible size instead of trimmed."""

    torch_device: torch.device
    precision: str  # fp32 or bf16
    static: bool = False

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision for forward passes; weights and optimiser stay in float32."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.torch_device.type, dtype=torch.bfloat16)

    def end_step(self) -> None:
        """Called after every optimiser update: a device that collects work before it runs it starts now."""
        if self.torch_device.type == "xla":
            importlib.import_module("torch_xla").sync()


def device_kind(runtime: RuntimeConfig) -> str:
    """cpu, cuda or xla: what `runtime.device` means here. Raises ConfigError if it is not there."""
    if runtime.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if runtime.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("runtime.device=cuda: torch sees no CUDA device; set runtime.device=cpu or auto")
    return runtime.device


def require_device(runtime: RuntimeConfig) -> None:
    """Raise ConfigError if the device that `runtime` asks for is not there; takes none, as a TPU serves one process only."""
    if device_kind(runtime) == "xla":
        _torch_xla()


def resolve(runtime: RuntimeConfig, *, shared: bool = False, world: World = _ALONE) -> Device:
    """Pick device and precision and set torch's thread count (`shared`: trainer and refresh run side by side).

    Raises ConfigError if the device that was asked for is not there.
    """
    kind = device_kind(runtime)
    threads = runtime.shared_threads if shared else runtime.threads
    if not threads and world.size > 1 and kind == "cpu":
        threads = max(1, (os.cpu_count() or 1) // world.size)  # each process would take all cores otherwise
    if threads:
        torch.set_num_threads(threads)
    precision = runtime.precision
    if precision == "auto":
        precision = "bf16" if computes_bf16(kind) else "fp32"
    return Device(_torch_device(kind, world), precision, runtime.static_shapes or kind == "xla")


def _torch_device(kind: str, world: World) -> torch.device:
    if kind == "xla":
        found: torch.device = _torch_xla().device()
        return found
    if kind == "cuda" and world.size > 1:
        if world.local >= torch.cuda.device_count():
            raise ConfigError(
                f"{world}: this machine has {torch.cuda.device_count()} CUDA devices, one is needed for each process; "
                "start fewer processes"
            )
        torch.cuda.set_device(world.local)
        return torch.device("cuda", world.local)
    return torch.device(kind)


def _torch_xla():  # type: ignore[no-untyped-def]  # an optional library without type information
    try:
        return importlib.import_module("torch_xla")
    except ImportError as error:
        raise ConfigError(
            f"runtime.device=xla: torch_xla cannot be imported ({error}); install it for this torch, "
            "or set runtime.device=auto"
        ) from None


def computes_bf16(device: str) -> bool:
    """Whether bfloat16 matrix products run in hardware there, rather than by conversion."""
    if device == "xla":
        return True
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch offers no public name for this
    return bool(probe and probe())
