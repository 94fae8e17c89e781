"""What the rules need to know of a GPU, by compute capability, never by product name."""

from __future__ import annotations

from dataclasses import dataclass

# Opt-in shared memory per block in bytes: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability".
_SHARED_MEMORY = {
    (7, 5): 65536,
    (8, 0): 166912,
    (8, 6): 101376,
    (8, 7): 166912,
    (8, 9): 101376,
    (9, 0): 232448,
    (10, 0): 232448,
    (10, 3): 232448,
    (12, 0): 101376,
    (12, 1): 101376,
}
_SMS = {(8, 0): 108, (8, 6): 84, (8, 9): 128, (9, 0): 132, (10, 0): 148, (12, 0): 170}


@dataclass(frozen=True)
class Arch:
    """``kind``: "cuda", "hip" or "interpreter"; ``capability``: (9, 0) for sm_90; ``shared_memory``: bytes one block may use."""

    kind: str
    capability: tuple[int, int]
    shared_memory: int
    sms: int

    @property
    def name(self) -> str:
        if self.kind == "interpreter":
            return "interpreter"
        major, minor = self.capability
        return f"gfx{major}{minor:02x}" if self.kind == "hip" else f"sm_{major}{minor}"

    @property
    def has_tma(self) -> bool:
        return self.kind == "interpreter" or (self.kind == "cuda" and self.capability >= (9, 0))

    @property
    def has_pdl(self) -> bool:
        return self.has_tma  # both came with sm_90

    @property
    def has_wgmma(self) -> bool:
        return self.kind == "cuda" and self.capability[0] == 9

    @property
    def has_tcgen05(self) -> bool:
        return self.kind == "cuda" and self.capability[0] == 10

    @classmethod
    def cuda(cls, major: int, minor: int, shared_memory: int = 0, sms: int = 0) -> Arch:
        """An NVIDIA GPU; what is not given is taken from its capability, or the smallest known for one not listed."""
        key = (major, minor)
        return cls("cuda", key, shared_memory or _SHARED_MEMORY.get(key, 65536), sms or _SMS.get(key, 64))

    @classmethod
    def hip(cls, name: str = "gfx942", sms: int = 304) -> Arch:
        """An AMD GPU by its gfx name: 64 KiB of LDS per workgroup."""
        digits = name.removeprefix("gfx")
        return cls("hip", (int(digits[:-2]), int(digits[-2:], 16)), 65536, sms)

    @classmethod
    def interpreter(cls) -> Arch:
        """Triton's interpreter on the CPU: no limits, one program at a time."""
        return cls("interpreter", (0, 0), 1 << 40, 4)

    @classmethod
    def parse(cls, name: str) -> Arch:
        """From "sm_90", "gfx942" or "interpreter"."""
        if name == "interpreter":
            return cls.interpreter()
        if name.startswith("gfx") and len(name) >= 6:
            return cls.hip(name)
        digits = name.removeprefix("sm_").rstrip("a")
        if name.startswith("sm_") and digits.isdigit() and len(digits) >= 2:
            return cls.cuda(int(digits[:-1]), int(digits[-1]))
        raise ValueError(f"arch: wanted a name such as sm_90 or gfx942, got {name!r}")
