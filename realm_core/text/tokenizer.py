"""The uncased WordPiece tokenizer of BERT, with offsets into the original text.

Token ids are stored with the corpus, so the digest of the vocabulary is part of every artifact that holds ids.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import SupportsIndex

from tokenizers import Tokenizer as Backend
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from realm_core.errors import ConfigError, DataError

PAD, UNK, CLS, SEP, MASK = "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"
SPECIAL_TOKENS = (PAD, UNK, CLS, SEP, MASK)
MAX_WORD_CHARACTERS = 100  # a longer word becomes one [UNK], as in the published tokenizers


def encodable(text: str) -> str:
    """The text with lone surrogates, which no UTF-8 file can hold, replaced by U+FFFD. Keeps the length."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return "".join("\ufffd" if "\ud800" <= character <= "\udfff" else character for character in text)
    return text


class Tokenizer:
    """BERT's normalisation, pre-tokenisation and greedy WordPiece over a given vocabulary.

    Text that merely looks like a special token ("[SEP]") is ordinary text here: a passage or a question must not be
    able to inject one.
    """

    def __init__(self, vocab: Sequence[str], lowercase: bool = True) -> None:
        self.vocab = list(vocab)
        self.lowercase = lowercase
        self._bytes = ("\n".join(self.vocab) + "\n").encode("utf-8")
        _check_vocabulary(self.vocab, "vocabulary")
        index = {piece: number for number, piece in enumerate(self.vocab)}
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (index[piece] for piece in SPECIAL_TOKENS)
        self._backend = Backend(WordPiece(index, unk_token=UNK, max_input_chars_per_word=MAX_WORD_CHARACTERS))
        self._backend.normalizer = BertNormalizer(lowercase=lowercase, strip_accents=None)
        self._backend.pre_tokenizer = BertPreTokenizer()

    @classmethod
    def from_file(cls, path: str | Path, lowercase: bool = True) -> "Tokenizer":
        """Read a vocabulary file with one piece a line; the line number is the id."""
        try:
            raw = Path(path).read_bytes()
            pieces = raw.decode("utf-8").replace("\r\n", "\n").removesuffix("\n").split("\n")
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}); name an existing vocab.txt") from None
        except UnicodeDecodeError as error:
            raise DataError(f"{path}: not UTF-8 at byte {error.start}; this is not a WordPiece vocabulary") from None
        _check_vocabulary(pieces, str(path))
        tokenizer = cls(pieces, lowercase)
        tokenizer._bytes = raw
        return tokenizer

    def save(self, path: str | Path) -> None:
        """Write the vocabulary file; a tokenizer read from a file writes the same bytes again."""
        Path(path).write_bytes(self._bytes)

    @property
    def digest(self) -> str:
        """sha256 of the bytes of the vocabulary file."""
        return sha256(self._bytes).hexdigest()

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    def ids(self, text: str) -> list[int]:
        """Wordpiece ids without special tokens."""
        return list(self._backend.encode(encodable(text), add_special_tokens=False).ids)

    def ids_with_offsets(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """(ids, starts, stops); starts and stops are character offsets into the text as given, right-exclusive."""
        encoding = self._backend.encode(encodable(text), add_special_tokens=False)
        return list(encoding.ids), [start for start, _ in encoding.offsets], [stop for _, stop in encoding.offsets]

    def batch_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """`ids` of every text."""
        encodings = self._backend.encode_batch([encodable(text) for text in texts], add_special_tokens=False)
        return [list(encoding.ids) for encoding in encodings]

    def pieces(self, ids: Iterable[SupportsIndex]) -> list[str]:
        """The vocabulary entries of the ids."""
        return [self.vocab[number] for number in ids]

    def words(self, text: str) -> list[str]:
        """Normalised words before they are cut into pieces."""
        normalised = self._backend.normalizer.normalize_str(encodable(text))
        return [word for word, _ in self._backend.pre_tokenizer.pre_tokenize_str(normalised)]


def _check_vocabulary(pieces: Sequence[str], where: str) -> None:
    for special in SPECIAL_TOKENS:
        if special not in pieces:
            raise DataError(
                f"{where}: the special token {special} is missing among {len(pieces)} pieces; "
                "use a BERT WordPiece vocabulary"
            )
    if len(set(pieces)) != len(pieces):
        piece, count = Counter(pieces).most_common(1)[0]
        raise DataError(f"{where}: the piece {piece!r} occurs {count} times; every line must be a different piece")


def build_vocabulary(texts: Iterable[str], size: int, lowercase: bool = True) -> list[str]:
    """A small deterministic WordPiece vocabulary: special tokens, characters, then the most frequent words.

    Characters come alone and as `##` continuations, the most frequent ones first, in at most half of the room, so that
    a text in a script with many characters cannot crowd out the words. Ties are settled alphabetically.
    """
    if size < len(SPECIAL_TOKENS) + 2:
        raise ConfigError(f"vocabulary size {size} leaves no room beside the {len(SPECIAL_TOKENS)} special tokens")
    normaliser = Tokenizer(SPECIAL_TOKENS, lowercase)
    words: Counter[str] = Counter()
    for text in texts:
        words.update(normaliser.words(text))
    characters: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            characters[character] += count
    room = size - len(SPECIAL_TOKENS)
    kept = sorted(_most_frequent(characters, max(1, room // 4)))
    singles = [*kept, *(f"##{character}" for character in kept)]
    taken = {*SPECIAL_TOKENS, *singles}
    whole = Counter(
        {word: count for word, count in words.items() if word not in taken and len(word) <= MAX_WORD_CHARACTERS}
    )
    return [*SPECIAL_TOKENS, *singles, *_most_frequent(whole, room - len(singles))]


def _most_frequent(counts: Counter[str], limit: int) -> list[str]:
    return sorted(counts, key=lambda entry: (-counts[entry], entry))[: max(limit, 0)]
