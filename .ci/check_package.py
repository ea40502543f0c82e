"""The wheel holds the package and nothing else; the source archive holds the tests too."""

import sys
import tarfile
import zipfile
from pathlib import Path

[wheel] = Path(sys.argv[1]).glob("*.whl")
[source] = Path(sys.argv[1]).glob("*.tar.gz")
package = {f"skqlora/{path.name}" for path in Path("skqlora").iterdir() if path.is_file()}
tests = {f"tests/{path.name}" for path in Path("tests").glob("test_*.py")}

packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
if packed != package:
    sys.exit(f"The wheel should hold the package alone; different: {sorted(packed ^ package)}")
with tarfile.open(source) as archive:
    packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
missing = (package | tests | {"README.md", "LICENSE", "pyproject.toml"}) - packed
if missing:
    sys.exit(f"The source archive lacks {sorted(missing)}")
