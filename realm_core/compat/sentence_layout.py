"""Writes one tower of the retriever as transformers (the backbone) and sentence-transformers (all of it) read it.

The vector is LayerNorm(dense(tanh(pooler(h_CLS)))). In modules: the backbone, pooling by CLS, a dense layer with tanh, a
dense layer without, a LayerNorm. So `encode` gives the vectors of the project's own embedder.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from realm_core.compat.bert_layout import save, write_backbone, write_json
from realm_core.compat.projection import rescaled
from realm_core.model.encoder import EncoderShape
from realm_core.text.tokenizer import Tokenizer

MODULE_EPS = 1e-5  # of the LayerNorm module of sentence-transformers, which has no setting for it
_TYPE = "sentence_transformers.models."
_DENSE = "torch.nn.modules."


def write_tower(
    folder: Path, tensors: Mapping[str, Tensor], shape: EncoderShape, projection_eps: float, tokenizer: Tokenizer
) -> None:
    """A tower whose tensors have the names of an `Embedder`: `realm.*` and `cls.*`."""
    write_backbone(folder, tensors, "realm.", shape, tokenizer)
    dense, bias = rescaled(tensors["cls.dense.weight"], tensors["cls.dense.bias"], projection_eps, MODULE_EPS)
    hidden, width = shape.hidden_size, len(bias)
    pooler = {f"linear.{part}": tensors[f"realm.pooler.dense.{part}"] for part in ("weight", "bias")}
    norm = {f"norm.{part}": tensors[f"cls.LayerNorm.{part}"] for part in ("weight", "bias")}
    modules: list[tuple[str, str, dict[str, Any], dict[str, Tensor]]] = [
        ("1_Pooling", "Pooling", {"word_embedding_dimension": hidden, "pooling_mode_cls_token": True}, {}),
        ("2_Dense", "Dense", _dense(hidden, hidden, "activation.Tanh"), pooler),
        ("3_Dense", "Dense", _dense(hidden, width, "linear.Identity"), {"linear.weight": dense, "linear.bias": bias}),
        ("4_LayerNorm", "LayerNorm", {"dimension": width}, norm),
    ]
    listing = [{"idx": 0, "name": "0", "path": "", "type": f"{_TYPE}Transformer"}]
    for number, (name, kind, settings, weights) in enumerate(modules, start=1):
        listing.append({"idx": number, "name": str(number), "path": name, "type": f"{_TYPE}{kind}"})
        (folder / name).mkdir()
        write_json(folder / name / "config.json", settings)
        if weights:
            save(folder / name / "model.safetensors", weights)
    write_json(folder / "modules.json", listing)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": shape.max_positions, "do_lower_case": False})
    write_json(folder / "config_sentence_transformers.json", {"prompts": {}, "similarity_fn_name": "dot"})


def _dense(inputs: int, outputs: int, activation: str) -> dict[str, Any]:
    return {
        "in_features": inputs,
        "out_features": outputs,
        "bias": True,
        "activation_function": f"{_DENSE}{activation}",
    }
