"""The project's reading of a MediaWiki dump beside WikiExtractor's, both ways; and what other parsers cost.

    python benchmarks/corpus_wikiextractor.py DUMP REFERENCE [--json FILE] [--libraries]

REFERENCE is WikiExtractor's JSON-lines output for DUMP. Words are runs of letters and digits in lower case; a page's words
are compared as a multiset, so that neither order nor line breaks count. With --libraries the parsers that happen to be
installed (mwxml, mwparserfromhell, wikitextparser) are timed on the same pages, and on hostile ones.
"""

import argparse
import gzip
import json
import multiprocessing
import re
import statistics
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from realm_core.corpus.documents import Document, Tally, title_kind
from realm_core.corpus.mediawiki import read_mediawiki
from realm_core.corpus.packing import as_plain
from realm_core.text.wikitext import is_disambiguation, is_redirect

WORD = re.compile(r"\w+")
NON_LATIN = re.compile("[\u0370-\u1dff\u2c00-\u2dff\u2e80-\ufaff]")  # Greek, Cyrillic, Hebrew, Arabic, CJK …
HOSTILE = {
    "unclosed <ref>": "<ref>",
    "unclosed [http://a": "[http://a ",
    "[[a|{{b|<i> nested": "[[a|{{b|<i>",
    "{{a|[[b|''c mixed": "{{a|[[b|''c ",
}
HOSTILE_SIZE = 100_000  # characters
PATIENCE = 60  # seconds a library may take for one page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dump", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--libraries", action="store_true", help="time the other parsers that are installed")
    arguments = parser.parse_args()
    figures = compare(arguments.dump, arguments.reference)
    if arguments.libraries:
        figures["hostile_seconds"] = hostile(arguments.dump)
    print(json.dumps(figures, indent=1, ensure_ascii=False))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def compare(dump: Path, reference: Path) -> dict[str, Any]:
    """Articles and words that each reading has and the other lacks."""
    began = time.process_time()
    tally = Tally()
    documents: list[Document] = list(read_mediawiki(dump, tally=tally))
    read = time.process_time()
    ours = {document.doc_id: as_plain(document).text for document in documents}
    converted = time.process_time()
    ours = {number: text for number, text in ours.items() if text}
    theirs = _reference(reference)
    both = sorted(ours.keys() & theirs.keys())
    rows = [_overlap(ours[number], theirs[number]) for number in both]
    return {
        "pages": tally.pages,
        "redirects": tally.redirects,
        "dropped": dict(tally.dropped),
        "articles": {"ours": len(ours), "reference": len(theirs), "both": len(both)},
        "reference_articles_found": round(len(both) / len(theirs), 4),
        "reference_articles_left_out": dict(_reasons(dump, theirs.keys() - ours.keys())),
        "articles_only_ours": len(ours.keys() - theirs.keys()),
        "reference_words_in_ours": _share(rows, "common", "theirs"),
        "our_words_in_reference": _share(rows, "common", "ours"),
        "median_similarity": round(
            statistics.median(2 * r["common"] / max(r["ours"] + r["theirs"], 1) for r in rows), 4
        ),
        "pages_with_all_reference_words": round(sum(r["common"] == r["theirs"] for r in rows) / len(rows), 4),
        "non_latin_words": {name: sum(r[f"{name}_non_latin"] for r in rows) for name in ("ours", "theirs")},
        "cpu_seconds": {"xml": round(read - began, 1), "wikitext": round(converted - read, 1)},
        "million_characters": round(sum(map(len, ours.values())) / 1e6, 1),
    }


def _reference(path: Path) -> dict[str, str]:
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        return {str(record["id"]): record["text"] for record in map(json.loads, file)}


def _reasons(dump: Path, missing: set[str]) -> Counter[str]:
    """Why pages of the reference are no articles here."""
    reasons: Counter[str] = Counter()
    with gzip.open(dump) if dump.suffix == ".gz" else dump.open("rb") as file:
        number = title = ""
        with suppress(ElementTree.ParseError):  # a dump that was cut
            for _, element in ElementTree.iterparse(file):
                name = element.tag.rpartition("}")[2]
                if name == "title":
                    title, number = element.text or "", ""
                elif name == "id":
                    number = number or element.text or ""
                elif name == "text" and number in missing:
                    reasons[_reason(title, element.text or "")] += 1
                elif name == "page":
                    element.clear()
    return reasons


def _reason(title: str, text: str) -> str:
    if is_redirect(text):
        return "redirect"
    return title_kind(title) or ("disambiguation" if is_disambiguation(text) else "no text is left")


def _overlap(ours: str, theirs: str) -> dict[str, int]:
    mine, other = Counter(WORD.findall(ours.lower())), Counter(WORD.findall(theirs.lower()))
    return {
        "ours": mine.total(),
        "theirs": other.total(),
        "common": (mine & other).total(),
        "ours_non_latin": sum(count for word, count in mine.items() if NON_LATIN.search(word)),
        "theirs_non_latin": sum(count for word, count in other.items() if NON_LATIN.search(word)),
    }


def _share(rows: list[dict[str, int]], part: str, whole: str) -> float:
    return round(sum(row[part] for row in rows) / sum(row[whole] for row in rows), 4)


def hostile(dump: Path) -> dict[str, Any]:
    """Seconds of every parser for 100 kB of markup that never closes, and for a fortieth of the honest pages."""
    pages = [document.text for document in read_mediawiki(dump)][::40]
    found: dict[str, Any] = {}
    for name, convert in _parsers().items():
        began = time.process_time()
        for page in pages:
            convert(page)
        found[name] = {"honest pages, all": round(40 * (time.process_time() - began), 1)}
        for label, unit in HOSTILE.items():
            found[name][label] = _patiently(name, unit * (HOSTILE_SIZE // len(unit)))
    return found


def _parsers() -> dict[str, Callable[[str], Any]]:
    parsers: dict[str, Callable[[str], Any]] = {
        "realm_core.text.wikitext": lambda text: as_plain(
            Document("x", "x", text, hidden=("file", "image", "category"))
        )
    }
    try:
        import mwparserfromhell

        parsers["mwparserfromhell"] = lambda text: mwparserfromhell.parse(text).strip_code()
    except ImportError:
        pass
    try:
        import wikitextparser

        parsers["wikitextparser"] = wikitextparser.remove_markup
    except ImportError:
        pass
    return parsers


def _patiently(name: str, page: str) -> float | str:
    """Seconds for one page, in a process of its own: a parser written in C cannot be interrupted."""
    queue: Any = multiprocessing.Queue()
    process = multiprocessing.Process(target=_timed, args=(name, page, queue))
    process.start()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        return f"more than {PATIENCE}"
    return float(queue.get())


def _timed(name: str, page: str, queue: Any) -> None:
    began = time.process_time()
    _parsers()[name](page)
    queue.put(round(time.process_time() - began, 2))


if __name__ == "__main__":
    main()
