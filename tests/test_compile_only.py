"""What the compiler makes of every kernel, for each architecture, in processes of their own (the rest of the suite interprets)."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from lora_kernels import cli
from lora_kernels.compile_only import ELEMENTWISE, Report, in_loops
from lora_kernels.tuning import Arch, Config, Expand, Shrink, Wgrad, tables

AS_SM_89 = ("sm_80", "sm_86")
WANTED = {"sm_89": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "sm_120": "mma", "gfx942": "mfma"}


def run(*command: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=900)


UNLIKE = """
import json, sys
from lora_kernels import compile_only, launch
from lora_kernels.tuning import Arch
arch, other = map(Arch.parse, sys.argv[1:])
intercept = launch.intercept
def look(value):
    if isinstance(value, (tuple, dict)):
        return tuple(map(look, value.items() if isinstance(value, dict) else value))
    if hasattr(value, "block_shape"):
        return str(value.block_shape), look(value.base)
    return str(value.dtype if hasattr(value, "dtype") else getattr(value, "__name__", value))
def reports(arch, wanted):
    def those(compile_launch):
        def record(kernel, grid, args, options):
            if wanted(look((kernel, args, dict(options)))):
                compile_launch(kernel, grid, args, options)
        return intercept(record)
    launch.intercept = those
    return compile_only.heuristic_reports(arch, lambda *_: None)
others, launched = set(), set()
def unlike(call):
    launched.add(call)
    return call not in others
reports(other, others.add)  # which says None: nothing is compiled
for report in reports(arch, unlike):
    print(json.dumps(report.as_dict()))
print(len(launched & others), "of", len(launched))
"""


@pytest.fixture(scope="module")
def compilations():
    """Each architecture's process, as many at a time as there are cores: a minute each."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        whole = {arch: pool.submit(run, "-m", "lora_kernels", "compile", "--arch", arch, "--json") for arch in WANTED}
        yield whole | {arch: pool.submit(run, "-c", UNLIKE, arch, "sm_89") for arch in AS_SM_89}


@pytest.mark.parametrize("arch", AS_SM_89)
def test_every_heuristic_config_that_sm_89_has_not(arch, compilations):
    """Of one generation, with the same instructions and as many registers: what sm_89 launches alike is compiled for it alone."""
    out = compilations[arch].result()
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
    *lines, shared = out.stdout.splitlines()
    alike, launched = map(int, shared.split(" of "))
    assert launched > 200 and alike > launched / 2, shared
    reports = [json.loads(line) for line in lines]
    assert len(reports) > 20 and {r["arch"] for r in reports} == {arch} and "mma" in {r["matmul"] for r in reports}
    assert [r for r in reports if not r["good"]] == []


@pytest.mark.parametrize("arch", WANTED)
def test_every_heuristic_config(arch, compilations, capsys):
    """No spills, no serialized wgmma, within the chip's shared memory, on the chip's own matmul instruction; TMA where there is one."""
    out = compilations[arch].result()
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-2000:]
    reports = [json.loads(line) for line in out.stdout.splitlines()]
    bodies = set("shrink expand experts wgrad add_parts plan_counts plan_tokens plan_tiles".split()) | set(ELEMENTWISE)
    assert {r["kernel"].split()[0] for r in reports} == bodies
    assert {r["kernel"] for r in reports} >= {"expand given", "expand loop"}
    for r in reports:
        assert r["spills"] == r["hazards"] == 0 and not r["serialized"], r
        assert r["shared"] <= Arch.parse(arch).shared_memory, r
        assert r["registers"] > 16 or r["matmul"] or r["kernel"] == "add_parts", f"an empty kernel: {r}"
        if r["dtype"] == "bfloat16":  # v gathered for each token takes none, where the base product is given
            assert r["matmul"] and (r["matmul"] != "fma" or "base given" in r["label"] or r["kernel"] in ELEMENTWISE), r
    segments = [r for r in reports if "segments" in r["kernel"]]
    names = {"shrink segments", "expand given segments", "expand given segments split", "wgrad segments"}
    assert {r["kernel"] for r in segments} == names and len(segments) > 20
    gemms = [r for r in reports if r["kernel"].startswith("expand given") and r["dtype"] == "bfloat16" and "M=8192" in r["label"]]
    beside = [r for r in reports if "base given" in r["label"] and r["kernel"].startswith("expand")]
    assert len(gemms) >= 8 and len(beside) >= 8 and not any(r["tma"] for r in beside)
    for r in gemms:
        assert r["matmul"] == WANTED[arch], r
        assert r["tma"] == (Arch.parse(arch).kind == "cuda" and Arch.parse(arch).capability >= (9, 0)), r
    cli.print_reports(Arch.parse(arch), [Report(**{name: value for name, value in r.items() if name != "good"}) for r in reports])
    table = capsys.readouterr().out
    assert WANTED[arch] in table and "spills: 0" in table and "BAD" not in table


