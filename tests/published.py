"""Small checkpoints in the formats others publish: the port's folders, and TensorFlow bundles written without TensorFlow."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from realm_core.compat.bert_layout import shape_values
from realm_core.compat.crc32c import masked_crc32c
from realm_core.model.embedder import Embedder
from realm_core.model.encoder import EncoderShape
from realm_core.model.knowledge_encoder import KnowledgeEncoder
from realm_core.model.reader import Reader
from realm_core.text.tokenizer import SPECIAL_TOKENS

WORDS = "the of in who what city river king moon born paris rome tower newton curie first second war film".split()
VOCABULARY = [*SPECIAL_TOKENS, *WORDS, *"abcdefghijklmnopqrstuvwxyz0123456789.,?"]
TEXTS = ["The king of Rome.", "Paris is a city. The river is in Paris.", "Newton, the first.", "A moon film."]
SHAPE = EncoderShape(
    vocab_size=len(VOCABULARY), hidden_size=16, layers=2, heads=2, intermediate_size=24, max_positions=32
)
PROJECTION, SPAN_HIDDEN, SPAN_WIDTH = 8, 6, 3
State = dict[str, Tensor]


def weights(module: nn.Module, seed: int) -> State:
    """Tensors of a module, all drawn anew: no norm is the identity, no bias is zero."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.3 + (1.0 if name.endswith("Norm.weight") else 0.0)
        for name, tensor in module.state_dict().items()
    }


def embedder_state(seed: int = 0) -> State:
    return {**weights(Embedder(SHAPE, PROJECTION), seed), **unused_head(seed)}


def encoder_state(seed: int = 1) -> State:
    """With the tied tensors stored twice, as PyTorch files have them."""
    state = weights(KnowledgeEncoder(SHAPE), seed)
    state["cls.predictions.decoder.weight"] = state["realm.embeddings.word_embeddings.weight"].clone()
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"].clone()
    return state


def reader_state(seed: int = 2) -> State:
    return {**weights(Reader(SHAPE, SPAN_HIDDEN, SPAN_WIDTH), seed), **unused_head(seed)}


def open_qa_state(rows: int = len(TEXTS)) -> State:
    return {
        **{f"embedder.{name}": tensor for name, tensor in embedder_state().items()},
        **{f"reader.{name}": tensor for name, tensor in reader_state().items()},
        "block_emb": torch.randn(rows, PROJECTION, generator=torch.Generator().manual_seed(3)),
    }


def scorer_state(query_seed: int = 0) -> State:
    """With the seed of the embedder both towers are equal."""
    towers = {"embedder": embedder_state(), "query_embedder": embedder_state(query_seed)}
    return {f"{prefix}.{name}": tensor for prefix, state in towers.items() for name, tensor in state.items()}


def unused_head(seed: int) -> State:
    """The masked-LM head that embedders and readers of the port carry along."""
    drawn = weights(KnowledgeEncoder(SHAPE), seed + 100)
    head = {name: tensor for name, tensor in drawn.items() if name.startswith("cls.")}
    words = drawn["realm.embeddings.word_embeddings.weight"]
    return {
        **head,
        "cls.predictions.decoder.weight": words,
        "cls.predictions.decoder.bias": head["cls.predictions.bias"],
    }


STATES: dict[str, Callable[[], State]] = {
    "RealmEmbedder": embedder_state,
    "RealmScorer": scorer_state,
    "RealmKnowledgeAugEncoder": encoder_state,
    "RealmReader": reader_state,
    "RealmForOpenQA": open_qa_state,
}


def port_config(architecture: str, **changes: Any) -> dict[str, Any]:
    values = {
        "architectures": [architecture],
        "model_type": "realm",
        **shape_values(SHAPE),
        "retriever_proj_size": PROJECTION,
        "span_hidden_size": SPAN_HIDDEN,
        "max_span_width": SPAN_WIDTH,
        "num_block_records": len(TEXTS),
        "pad_token_id": 1,
    }
    return {key: value for key, value in {**values, **changes}.items() if value is not None}


