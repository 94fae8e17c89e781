"""PEFT's own tests on our layer: ``python tests/peft_suite.py [--shadow] [--plant NAME] [--files FILE ...] [-k EXPRESSION]``

Downloads the source distribution of the PEFT that is installed, which carries its tests, and runs them twice: as they are, and with
`FusedLoraLinear` wherever PEFT would build its own layer. With --shadow each fused call is also compared with PEFT's own, in y and
every gradient (see peft_swap.py); --plant breaks the layer on purpose, and tells how many tests notice. Prints counts and the tests
whose outcome differs. No model is downloaded: tests that need one fail alike in both runs, and are not counted.
Exit status: 0 if no test that PEFT's layer passes fails on ours, but for those that name PEFT's class; 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES = ["custom_models", "initialization", "tuners_utils", "low_level_api", "lora_variants", "mixed", "helpers", "other"]
FILES += ["target_parameters", "lora_conversion", "arrow", "bdlora", "loraplus", "lorafa", "trainable_tokens", "xlora", "integrations"]
SELECT = "not custom_models or (lora and not adalora and not randlora and not gralora and not loha)"
NAMES_PEFTS_CLASS = (  # tests that assert the text "lora.Linear" or "peft.tuners.lora.layer.Linear", or count the calls of PEFT's own parts
    "test_repr_lora",
    "test_module_type",
    "test_modules_to_save_targets_lora_layer_raises",
    "test_target_parameters_and_target_modules",
    "test_target_parameter_result_caching_works",
)
LIMIT = 3600  # seconds


def sources(folder: Path) -> Path:
    """The source distribution's folder, with tests that pytest can import."""
    name = f"peft-{version('peft')}"
    command = ["download", "-q", "--no-deps", "--no-binary", "peft", "--no-build-isolation", "-d", str(folder), name.replace("-", "==")]
    if not (folder / name).exists():
        subprocess.run([sys.executable, "-m", "pip", *command], check=True)
        with tarfile.open(folder / f"{name}.tar.gz") as archive:
            archive.extractall(folder, filter="data")
    (folder / name / "tests" / "__init__.py").touch()
    return folder / name


def run(folder: Path, mode: str, plant: str, files: list[str], select: str) -> dict:
    out = folder / f"{mode}.json"
    env = dict(os.environ, SUITE=mode, SUITE_PLANT=plant, SUITE_OUT=str(out), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, [env.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "peft_swap", "-o", "addopts=", "-p", "no:cacheprovider", "-k", select]
    command += ["--no-header", "--tb=line", "-Wignore", "--continue-on-collection-errors", *files]
    with open(folder / f"{mode}.log", "w") as log:
        subprocess.run(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, timeout=LIMIT)
    if not out.exists():
        raise SystemExit(f"pytest did not finish: see {folder / f'{mode}.log'}")
    result = json.loads(out.read_text()) | {"asked": [files, select]}
    out.write_text(json.dumps(result))
    if not passed(result):
        raise SystemExit(f"no test passed: see {folder / f'{mode}.log'}")
    return result


def kept(folder: Path, files: list[str], select: str) -> dict | None:
    """An earlier run of the same tests on PEFT's own layer."""
    out = folder / "stock.json"
    result = json.loads(out.read_text()) if out.exists() else {}
    return result if result.get("asked") == [files, select] else None


def passed(result: dict) -> set[str]:
    return {name for name, outcome in result["outcomes"].items() if outcome == "passed"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shadow", action="store_true", help="compare each fused call with PEFT's own")
    parser.add_argument("--plant", default="", help="break the layer: backward_without_scale, dx_without_the_adapter, dropout_ignored")
    parser.add_argument("--files", nargs="*", default=FILES, help="test files, without test_ and .py")
    parser.add_argument("-k", dest="select", default=SELECT, help="pytest's expression")
    parser.add_argument("--folder", type=Path, help="where the sources are kept, and stock.json of an earlier run is used again")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = sources(args.folder or Path(temporary))
        files = [f"tests/test_{name}.py" for name in args.files if (folder / f"tests/test_{name}.py").exists()]
        stock = kept(folder, files, args.select) or run(folder, "stock", "", files, args.select)
        ours = run(folder, "shadow" if args.shadow else "fused", args.plant, files, args.select)
    lost = sorted(passed(stock) - passed(ours))
    named = [name for name in lost if any(word in name for word in NAMES_PEFTS_CLASS)]
    print(f"PEFT {version('peft')}, torch {version('torch')}, transformers {version('transformers')}; {len(files)} files")
    print(f"passed on PEFT's layer {len(passed(stock))}, on ours {len(passed(ours) & passed(stock))}; calls {ours['calls']}")
    print(f"{len(set(ours['touched']) & passed(stock))} of them took a fused call; {len(ours['differences'])} differences from the shadow")
    for name in lost:
        print(f"  {'names the class' if name in named else 'LOST'}: {name}")
    return int(len(lost) > len(named))


if __name__ == "__main__":
    sys.exit(main())
