"Makes README.md from nbs/index.ipynb, so that the site's first page and the README say the same."
import re
from configparser import ConfigParser
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter
from traitlets.config import Config

root = Path(__file__).resolve().parent.parent


def prepare(notebook):
    "Drops what readers of the page do not see either: front matter, hidden cells, directives."
    notebook.cells = [c for c in notebook.cells if c.cell_type != "raw" and not c.source.startswith("#| hide")]
    for cell in notebook.cells:
        if cell.cell_type != "code": continue
        if any("image/png" in o.get("data", {}) for o in cell.outputs):
            raise ValueError(f"cell {cell.id} of the index draws a picture, which the README cannot hold: save it under nbs/images and link it")
        if re.search(r"^#\| *echo: *false", cell.source, re.M): cell.metadata.tags = ["no-input"]
        cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M)
    notebook.metadata.language_info = {"name": "python"}
    return notebook


def readme() -> str:
    settings = ConfigParser(delimiters=["="])
    settings.read(root/"settings.ini", encoding="utf-8")
    exporter = MarkdownExporter(config=Config(TagRemovePreprocessor=dict(enabled=True, remove_input_tags={"no-input"})))
    text, _ = exporter.from_notebook_node(prepare(nbformat.read(root/"nbs/index.ipynb", as_version=4)))
    text = re.sub(r"\]\(([\w/-]+\.html)", rf"]({settings['DEFAULT']['doc_url']}/\1", text)
    text = re.sub(r"(\]\(|src=\")images/", r"\1nbs/images/", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+$", "", text, flags=re.M)).strip() + "\n"


if __name__ == "__main__": (root/"README.md").write_text(readme(), encoding="utf-8")
