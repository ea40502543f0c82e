"""The wheel holds the package and nothing else; the source archive holds its tests too."""

import sys
import tarfile
import zipfile
from pathlib import Path

[wheel] = Path(sys.argv[1]).glob("*.whl")
[source] = Path(sys.argv[1]).glob("*.tar.gz")


def files_of(folder, pattern):
    """Name the files that belong to a folder of the checkout."""
    files = (path for path in Path(folder).rglob(pattern) if path.is_file())
    return {path.as_posix() for path in files if "__pycache__" not in path.parts}


package = files_of("skqlora", "*.py") | {"skqlora/py.typed"}
packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
if packed != package:
    sys.exit(f"The wheel should hold the package alone; different: {sorted(packed ^ package)}")
with tarfile.open(source) as archive:
    packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
wanted = package | files_of("tests", "*") | files_of("examples", "*.py") | files_of("docs", "*.md")
missing = (wanted | {"README.md", "LICENSE", "pyproject.toml"}) - packed
if missing:
    sys.exit(f"The source archive lacks {sorted(missing)}")
