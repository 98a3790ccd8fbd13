"""What a page says, read back."""

from html.parser import HTMLParser


class Reader(HTMLParser):
    """What an HTML page shows and what it asks for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.cells, self.wanted, self.scripts, self.images, self._in = [], [], 0, [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self._in = tag
        self.wanted += [values[name] for name in ("src", "srcset", "href") if name in values]
        self.scripts += tag == "script"
        if tag == "img":
            self.images.append(values)

    def handle_endtag(self, tag):
        self._in = ""

    def handle_data(self, data):
        if self._in in ("th", "td"):
            self.cells.append(data)
