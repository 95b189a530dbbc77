"""Wikitext to prose, with the places of its links.

No browser view: tables, templates, pictures, references and bare lists go, sentences and headings stay, as in the corpus
of the original code (language/orqa reads WikiExtractor's output). Every step is one pass of a pattern that cannot
backtrack over more than it consumed, or a bounded number of such passes, so that time grows with the length of a page and
not with its square, whatever the page holds (docs/decisions/0006-own-wikitext-reader.md compares two parsers).
"""

import html
import re
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

Range = tuple[int, int]

# Where a link begins and ends, until the offsets are known. Noncharacters: no text may contain them.
_OPEN, _CLOSE = "\ufdd0", "\ufdd1"
_MARKS = {ord(_OPEN): None, ord(_CLOSE): None}
_DEEPEST = 20  # nested links, templates or tables that are understood; what is deeper is shown or dropped as text

FILE_AND_CATEGORY = frozenset({"file", "image", "media", "category"})

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
# Elements whose content is no prose, and four whose content must not be read as markup.
_ELEMENT = re.compile(
    r"<(/?)(ref|references|gallery|imagemap|timeline|score|hiero|graph|chem|ce|mapframe|maplink|templatedata|inputbox|"
    r"source|syntaxhighlight|style|script|math|nowiki|code|pre)(?=[\s/>])([^<>]*)>",
    re.IGNORECASE,
)
_LITERAL = {"nowiki", "code", "pre", "math"}
_ESCAPES = {ord(character): f"&#{ord(character)};" for character in "[]{}|<>'=*#:;\n"}
_REDIRECT_WORDS = "redirect|weiterleitung|redirection|redirección|rinvia|doorverwijzing|omdirigering|перенаправление"
_REDIRECT = re.compile(rf"\s*+:?\s*+#\s*+(?:{_REDIRECT_WORDS})\b", re.IGNORECASE)
_DISAMBIGUATION = re.compile(
    r"__DISAMBIG__|\{\{\s*+(?:[\w -]{0,30}disambig(?:uation)?[\w -]{0,30}|dab|hndis|geodis|numberdis|tla-dab)\s*+[|}]",
    re.IGNORECASE,
)
_NOT_ALL = re.compile(r"\{\{\s*(?:R (?:to|from)|other|redirect|for)\b", re.IGNORECASE)

_EXTERNAL = re.compile(r"\[(?:https?:|ftps?:|mailto:|news:|irc:|gopher:|//)[^\s\[\]]*+([^\[\]\n]*+)\]")
_BRACKETS = re.compile(r"(?<!\[)\[(?!\[)([^\[\]\n]*+)\](?!\])")
_LINK = re.compile(r"\[\[([^\[\]\n|]*+)(\|[^\[\]]*+)?\]\]([a-z]*+)")
_LANGUAGE = re.compile(r"(?:[a-z]{2,3}|simple)(?:-[a-z]{2,10}){0,2}")
_LONE_BRACE = re.compile(r"(?<!\{)\{(?![{|])|(?<![}|])\}(?!\})")
_TEMPLATE = re.compile(r"\{\{([^{}]*+)\}\}")
_TABLE = re.compile(r"^[ \t:*#]*(\{\|)|^[ \t]*(\|\})|<(/?)table\b[^<>]*>", re.IGNORECASE | re.MULTILINE)
_TAG = re.compile(
    r"<(/?)(abbr|b|bdi|bdo|big|blockquote|br|caption|center|cite|dd|del|dfn|div|dl|dt|em|font|h[1-6]|hr|i|includeonly|ins|"
    r"kbd|li|mark|noinclude|ol|onlyinclude|p|poem|q|rb|rp|rt|ruby|s|samp|section|small|span|strike|strong|sub|sup|table|"
    r"tbody|td|th|thead|tr|tt|u|ul|var|wbr)(?=[\s/>])[^<>]*>",
    re.IGNORECASE,
)
_BREAKS = frozenset(
    "blockquote caption center dd div dl dt h1 h2 h3 h4 h5 h6 hr ol p poem table tbody td th thead tr ul".split()
)
_QUOTES = re.compile(r"''(?:(?!'s\b)'{1,3})?")  # bold and italic; of '''s a possessive stays
_MAGIC_WORD = re.compile(r"__[A-Z]{3,30}__")
_EMPTY_BRACKETS = re.compile(rf"[(\[][\s,;:{_OPEN}{_CLOSE}]*+[)\]]")
_AFTER_BRACKET = re.compile(r"(?<=\()[\s,;:]++|(?<![\s,;:])[\s,;:]++(?=\))")
_SPACES = re.compile(r"[^\S\n]+")
_SPACE_BEFORE = re.compile(r" (?=[,.;:)](?:\s|$))")
_PROSE_END = re.compile(rf"[.!?][\"'”’)\]{_CLOSE}]*$")
_APPARATUS = re.compile(
    r"(?:see also|external links?|references?|(?:foot)?notes(?: and references)?|bibliography|further reading|sources?|"
    r"literature|publications|works cited|citations|links|books)\b",
    re.IGNORECASE,
)
# "Main article: …" and the like, which say where to read on.
_HATNOTE = re.compile(
    rf"[:\s(]*''+[({_OPEN}]*(?:(?:main|full|detailed|related) articles?|see\b|for (?:other|more|the|a|further)\b|"
    r"this (?:article|page) (?:is|deals|describes)|further (?:information|reading)|more (?:information|details)|"
    r"(?:redirected|see also)\b|you may also)",
    re.IGNORECASE,
)
_FEWEST_WORDS = 8  # of a list item that is prose

