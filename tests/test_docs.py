"""The documents' python blocks run, in order, and what they assert holds."""

import importlib.util
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parent.parent / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


BLOCKS = {"many_adapters.md": 6, **({"peft.md": 3} if importlib.util.find_spec("peft") else {})}


@pytest.mark.parametrize("name, blocks", BLOCKS.items())
def test_python_blocks(name, blocks):
    text, namespace = (DOCS / name).read_text(), {"__name__": name}
    found = list(BLOCK.finditer(text))
    assert len(found) == blocks == text.count("```python")
    for block in found:
        lines_above = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_above + block[1], str(DOCS / name), "exec"), namespace)  # a traceback names the document's line
