"""What an adapter's update ``dW = scale * B A`` does: the questions of LoRA's paper (Hu et al. 2021, arXiv:2106.09685), as numbers.

    subspace_similarity   how much two adapters share        section 7.2, eq. 4
    amplification         what dW adds to W's own directions  section 7.3, table 7
    spectrum              the singular values of dW, and the ranks read off them
    budget                parameters and bytes                sections 4.2 and 7.1

Everything is computed in float64 on the tensors' device, from float16, bfloat16, float32 or float64; B A is never formed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from .checks import check_number
from .problem import FLOATS

EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True, eq=False)
class Spectrum:
    """``scale * B A = U diag(s) V^T`` without the directions that are rounding noise.

    Attributes:
        U: ``[N, k]`` and V: ``[K, k]``, float64, orthonormal columns.
        s: ``[k]``, descending and positive. k, the numerical rank, is 0 for an update of zero, such as a fresh adapter's.
    """

    U: torch.Tensor
    s: torch.Tensor
    V: torch.Tensor

    @property
    def rank(self) -> int:
        """k: how many singular values are above ``max(N, K) * eps * |scale| * |A|_F * |B|_F``.

        That is `torch.linalg.matrix_rank`'s convention with the factors' norms, to which B A is rounded, in place of the product's."""
        return self.s.numel()

    @property
    def norm(self) -> float:
        """The Frobenius norm of dW."""
        return self.s.norm().item()

    @property
    def effective_rank(self) -> float:
        """``exp(H(s / sum(s)))``: the number of equal directions that would be as spread out; 1 to k, or 0 for an update of zero.

        Source: Roy & Vetterli 2007, "The effective rank: a measure of effective dimensionality", definition 1."""
        share = self.s / self.s.sum()
        return torch.special.entr(share).sum().exp().item() if self.rank else 0.0

    @property
    def stable_rank(self) -> float:
        """``|dW|_F^2 / |dW|_2^2`` (Rudelson & Vershynin 2007): 1 to k, or 0 for an update of zero; small directions hardly count."""
        return (self.s / self.s[0]).square().sum().item() if self.rank else 0.0

    def energy(self) -> torch.Tensor:
        """``[k]``: the share of ``|dW|_F^2`` in the first 1, 2, ... k directions."""
        kept = self.s.square().cumsum(0)
        return kept / kept[-1:]


@torch.no_grad()
def spectrum(lora_A: torch.Tensor, lora_B: torch.Tensor, scale: float = 1.0) -> Spectrum:
    """The singular value decomposition of ``scale * B A``, by QR of both factors and an SVD of the r x r core.

    Args:
        lora_A: ``[r, K]``. lora_B: ``[N, r]``. r may exceed N and K.
        scale: A finite float; a negative one turns U round.
    Raises:
        TypeError: dtypes. ValueError: shapes, NaN or Inf.
    """
    A, B = _float64("lora_A", lora_A), _float64("lora_B", lora_B)
    if A.shape[0] != B.shape[1]:
        raise ValueError(f"lora_B: wanted [N, {A.shape[0]}] beside lora_A {list(A.shape)}, got {list(B.shape)}")
    check_number("scale", scale)
    left, b = torch.linalg.qr(B)
    right, a = torch.linalg.qr(A.T)
    core = scale * (b @ a.T)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    noise = max(B.shape[0], A.shape[1]) * EPSILON * abs(scale) * a.norm() * b.norm()
    k = int((s > noise).sum())
    return Spectrum(left @ u[:, :k], s[:k], right @ vh[:k].T)


@torch.no_grad()
def subspace_similarity(first: torch.Tensor, second: torch.Tensor, side: str = "right") -> torch.Tensor:
    """``phi(i, j) = |U1[:, :i]^T U2[:, :j]|_F^2 / min(i, j)`` for every i and j: how much the top directions of two factors share.

    1: the smaller subspace lies in the larger; 0: they are orthogonal. `random_similarity` is what chance gives.

    Args:
        first, second: With side "right" two lora_A, ``[r1, K]`` and ``[r2, K]``, compared by their right-singular vectors, as in the paper;
            with "left" two lora_B, ``[N, r1]`` and ``[N, r2]``, by their left ones. Equal singular values leave their order open.
    Returns:
        float64 ``[k1, k2]``, phi(i, j) at ``[i - 1, j - 1]``; k1 and k2 are the numerical ranks, as in `torch.linalg.matrix_rank`.
    Raises:
        TypeError: dtypes. ValueError: shapes, NaN or Inf, another side, or a factor of zeros (a fresh adapter's lora_B), which has no
        directions.
    Source: Hu et al. 2021, eq. 4 and appendix G.
    """
    if side not in ("right", "left"):
        raise ValueError(f"side: wanted 'right' (of lora_A) or 'left' (of lora_B), got {side!r}")
    axis = 1 if side == "right" else 0
    U1, U2 = _directions("first", first, side), _directions("second", second, side)
    if U1.shape[0] != U2.shape[0]:
        raise ValueError(f"second: wanted {U1.shape[0]} as size {axis}, as first has, got {list(second.shape)}")
    shared = (U1.T @ U2).square().cumsum(0).cumsum(1)
    smaller = _pairs(torch.minimum, U1.shape[1], U2.shape[1])
    return (shared / smaller.to(shared.device)).clamp(max=1.0)