# Templates that stand for words of a sentence: which argument they show.
_SHOWN = {
    **dict.fromkeys(
        ("nowrap", "nobr", "small", "big", "smallcaps", "sc", "abbr", "em", "strong", "sic", "not a typo"), 0
    ),
    **dict.fromkeys(("lang", "transl", "transliteration", "script"), -1),
    **dict.fromkeys(("quote", "blockquote", "nihongo", "vanchor", "anchor text", "circa", "c.", "as of", "frac"), 0),
}
_SIGNS = {
    **dict.fromkeys(("ndash", "en dash", "–", "spaced ndash", "snd", "spnd", "dash"), " – "),
    **dict.fromkeys(("mdash", "em dash", "—", "spaced mdash"), " — "),
    **dict.fromkeys(("nbsp", "space", "spaces", "·", "*"), " "),
    "'": "'",
    "!": "|",
}
_RANGE_WORDS = frozenset({"to", "-", "–", "and", "by", "x", "or", "and(-)"})


class Prose(NamedTuple):
    """Text of a page; `links` are character ranges of `text`, in order, not overlapping."""

    text: str
    links: tuple[Range, ...]


def is_redirect(wikitext: str) -> bool:
    """Whether the page only points to another one (dumps before export-0.4 mark it nowhere else)."""
    return _REDIRECT.match(wikitext) is not None


def is_disambiguation(wikitext: str) -> bool:
    """Whether the page carries the mark of a disambiguation page (WikiExtractor's filter, and the marks of old dumps)."""
    return any(not _NOT_ALL.match(found.group()) for found in _DISAMBIGUATION.finditer(wikitext))


def prose(wikitext: str, hidden: Collection[str] = FILE_AND_CATEGORY) -> Prose:
    """Paragraphs, headings and list items that are sentences, a blank line between them.

    `hidden` are the lower-case namespace prefixes whose links show nothing in running text. Headings end in a full
    stop, and vanish where nothing follows. Never raises: broken markup is dropped, or shown as it stands.
    """
    text = wikitext.translate(_MARKS) if _OPEN in wikitext or _CLOSE in wikitext else wikitext
    text = _COMMENT.sub("", text.replace("\r\n", "\n"))
    text = _without_elements(text)
    text = _resolve_links(text, hidden)
    text = _repeat(lambda part: _TEMPLATE.subn(_template, part), _LONE_BRACE.sub(_escape, text))
    text = _without_tables(text)
    text = _TAG.sub(_tag, text)
    return _located("\n".join(_lines(text)))


def _repeat(replace: Callable[[str], tuple[str, int]], text: str) -> str:
    """Replace from the inside out."""
    for _ in range(_DEEPEST):
        text, count = replace(text)
        if not count:
            break
    return text


def _escape(match: re.Match[str]) -> str:
    return match.group().translate(_ESCAPES)


def _without_elements(text: str) -> str:
    """Drop elements with their content; shield literal ones. An element without an end loses its tag only."""
    tags = list(_ELEMENT.finditer(text))
    if not tags:
        return text
    closing: dict[str, int] = {}
    ends: list[int | None] = [None] * len(tags)
    for number in range(len(tags) - 1, -1, -1):
        name = tags[number][2].lower()
        ends[number] = closing.get(name)
        if tags[number][1]:
            closing[name] = number
    parts, done, number = [], 0, 0
    while number < len(tags):
        tag, end = tags[number], ends[number]
        parts.append(text[done : tag.start()])
        done = tag.end()
        if not tag[1] and not tag[3].endswith("/") and end is not None:
            if tag[2].lower() in _LITERAL:
                parts.append(_literal(tag[2].lower(), text[done : tags[end].start()]))
            done, number = tags[end].end(), end
        number += 1
    return "".join([*parts, text[done:]])


def _literal(name: str, content: str) -> str:
    # A formula is worth reading as long as it is not TeX: "n", "E=mc^2".
    return "" if name == "math" and "\\" in content else content.translate(_ESCAPES)


