"""The conditions of a number, and the JSON lines that carry them: no row is written without its hardware, versions and commit."""

from __future__ import annotations

import datetime
import functools
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]

# Every row has every one of FIELDS and CONDITIONS, null where it does not apply; OTHERS are written only where they apply.
FIELDS = "section what arm config M N K r p dtype ms roof_fraction over_linear".split()
OTHERS = "took launch layer grid rounds speedup_over_peft gbs tflops us peak_bytes saved_bytes name ok ratio detail error quick".split()
OTHERS += "moved_bytes adapters loaded popularity order ranks widths top_k adapter_dtype losses".split()
OTHERS += "capability kernel round over_heuristic seconds kernels lengths tool".split()
CONDITIONS = "gpu cpu cpu_capability threads driver cuda torch triton python commit code date".split()


def conditions(device: torch.device) -> dict:
    """Where and with what a run happens; ``gpu`` is null on a CPU, which has no ``capability``."""
    cuda = device.type == "cuda"
    capability = {"capability": torch.cuda.get_device_capability(device)} if cuda else {}
    return capability | {
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "cpu": cpu_model(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton_version(),
        "python": platform.python_version(),
        "commit": commit(),
        "code": fingerprint(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def cpu_model() -> str:
    """The processor's name, with family and model where Linux tells them, since a virtual machine's name is often cut short."""
    try:
        pairs = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
        info = {key.strip(): value.strip() for key, value in pairs}
    except OSError:
        info = {}
    name = info.get("model name") or platform.processor() or platform.machine()
    return f"{name} (family {info['cpu family']}, model {info['model']})" if "cpu family" in info and "model" in info else name


def triton_version() -> str | None:
    """Triton's version from its metadata: asking does not import it."""
    for name in ("triton", "pytorch-triton", "pytorch-triton-rocm"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


@functools.cache
def fingerprint() -> str:
    """A hash of the package's sources: tells two states of the code apart outside git, and with uncommitted changes."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "lora_kernels").rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def commit() -> str | None:
    """The commit, marked "-dirty" where the package differs from it; None outside git."""
    head = _output("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", "lora_kernels")
    return f"{head}-dirty" if head and changed else head


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.split("\n")
    return lines[0].strip() or None


def machine(row: dict) -> str:
    """What computed a row: the GPU's name, or the CPU's."""
    return row["gpu"] or row["cpu"]


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class Recorder:
    """Writes a section's rows to a file as JSON lines, each at once, so that a run cut short keeps what it measured."""

    def __init__(self, path: Path, section: str, conditions: dict):
        self.rows: list[dict] = []
        self.path, self._fixed = path, {"section": section, **conditions}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def add(self, **fields) -> dict:
        unknown = set(fields) - {*FIELDS, *OTHERS}
        if unknown:
            raise ValueError(f"row: wanted fields among {', '.join([*FIELDS, *OTHERS])}, got {', '.join(sorted(unknown))}")
        row = {**dict.fromkeys(FIELDS), **{k: v for k, v in fields.items() if k in FIELDS or v is not None}, **self._fixed}
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        row = _whole(row)
        self.rows.append(row)
        return row


def _whole(row: dict) -> dict:
    return {**dict.fromkeys(OTHERS), **row}


def read_rows(path: Path) -> list[dict]:
    """The rows of a file of JSON lines, with every field; none where there is no file."""
    if not path.exists():
        return []
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: wanted a JSON object a line, got {line[:60]!r} ({error})") from None
        missing = [field for field in (*FIELDS, *CONDITIONS) if field not in row]
        if missing:
            raise ValueError(f"{path}:{number}: wanted every field and condition in a row, missing {', '.join(missing)}")
        rows.append(_whole(row))
    return rows
