"""A page of HTML as its elements and text; nesting is checked while it is read."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """Checks nesting and collects tags, attributes and text."""

    VOID = frozenset({"meta", "br", "link", "img", "hr", "input"})

    def __init__(self, html):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)
