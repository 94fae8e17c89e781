"""``python -m lora_kernels inspect ADAPTER_DIR``: what a saved adapter does, matrix by matrix, by `lora_kernels.analysis`.

A folder as PEFT saves it: adapter_config.json and adapter_model.safetensors. Shapes are checked before a tensor is read, one matrix is in
memory at a time, and nothing is unpickled.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from . import analysis
from .adapter_store import WEIGHTS_FILE as FILE
from .adapter_store import opened
from .files import DTYPES, PREFIX
from .lora_config import CONFIG_FILE as CONFIG
from .lora_config import pattern_means, read_config
from .nn import scaling_of

DESCRIPTION = """\
What a LoRA adapter saved by PEFT does to its base, for each matrix W it adapts; dW = scale * B A.

  |dW|        the Frobenius norm of the update
  rank        how many directions it has, of the r it was given; fewer mean an unused or repeated direction
  effective   as how many equal directions its singular values are spread (Roy & Vetterli 2007)
  stable      |dW|_F^2 / |dW|_2^2: near 1, one direction does it all
  top 1       the share of |dW|_F^2 in the strongest direction; 90%: how many directions hold nine tenths of it

--base adds the paper's table 7 (arXiv:2106.09685):
  |W|  |UtWV|  by chance  the norm of W, of W in the directions of dW, and of W in random directions
  factor      |dW| / |UtWV|: how strongly the update amplifies what W had there

--against adds the similarity of two adapters, the paper's eq. 4: 1 where one subspace holds the other, 0 where they are orthogonal.
  A 1:1       of the strongest input direction of each; A all: of all of them; by chance: all of two random A
  B 1:1, ...  the same for output directions. Two A from one seed begin alike, whatever they learn; B begins at zero.

Exit code: 0 all read, 1 a matrix holds NaN or Inf, 2 the folder cannot be read.
"""
PAIRS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
CHANGE_THE_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
SERVED = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, metavar="ADAPTER_DIR", help=f"a folder with {CONFIG} and {FILE}")
    parser.add_argument("--base", type=Path, metavar="MODEL", help="the base's .safetensors file, or a folder of them")
    parser.add_argument("--against", type=Path, metavar="OTHER_DIR", help="a second adapter of the same base")
    parser.add_argument("--plot", type=Path, metavar="DIR", help="with --against: a heat map of A's similarity a matrix (extra [plot])")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output, nothing else")


@dataclass(frozen=True)
class Matrix:
    """One adapted matrix of a file. shape: (N, K) of ``B A``; transposed: its base is stored ``[K, N]``."""

    name: str
    key_A: str
    key_B: str
    shape: tuple[int, int]
    r: int
    scale: float
    transposed: bool


class Adapter:
    """The matrices of an adapter's folder, all shapes checked, no tensor read yet.

    Attributes:
        matrices: By the name of the module in the base model. parameters: Of all A and B. others: Other tensors' keys and sizes.
    """

    def __init__(self, folder: Path):
        self.config, self.path = checked_config(folder), folder / FILE
        with opened(self.path) as file:
            self.bytes = self.path.stat().st_size
            slices = {key: file.get_slice(key) for key in file.keys()}
            shapes = {key: tuple(part.get_shape()) for key, part in slices.items()}
            dtypes = {key: part.get_dtype() for key, part in slices.items()}
        pairs = {key: key[: -len(a)] + b for key in shapes for a, b in PAIRS.items() if key.endswith(a)}
        alone = [key for pair in pairs.items() for key in pair if not set(pair) <= shapes.keys() and key in shapes]
        alone += [key for key in shapes if key.endswith(tuple(PAIRS.values())) and key not in pairs.values()]
        if alone:
            raise ValueError(f"{self.path}: wanted a lora_A and a lora_B for each matrix, got {alone[0]} alone")
        for key in (*pairs, *pairs.values()):
            if dtypes[key] not in DTYPES:
                raise ValueError(f"{self.path}: wanted {key} as {', '.join(DTYPES)}, got {dtypes[key]}")
        if not pairs:
            raise ValueError(f"{self.path}: wanted tensors named ...lora_A.weight, got {', '.join(sorted(shapes)[:3]) or 'none'}")
        found = [self._matrix(a, pairs[a], shapes[a], shapes[pairs[a]]) for a in sorted(pairs, key=natural)]
        self.matrices: dict[str, Matrix] = {matrix.name: matrix for matrix in found}
        self.dtype = "/".join(sorted({dtypes[key] for key in pairs}))
        self.parameters = sum(math.prod(shapes[key]) for pair in pairs.items() for key in pair)
        self.others = {key: math.prod(shape) for key, shape in shapes.items() if key not in pairs and key not in pairs.values()}

    def _matrix(self, key_A: str, key_B: str, shape_A: tuple[int, ...], shape_B: tuple[int, ...]) -> Matrix:
        (suffix,) = (suffix for suffix in PAIRS if key_A.endswith(suffix))
        name = key_A.removesuffix(suffix).removeprefix(PREFIX)
        r, alpha = of_pattern(self.config, "rank", name), of_pattern(self.config, "alpha", name)
        if len(shape_A) < 2 or len(shape_B) < 2 or shape_A[0] != r or math.prod(shape_B[1:]) != r or not all(shape_A + shape_B):
            shapes = f"{list(shape_A)} and {list(shape_B)}"
            raise ValueError(f"{name}: wanted lora_A [{r}, K] and lora_B [N, {r}], the rank that {CONFIG} says, got {shapes}")
        scale = scaling_of(alpha, r, bool(self.config.get("use_rslora")))
        transposed = bool(self.config.get("fan_in_fan_out")) or "embedding" in suffix
        return Matrix(name, key_A, key_B, (shape_B[0], math.prod(shape_A[1:])), r, scale, transposed)

    def read(self, matrix: Matrix) -> tuple[torch.Tensor, torch.Tensor]:
        """A ``[r, K]`` and B ``[N, r]``; a convolution's kernel positions are columns of A."""
        with opened(self.path) as file:
            return file.get_tensor(matrix.key_A).flatten(1), file.get_tensor(matrix.key_B).flatten(1)

    def notes(self) -> list[str]:
        """What the numbers leave out."""
        magnitudes = sum("lora_magnitude_vector" in key for key in self.others)
        lora = sum(".lora_" in key for key in self.others) - magnitudes
        whole, start = len(self.others) - magnitudes - lora, self.config.get("init_lora_weights")
        notes = [f"DoRA: its {magnitudes} magnitude vectors are left out; every number is of scale * B A alone"] if magnitudes else []
        notes += [f"{lora} more LoRA tensors (such as a bias of the adapter) are left out"] if lora else []
        notes += [f"{whole} tensors trained whole (modules_to_save, biases) are left out"] if whole else []
        if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
            notes += [f"init_lora_weights = {start!r} changed the base: dW is against that base, not the published one"]
        return notes