VARIANTS = """
import json, sys, torch
from lora_kernels import compile_only
from lora_kernels.compile_only import compile_pass
from lora_kernels.problem import Problem
from lora_kernels.dispatch import why_not_here
from lora_kernels.tuning import Arch, Config, Expand
arch, compile_calls = Arch.parse(sys.argv[1]), compile_only.compile_calls
compile_only.compile_calls = lambda run, arch, label, only: compile_calls(run, arch, label, "expand")  # the kernel that differs
def problem_of(expand, R, **many):
    wide = 512 if expand.base == "library" else 4096  # torch computes a base product of the library's, in bfloat16 on a CPU
    return Problem(8192, wide, wide, R, torch.bfloat16, **many)
large = dict(block_m=128, block_n=256, block_k=64, num_warps=8, num_stages=3, tma=True)
variants = dict(
    given=Expand(**large), persistent=Expand(**large, persistent=True), loop=Expand(**large, u="loop"),
    awaited=Expand(**large, u="awaited"),
    awaited_persistent=Expand(**large, u="awaited", persistent=True), library=Expand(base="library"),
    pdl=Expand(**large, pdl=True),
)
whole = arch.name == "sm_90"  # the only one that is measured as yet
for name, expand in variants.items():
    for backward in (False, True) if whole else (False,):
        for R in (16, 96) if whole and name in ("given", "awaited") else (16,):
            problem = problem_of(expand, R).backward() if backward else problem_of(expand, R)
            config = Config(expand=expand)
            if why_not_here(config, problem, arch) is None:
                for report in compile_pass(problem, arch, config, name, backward):
                    print(json.dumps(report.as_dict() | {"backward": backward, "R": R}))
tile = dict(block_m=128, block_n=128, block_k=64, num_warps=8, num_stages=3, tma=True)
for name, expand in dict(awaited_segments=Expand(**tile, u="awaited"), library_segments=Expand(base="library")).items():
    for mixed in (False, True):
        problem = problem_of(expand, 16, adapters=64, row_block=128, gather_block=32, mixed_ranks=mixed)
        for report in compile_pass(problem, arch, Config(expand=expand), name):
            print(json.dumps(report.as_dict() | {"backward": False, "R": 16}))
"""


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_variants_that_a_gpu_will_choose_between(arch):
    """Each source of u, persistent or not, compiles to the chip's matmul instruction and fits it."""
    out = run("-c", VARIANTS, arch)
    assert out.returncode == 0, out.stderr[-2000:]
    reports = [json.loads(line) for line in out.stdout.splitlines()]
    labels = {r["label"] for r in reports}
    assert labels >= {"given", "persistent", "loop", "awaited", "awaited_persistent", "library", "awaited_segments", "library_segments"}
    assert "pdl" in labels
    for r in reports:
        assert r["matmul"] == WANTED[arch] and r["shared"] <= r["shared_limit"], r
        if "segments" in r["label"] or (r["label"] in ("given", "loop", "awaited", "pdl") and r["R"] == 16):
            assert r["spills"] == 0 and not r["serialized"], r


