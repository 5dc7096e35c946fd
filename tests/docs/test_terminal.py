"""A picture of a terminal shows a command and all that it printed, and fetches nothing."""

from __future__ import annotations

import sys
from html import unescape
from subprocess import CalledProcessError
from xml.etree import ElementTree

import pytest

SVG = "{http://www.w3.org/2000/svg}"


def lines(svg: str) -> str:
    texts = ElementTree.fromstring(svg).iter(f"{SVG}text")
    return unescape(" ".join("".join(text.itertext()) for text in texts)).replace("\N{NO-BREAK SPACE}", " ")


def test_a_picture_shows_the_command_and_its_output(terminal):
    svg = terminal.draw(["dspa", "map", "a [b].st"], "\x1b[1mbold\x1b[0m [x] <&> plain\nsecond")
    shown = lines(svg)
    assert "$ dspa map 'a [b].st'" in shown
    assert "bold" in shown and "[x] <&> plain" in shown and "second" in shown
    assert "font-weight: bold" in svg and "@font-face" not in svg and "url(http" not in svg


def test_a_command_that_fails_leaves_the_picture_as_it_was(terminal, tmp_path):
    picture = tmp_path / "picture.svg"
    terminal.main(picture, [sys.executable, "-c", "print('hello')"])
    drawn = picture.read_text()
    assert "hello" in lines(drawn)
    with pytest.raises(CalledProcessError):
        terminal.main(picture, [sys.executable, "-c", "raise SystemExit(3)"])
    assert picture.read_text() == drawn
