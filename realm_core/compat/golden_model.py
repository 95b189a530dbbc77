"""Reference cases of the neural model, its objectives and its optimiser."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from realm_core.compat.golden_case import CaseFiles, Family, Record, from_float32_records, from_outputs
from realm_core.compat.hf import TANH_GELU
from realm_core.config import PretrainConfig
from realm_core.errors import DataError
from realm_core.model.embedder import Embedder, Retriever
from realm_core.model.embedder import relevance as relevance_of
from realm_core.model.encoder import EncoderShape
from realm_core.model.knowledge_encoder import KnowledgeEncoder
from realm_core.model.objectives import (
    candidate_posterior,
    gold_log_probability,
    marginal_log_loss,
    marginal_mlm_loss,
    reader_loss,
    retrieval_utility,
    retriever_loss,
)
from realm_core.model.reader import Reader, best_span, correct_spans, span_candidates
from realm_core.train.optimizer import NO_DECAY, build_optimizer, clip_gradients, set_learning_rate, warmup_steps

IGNORED = -100  # label of a position that is not predicted, in the PyTorch port
TF_MASK_VALUE = -10000.0  # what the original code adds to wrong entries


def shape_of(config: Mapping[str, Any]) -> EncoderShape:
    """Encoder sizes from a published configuration. Raises DataError for another activation than the project has."""
    if (act := config.get("hidden_act", "gelu_new")) not in TANH_GELU:
        raise DataError(f"hidden_act is {act!r}; only the tanh form of GELU is computed")
    return EncoderShape(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        max_positions=config["max_position_embeddings"],
        segment_types=config["type_vocab_size"],
        dropout=config["hidden_dropout_prob"],
        layer_norm_eps=config.get("layer_norm_eps", 1e-12),
    )


def embedder_of(config: Mapping[str, Any]) -> Embedder:
    """An embedder with the sizes of a published configuration; its one epsilon is the projection's as well."""
    shape = shape_of(config)
    return Embedder(shape, config["retriever_proj_size"], shape.layer_norm_eps)


def retriever_of(config: Mapping[str, Any], share: bool = True) -> Retriever:
    """A retriever with the sizes of a published configuration; see `embedder_of`."""
    shape = shape_of(config)
    return Retriever(shape, config["retriever_proj_size"], shape.layer_norm_eps, share=share)


def reader_of(config: Mapping[str, Any]) -> Reader:
    """A reader with the sizes of a published configuration."""
    eps = config.get("reader_layer_norm_eps", 1e-3)
    return Reader(shape_of(config), config["span_hidden_size"], config["max_span_width"], eps)


