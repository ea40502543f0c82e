"""Print constraints: the oldest versions of dependencies, and the known ones of the tools."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
oldest = {}
for text in project["dependencies"] + extras["dask"] + extras["serving"]:
    requirement = Requirement(text)
    [minimum] = [each.version for each in requirement.specifier if each.operator == ">="]
    oldest[canonicalize_name(requirement.name)] = minimum
tools = {canonicalize_name(Requirement(text).name) for text in extras["test"] + extras["demo"]}
known = dict(
    line.split("==") for line in Path("tests/constraints.txt").read_text().split() if "==" in line
)
known = {canonicalize_name(name): version for name, version in known.items()}
for name in sorted(tools & set(known) - set(oldest)):
    oldest[name] = known[name]
print(*(f"{name}=={version}" for name, version in oldest.items()), sep="\n")