def random_similarity(rank1: int, rank2: int, dim: int) -> torch.Tensor:
    """What `subspace_similarity` is on average for two Gaussian matrices: ``max(i, j) / dim``.

    The paper draws them (figure 4, right); the mean is exact, for random subspaces are uniform, whence E|U1^T U2|_F^2 = i j / dim.

    Args:
        rank1, rank2: Sizes of the grid, at most dim. dim: K for two lora_A, N for two lora_B.
    Returns:
        float64 ``[rank1, rank2]``.
    Raises:
        ValueError: a rank outside 1 to dim.
    """
    for name, rank in (("rank1", rank1), ("rank2", rank2)):
        if not 1 <= rank <= dim:
            raise ValueError(f"{name}: wanted a rank from 1 to dim = {dim}, got {rank}")
    return _pairs(torch.maximum, rank1, rank2).double() / dim


@dataclass(frozen=True)
class Amplification:
    """A column of the paper's table 7; Frobenius norms.

    Attributes:
        update: ``|dW|``. weight: ``|W|``.
        projected: ``|U^T W V|``, what W itself has in the directions of dW.
        random: `random_norm`, what it has in as many random ones.
    """

    update: float
    weight: float
    projected: float
    random: float

    @property
    def factor(self) -> float:
        """``|dW| / |U^T W V|`` (appendix H.4); inf where W has nothing in these directions."""
        return self.update / self.projected if self.projected else math.inf


@torch.no_grad()
def amplification(weight: torch.Tensor, update: Spectrum) -> Amplification:
    """How strongly dW amplifies directions of W, by projecting W on dW's: ``U^T W V``.

    Args:
        weight: ``[N, K]``, the frozen base. update: Its adapter's `spectrum`.
    Raises:
        TypeError: weight's dtype. ValueError: shapes, NaN or Inf, or an update of zero, which has no directions.
    Source: Hu et al. 2021, section 7.3.
    """
    W, (N, K) = _float64("weight", weight), (update.U.shape[0], update.V.shape[0])
    if W.shape != (N, K):
        raise ValueError(f"weight: wanted [{N}, {K}], got {list(W.shape)}")
    if not update.rank:
        raise ValueError("update: wanted one other than zero, got scale * B A = 0, as of a fresh adapter, which amplifies nothing")
    norm = W.norm().item()
    projected = (update.U.T @ W @ update.V).norm().item()
    return Amplification(update.norm, norm, projected, random_norm(norm, (N, K), update.rank))


def random_norm(norm: float, shape: tuple[int, int], rank: int) -> float:
    """``rank |W| / sqrt(N K)``: the root of the mean of ``|U^T W V|_F^2`` over random U ``[N, rank]`` and V ``[K, rank]``.

    The paper draws one; this reproduces table 7's 0.02 and 0.33 from its |W| = 61.95."""
    return rank * norm / math.sqrt(math.prod(shape))


@torch.no_grad()
def dominant_norm(weight: torch.Tensor, rank: int) -> float:
    """``|U^T W V|_F`` with W's own top ``rank`` directions: the most it can be, table 7's other control. Slow: an SVD of W ``[N, K]``.

    Raises:
        TypeError: dtype. ValueError: shape, NaN or Inf, a rank outside 1 to the smaller of N and K.
    """
    W = _float64("weight", weight)
    if not 1 <= rank <= min(W.shape):
        raise ValueError(f"rank: wanted 1 to {min(W.shape)} for weight {list(W.shape)}, got {rank}")
    return torch.linalg.svdvals(W)[:rank].norm().item()