def gradients(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """All gradients of a module as `PREFIXgrad:NAME`, cleared for the next backward pass."""
    found = {f"{prefix}{name}": weight.grad for name, weight in module.named_parameters() if weight.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def _embedder(case: CaseFiles, dtype: torch.dtype) -> dict[str, Any]:
    config, inputs = case.json("config.json"), case.inputs(dtype)
    embedder = embedder_of(config)
    case.load(embedder, dtype)
    found: dict[str, Any] = {}
    for role in ("query", "doc"):
        ids, segments, mask = (inputs[f"{role}_{key}"] for key in ("input_ids", "token_type_ids", "attention_mask"))
        hidden = embedder.realm(ids, segments, mask)
        found[f"{role}/last_hidden_state"] = hidden
        found[f"{role}/pooler_output"] = embedder.realm.pool(hidden)
        found[f"{role}/projected_score"] = embedder(ids, segments, mask)
    found["query_nomask/projected_score"] = embedder(inputs["query_input_ids"])
    found["query/loss"] = (found["query/projected_score"] * inputs["loss_weight_query"]).sum()
    torch.autograd.backward(found["query/loss"])
    return found | gradients(embedder, "query/grad:")


def _without_gradient(case: CaseFiles, extra: Any, found: Mapping[str, Any]) -> Iterator[Record]:
    """Parameters of the file that the loss does not reach: those that the embedder here does not even have."""
    tensors = load_file(case.path("state.safetensors"))
    tied = {"cls.predictions.decoder.bias"}  # the same parameter as cls.predictions.bias
    reached = {name.removeprefix("query/grad:") for name in found if name.startswith("query/grad:")}
    unreached = sorted(name for name in tensors.keys() - reached - tied if not name.endswith("position_ids"))
    yield "parameters_without_gradient", unreached, sorted(extra["parameters_without_gradient"])


def _scorer(case: CaseFiles, dtype: torch.dtype) -> dict[str, Any]:
    config, inputs = case.json("config.json"), case.inputs(dtype)
    found: dict[str, Any] = {}

    def score(share: bool, part: str) -> tuple[Retriever, Tensor, Tensor]:
        retriever = retriever_of(config, share)
        case.load(retriever, dtype, part)
        keys = ("input_ids", "token_type_ids", "attention_mask")
        queries = retriever.embed_queries(*(inputs[key] for key in keys))
        candidates = retriever.embed_documents(*(inputs[f"candidate_{key}"] for key in keys))
        return retriever, queries, candidates

    found["separate/relevance_score"] = relevance_of(*score(False, "separate.state.safetensors")[1:])
    for loss_name in ("linear", "softmax"):
        retriever, queries, candidates = score(True, "state.safetensors")
        relevance = relevance_of(queries, candidates)
        found |= {"relevance_score": relevance, "query_score": queries, "candidate_score": candidates}
        if loss_name == "linear":
            loss = (relevance * inputs["loss_weight"]).sum()
        else:
            loss = F.cross_entropy(relevance, inputs["gold_candidate"])
        torch.autograd.backward(loss)
        found |= {f"{loss_name}/loss": loss, **gradients(retriever, f"{loss_name}/grad:")}
    return found


def masked_lm_numbers(relevance: Tensor, gold_logp: Tensor, real: Tensor) -> dict[str, Any]:
    """The quantities that the reference recomputes apart from the models, under their names there."""
    return {
        "numpy/token_level": marginal_mlm_loss(relevance, gold_logp, real, "token"),
        "numpy/joint": marginal_mlm_loss(relevance, gold_logp, real, "joint"),
        "numpy/utility": retrieval_utility(relevance, gold_logp, real),
        "numpy/log_p_z": relevance.log_softmax(dim=1),
        "numpy/log_p_y_given_z": (gold_logp * real[:, None]).sum(dim=2),
        "numpy/posterior_joint": candidate_posterior(relevance, gold_logp, real, "joint"),
    }


def _labelled_log_probability(logits_BCLV: Tensor, labels_BL: Tensor) -> Tensor:
    """log p of the labels; a label of -100 counts as certain, as in the PyTorch port."""
    labels_BCL = labels_BL[:, None].expand(logits_BCLV.shape[:3])
    logp_BCL = gold_log_probability(logits_BCLV, labels_BCL.clamp(min=0))
    return logp_BCL.masked_fill(labels_BCL == IGNORED, 0.0)


def _knowledge_encoder(case: CaseFiles, dtype: torch.dtype) -> dict[str, Any]:
    config, inputs = case.json("config.json"), case.inputs(dtype)
    encoder = KnowledgeEncoder(shape_of(config))
    case.load(encoder, dtype)
    batch, candidates, length = inputs["input_ids"].shape
    ids, segments, mask = (inputs[key].flatten(0, 1) for key in ("input_ids", "token_type_ids", "attention_mask"))
    positions = torch.arange(length).expand(batch * candidates, -1)
    found: dict[str, Any] = {}
    for name, real in (("masked", inputs["mlm_mask"]), ("nomask", torch.ones_like(inputs["mlm_mask"]))):
        relevance = inputs["relevance_score"].clone().requires_grad_()
        logits = encoder(ids, segments, mask, positions)
        gold_logp = _labelled_log_probability(logits.view(batch, candidates, length, -1), inputs["labels"])
        loss = marginal_mlm_loss(relevance, gold_logp, real)
        torch.autograd.backward(loss)
        found |= {f"{name}/loss": loss, f"{name}/grad_input:relevance_score": relevance.grad, "logits": logits}
        found |= gradients(encoder, f"{name}/grad:")
        if name == "masked":
            found |= masked_lm_numbers(relevance, gold_logp, real)
    return found


def _joint_pretraining(case: CaseFiles, dtype: torch.dtype) -> dict[str, Any]:
    config, inputs = case.json("config.json"), case.inputs(dtype)
    retriever = retriever_of(config)
    case.load(retriever, dtype, "scorer.state.safetensors")
    encoder = KnowledgeEncoder(shape_of(config))
    case.load(encoder, dtype, "encoder.state.safetensors")

    def features(name: str) -> list[Tensor]:
        return [inputs[f"{name}_inputs.{key}"] for key in ("token_ids", "segment_ids", "mask")]

    candidate_features = features("candidate")
    batch, candidates, _ = candidate_features[0].shape
    relevance = relevance_of(
        retriever.embed_queries(*features("query")), retriever.embed_documents(*candidate_features)
    )
    relevance.retain_grad()
    positions_BM, targets_BM, real = inputs["mlm_positions"], inputs["mlm_targets"], inputs["mlm_gather_mask"]
    positions_NM = positions_BM.repeat_interleave(candidates, dim=0)
    logits = encoder(*(tensor.flatten(0, 1) for tensor in features("joint")), positions_NM)
    targets_NM = targets_BM.repeat_interleave(candidates, dim=0)
    gold_logp = gold_log_probability(logits, targets_NM).view(batch, candidates, -1)
    loss = marginal_mlm_loss(relevance, gold_logp, real)
    torch.autograd.backward(loss)
    return (
        {"relevance_score": relevance, "loss": loss, "grad:relevance_score": relevance.grad}
        | gradients(retriever, "grad:scorer.")
        | gradients(encoder, "grad:encoder.")
        | masked_lm_numbers(relevance, gold_logp, real)
    )


def _reader(case: CaseFiles, dtype: torch.dtype) -> dict[str, Any]:
    config, inputs = case.json("config.json"), case.inputs(dtype)
    reader = reader_of(config)
    case.load(reader, dtype)
    names = sorted({key.split("/")[1] for key in inputs if key.startswith("case/")})
    found: dict[str, Any] = {}
    for name in names:
        relevance = inputs["relevance_score"].clone().requires_grad_()
        gold = {key: inputs[f"case/{name}/{key}"] for key in ("start_positions", "end_positions", "has_answers")}
        outputs = read(reader, inputs, inputs["block_mask"], relevance, **gold)
        torch.autograd.backward(outputs["loss"])
        found |= {f"case/{name}/{key}": outputs.pop(key) for key in LOSS_OUTPUTS} | outputs
        found |= gradients(reader, f"case/{name}/grad:")
        found[f"case/{name}/grad_input:relevance_score"] = relevance.grad
    return found


LOSS_OUTPUTS = ("loss", "retriever_loss", "reader_loss", "reader_correct", "retriever_correct")


def read(
    reader: Reader,
    inputs: Mapping[str, Tensor],
    block_mask: Tensor,
    relevance: Tensor,
    start_positions: Tensor,
    end_positions: Tensor,
    has_answers: Tensor,
) -> dict[str, Any]:
    """One question: `inputs` holds the blocks that are read, everything else the whole searcher beam."""
    beam = inputs["input_ids"].shape[0]
    spans = reader(inputs["input_ids"], inputs["token_type_ids"], inputs["attention_mask"], block_mask[:beam])
    starts, ends = span_candidates(inputs["input_ids"].shape[1], reader.max_span_width)
    correct = correct_spans(starts, ends, start_positions[:beam], end_positions[:beam])
    retrieval = retriever_loss(relevance, has_answers)
    reading = reader_loss(spans.score, relevance[:beam], correct, spans.valid)
    block, candidate, _ = best_span(spans, relevance[:beam])
    return {
        "candidate_starts": starts,
        "candidate_ends": ends,
        "span_valid": spans.valid,
        "span_logits_without_retriever": spans.score.masked_fill(~spans.valid, 0.0),
        "block_idx": block,
        "candidate": candidate,
        "start_pos": starts[candidate].view(1),
        "end_pos": ends[candidate].view(1),
        "loss": retrieval + reading,
        "retriever_loss": retrieval,
        "reader_loss": reading,
        "reader_correct": correct,
        "retriever_correct": has_answers,
    }


def _tensor(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def _ict_projection(record: Mapping[str, Any], dtype: torch.dtype) -> Iterator[Record]:
    features = _tensor(record["x"], dtype)
    kernel = _tensor(record["kernel"], dtype)
    shape = EncoderShape(vocab_size=1, hidden_size=kernel.shape[0], layers=1, heads=1, intermediate_size=1)
    embedder = Embedder(shape, kernel.shape[1], projection_eps=record["epsilon"]).to(dtype).eval()
    with torch.no_grad():
        embedder.cls.dense.weight.copy_(kernel.T)
        embedder.cls.dense.bias.copy_(_tensor(record["bias"], dtype))
        yield "out", embedder.project(features), record["out"]


def _orqa(record: Mapping[str, Any], dtype: torch.dtype) -> Iterator[Record]:
    spans, gold = record["span_candidates"], record["correct_candidates"]
    inside = torch.tensor(spans["mask"])
    starts, ends = span_candidates(inside.shape[1], spans["max_span_width"])
    yield "span_candidates/starts", starts, torch.tensor(spans["starts"])
    yield "span_candidates/ends", ends, torch.tensor(spans["ends"])
    yield "span_candidates/span_masks", inside[:, starts] * inside[:, ends], torch.tensor(spans["span_masks"])
    correct = correct_spans(starts, ends, torch.tensor(gold["gold_starts"]), torch.tensor(gold["gold_ends"]))
    yield "correct_candidates", correct, torch.tensor(gold["correct"])
    for case in record["losses"]:
        relevance = _tensor(case["retriever_logits"], dtype).requires_grad_()
        scores = _tensor(case["reader_logits"], dtype).requires_grad_()
        has_answer, correct = torch.tensor(case["retriever_correct"]), torch.tensor(case["reader_correct"])
        nothing_added = scores.new_zeros(scores.shape[0])  # the scores given already contain the relevance
        loss = retriever_loss(relevance, has_answer, TF_MASK_VALUE)
        loss = loss + reader_loss(scores, nothing_added, correct, mask_value=TF_MASK_VALUE)
        torch.autograd.backward(loss)
        yield f"{case['case']}/loss", loss, case["loss"]
        yield f"{case['case']}/grad_retriever_logits", relevance.grad, case["grad_retriever_logits"]
        yield f"{case['case']}/grad_reader_logits", scores.grad, case["grad_reader_logits"]
        raw = marginal_log_loss(relevance, has_answer, TF_MASK_VALUE)
        yield f"{case['case']}/retriever_marginal_log_loss", raw, case["retriever_marginal_log_loss"]


def _realm_model_fn(record: Mapping[str, Any], dtype: torch.dtype) -> Iterator[Record]:
    queries = _tensor(record["query_emb"], dtype).requires_grad_()
    documents = _tensor(record["candidate_emb"], dtype).requires_grad_()
    logits = _tensor(record["mlm_logits"], dtype).requires_grad_()
    targets, real = torch.tensor(record["mlm_targets"]), torch.tensor(record["mlm_mask"])
    batch, candidates = len(record["query_emb"]), record["num_candidates"]
    relevance = relevance_of(queries, documents.view(batch, candidates, -1))
    gold_logp = gold_log_probability(logits, targets.repeat_interleave(candidates, dim=0))
    gold_logp = gold_logp.view(batch, candidates, -1)
    loss = marginal_mlm_loss(relevance, gold_logp, real)
    torch.autograd.backward(loss)
    yield "loss", loss, record["loss"]
    yield "grad_query_emb", queries.grad, record["grad_query_emb"]
    yield "grad_candidate_emb", documents.grad, record["grad_candidate_emb"]
    yield "grad_mlm_logits", logits.grad, record["grad_mlm_logits"]
    utility = retrieval_utility(relevance, gold_logp, real)
    metrics = record["metrics"]
    yield "retrieval_utility", utility, metrics["retrieval_utility"]
    yield "off_policy_delay_mins", 0.0, metrics["off_policy_delay_mins"]  # of the first index, which is all that is fed
    # The record says nothing of a length, so it is that of the published run, which is the default here too.
    steps = record.get("num_train_steps", PretrainConfig.model_fields["steps"].default)
    yield "num_warmup_steps", warmup_steps(steps), record["num_warmup_steps"]


def _bert_adam(record: Mapping[str, Any], dtype: torch.dtype) -> Iterator[Record]:
    inputs, target = _tensor(record["inputs"], dtype), _tensor(record["target"], dtype)
    weights = {name: nn.Parameter(_tensor(values, dtype)) for name, values in record["init"].items()}
    optimizer = build_optimizer(
        {"model": weights.items()},
        learning_rate=record["init_lr"],
        weight_decay=record["weight_decay"],
        eps=record["epsilon"],
    )
    for group in optimizer.param_groups:
        group["betas"] = (record["beta_1"], record["beta_2"])
    yield "no_decay_patterns", sorted(NO_DECAY.pattern.split("|")), sorted(record["no_decay_patterns"])
    for step, reference in enumerate(record["trajectory"]):
        scaled = (inputs @ weights["dense/kernel"] + weights["dense/bias"]) * weights["LayerNorm/gamma"]
        hidden = torch.tanh(scaled * weights["layer_normalization/gamma"])
        loss = ((hidden @ weights["out/kernel"] - target) ** 2).sum()
        yield f"step {step}/loss_before", loss, reference["loss_before"]
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        clip_gradients(weights.values(), record["clip_norm"])
        set_learning_rate(optimizer, step, record["num_warmup_steps"], record["num_train_steps"])
        optimizer.step()
        for name, weight in weights.items():
            yield f"step {step}/{name}", weight.detach().clone(), reference[name]


FAMILIES: dict[str, Family] = {
    "RealmEmbedder": from_outputs(_embedder, _without_gradient),
    "RealmScorer": from_outputs(_scorer),
    "RealmKnowledgeAugEncoder": from_outputs(_knowledge_encoder),
    "joint_pretraining": from_outputs(_joint_pretraining),
    "RealmReader": from_outputs(_reader),
    "tf_original.ict_projection": from_float32_records(_ict_projection),
    "tf_original.orqa": from_float32_records(_orqa),
    "tf_original.realm_model_fn": from_float32_records(_realm_model_fn, inputs=("note",)),
    "tf_original.bert_adam": from_float32_records(_bert_adam, inputs=("model",)),
}
