"""Would the kernel tests notice a slip? ``python tests/mutation.py [--only NAME] [--jobs 1] [--list] [--whole]``

Each mutant is one plausible slip in a copy of the package. A fast selection of test_kernels.py runs against it; with
--whole, a mutant that passes, and that no note excuses, meets the rest of the file. Prints a line per mutant
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FAST = (
    "test_parity and 0.1 and not torch and (M19 and float32 or M32 and float16 and tma) or test_strides and sliced"
    " or one_tile[129] or test_sizes and (15-1-17 or 33-31-64) or nothing_is_written or mask_is_exact or every_tile[3]"
    " or past_32_bits or adapters_in_float32 or lane_equal or long_sums or partial_sums or small_sums or one_even_axis"
)
LIMIT, LIMIT_WHOLE = 120, 400  # seconds
RUN = """
import os, sys, pytest, lora_kernels
assert lora_kernels.__file__.startswith(os.getcwd() + os.sep), lora_kernels.__file__
sys.exit(pytest.main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Mutant:
    """``old`` occurs exactly ``count`` times in the file and becomes ``new``; ``note``: why these tests cannot see it."""

    name: str
    file: str
    old: str
    new: str
    count: int = 1
    note: str = ""


LOAD, DROP, TILES = "kernels/load.py", "kernels/dropout.py", "kernels/tiles.py"
SHRINK, EXPAND, WGRAD, LAUNCH = "kernels/shrink.py", "kernels/expand.py", "kernels/wgrad.py", "launch.py"
SPEED = "equivalent: the same result, more slowly"
ORDER = "GPU only: the interpreter runs programs one after the other, in order"
UNSEEN = "equivalent in value: what is read out of range is not stored; visible to compute-sanitizer alone"
I_MASK, J_MASK = "(i0 + tl.arange(0, BLOCK_I) < I)[:, None]", "(j0 + tl.arange(0, BLOCK_J) < J)[None, :]"
X_DOT_W = "acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)"
X_DOT_A = "acc = tl.dot(x_tile, a_tile, acc, input_precision=PRECISION)"
X_DOT_G = "acc = tl.dot(tl.trans(x_tile), g_tile, acc, input_precision=PRECISION)"
KEEP = "tl.where(keep_tile(seed, threshold, m0, n0, BLOCK_M, BLOCK_N), uv * inv_keep, 0.0)"
OFFSETS = "i[:, None] * stride_i + j[None, :] * stride_j"
I0, J0 = "tl.cast(i0, tl.int32)", "tl.cast(j0, tl.int32)"
K_END, M_END = "tl.minimum(k_start + blocks_per_split * BLOCK_K, K)", "blocks_per_split * BLOCK_M, M)"
U_DOT_V = "acc = tl.dot(u_tile, v_tile.to(u_tile.dtype), acc, input_precision=PRECISION)"
W_SHAPE = "K, N, BLOCK_K, BLOCK_N, EVEN_"
STEP = "tl.num_programs(0) if PERSISTENT else 1"
WAIT = "< R_BLOCKS:\n                pass"
TICKET = 'tl.atomic_add(ticket_ptr, 1, sem="relaxed", scope="gpu")'
PHILOX = "tl.philox(seed, token + zero, zero, group + zero, zero, 7)"

MUTANTS = [
    Mutant("load: no mask", LOAD, "mask=tile_mask(i0, j0, I, J, BLOCK_I, BLOCK_J), other=0.0", ""),
    Mutant("load: j mask off by one", LOAD, f"mask={J_MASK}", f"mask={J_MASK.replace('< J', '<= J')}"),
    Mutant("load: i mask off by one", LOAD, f"mask={I_MASK}", f"mask={I_MASK.replace('< I', '<= I')}"),
    Mutant("mask: row off by one", LOAD, f"{I_MASK} &", f"{I_MASK.replace('< I', '<= I')} &"),
    Mutant("offsets: strides swapped", LOAD, OFFSETS, "i[:, None] * stride_j + j[None, :] * stride_i"),
    Mutant("offsets: 32 bits in a wide tile", LOAD, "i = i.to(tl.int64)", "pass"),
    Mutant("base: 32 bits", LOAD, "tl.cast(i0, tl.int64) * stride_i", "i0 * stride_i"),
    Mutant("descriptor: coordinates swapped", LOAD, f"[{J0}, {I0}]", f"[{I0}, {J0}]"),
    Mutant("dropout: > for >=", DROP, ">= threshold, [", "> threshold, ["),
    Mutant("dropout: 10 rounds", DROP, "zero, 7)", "zero, 10)"),
    Mutant("dropout: halves of a word swapped", DROP, "tl.join(words & 0xFFFF, words >> 16)", "tl.join(words >> 16, words & 0xFFFF)"),
    Mutant("dropout: counters swapped", DROP, PHILOX, "tl.philox(seed, group + zero, zero, token + zero, zero, 7)"),
    Mutant("dropout: token counted in its tile", DROP, "(m0 + tl.arange(0, BLOCK_M))[:, None]", "tl.arange(0, BLOCK_M)[:, None]"),
    Mutant("tiles: last group not clamped", TILES, "tl.minimum(num_m - first_m, GROUP_M)", "GROUP_M"),
    Mutant("tiles: group counted in rows", TILES, "tile // (GROUP_M * num_n)", "tile // (GROUP_M * num_m)"),
    Mutant("tiles: row by row inside a group", TILES, "inside % rows, inside // rows", "inside // num_n, inside % num_n", note=SPEED),
    Mutant("shrink: scale missing", SHRINK, "(acc * scale).to", "acc.to"),
    Mutant("shrink: rounded before the scale", SHRINK, "(acc * scale).to", "(acc.to(a[0].dtype.element_ty) * scale).to"),
    Mutant("shrink: 16-bit sums", SHRINK, X_DOT_A, f"{X_DOT_A}.to(x_tile.dtype).to(tl.float32)"),
    Mutant("shrink: mask coordinates swapped", SHRINK, "threshold, m0, k0, BLOCK_M", "threshold, k0, m0, BLOCK_M"),
    Mutant("shrink: first rank block only", SHRINK, "r0 = tl.program_id(1) * BLOCK_R", "r0 = 0"),
    Mutant("shrink: splits overlap", SHRINK, "tl.program_id(2) * blocks_per_split * BLOCK_K", "tl.program_id(2) * BLOCK_K"),
    Mutant("shrink: last split past K", SHRINK, K_END, "k_start + blocks_per_split * BLOCK_K"),
    Mutant("wgrad: 16-bit sums", WGRAD, X_DOT_G, f"{X_DOT_G}.to(x_tile.dtype).to(tl.float32)"),
    Mutant("wgrad: mask coordinates swapped", WGRAD, "threshold, m0, j0, BLOCK_M", "threshold, j0, m0, BLOCK_M"),
    Mutant("wgrad: tail of the tokens missing", WGRAD, M_END, M_END.replace("M)", "M // BLOCK_M * BLOCK_M)")),
    Mutant("wgrad: first rank block only", WGRAD, "r0 = tl.program_id(1) * BLOCK_R", "r0 = 0"),
    Mutant("wgrad: store mask off by one", WGRAD, "tile_mask(j0, r0, J, R,", "tile_mask(j0, r0, J, R + 1,"),
    Mutant("expand: first rank block only", EXPAND, "tl.range(0, R_BLOCKS * BLOCK_R, BLOCK_R", "tl.range(0, BLOCK_R, BLOCK_R"),
    Mutant("expand: mask takes the base, too", EXPAND, "if DROP_UV and not FIRST:", "if DROP_UV and FIRST:"),
    Mutant("expand: dX without 1 / (1 - p)", EXPAND, f"uv = {KEEP}", f"uv = {KEEP}".replace("uv * inv_keep", "uv")),
    Mutant("expand: dX without mask", EXPAND, f"uv = {KEEP}", "uv = uv * inv_keep"),
    Mutant("expand: dX mask coordinates swapped", EXPAND, f"uv = {KEEP}", f"uv = {KEEP}".replace("m0, n0", "n0, m0")),
    Mutant("expand: dX in the loop without 1 / (1 - p)", EXPAND, f"acc += {KEEP}", f"acc += {KEEP}".replace("uv * inv_keep", "uv")),
    Mutant("expand: low rank lost on library base", EXPAND, "acc += tl.load(y_ptrs", "acc = 0.0 + tl.load(y_ptrs"),
    Mutant("expand: low rank lost when awaited", EXPAND, 'if U == "awaited" or (U ==', 'if (U =='),
    Mutant("expand: low rank lost in the loop", EXPAND, U_DOT_V, "pass"),
    Mutant("expand: loop without scale", EXPAND, "(u_acc * scale)", "u_acc"),
    Mutant("expand: loop saves u without scale", EXPAND, "tl.store(u_ptrs, u_tile, mask", "tl.store(u_ptrs, u_acc.to(u_tile.dtype), mask"),
    Mutant("expand: loop without dropout", EXPAND, "x_tile = drop(x_tile", "drop(x_tile"),
    Mutant("expand: u saved by the second column", EXPAND, "pid_n == 0", "pid_n == 1"),
    Mutant("expand: 16-bit sums", EXPAND, X_DOT_W, f"{X_DOT_W}.to(x_tile.dtype).to(tl.float32)"),
    Mutant("expand: EVEN_K and EVEN_N swapped for w", EXPAND, f"{W_SHAPE}K, EVEN_N", f"{W_SHAPE}N, EVEN_K"),
    Mutant("expand: bias skipped", EXPAND, "if bias_ptr is not None:", "if bias_ptr is not None and LOAD_W is None:"),
    Mutant("expand: bias of the first tile", EXPAND, "n = n0 + tl.arange", "n = 0 * n0 + tl.arange"),
    Mutant("expand: bias not masked", EXPAND, "tl.load(bias_ptr + n, mask=n < N, other=0.0)", "tl.load(bias_ptr + n)", note=UNSEEN),
    Mutant("expand: store not masked", EXPAND, "acc.to(y[0].dtype.element_ty), mask=y_mask)", "acc.to(y[0].dtype.element_ty))"),
    Mutant("expand: TF32 always", EXPAND, "_precision=PRECISION", '_precision="tf32"', 5, "GPU only: the interpreter has no TF32"),
    Mutant("expand: persistent step of 1", EXPAND, STEP, "1", note=SPEED),
    Mutant("expand: persistent step too long", EXPAND, STEP, "tl.num_programs(0) + 1"),
    Mutant("expand: persistent range without producers", EXPAND, "last = producers + num_m", "last = num_m"),
    Mutant("awaited: no wait", EXPAND, WAIT, WAIT.replace("R_BLOCKS", "0"), note=ORDER),
    Mutant("awaited: acquire relaxed", EXPAND, 'sem="acquire"', 'sem="relaxed"', note=ORDER),
    Mutant("awaited: release relaxed", EXPAND, 'sem="release"', 'sem="relaxed"', note=ORDER),
    Mutant("awaited: no barriers", EXPAND, "tl.debug_barrier()", "pass", 2, ORDER),
    Mutant("awaited: item without ticket", EXPAND, TICKET, "turn"),
    Mutant("awaited: first rank block for all", EXPAND, "(item % R_BLOCKS) * BLOCK_R", "0"),
    Mutant("launch: last split missing", LAUNCH, "triton.cdiv(blocks, per_split)", "max(1, blocks // per_split)"),
    Mutant("launch: 16-bit partial sums", LAUNCH, "torch.float32 if splits > 1 else dtype", "dtype", 2),
    Mutant("launch: v reshaped, not transposed", LAUNCH, "w.t(), v.t(),", "w.t(), v.reshape(v.shape[::-1]),"),
    Mutant("launch: EVEN_K always", LAUNCH, "EVEN_K=K % c.block_k == 0", "EVEN_K=True", 2),
    Mutant("launch: EVEN_N always", LAUNCH, "EVEN_N=N % c.block_n == 0", "EVEN_N=True", note=UNSEEN),
    Mutant("launch: EVEN_R always", LAUNCH, "EVEN_R=R % block_r == 0", "EVEN_R=True", 3),
    Mutant("launch: EVEN_J always", LAUNCH, "EVEN_J=J % c.block_j == 0", "EVEN_J=True", note=UNSEEN),
    Mutant("launch: SAVE_U never", LAUNCH, 'SAVE_U=c.u == "loop" and u is not None', "SAVE_U=False"),
    Mutant("launch: 1 / (1 - p) twice in shrink", LAUNCH, "scale * inv_keep, M, K", "scale * inv_keep * inv_keep, M, K"),
    Mutant("launch: loop without 1 / (1 - p)", LAUNCH, "scale * (inv_keep if drop_x else 1.0)", "scale"),
    Mutant("launch: bias twice on library base", LAUNCH, "y=F.linear(x, weight, bias)", "bias=bias, y=F.linear(x, weight, bias)"),
    Mutant("launch: dropout on dY", LAUNCH, "lora_B, scale=scale, dropout=None", "lora_B, scale=scale, dropout=drop"),
    Mutant("launch: dA without dropout", LAUNCH, "ds, scale=1.0, dropout=drop", "ds, scale=1.0, dropout=None"),
    Mutant("launch: flags not zeroed", LAUNCH, "flags = torch.zeros(", "flags = torch.empty("),
]  # fmt: skip


def mutated(source: Path, mutant: Mutant) -> str:
    """The file's text with the mutation; LookupError if what it replaces is not there as often as stated."""
    text = (source / mutant.file).read_text()
    found = text.count(mutant.old)
    if found != mutant.count:
        raise LookupError(f"{mutant.name}: wanted {mutant.count} of {mutant.old!r} in {mutant.file}, found {found}")
    return text.replace(mutant.old, mutant.new)


def run_tests(folder: Path, select: list[str], limit: float) -> str:
    """'' if all pass; else the test at which they stopped, with what it said."""
    env = dict(os.environ, PYTHONPATH=str(folder), TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", COLUMNS="300")
    command = [sys.executable, "-c", RUN, "-x", "-v", "--tb=line", "-pno:cacheprovider", "-Wignore", "tests/test_kernels.py", *select]
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
    last = (re.findall(r"^tests/test_kernels.py::(\S+)", out, re.M) or ["collection"])[-1]
    if status is None:
        return f"timeout of {limit} s in {last}"
    said = re.search(r"^(?:FAILED|ERROR) .*? - (.*)$", out, re.M)
    return f"{last}: {said[1][:90] if said else f'exit status {status}'}"


def verdict(pristine: Path, mutant: Mutant | None, whole: bool = False) -> str:
    """'' for a survivor, else what killed it; None as mutant: the tests as they are."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve() / "copy"
        shutil.copytree(pristine, folder)
        if mutant:
            (folder / "lora_kernels" / mutant.file).write_text(mutated(folder / "lora_kernels", mutant))
        killed = run_tests(folder, ["-k", FAST], LIMIT)
        if killed or not whole or mutant is None or mutant.note:
            return killed
        return run_tests(folder, ["-k", f"not ({FAST})"], LIMIT_WHOLE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", metavar="NAME", help="mutants whose name contains NAME")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time")
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument("--whole", action="store_true", help="meet the whole test file before surviving")
    args = parser.parse_args()
    mutants = [m for m in MUTANTS if not args.only or args.only in m.name]
    try:
        for mutant in MUTANTS:
            compile(mutated(ROOT / "lora_kernels", mutant), mutant.file, "exec")
    except LookupError as error:
        print(error, file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(f"{m.file:20} {m.name}" for m in mutants))
        return 0
    with tempfile.TemporaryDirectory() as name:
        pristine = Path(name) / "pristine"
        shutil.copytree(ROOT / "lora_kernels", pristine / "lora_kernels", ignore=shutil.ignore_patterns("__pycache__"))
        (pristine / "tests").mkdir()
        for file in ("tests/conftest.py", "tests/test_kernels.py", "setup.cfg"):
            shutil.copy(ROOT / file, pristine / file)
        if failed := verdict(pristine, None):
            print(f"the tests fail without a mutation: {failed}", file=sys.stderr)
            return 1
        with ThreadPoolExecutor(args.jobs) as pool:
            survivors = []
            verdicts = pool.map(lambda m: verdict(pristine, m, args.whole), mutants)
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