RANKED = """
import re, sys, torch
from lora_kernels import compile_only, launch
from lora_kernels.problem import Problem
from lora_kernels.tuning import Arch, heuristic
arch = Arch.parse("sm_90")
def show(run, arch, label, only):
    def count(kernel, grid, args, options):
        ptx = kernel.run(*args, grid=grid, warmup=True, **options).asm["ptx"]
        print(label, kernel.__name__, len(re.findall(r"ld\\.global\\S*\\.[bu]16 ", ptx)))
    with compile_only.target(arch), launch.intercept(count):
        run()
    return []
compile_only.compile_calls = show
for M, blocks in ((16, (16, 16)), (64, (64, 16)), (2048, (128, 32))):
    for R in (8, 64):
        plan = dict(adapters=64, row_block=blocks[0], gather_block=blocks[1], mixed_ranks=True)
        forward = Problem(M, 4096, 4096, R, torch.bfloat16, **plan)
        for problem, backward in ((forward, False), (forward.backward(), True)):
            label = f"{'backward' if backward else 'forward'} M={M} r<={R}"
            compile_only.compile_pass(problem, arch, heuristic(problem, arch), label, backward)
for M in (16, 8192):  # one adapter's
    for R in (4, 8, 24):
        forward = Problem(M, 4096, 4096, R, torch.bfloat16)
        for problem, backward in ((forward, False), (forward.backward(), True)):
            compile_only.compile_pass(problem, arch, heuristic(problem, arch), f"M={M} r={R}", backward)
equal = Problem(2048, 4096, 4096, 8, torch.bfloat16, adapters=64, row_block=128, gather_block=32)
compile_only.compile_pass(equal, arch, heuristic(equal, arch), "equal", False)
stack = Problem(2048, 1536, 2048, 64, torch.bfloat16, experts=True, adapters=64, row_block=128, gather_block=64, mixed_ranks=True)
compile_only.compile_pass(stack, arch, heuristic(stack, arch), "experts", False)
"""


def test_ranks_do_not_make_loads_narrow():
    """Of ranks that are multiples of 4, and of ranks of their own within such, no kernel loads 16 bits at a time, but for a bias."""
    out = run("-c", RANKED)
    assert out.returncode == 0, out.stderr[-2000:]
    found = [(kernel, int(number)) for *_, kernel, number in map(str.split, out.stdout.splitlines())]
    assert {kernel for kernel, _ in found} == {"shrink", "expand", "experts", "wgrad", "add_parts"}, found
    assert sum(kernel != "add_parts" for kernel, _ in found) == 6 * (2 + 4) + 3 * (1 + 3) + 3 * (2 + 4) + 2 + 2, found
    assert not [each for each in found if each[1] > (each[0] in ("expand", "experts"))], found


PARTS = """
import torch
from lora_kernels import compile_only, launch
from lora_kernels.problem import Problem
from lora_kernels.segments import Adapters, Segments
from lora_kernels.tuning import Arch, heuristic
arch = Arch.parse("sm_90")
def show(kernel, grid, args, options):
    if kernel.__name__ == "expand":
        ptx = kernel.run(*args, grid=grid, warmup=True, **options).asm["ptx"]
        ahead = ptx[: ptx.index("cp.async")]
        print(len(args[3]), ahead.count("ld.global") >= 8, ahead.count("bra"))
for M, K in ((64, 4096), (16, 14336)):
    config = heuristic(Problem(M, 4096, K, 16, torch.bfloat16, adapters=64, row_block=M, gather_block=16), arch)
    x, w, A, B = (torch.empty(*shape, dtype=torch.bfloat16) for shape in ((M, K), (4096, K), (64, 16, K), (64, 4096, 16)))
    plan = Segments.from_ids(torch.zeros(M, dtype=torch.int32), 64, row_block=M, gather_block=16)
    with compile_only.target(arch), launch.intercept(show):
        launch.forward(x, w, A, B, None, None, Adapters(plan, torch.empty(64), None, ()), 1.0, 0.0, False, config)
"""


def test_parts_of_u_are_all_on_their_way_before_w_is():
    """Decode without gradients: shrink's partial sums are loaded ahead of W's first copies, in no loop, which would wait for some."""
    out = run("-c", PARTS)
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.splitlines() == ["5 True 0"] * 2, out.stdout


