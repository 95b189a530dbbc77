"""Opens the weight files of a transformers folder: safetensors, or a PyTorch file through the loader that runs no code."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from realm_core.errors import DataError

SAFETENSORS, SAFETENSORS_INDEX, PYTORCH = "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"
MAX_JSON = 16 << 20  # bytes
_MOST_SHARED = 3  # how often tied tensors may repeat what the file holds once


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights. Safetensors are preferred. Raises DataError if there are none."""
    if (folder / SAFETENSORS).is_file():
        return [folder / SAFETENSORS]
    if (folder / SAFETENSORS_INDEX).is_file():
        return [folder / name for name in _shard_names(folder / SAFETENSORS_INDEX)]
    if (folder / PYTORCH).is_file():
        return [folder / PYTORCH]
    raise DataError(f"{folder}: neither {SAFETENSORS} nor {PYTORCH}; name the folder of a transformers checkpoint")


def read_weights(paths: list[Path]) -> dict[str, Tensor]:
    """All tensors by name, mapped from the files where possible. Raises DataError for anything else than tensors."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        found = _read_pytorch(path) if path.name == PYTORCH else _read_safetensors(path)
        if repeated := sorted(found.keys() & tensors.keys()):
            raise DataError(f"{path}: {repeated[0]} is in another file already; the checkpoint is not consistent")
        tensors |= found
    return tensors


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of reasonable size. Raises DataError."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise DataError(f"{path}: larger than {MAX_JSON} bytes; this is another file")
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name the folder of a checkpoint") from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON ({str(error)[:80]}); fetch it again") from None
    if not isinstance(values, dict):
        raise DataError(f"{path}: a JSON {type(values).__name__}, expected an object; fetch it again")
    return values


def _shard_names(path: Path) -> list[str]:
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise DataError(f"{path}: no weight_map; fetch it again")
    plain = sorted(set(map(str, names.values())))
    for name in plain:
        if PurePath(name).name != name or not name.endswith(".safetensors"):
            raise DataError(f"{path}: {name!r} is not a safetensors file of this folder; refused")
    return plain


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({_short(error)}); fetch it again") from None


def _read_pytorch(path: Path) -> dict[str, Tensor]:
    """Tensors of a file that `torch.save` wrote. Its pickle goes through torch's restricted reader, and never another."""
    _require_plain_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged or hostile file makes torch's reader raise
        raise DataError(f"{path}: refused by the loader that runs no code ({_short(error)}); use safetensors") from None
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and type(tensor) in (Tensor, torch.nn.Parameter) for name, tensor in content.items()
    ):
        raise DataError(f"{path}: holds something else than named tensors; use safetensors")
    _require_backed(content, path)
    return dict(content)


def _require_plain_archive(path: Path) -> None:
    """Only uncompressed archives: they cannot unpack to more than they are. Older pickle streams are not opened at all."""
    try:
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path}: not an archive of torch >= 1.6; save it again as safetensors")
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise DataError(f"{path}: not a readable archive ({_short(error)}); fetch it again") from None
    size = path.stat().st_size
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size > size for entry in entries):
        raise DataError(f"{path}: a compressed archive, which torch does not write; refused")


def _require_backed(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Views can claim any size over a few bytes (strides of zero); copying them would fill the memory."""
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if claimed > _MOST_SHARED * path.stat().st_size:
        raise DataError(f"{path}: tensors of {claimed} bytes in a much smaller file; refused")


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
