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

SAFETENSORS, PYTORCH = "model.safetensors", "pytorch_model.bin"  # or parts of them, listed in a NAME.index.json
_OLD_STREAM = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch wrote first before 1.6
MAX_JSON = 16 << 20  # bytes
_MOST_SHARED = 3  # how often tied tensors may repeat what the file holds once


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights. Safetensors are preferred. Raises DataError if there are none."""
    for name in (SAFETENSORS, PYTORCH):
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [folder / shard for shard in _shard_names(index, PurePath(name).suffix)]
    raise DataError(f"{folder}: neither {SAFETENSORS} nor {PYTORCH}; name the folder of a transformers checkpoint")


def read_weights(paths: list[Path]) -> dict[str, Tensor]:
    """All tensors by name, mapped from the files where possible. Raises DataError for anything else than tensors."""
    tensors: dict[str, Tensor] = {}
    for path in paths:
        found = _read_safetensors(path) if path.suffix == PurePath(SAFETENSORS).suffix else _read_pytorch(path)
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


def _shard_names(path: Path, suffix: str) -> list[str]:
    names = read_json(path).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise DataError(f"{path}: no weight_map; fetch it again")
    plain = sorted(set(map(str, names.values())))
    for name in plain:
        if PurePath(name).name != name or PurePath(name).suffix != suffix:
            raise DataError(f"{path}: {name!r} is not a {suffix} file of this folder; refused")
    return plain


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, RuntimeError, TypeError, KeyError) as error:
        raise DataError(f"{path}: not a readable safetensors file ({_short(error)}); fetch it again") from None


def _read_pytorch(path: Path) -> dict[str, Tensor]:
    """Tensors of a file that `torch.save` wrote. Its pickle goes through torch's restricted reader, and never another."""
    old = _begins_as_before_torch_1_6(path)
    if not old:
        _require_plain_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=not old)
    except Exception as error:  # whatever a damaged or hostile file makes torch's reader raise
        raise DataError(f"{path}: refused by the loader that runs no code ({_short(error)}); use safetensors") from None
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and type(tensor) in (Tensor, torch.nn.Parameter) for name, tensor in content.items()
    ):
        raise DataError(f"{path}: holds something else than named tensors; use safetensors")
    _require_backed(content, path)
    return dict(content)


def _begins_as_before_torch_1_6(path: Path) -> bool:
    """Whether this is the older stream of torch, which the same restricted reader knows. No other pickle is opened."""
    try:
        with path.open("rb") as file:
            return file.read(len(_OLD_STREAM)) == _OLD_STREAM
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def _require_plain_archive(path: Path) -> None:
    """Only uncompressed archives: they cannot unpack to more than they are."""
    try:
        if not zipfile.is_zipfile(path):
            raise DataError(f"{path}: neither an archive nor a stream of torch; save it again as safetensors")
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
