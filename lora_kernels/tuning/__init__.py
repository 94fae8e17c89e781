"""Which configuration a call takes: values and rules, no tensors. Order: explicit > measured table > heuristic."""

from .arch import Arch
from .config import Config, Expand, Shrink, Wgrad, rank_block
from .heuristic import MERGE, heuristic
from .tables import lookup
from .validity import why_not

__all__ = ["MERGE", "Arch", "Config", "Expand", "Shrink", "Wgrad", "heuristic", "lookup", "rank_block", "resolve", "why_not"]


def resolve(problem, arch, refusal=why_not) -> tuple[Config, str]:
    """The configuration for a problem on an architecture, and where it comes from: "table" or "heuristic".

    refusal: `why_not`, or one that knows more of the machine; a row's configuration that it refuses yields to the heuristic's.
    """
    row = lookup(problem, arch)
    if row and refusal(row.config, problem, arch) is None:  # a row for the chain holds for operands that its configuration cannot take
        return row.config, "table"
    return heuristic(problem, arch), "heuristic"
