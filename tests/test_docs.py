"""The documents' python blocks run, in order, and what they assert holds."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
PAGES = [  # the page, its blocks, and the package of an extra that it is about
    ("many_adapters.md", 6, "torch"),
    ("merging.md", 4, "torch"),
    ("analysis.md", 5, "torch"),
    ("adapter_files.md", 7, "peft"),
    ("from_unsloth.md", 1, "peft"),
    ("peft.md", 3, "peft"),
    ("quantised.md", 3, "bitsandbytes"),
    ("experts.md", 3, "peft"),
    ("shared_input.md", 2, "transformers"),
    ("packed.md", 4, "peft"),
    ("serving.md", 3, "peft"),
]


@pytest.mark.parametrize("name, blocks", [(name, blocks) for name, blocks, needs in PAGES if importlib.util.find_spec(needs)])
def test_python_blocks(name, blocks):
    text, namespace = (DOCS / name).read_text(), {"__name__": name}
    found = list(BLOCK.finditer(text))
    assert len(found) == blocks == text.count("```python")
    for block in found:
        lines_above = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_above + block[1], str(DOCS / name), "exec"), namespace)  # a traceback names the document's line
