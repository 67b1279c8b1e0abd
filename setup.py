"Packaging reads everything from settings.ini, the one place for version and requirements."
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

setup(
    name=cfg["lib_name"], version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"].split(),
    author=cfg["author"], license=cfg["license"], python_requires=f">={cfg['min_python']}",
    long_description=(here / "README.md").read_text(encoding="utf-8"), long_description_content_type="text/markdown",
    packages=find_packages(include=["pcrl", "pcrl.*"]), include_package_data=True,
    install_requires=cfg["requirements"].split(), extras_require={extra: cfg[f"{extra}_requirements"].split() for extra in ("dev", "bench", "export")},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": [f"{cfg['lib_name']} = {cfg['lib_name']}._modidx:d"]},
)