class Base:
    """A base model's safetensors: where each weight lies, no tensor read yet."""

    def __init__(self, path: Path):
        files = [path] if path.is_file() else sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"--base {path}: wanted a .safetensors file or a folder of them, got none")
        self.path, self.bytes = path, sum(file.stat().st_size for file in files)
        self.places: dict[str, Path] = {}
        for place in files:
            with opened(place) as file:
                self.places.update(dict.fromkeys(file.keys(), place))

    def weight(self, matrix: Matrix) -> torch.Tensor | None:
        """W as ``[N, K]``, by its name or, where a prefix such as "model." differs, by the one name that ends alike; None if absent."""
        wanted = matrix.name + ".weight"
        keys = [wanted] if wanted in self.places else [k for k in self.places if k.endswith("." + wanted) or wanted.endswith("." + k)]
        if len(keys) != 1:
            return None
        with opened(self.places[keys[0]]) as file:
            stored = file.get_slice(keys[0])
            shape, dtype = stored.get_shape(), stored.get_dtype()
            order = matrix.shape[::-1] if matrix.transposed else matrix.shape
            if len(shape) < 2 or (shape[0], math.prod(shape[1:])) != order or dtype not in DTYPES:
                raise ValueError(f"{self.path}: wanted {keys[0]} as floats {list(order)}, got {dtype} {shape}")
            weight = file.get_tensor(keys[0]).flatten(1)
        return weight.T if matrix.transposed else weight


def checked_config(folder: Path) -> dict:
    """The adapter's configuration, of the method that this is about; the fields that a scale needs have PEFT's defaults."""
    config = read_config(folder)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG}: wanted peft_type 'LORA', got {config.get('peft_type')!r}")
    if config.get("target_parameters"):
        raise ValueError(f"{folder / CONFIG}: wanted adapted modules, got target_parameters, whose factors hold several matrices each")
    return {"r": 8, "lora_alpha": 8, **config}


