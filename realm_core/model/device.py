"""The device layer: which device computes, in which precision, with how many threads.

CPU and CUDA today. An XLA device fits in `resolve`: sequence lengths are static settings, and every stage asks this
module for its device and its autocast context.
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from realm_core.config import RuntimeConfig
from realm_core.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """A resolved device."""

    torch_device: torch.device
    precision: str  # fp32 or bf16

    def autocast(self) -> AbstractContextManager[None]:
        """Mixed precision for forward passes; weights and optimiser stay in float32."""
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.torch_device.type, dtype=torch.bfloat16)


def resolve(runtime: RuntimeConfig, *, shared: bool = False) -> Device:
    """Pick device and precision and set torch's thread count (`shared`: trainer and refresh run side by side).

    Raises ConfigError if the device that was asked for is not there.
    """
    threads = runtime.shared_threads if shared else runtime.threads
    if threads:
        torch.set_num_threads(threads)
    name = runtime.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("runtime.device=cuda: torch sees no CUDA device; set runtime.device=cpu or auto")
    precision = runtime.precision
    if precision == "auto":
        precision = "bf16" if computes_bf16(name) else "fp32"
    return Device(torch.device(name), precision)


def computes_bf16(device: str) -> bool:
    """Whether bfloat16 matrix products run in hardware there, rather than by conversion."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    probe = getattr(torch.cpu, "_is_avx512_bf16_supported", None)  # torch offers no public name for this
    return bool(probe and probe())
