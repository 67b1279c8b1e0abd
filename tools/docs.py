"Builds the site into _docs: by Quarto where it is installed, else by smalldocs, which also checks the links between pages."
import json, shutil, subprocess, sys
from pathlib import Path

from nbdev import doclinks, quarto
from nbdev.config import nbpath2html
from nbdev.serve import proc_nbs

root = Path(__file__).resolve().parent.parent


def run(*command):
    done = subprocess.run([Path(sys.executable).with_name(command[0]), *command[1:]], cwd=root)
    if done.returncode: sys.exit(done.returncode)


def stage() -> Path:
    "nbdev's part of `nbdev-docs`, without its look for Quarto, which would start an installer."
    quarto.refresh_quarto_yml()
    doclinks._build_modidx()
    quarto.nbdev_sidebar.__wrapped__(force=True)
    return proc_nbs(force=True)


def name_pages(staged: Path):
    "Gives each page the name nbdev's links expect: smalldocs does not read `output-file`."
    sidebar = staged/"sidebar.yml"
    contents = sidebar.read_text()
    for page in sorted(staged.rglob("*.ipynb")):
        renamed = nbpath2html(page).with_suffix(".ipynb")
        notebook = json.loads(page.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "raw": cell["source"] = [l for l in cell["source"] if not l.startswith("output-file:")]
        page.unlink()
        renamed.write_text(json.dumps(notebook), encoding="utf-8")
        contents = contents.replace(f"- {page.relative_to(staged).as_posix()}", f"- {renamed.relative_to(staged).as_posix()}")
    sidebar.write_text(contents)


if __name__ == "__main__":  # staging starts processes that import this file
    if shutil.which("quarto"): run("nbdev-docs")
    else:
        staged = stage()
        name_pages(staged)
        run("smalldocs", "render", "--quiet", "--strict", staged)  # a broken link is an error
        shutil.rmtree(root/"_docs", ignore_errors=True)
        shutil.move(staged/"_docs", root/"_docs")
    print("The site is in _docs: open _docs/index.html.")