OVERLAP = """
import torch
from lora_kernels import compile_only, launch
from lora_kernels.segments import ONE
from lora_kernels.tuning import Arch, Config, Expand
bf16 = dict(dtype=torch.bfloat16)
x, w, A, B = (torch.empty(*shape, **bf16) for shape in ((16, 512), (256, 512), (16, 512), (256, 16)))
def show(kernel, grid, args, options):
    ptx = kernel.run(*args, grid=grid, warmup=True, **options).asm["ptx"]
    first = lambda text: ptx.find(text) if text in ptx else 1 << 40
    print(kernel.__name__, options.get("launch_pdl", False), "griddepcontrol.launch_dependents" in ptx,
          first("cp.async") < first("griddepcontrol.wait") < min(first("ld.global"), 1 << 39))
with compile_only.target(Arch.parse("sm_90")), launch.intercept(show):
    for pdl in (False, True):
        launch.forward(x, w, A, B, None, None, ONE, 1.0, 0.0, True, Config(expand=Expand(16, 32, 64, num_warps=4, pdl=pdl)))
"""


def test_overlapped_launches_wait_before_they_read_u():
    """shrink lets expand begin, and expand loads tiles of x and w before it waits, but u, its only plain loads, after."""
    out = run("-c", OVERLAP)
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.split("\n")[:4] == [
        "shrink False False False", "expand False False False", "shrink False True False", "expand True False True"
    ]  # fmt: skip


BESIDE = """
import re, torch
from bench.candidates import overlapped
from lora_kernels import compile_only, launch
from lora_kernels.compile_only import compile_pass
from lora_kernels.problem import Problem
from lora_kernels.tuning import Arch, heuristic
arch, forward = Arch.parse("sm_90"), Problem(8192, 4096, 4096, 16, torch.bfloat16)
def show(kernel, grid, args, options):
    ptx = kernel.run(*args, grid=grid, warmup=True, **options).asm["ptx"]
    words = r"griddepcontrol.(\\w+)|(cp.async.bulk.tensor|cp.async.cg|ld.global|st.global|wgmma.mma)"
    found = ["".join(match.groups("")) for match in re.finditer(words, ptx)]
    print(kernel.__name__, *[word for i, word in enumerate(found) if i == 0 or word != found[i - 1]])
config, reason = overlapped(heuristic(forward.backward(), arch), "pdl", forward.backward(), arch)
shapes = ((512, 512), (512, 512), (16, 512), (512, 16), (512, 512), (512, 16))
x, w, A, B, dy, u = (torch.empty(*shape, dtype=torch.bfloat16) for shape in shapes)
with compile_only.target(arch), launch.intercept(show):
    launch.backward(dy, x, w, A, B, u, None, launch.ONE, 1.0, 0.0, (True, True, True), torch.bfloat16, config)
def rounded(n, unit): return -(-n // unit) * unit
def room(report):
    return report.shared + 1024, rounded(report.registers, 8) * 32 * report.warps
for problem, backward in ((forward, False), (forward.backward(), True)):
    for how in ("pdl", "stream"):
        config, reason = overlapped(heuristic(problem, arch), how, problem, arch)
        reports = compile_pass(problem, arch, config, "", backward)
        shared, registers = map(sum, zip(*(room(r) for r in reports if r.kernel.startswith("expand"))))
        for r in reports:
            if r.kernel != "shrink" or how == "pdl":
                fits = room(r)[0] <= 228 * 1024 - shared and room(r)[1] <= 65536 - registers
                print("beside" if fits or r.kernel.startswith("expand") else "no room", how, r.kernel, r.spills)
"""


def test_gradients_beside_dX_find_room_and_wait_where_they_must():
    """A large tile of dX, without dropout, leaves a program of wgrad and of shrink its registers and shared memory on sm_90; expand
    waits, then lets go, before it reads dS, and late programs at once; wgrad lets go at once and waits when all is stored."""
    out = run("-c", BESIDE)
    assert out.returncode == 0, out.stderr[-2000:]
    lines = [line for line in out.stdout.splitlines() if "add_parts" not in line]  # an ordinary launch, behind all of them
    shrink, expand, *wgrads = [line.split() for line in lines[:4]]
    assert shrink[:2] == ["shrink", "launch_dependents"] and "wait" not in shrink
    assert expand[:5] == ["expand", "wait", "launch_dependents", "cp.async.bulk.tensor", "wgmma.mma"], expand
    again = expand.index("wait", 3)
    assert expand[again : again + 2] == ["wait", "launch_dependents"] and expand[again + 2] in ("ld.global", "cp.async.cg"), expand
    for wgrad in wgrads:
        assert wgrad[:2] == ["wgrad", "launch_dependents"] and wgrad[-2:] == ["st.global", "wait"], wgrad
    assert len(lines) == 4 + 3 + 7 and not [line for line in lines[4:] if not line.startswith("beside") or line[-2:] != " 0"], lines


