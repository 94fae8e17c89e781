"""Would the kernel tests notice a slip? ``python tests/mutation.py [--only NAME] [--jobs 1] [--list] [--whole]``

Each mutant of `mutants` is one plausible slip in a copy of the package. A fast selection of tests runs against it; with
--whole, a mutant that passes, and that no note excuses, meets the rest of their files. Prints a line per mutant
and a table of the survivors.
Exit status: 0 after a complete run, 1 if the tests fail without a mutation, 2 if the text that a mutant replaces is gone.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutants import Mutant
from mutants_launcher import EVERY

ROOT = Path(__file__).resolve().parents[1]
SELECTIONS = {  # a mutant's tests: their files, and which of them run first
    "kernels": (
        ["test_kernels.py"],
        "test_parity and 0.1 and not torch and not adapters and (M19 and float32 or M32 and float16 and tma) or test_strides and sliced"
        " or one_tile[129] or test_sizes and (15-1-17 or 33-31-64) or nothing_is_written and not -5] or mask_is_exact or every_tile[3]"
        " or past_32_bits or adapters_in_float32 or lane_equal or long_sums or partial_sums or small_sums or one_even_axis",
    ),
    "machine": (
        ["test_kernels.py", "test_segments.py", "test_merging.py", "test_projections.py"],
        "every_tile[3] or one_even_axis or awaited and (sizes or invariance) or splits_of_one_tile or test_mixes and mixed"
        " or test_one_rounding and dtype0 or tf32 or test_parity and (experts or packed and not mixed)"
        " or test_sizes and size1 and triton or test_ranks and 1-False",
    ),
    "base": (["test_base_given.py", "test_memory.py"], "test_base_given.py and not (compiles or 200 or 512 or blocks)"),
    "experts": (["test_experts.py"], "not (compiles or opcheck or 512 or of_every_size or twice)"),
    "shared": (
        ["test_projections.py", "test_shared_input.py"],
        "not (test_ranks or test_sizes or looks_on or named_arm or refusals) or triton and test_sizes and size3",
    ),
    "packed": (
        ["test_packed.py", "test_packed_layer.py", "test_packed_files.py"],
        "not (opcheck or compiled or test_refusals or 170 or repeats or flops)",
    ),
    "mask": (["test_memory.py", "test_philox.py"], "test_philox.py or made_once or bytes_of_a_call"),
    "sum": (["test_expand_sum.py"], "further_steps or behind_the_loop and 12 or no_other"),
    "offsets": (["test_offsets.py"], "test"),
    "launcher": (["test_launcher.py"], "test"),
    "made": (["test_weight_made.py", "test_dequantize.py"], "not compiled"),
    "dora": (["test_dora.py", "test_peft_bias.py", "test_peft_qdora.py"], "not compile"),
    "gated": (
        ["test_gated.py", "test_gate_match.py", "test_gate_packed.py", "test_gate_kernels.py", "test_peft_gated.py"],
        "four_bits or not test_peft_gated.py",
    ),
    "mixtures": (["test_experts_node.py", "test_experts_layer.py", "test_peft_experts.py"], "not (compiled or every_class or with_its)"),
    "elementwise": (["test_dora_columns.py", "test_gate_kernels.py"], "test_values or each_gradient"),
    "columns": (["test_dora_columns.py"], "test"),
    "tuning": (["test_tuning.py"], "tiles_fill or float32_products or descriptor or for_each_token"),
    "calls": (["test_calls.py"], "test"),
    "serving": (["test_serving.py", "test_pool.py", "test_pool_writes.py"], "test"),
    "slots": (["test_multi.py", "test_multi_training.py", "test_pool.py", "test_pool_writes.py"], "adapter or slot or pool or wr"),
    "merge": (["test_merging.py"], "one_rounding or in_place or blocks or not_finite or merged"),
    "overlap": (["test_overlap.py"], "test"),
    "plan": (["test_plan.py"], "equals or apart or one_adapter or out_of_range or any_block or parts"),
    "split": (["test_kernels.py", "test_segments_edges.py"], "splits_of_one_tile or K_split and 0.1 or in_parts or parts_of_a_tile"),
    "segments": (
        ["test_refusals.py", "test_segments.py", "test_segments_edges.py"],
        "unvalidated or plan_refused or lengths_refused or brute_force or from_lengths or same_plan or test_mixes[1-mixed] or 16-mixed"
        " or in_float64 or loop_of_single and (given or masked or each or awaited or torch)"
        " or what_is_not_used and (given or masked or each or awaited or torch) or 40-True or 130-True or sliced"
        " or diverged and (given-nan or masked-nan or each-nan or token and given or torch)"
        " or test_segments_edges.py and not in_parts",
    ),
}
MACHINE = {"PTX_MACHINE": "sm_90", "PTX_MACHINE_SEED": "1", "TRITON_INTERPRET": "0"}
LIMIT, LIMIT_WHOLE = 120, 400  # seconds; or, on a busy machine, three times what the tests take without a mutation
RUN = """
import os, sys, pytest, lora_kernels
assert lora_kernels.__file__.startswith(os.getcwd() + os.sep), lora_kernels.__file__
sys.exit(pytest.main(sys.argv[1:]))
"""


def mutated(source: Path, mutant: Mutant) -> str:
    """The file's text with the mutation; LookupError if what it replaces is not there as often as stated."""
    text = (source / mutant.file).read_text()
    found = text.count(mutant.old)
    if found != mutant.count:
        raise LookupError(f"{mutant.name}: wanted {mutant.count} of {mutant.old!r} in {mutant.file}, found {found}")
    return text.replace(mutant.old, mutant.new)