def _resolve_links(text: str, hidden: Collection[str]) -> str:
    def shown(match: re.Match[str]) -> str:
        target, label, trail = match[1].strip(), match[2], match[3]
        prefix, colon, rest = target.partition(":")
        if colon and prefix:
            space = prefix.strip().lower().replace("_", " ")
            if space in hidden or (label is None and _LANGUAGE.fullmatch(prefix)):
                return trail
        words = target.lstrip(":").replace("_", " ") if label is None else label[1:].translate(_MARKS)
        if label == "|":  # the pipe trick: no namespace, no bracketed addition
            words = re.sub(r" \([^()]*\)$", "", rest or target)
        bare = " ".join(words.split())
        if not bare:
            return words
        lead, tail = " " if words[0].isspace() else "", " " if words[-1].isspace() and not trail else ""
        return f"{lead}{_OPEN}{bare}{trail}{_CLOSE}{tail}"

    def replace(part: str) -> tuple[str, int]:
        part, sites = _EXTERNAL.subn(r"\1", part)
        part = _BRACKETS.sub(_escape, part)
        part, links = _LINK.subn(shown, part)
        return part, sites + links

    return _repeat(replace, text)


def _template(match: re.Match[str]) -> str:
    name, _, rest = match[1].partition("|")
    key = name.strip().lower().replace("_", " ")
    if key in _SIGNS:
        return _SIGNS[key]
    if key in ("convert", "cvt"):
        return _measure(rest.split("|"))
    place = 0 if key.startswith("lang-") else _SHOWN.get(key)
    if place is None:
        return ""
    arguments = [argument for argument in rest.split("|") if "=" not in argument]
    return arguments[place].strip() if arguments else ""


def _measure(arguments: list[str]) -> str:
    """ "5 km" of {{convert|5|km|mi}}, "5 to 10 km" of {{convert|5|to|10|km}}."""
    kept = 4 if len(arguments) > 3 and arguments[1].strip() in _RANGE_WORDS else 2
    return " ".join(argument.strip() for argument in arguments[:kept])


def _without_tables(text: str) -> str:
    parts, done, open_at = [], 0, []
    for match in _TABLE.finditer(text):
        if match[1] or match[3] == "":
            open_at.append(match.start())
        elif open_at:
            start = open_at.pop()
            if not open_at:
                parts.append(text[done:start])
                done = match.end()
    return "".join([*parts, text[done:]]) if parts else text


def _tag(match: re.Match[str]) -> str:
    name = match[2].lower()
    if name == "li":
        return "" if match[1] else "\n*"
    if name == "br":
        return "\n"
    return "\n\n" if name in _BREAKS else ""


def _lines(text: str) -> Iterator[str]:
    """Lines of the result. Blank lines keep apart what is no common paragraph."""
    headings: list[tuple[int, str]] = []  # waiting for something to stand above
    apparatus = False  # inside a section that lists sources and links
    for raw in text.split("\n"):
        line = raw.strip()
        if len(line) > 2 and line[0] == line[-1] == "=":
            depth = min(len(line) - len(line.lstrip("=")), len(line) - len(line.rstrip("=")))
            title = _tidy(line.strip("= \t"))
            headings = [(level, kept) for level, kept in headings if level < depth]
            apparatus = bool(_APPARATUS.match(title.translate(_MARKS)))
            if title:
                headings.append((depth, title if title[-1] in ".!?:" else title + "."))
            yield ""
            continue
        item = line.lstrip("*#:; ") if line[:1] in ("*", "#", ";") else None
        if item is not None:
            shown = "" if apparatus else _tidy(item)
            shown = shown if _is_prose(shown) else ""
        elif line.startswith(("|", "{|", "{{", "}}")) or _HATNOTE.match(line):
            shown = ""
        else:
            shown = _tidy(line.lstrip(": "))
        if not shown.strip(_OPEN + _CLOSE + " "):
            yield ""
            continue
        for _, heading in headings:
            yield from (heading, "")
        headings = []
        yield from (shown,) if item is None else ("", shown, "")


def _is_prose(item: str) -> bool:
    return _PROSE_END.search(item) is not None and item.count(" ") + 1 >= _FEWEST_WORDS


def _tidy(line: str) -> str:
    """One line as a reader sees it."""
    line = _MAGIC_WORD.sub("", _QUOTES.sub("", line).replace("{{", "").replace("}}", ""))
    if "&" in line:
        line = html.unescape(line).replace("\n", " ")
    line = _SPACES.sub(" ", line)
    if "(" in line:
        line = _AFTER_BRACKET.sub("", _EMPTY_BRACKETS.sub("", line))
    return _SPACE_BEFORE.sub("", _SPACES.sub(" ", line)).strip()


def _located(text: str) -> Prose:
    """Take the link marks out, remember where they stood, and squeeze blank lines."""
    text = re.sub(r"\n{3,}", "\n\n", text).strip()
    parts: list[str] = []
    links: list[Range] = []
    begin: int | None = None
    length = 0
    for piece in re.split(f"([{_OPEN}{_CLOSE}])", text):
        if piece == _OPEN:
            begin = length
        elif piece == _CLOSE:
            if begin is not None and length > begin:
                links.append((begin, length))
            begin = None
        else:
            parts.append(piece)
            length += len(piece)
    return Prose("".join(parts), tuple(links))