def of_pattern(config: dict, what: str, name: str):
    """``rank`` or ``alpha`` of a module: of the first pattern that PEFT matches with the end of its name, else the adapter's own."""
    patterns, field = config.get(f"{what}_pattern") or {}, "r" if what == "rank" else "lora_alpha"
    try:
        key = next((key for key in dict(patterns) if pattern_means(key, name)), None)
    except (re.error, TypeError) as error:
        raise ValueError(f"{CONFIG}: wanted {what}_pattern as regular expressions, got {patterns}: {error}") from error
    value = config[field] if key is None else patterns[key]
    kinds = int if what == "rank" else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not abs(value) <= sys.float_info.max or (what == "rank" and value < 1):
        raise ValueError(f"{CONFIG}: wanted {field} of {name} as a {'rank' if what == 'rank' else 'number'}, got {value!r}")
    return value


def natural(name: str) -> list:
    """A key that puts layers.10 behind layers.9."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def measure(matrix: Matrix, adapter: Adapter, base: Base | None, other: Adapter | None, plots: Path | None) -> dict:
    """A row of the table."""
    A, B = adapter.read(matrix)
    row: dict = {"name": matrix.name, "shape": list(matrix.shape), "r": matrix.r, "scale": matrix.scale}
    if not (A.isfinite().all() and B.isfinite().all()):
        return row | {"bad": "NaN or Inf in lora_A or lora_B"}
    update = analysis.spectrum(A, B, matrix.scale)
    row |= {"norm": update.norm, "rank": update.rank, "effective_rank": update.effective_rank, "stable_rank": update.stable_rank}
    energy = update.energy().tolist()
    if update.rank:
        row |= {"top_1": energy[0], "top_90": 1 + sum(share < 0.9 for share in energy)}
    else:
        row["note"] = "dW = 0, as before training"
    weight = base.weight(matrix) if base is not None and update.rank else None
    if weight is not None and not weight.isfinite().all():
        row["bad"] = "NaN or Inf in the base's weight"
    elif weight is not None:
        found = analysis.amplification(weight, update)
        row |= {"weight_norm": found.weight, "projected": found.projected, "projected_by_chance": found.random, "factor": found.factor}
    elif base is not None and update.rank:
        row["note"] = "not in the base"
    if other is not None:
        row |= similarity(A, B, matrix, other, plots) if matrix.name in other.matrices else {"note": "not in the other"}
    return row


def similarity(A: torch.Tensor, B: torch.Tensor, matrix: Matrix, other: Adapter, plots: Path | None) -> dict:
    """Eq. 4 for the strongest direction and for all of them, of A and of B, each with what chance gives."""
    theirs = other.matrices[matrix.name]
    if theirs.shape != matrix.shape:
        return {"note": f"the other's is {list(theirs.shape)}"}
    row: dict = {}
    pairs = zip("AB", (A, B), other.read(theirs), ("right", "left"), matrix.shape[::-1], strict=True)
    for factor, ours, other_factor, side, dim in pairs:
        if not other_factor.isfinite().all():
            return {"bad": f"NaN or Inf in the other's lora_{factor}"}
        if ours.any() and other_factor.any():  # zeros have no directions
            grid = analysis.subspace_similarity(ours, other_factor, side)
            chance = analysis.random_similarity(grid.shape[0], grid.shape[1], dim)
            row |= {f"{factor}_1": grid[0, 0].item(), f"{factor}_all": grid[-1, -1].item(), f"{factor}_by_chance": chance[-1, -1].item()}
            if plots is not None and factor == "A":
                file = plots / (re.sub(r"[^\w.-]", "_", matrix.name) + ".png")
                analysis.plot_similarity(grid, file, control=chance, title=matrix.name)
    return row


def summary(adapter: Adapter, base: Base | None) -> dict:
    """Parameters by kind of module, and the budget of the file."""
    kinds: collections.Counter = collections.Counter()
    for matrix in adapter.matrices.values():
        kind = next((part for part in reversed(matrix.name.split(".")) if not part.isdigit()), matrix.name)
        kinds[kind] += matrix.r * sum(matrix.shape)
    found = {"parameters": adapter.parameters, "other_parameters": sum(adapter.others.values()), "dtype": adapter.dtype}
    found |= {"bytes": adapter.bytes, "adam_bytes": analysis.adam_bytes(adapter.parameters), "by_module": dict(kinds.most_common())}
    if base is not None:
        cost = analysis.Budget(adapter.parameters, adapter.bytes, base.bytes)
        found |= {"base_bytes": base.bytes, "adapters_per_copy": cost.adapters_per_copy, "adapters": SERVED}
        found |= {"shared_bytes": cost.shared_bytes(SERVED), "copies_bytes": cost.copies_bytes(SERVED)}
    return found


COLUMNS: dict = {
    "shape": ("shape", lambda shape: f"{shape[0]}x{shape[1]}"),
    "r": ("r", str),
    "scale": ("scale", "{:.4g}".format),
    "norm": ("|dW|", "{:.4g}".format),
    "rank": ("rank", str),
    "effective_rank": ("effective", "{:.2f}".format),
    "stable_rank": ("stable", "{:.2f}".format),
    "top_1": ("top 1", "{:.1%}".format),
    "top_90": ("90%", str),
    "weight_norm": ("|W|", "{:.4g}".format),
    "projected": ("|UtWV|", "{:.3g}".format),
    "projected_by_chance": ("by chance", "{:.3g}".format),
    "factor": ("factor", "{:.3g}".format),
    "A_1": ("A 1:1", "{:.3f}".format),
    "A_all": ("A all", "{:.3f}".format),
    "A_by_chance": ("by chance", "{:.3f}".format),
    "B_1": ("B 1:1", "{:.3f}".format),
    "B_all": ("B all", "{:.3f}".format),
    "B_by_chance": ("by chance", "{:.3f}".format),
}


def print_table(rows: list[dict]) -> None:
    shown = [key for key in COLUMNS if any(key in row for row in rows)]
    lines = [["matrix", *(COLUMNS[key][0] for key in shown), ""]]
    for row in rows:
        remark = f"BAD: {row['bad']}" if "bad" in row else row.get("note", "")
        lines.append([row["name"], *(COLUMNS[key][1](row[key]) if key in row else "-" for key in shown), remark])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for first, *cells, remark in lines:
        right = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:-1], strict=True))
        print(f"{first:<{widths[0]}}  {right}  {remark}".rstrip())


def print_summary(found: dict, notes: list[str]) -> None:
    kinds = ", ".join(f"{kind} {count / found['parameters']:.1%}" for kind, count in found["by_module"].items())
    others = f", and {found['other_parameters']:,} in other tensors" if found["other_parameters"] else ""
    print(f"\nparameters  {found['parameters']:,} of A and B ({found['dtype']}){others}; {size(found['bytes'])} on disk")
    print(f"modules     {kinds}")
    print(f"training    {size(found['adam_bytes'])} of Adam's moments in float32; the frozen base has none")
    if "base_bytes" in found:
        base, shared, copies = (size(found[key]) for key in ("base_bytes", "shared_bytes", "copies_bytes"))
        print(f"serving     one base of {base} and {SERVED} such adapters: {shared}, against {copies} for {SERVED} copies;")
        print(f"            {found['adapters_per_copy']:,} adapters in the room of one more copy")
    else:
        print(
            f"serving     {10**9 // found['bytes']:,} such adapters a GB beside one base; --base says how that compares with copies of it"
        )
    for note in notes:
        print(f"note        {note}")


def size(count: int) -> str:
    power = min(4, max(0, int(math.log10(max(count, 1))) // 3))
    return f"{count / 1000**power:.3g} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


def run(args: argparse.Namespace) -> int:
    """The command; returns the exit code."""
    from .cli import progress

    try:
        if args.plot is not None and args.against is None:
            raise ValueError("--plot: wanted --against OTHER_DIR beside it, got none; the heat maps compare two adapters")
        adapter = Adapter(args.adapter)
        base = None if args.base is None else Base(args.base)
        other = None if args.against is None else Adapter(args.against)
        if other is not None and not adapter.matrices.keys() & other.matrices.keys():
            raise ValueError(f"--against {args.against}: wanted a matrix such as {next(iter(adapter.matrices))}, got none in common")
        if args.plot is not None:
            args.plot.mkdir(parents=True, exist_ok=True)
        rows = []
        for done, matrix in enumerate(adapter.matrices.values(), 1):
            rows.append(measure(matrix, adapter, base, other, args.plot))
            progress(done, len(adapter.matrices), matrix.name)
        if base is not None and not any("factor" in row or "bad" in row or not row["rank"] for row in rows):
            raise ValueError(f"--base {args.base}: wanted a weight such as {rows[0]['name']}.weight, got none of them")
    except (OSError, ValueError, ImportError) as error:
        print(f"inspect: {error}", file=sys.stderr)
        return 2
    found, notes = summary(adapter, base), adapter.notes()
    if args.json:
        plain = [{k: None if v == math.inf else v for k, v in row.items()} for row in rows]
        print(json.dumps({"matrices": plain, "summary": found, "notes": notes}, indent=1, allow_nan=False))
    else:
        print_table(rows)
        print_summary(found, notes)
    return int(any("bad" in row for row in rows))