def run_tests(folder: Path, tests: str, files: list[str], select: str, limit: float) -> str:
    """'' if all pass; else the test at which they stopped, with what it said."""
    env = dict(os.environ, PYTHONPATH=str(folder), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", COLUMNS="300")
    env |= MACHINE if tests in ("machine", "launcher", "elementwise") else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", RUN, "-x", "-v", "--tb=line", "-pno:cacheprovider", "-Wignore", "-k", select, *files]
    with open(folder / "log", "w+") as log:
        child = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            status = child.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        log.seek(0)
        out = log.read()
    if status == 0:
        return ""
    last = (re.findall(r"^tests/test_\w+.py::(\S+)", out, re.M) or ["collection"])[-1]
    if status is None:
        return f"timeout of {limit} s in {last}"
    said = re.search(r"^(?:FAILED|ERROR) .*? - (.*)$", out, re.M)
    return f"{last}: {said[1][:90] if said else f'exit status {status}'}"


def verdict(pristine: Path, mutant: Mutant | None, whole: bool = False, tests: str = "", limit: float = LIMIT) -> str:
    """'' for a survivor, else what killed it; None as mutant: the selection ``tests`` without a mutation."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve() / "copy"
        shutil.copytree(pristine, folder)
        if mutant:
            (folder / "lora_kernels" / mutant.file).write_text(mutated(folder / "lora_kernels", mutant))
        tests = mutant.tests if mutant else tests
        files, select = SELECTIONS[tests]
        files = [f"tests/{name}" for name in files]
        killed = run_tests(folder, tests, files, select, limit)
        if killed or not whole or mutant is None or mutant.note:
            return killed
        return run_tests(folder, tests, files, f"not ({select})", LIMIT_WHOLE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="mutants whose 'selection: name' contains NAME")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument("--whole", action="store_true", help="meet the whole test file before surviving")
    args = parser.parse_args()
    mutants = [m for m in EVERY if not args.only or args.only in f"{m.tests}: {m.name}"]
    try:
        for mutant in EVERY:
            compile(mutated(ROOT / "lora_kernels", mutant), mutant.file, "exec")
    except LookupError as error:
        print(error, file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(f"{m.file:20} {m.name}" for m in mutants))
        return 0
    with tempfile.TemporaryDirectory() as name:
        pristine = Path(name) / "pristine"
        for part in ("lora_kernels", "tests"):
            shutil.copytree(ROOT / part, pristine / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "setup.cfg", pristine)
        limits = {}
        for tests in dict.fromkeys(m.tests for m in mutants):
            begun = time.monotonic()
            failed = verdict(pristine, None, tests=tests, limit=LIMIT_WHOLE)
            limits[tests] = max(LIMIT, 3 * (time.monotonic() - begun))
            if failed:
                print(f"the tests fail without a mutation: {failed}", file=sys.stderr)
                return 1
        with ThreadPoolExecutor(args.jobs) as pool:
            survivors = []
            verdicts = pool.map(lambda m: verdict(pristine, m, args.whole, limit=limits[m.tests]), mutants)
            for done, (mutant, killed) in enumerate(zip(mutants, verdicts, strict=True), 1):
                print(f"[{done}/{len(mutants)}] {mutant.name}: {'killed by ' + killed if killed else 'SURVIVED'}", flush=True)
                survivors += [] if killed else [mutant]
    print(f"\n{len(mutants)} mutants, {len(mutants) - len(survivors)} killed, {len(survivors)} survived")
    print("\n| survivor | file | why |\n|---|---|---|")
    for mutant in survivors:
        print(f"| {mutant.name} | {mutant.file} | {mutant.note or 'unexplained: a gap in the tests'} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
