"""Print constraints: the oldest versions of dependencies, and the known ones of the tools."""

import re
import tomllib
from pathlib import Path

FOLLOWS = {"pandas"}  # the newest that takes the oldest NumPy

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
oldest = dict(requirement.split(">=") for requirement in project["dependencies"])
tools = {
    re.match(r"[\w-]+", requirement)[0]
    for extra in project["optional-dependencies"].values()
    for requirement in extra
}
known = dict(
    line.split("==") for line in Path("tests/constraints.txt").read_text().split() if "==" in line
)
for name, version in oldest.items():
    print(f"{name}=={version}")
for name in sorted(tools & set(known) - FOLLOWS):
    print(f"{name}=={known[name]}")
