# All settings are in settings.ini; edit there, not here.
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
parser = ConfigParser(delimiters=["="])
parser.read(here / "settings.ini", encoding="utf-8")
settings = parser["DEFAULT"]

expected = "lib_name version description keywords author author_email license min_python requirements git_url".split()
missing = [key for key in expected if key not in settings]
if missing:
    raise SystemExit(f"settings.ini lacks {', '.join(missing)}")

extras = {
    key.removesuffix("_requirements"): settings[key].split()
    for key in settings
    if key.endswith("_requirements")
}
readme = here / "README.md"

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    keywords=settings["keywords"],
    packages=find_packages(include=["medibuddy", "medibuddy.*"]),
    package_data={"": ["*.yaml", "*.json", "*.jsonl", "*.jinja", "*.safetensors", "*.md", "*.txt"], "medibuddy": ["recipes/*.yaml", "embedded/*/*", "project/*"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": ["medibuddy=medibuddy.cli:main"],
        "nbdev": ["medibuddy=medibuddy._modidx:d"],
    },
    zip_safe=False,
)