def port_folder(folder: Path, architecture: str, state: State | None = None, **config: Any) -> Path:
    """A folder as transformers leaves it, in safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(port_config(architecture, **config)))
    state = STATES[architecture]() if state is None else state
    save_file({name: tensor.clone() for name, tensor in state.items()}, folder / "model.safetensors")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    if architecture == "RealmForOpenQA":
        write_records(folder / "block_records.npy", TEXTS)
    return folder


def write_records(path: Path, texts: Sequence[str]) -> None:
    """The way block_records.npy was written: a pickled object array of bytes."""
    records = np.empty(len(texts), dtype=object)
    records[:] = [text.encode() for text in texts]
    np.save(path, records, allow_pickle=True)


def write_tf_records(path: Path, records: Iterable[bytes]) -> None:
    with path.open("wb") as file:
        for record in records:
            length = len(record).to_bytes(8, "little")
            file.write(length + _crc(length) + record + _crc(record))


# --- TensorFlow ------------------------------------------------------------------------------------------------------


def tf_variables(state: Mapping[str, Tensor], bert: str, own: str = "") -> dict[str, np.ndarray]:
    """The tensors of one part under the names of the original code.

    `bert` stands before bert/ and cls/predictions/, `own` before the layers that a part has for itself.
    """
    variables = {}
    for name, tensor in state.items():
        if name.startswith("cls.predictions.decoder."):
            continue
        layers, leaf = name.rsplit(".", 1)
        if layers.startswith("realm."):
            path = f"{bert}bert/" + layers.removeprefix("realm.").replace(".layer.", ".layer_")
        elif layers.startswith("cls.predictions"):
            path = bert + layers
        else:
            path = own + layers.removeprefix("cls.")
            for ours, theirs in {
                "qa_outputs.dense_intermediate": "dense",
                "qa_outputs.dense_output": "dense_1",
                "qa_outputs.layer_normalization": "layer_normalization",
            }.items():
                path = path.replace(ours, theirs)
        path = path.replace(".", "/")
        value = tensor.numpy()
        if path.endswith("_embeddings"):
            variables[path] = value
        elif path.endswith(("LayerNorm", "layer_normalization")):
            variables[f"{path}/{'gamma' if leaf == 'weight' else 'beta'}"] = value
        elif path.endswith("cls/predictions"):
            variables[f"{path}/output_bias"] = value
        else:
            variables[f"{path}/{'kernel' if leaf == 'weight' else 'bias'}"] = value.T if leaf == "weight" else value
    return variables


def tf_embedder(state: State | None = None, depth: int = 3) -> dict[str, np.ndarray]:
    state = embedder_state() if state is None else state
    return tf_variables(state, "module/" * depth, "module/" * (depth - 1))


def tf_encoder(state: State | None = None) -> dict[str, np.ndarray]:
    return tf_variables(encoder_state() if state is None else state, "")


def tf_reader(state: State | None = None) -> dict[str, np.ndarray]:
    return tf_variables(reader_state() if state is None else state, "reader/module/", "reader/")


_TYPES = {"float32": 1, "float64": 2, "int32": 3, "int64": 9}


def write_bundle(
    prefix: Path, variables: Mapping[str, np.ndarray], *, shards: int = 1, snappy: bool = False, **entry: int
) -> Path:
    """PREFIX.index and its data files. `entry` overrides fields (by number, as `f4=...`) of every entry."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    contents = [bytearray(b"pad") for _ in range(shards)]  # offsets need not be multiples of four
    rows = [(b"", _message({1: shards, 3: _message({1: 1})}))]
    for number, name in enumerate(sorted(variables)):
        array = variables[name]
        raw = np.ascontiguousarray(array).tobytes()
        content = contents[number % shards]
        dimensions = b"".join(_field(2, _message({1: size})) for size in array.shape)
        fields = {1: _TYPES[str(array.dtype)], 2: dimensions, 3: number % shards, 4: len(content), 5: len(raw)}
        fields |= {int(key[1:]): value for key, value in entry.items()}
        checksum = b"" if 6 in fields else _varint(6 << 3 | 5) + _crc(raw)
        rows.append((name.encode(), _message(fields) + checksum))
        content.extend(raw)
    for number, content in enumerate(contents):
        prefix.with_name(f"{prefix.name}.data-{number:05d}-of-{shards:05d}").write_bytes(bytes(content))
    write_table(prefix.with_name(f"{prefix.name}.index"), rows, snappy=snappy)
    return prefix


def write_table(path: Path, rows: Sequence[tuple[bytes, bytes]], *, per_block: int = 7, snappy: bool = False) -> None:
    """A LevelDB table of several blocks."""
    content = bytearray()
    handles = []
    for first in range(0, len(rows), per_block):
        group = rows[first : first + per_block]
        handles.append((group[-1][0], _append_block(content, _block(group), snappy)))
    nothing = _append_block(content, _block([]), snappy)
    index = _append_block(content, _block(handles), snappy)
    footer = (nothing + index).ljust(40, b"\0")
    path.write_bytes(bytes(content) + footer + (0xDB4775248B80FB57).to_bytes(8, "little"))


def _append_block(content: bytearray, block: bytes, snappy: bool) -> bytes:
    offset = len(content)
    body = pa.compress(block, codec="snappy", asbytes=True) if snappy else block
    stored = body + (b"\1" if snappy else b"\0")
    content.extend(stored + _crc(stored))
    return _varint(offset) + _varint(len(body))


def _block(rows: Sequence[tuple[bytes, bytes]], every: int = 3) -> bytes:
    content, restarts, before = bytearray(), [0], b""
    for number, (key, value) in enumerate(rows):
        shared = 0
        if number % every:
            while shared < min(len(key), len(before)) and key[shared] == before[shared]:
                shared += 1
        elif number:
            restarts.append(len(content))
        content += _varint(shared) + _varint(len(key) - shared) + _varint(len(value)) + key[shared:] + value
        before = key
    return bytes(content) + b"".join(each.to_bytes(4, "little") for each in [*restarts, len(restarts)])


def _message(fields: Mapping[int, int | bytes]) -> bytes:
    return b"".join(_field(tag, value) for tag, value in fields.items())


def _field(tag: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(tag << 3) + _varint(value)
    return _varint(tag << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _crc(data: bytes) -> bytes:
    return masked_crc32c(data).to_bytes(4, "little")