@dataclass(frozen=True)
class Budget:
    """What adapters cost beside one base. A MB is 10^6 bytes.

    Attributes:
        parameters: Trained, of one adapter. adapter_bytes, base_bytes: As stored.
    """

    parameters: int
    adapter_bytes: int
    base_bytes: int

    def shared_bytes(self, adapters: int) -> int:
        """One base and so many adapters."""
        return self.base_bytes + adapters * self.adapter_bytes

    def copies_bytes(self, models: int) -> int:
        """So many fine-tuned copies of the whole model."""
        return models * self.base_bytes

    @property
    def adapters_per_copy(self) -> int:
        """How many adapters fit in the room of one more copy of the base."""
        return self.base_bytes // self.adapter_bytes


def budget(d_model: int, layers: int, matrices: int, r: int, base_parameters: int, dtype: torch.dtype = torch.float16) -> Budget:
    """The budget of LoRA on ``matrices`` of the ``[d_model, d_model]`` projections of each layer: ``2 d_model r`` parameters a projection.

    Args:
        base_parameters: Of the whole frozen model. dtype: Of base and adapters.
    Raises:
        TypeError: dtype is not a floating one. ValueError: a count below 1.
    Source: Hu et al. 2021, section 4.2 and table 5.
    """
    counts = {"d_model": d_model, "layers": layers, "matrices": matrices, "r": r, "base_parameters": base_parameters}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name}: wanted at least 1, got {count}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype: wanted a floating one, got {dtype}")
    parameters = layers * matrices * 2 * d_model * r
    return Budget(parameters, parameters * dtype.itemsize, base_parameters * dtype.itemsize)


def adam_bytes(parameters: int) -> int:
    """Adam's state (Kingma & Ba 2015): two float32 moments for each trained parameter. What is frozen has none."""
    return 2 * 4 * parameters


def plot_similarity(grid: torch.Tensor, path: str | Path, *, control: torch.Tensor | None = None, title: str = "") -> None:
    """Write the heat map of a `subspace_similarity` grid, in the manner of the paper's figures 3 and 4.

    Args:
        grid: ``[k1, k2]`` in [0, 1]. path: The file; its ending chooses the format, such as .png or .svg.
        control: A second grid at the right, in the same colours: `random_similarity`.
    Raises:
        ImportError: matplotlib, the extra [plot], is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f'plot_similarity: wanted matplotlib, got "{error}"; pip install "lora_kernels[plot]"') from error
    panels = {"phi(i, j)": grid} if control is None else {"phi(i, j)": grid, "two random matrices": control}
    figure = Figure(figsize=(1 + 4 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        k1, k2 = values.shape
        image = axis.imshow(
            values.cpu().numpy(), vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=(0.5, k2 + 0.5, k1 + 0.5, 0.5)
        )
        axis.set(xlabel="j", ylabel="i", title=name)
        axis.locator_params(integer=True)
    figure.colorbar(image, ax=axes)
    figure.suptitle(title)
    figure.savefig(path)


def _float64(name: str, matrix: torch.Tensor) -> torch.Tensor:
    if not isinstance(matrix, torch.Tensor) or matrix.dtype not in FLOATS:
        raise TypeError(f"{name}: wanted a tensor of 16, 32 or 64-bit floats, got {getattr(matrix, 'dtype', type(matrix).__name__)}")
    if matrix.ndim != 2 or not matrix.numel():
        raise ValueError(f"{name}: wanted a matrix of two sizes above 0, got {list(matrix.shape)}")
    if not torch.isfinite(matrix).all():
        raise ValueError(f"{name}: wanted finite values, got NaN or Inf")
    return matrix.detach().double()


def _directions(name: str, factor: torch.Tensor, side: str) -> torch.Tensor:
    """``[dim, k]``: the singular vectors of a factor, the strongest first, without those of rounding noise."""
    matrix = _float64(name, factor)
    U, s, _ = torch.linalg.svd(matrix.T if side == "right" else matrix, full_matrices=False)
    k = int((s > s[0] * max(matrix.shape) * EPSILON).sum())
    if not k:
        raise ValueError(f"{name}: wanted a factor with directions, got zeros; lora_B is zero before training")
    return U[:, :k]


def _pairs(function, rows: int, columns: int) -> torch.Tensor:
    """``[rows, columns]``: the function of i = 1, 2, ... and j = 1, 2, ..."""
    return function(torch.arange(1, rows + 1)[:, None], torch.arange(1, columns + 1))
