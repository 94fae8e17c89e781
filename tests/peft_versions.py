"""The PEFT integration's tests on each version of PEFT: ``python tests/peft_versions.py [VERSION ...] [--folder FOLDER]``

Puts each version into a folder of its own before the installed packages, with an older transformers where it needs one, and runs
tests/test_peft*.py there. Prints the table of docs/peft.md. Exit status: 0 if all pass.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLD = ["torchao==0.15.0"]  # PEFT before 0.19 imports what later ones have not
OLDER = [*OLD, "transformers==4.57.6", "tokenizers==0.22.2", "huggingface_hub==0.36.0"]  # and PEFT 0.17 what transformers 5 has not
OLDER += ["requests", "urllib3", "charset_normalizer", "idna", "certifi"]
VERSIONS = {"0.17.1": OLDER, "0.18.1": OLD, "0.19.1": [], "0.20.0": [], "0.21.2": []}
ASK = "import peft, transformers, torch; print(peft.__version__, transformers.__version__, torch.__version__)"
LIMIT = 1200  # seconds


def run(version: str, beside: list[str], folder: Path) -> tuple[str, bool]:
    """(a row of the table, whether all passed)."""
    target = folder / version
    if not target.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), f"peft=={version}", *beside]
        subprocess.run(pip, check=True)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(target), str(ROOT)]))
    found = subprocess.run([sys.executable, "-c", ASK], env=env, check=True, capture_output=True, text=True).stdout.split()
    if found[0] != version:
        raise SystemExit(f"PEFT: wanted {version}, got {found[0]}")
    tests = [str(path) for path in sorted((ROOT / "tests").glob("test_peft*.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "--no-header", "--tb=short", "-p", "no:cacheprovider", "-Wignore", *tests]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT)
    if result.returncode:
        print(result.stdout[-4000:], file=sys.stderr)
    counts = re.findall(r"(\d+) (passed|failed|error)", result.stdout.splitlines()[-1])
    return f"| {' | '.join(found)} | {', '.join(' '.join(count) for count in counts) or 'nothing ran'} |", not result.returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("versions", nargs="*", default=list(VERSIONS))
    parser.add_argument("--folder", type=Path, help="where the versions are kept for another run")
    args = parser.parse_args()
    print("| PEFT | transformers | torch | tests/test_peft*.py |\n|---|---|---|---|")
    good = True
    with tempfile.TemporaryDirectory() as temporary:
        for version in args.versions:
            row, passed = run(version, VERSIONS.get(version, []), args.folder or Path(temporary))
            print(row, flush=True)
            good &= passed
    return int(not good)


if __name__ == "__main__":
    sys.exit(main())