ROWS = """
import json
from lora_kernels.compile_only import compile_pass
from lora_kernels.dispatch import why_not_here
from lora_kernels.tuning import Arch, Config, Expand, Shrink, Wgrad
from lora_kernels.tuning.tables import ROWS, Row

for number, row in enumerate({rows}):
    arch = Arch.cuda(*row.capability)
    forward = row.problem(row.tokens[0], row.rank[1] - 1)
    if why_not_here(row.config, forward, arch) is None:
        backward = row.w_major == "n"
        for report in compile_pass(forward, arch, row.config, f"row {{number}}", backward):
            print(json.dumps(report.as_dict()))
    else:
        print(json.dumps(dict(label=f"row {{number}}", good=False, why=why_not_here(row.config, forward, arch))))
"""


def compiled_rows(rows: str) -> list[dict]:
    """The compiler's reports on rows of the table, named by an expression."""
    out = run("-c", ROWS.format(rows=rows))
    assert out.returncode == 0, out.stderr[-2000:]
    return [json.loads(line) for line in out.stdout.splitlines()]


def unserved(report: dict) -> bool:
    """Whether another Triton than this machine's is needed: then a call takes the heuristic."""
    return "compiled by Triton" in report.get("why", "")


def test_every_row_of_the_table_compiles_for_its_architecture():
    """No spills, within the chip's shared memory, on a matmul instruction."""
    reports = compiled_rows("ROWS")
    assert {r["label"] for r in reports} == {f"row {number}" for number in range(len(tables.ROWS))}
    assert [r for r in reports if not r["good"] and not unserved(r)] == []


def test_planted_rows_show_that_the_check_can_fail():
    """A good row of each pass, one that spills, and one that is not valid."""
    good = tables.Row((9, 0), (1024, 4096), 4096, 1024, (1, 17), False, 2, "triton", Config(Shrink(32, 64)), "bench/results/x.jsonl")
    backward = replace(good, w_major="n", dropout=True, config=Config(wgrad=Wgrad(64, 32)))
    spilling = Expand(256, 128, 64, num_warps=8, num_stages=3, tma=True, persistent=True)
    too_big = Config(expand=Expand(256, 256, 128, num_stages=4))
    planted = good, backward, replace(backward, config=replace(backward.config, expand=spilling)), replace(good, config=too_big)
    reports = compiled_rows(repr(planted))
    by_row = [[r for r in reports if r["label"] == f"row {number}"] for number in range(len(planted))]
    assert [len(mine) for mine in by_row] == [2, 5, 5, 1]
    assert all(r["good"] for mine in by_row[:2] for r in mine)
    assert [(r["kernel"], r["spills"] > 0) for r in by_row[2] if not r["good"]] == [("expand given", True)]
    assert "bytes of shared memory" in by_row[3][0]["why"] and not unserved(by_row[3][0])


HAZARD = """
import torch
from lora_kernels import compile_only
from lora_kernels.compile_only import compile_pass
from lora_kernels.problem import Problem
from lora_kernels.tuning import Arch, Config, Expand, Shrink, Wgrad
for rows in (32, 64):
    config = Config(Shrink(rows, 64, num_stages=3), Expand(64, 64, 64, num_warps=4), Wgrad(32, 32))
    for report in compile_pass(Problem(512, 4096, 4096, 16, torch.bfloat16, "x"), Arch.parse("sm_90"), config):
        print(report.kernel, rows, report.hazards, report.good)
"""


def test_a_dropped_tile_that_wgmma_reads_from_registers_is_a_hazard():
    """Which `why_not` keeps from being launched: by 64 rows in a pipelined loop, where 32 take another instruction."""
    out = run("-c", HAZARD)
    assert out.returncode == 0, out.stderr[-2000:]
    found = [line.rsplit(maxsplit=3) for line in out.stdout.splitlines()]
    hazards = {(kernel, int(rows)): int(number) for kernel, rows, number, _ in found}
    assert hazards["shrink", 32] == 0 < hazards["shrink", 64], found
    assert all((number == "0") == (good == "True") for _, _, number, good in found), found


