"""Wikitext to prose: what a reader would read, and where the links stand."""

import time

import pytest

from realm_core.text.wikitext import is_disambiguation, is_redirect, prose


def shown(wikitext: str) -> tuple[str, list[str]]:
    text, links = prose(wikitext)
    return text, [text[start:stop] for start, stop in links]


@pytest.mark.parametrize(
    ("wikitext", "text", "links"),
    [
        ("'''Rome''' is the [[capital city|capital]] of [[Italy]].", "Rome is the capital of Italy.", ["capital", "Italy"]),
        ("a [[bird]]s-eye [[x_y]]", "a birds-eye x y", ["birds", "x y"]),  # a trail belongs to its link
        ("[[Rome (city)|]] [[Help:Me|]] [[:Category:Towns]] [[|x]]", "Rome Me Category:Towns x", None),
        ("A [[Category:Towns]][[de:Rom]][[File:R.png|thumb|A [[view]] of [http://a.b it]]] end.", "A end.", []),
        ("[[Star Wars: A New Hope]] opened.", "Star Wars: A New Hope opened.", ["Star Wars: A New Hope"]),
        ("{{convert|5|km|mi}} or {{convert|5|to|10|km}} {{nowrap|no [[gap]]}}.", "5 km or 5 to 10 km no gap.", ["gap"]),
        ("{{lang|fr|mot}} {{lang-it|Roma}}{{ndash}}{{unknown|x|y={{z}}}}end", "mot Roma – end", []),
        ("born (<!-- ? -->{{b}}; 1900) died ({{d}})", "born (1900) died", []),
        ("x<ref name=a>[[y]] z.</ref> and<ref name=a/> w", "x and w", []),
        ("<math>n</math> is <math>\\frac{a}{b}</math>", "n is", []),
        ("<nowiki>[[a]] ''b''</nowiki> &lt;ref&gt; &amp;amp; [sic]", "[[a]] ''b'' <ref> &amp; [sic]", []),
        ("[http://a.b name] [http://a.b] [//c.d x [[y]] z]", "name x y z", ["y"]),
        ("''Doom'''s success. '''''Both''''' 5 < 6 and 7 > 6.", "Doom's success. Both 5 < 6 and 7 > 6.", []),
        ("one<br>two <b>bold</b> <div>three</div>", "one\ntwo bold\n\nthree", []),
        ("__NOTOC__\nText.", "Text.", []),
        ("{|\n| a\n{| b\n|}\n|}\nAfter. <table><tr><td>c</td></tr></table>", "After.", []),
        ("{| never closed\n| cell\nText.", "Text.", []),
        ("[[a|b [[c]] d]]", "b c d", ["b c d"]),
        ("[[unclosed and {{unclosed", "[[unclosed and unclosed", []),
        ("", "", []),
    ],
)  # fmt: skip
def test_markup_becomes_what_a_reader_reads(wikitext: str, text: str, links: list[str] | None) -> None:
    found = shown(wikitext)
    assert found[0] == text
    assert links is None or found[1] == links


def test_headings_stand_where_text_follows_and_end_in_a_full_stop() -> None:
    source = "Lead.\n== Life ==\n=== Youth ===\nBorn.\n== Empty ==\n== Why? ==\nSo."
    assert prose(source).text == "Lead.\n\nLife.\n\nYouth.\n\nBorn.\n\nWhy?\n\nSo."


def test_a_list_item_counts_if_it_is_a_sentence_outside_the_apparatus() -> None:
    item = "* She was one of the first people who wrote a program for a [[machine]].\n"
    assert shown(item + "* [[Short]]\n*** Also [[x]], 1900\n") == (
        item[2:].strip().replace("[[", "").replace("]]", ""),
        ["machine"],
    )
    assert prose("A.\n== Further reading ==\n" + item).text == "A."
    assert prose(":''Main article: [[Rome]]''\n:A quoted line.").text == "A quoted line."


def test_other_languages_hide_their_own_files_and_categories() -> None:
    assert prose("A [[Datei:x.png|mini|Bild]] b.", frozenset({"datei"})).text == "A b."


def test_redirects_and_disambiguation_pages_are_recognised() -> None:
    assert all(map(is_redirect, ("#REDIRECT [[A]]", " \n#redirect[[A]]", "# Weiterleitung [[A]]", ":#REDIRECT [[A]]")))
    assert not any(map(is_redirect, ("# Redirected things", "A #REDIRECT [[B]]", "")))
    assert all(map(is_disambiguation, ("{{disambig}}", "x {{Hndis|name=A}}", "{{TLAdisambig}}", "__DISAMBIG__")))
    assert not any(map(is_disambiguation, ("{{R to disambiguation}}", "disambig", "{{otheruses}}", "{{dablink|x}}")))


@pytest.mark.parametrize(
    "unit",
    ["[[", "{{", "<ref>", "<div>", "{|\n", "[http://a ", "[[a|{{b|<i>", "\n", " ", "*", "=a\n", "<!--", "(,", "'''a''b",
     "{{a|[[b|''c ", "<ref", "<nowiki>", "{", "|}", "\n = a(", "&", "{{ disambig "],
)  # fmt: skip
def test_time_grows_with_the_length_of_a_hostile_page_and_not_with_its_square(unit: str) -> None:
    def seconds(size: int) -> float:
        page = unit * (size // len(unit))
        began = time.process_time()
        prose(page)
        is_disambiguation(page)
        is_redirect(page)
        return time.process_time() - began

    # A quadratic step takes a hundred times as long here; the libraries that were tried need half a minute.
    assert seconds(100_000) < 3.0