def test_what_makes_a_report_bad():
    report = Report("expand", "", "sm_90", "bfloat16", 128, 0, 232448, 232448, "wgmma", True, 8, False)
    assert report.good and not replace(report, shared=232449).good and not replace(report, spills=1).good
    assert not replace(report, serialized=True).good and not replace(report, hazards=1).good


def test_wgmma_is_serialized_where_each_ends_its_group():
    from lora_kernels.compile_only import serialized

    ptx = "wgmma.mma_async.sync\nwgmma.mma_async.sync\nwgmma.commit_group.sync.aligned\n"
    beside, last = "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;\n", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;\n"
    assert serialized(ptx, last + last) and not serialized(ptx, beside + last) and not serialized("mma.sync", "HMMA ;")
    assert not serialized("wgmma.mma_async.sync\nwgmma.commit_group.sync", last), "a group of one"


def test_compiling_needs_no_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    out = subprocess.run([sys.executable, "-m", "lora_kernels", "compile"], capture_output=True, text=True, env=env)
    assert out.returncode == 2 and "TRITON_INTERPRET unset" in out.stderr


def test_one_compilation_serves_every_length_scale_and_probability():
    code = """
import torch
from lora_kernels import compile_only, launch
from lora_kernels.segments import ONE
from lora_kernels.tuning import Arch, Config
from lora_kernels.kernels.shrink import shrink
from lora_kernels.kernels.expand import expand
from lora_kernels.kernels.wgrad import wgrad
bf16 = dict(dtype=torch.bfloat16)
w, A, B = torch.empty(256, 512, **bf16), torch.empty(16, 512, **bf16), torch.empty(256, 16, **bf16)
def run():
    for M, scale, p in ((4096, 1.0, 0.1), (4097, 0.5, 0.2), (8000, 2.0, 0.5), (131072, 3.0, 0.9)):
        x, dy, u = torch.empty(M, 512, **bf16), torch.empty(M, 256, **bf16), torch.empty(M, 16, **bf16)
        launch.forward(x, w, A, B, None, torch.tensor(1), ONE, scale, p, True, Config())
        launch.backward(dy, x, w, A, B, u, torch.tensor(1), ONE, scale, p, (True, True, True), torch.bfloat16, Config())
compile_only.compile_calls(run, Arch.parse("sm_80"), "")
print([sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in (shrink, expand, wgrad)])
"""
    out = run("-c", code)
    assert out.returncode == 0, out.stderr[-2000:]
    assert out.stdout.strip() == "[2, 2, 2]", "one for each of the two uses of a body"


def reloads(sass: str) -> int:
    return in_loops(sass, r"\bLDL\b")[0]


def test_a_reload_counts_where_it_repeats():
    """Before, in and after a loop; a branch to itself, which ends the code, is none."""
    lines = ["LDL R1, [R1]", "MOV R2, R3", "LDL.LU R10, [R1+0x4]", "@!P1 BRA 0x10", "LDL R4, [R1]", "BRA 0x50"]
    sass = "".join(f"        /*{16 * i:04x}*/    {line} ;   /* 0x000000 */\n" for i, line in enumerate(lines))
    assert reloads(sass) == 1 and reloads(sass.replace("BRA 0x10", "BRA 0x40")) == 0


def test_a_wait_moved_behind_the_code_is_no_loop_around_it():
    """As ptxas lays a K loop's wait for a barrier: out of line, spinning on itself, and back into the loop."""
    loop = ["@!P1 BRA 0x60", "HGMMA R8, R8", "@P0 BRA 0x0", "LDL.LU R1, [R1]", "STG R1", "EXIT", "@!P1 BRA 0x60", "BRA 0x10"]
    inside = [*loop[:1], "LDL R1, [R1]", *loop[2:]]
    moved = [*loop[:6], "LDL R1, [R1]", *loop[7:]]
    sass = [
        "".join(f"        /*{16 * i:04x}*/    {line} ;   /* 0x000000 */\n" for i, line in enumerate(lines))
        for lines in (loop, inside, moved)
    ]
    assert [reloads(each) for each in sass] == [0, 1, 1]
