"""The heat maps of similarity: written, of the right colours, and a missing matplotlib named."""

import struct
import sys

import matplotlib.image
import pytest
import torch
from matplotlib.figure import Figure

from lora_kernels.analysis import plot_similarity, random_similarity, subspace_similarity


def test_the_picture_holds_the_grid(tmp_path, monkeypatch):
    """Each panel shows its own values on the scale from 0 to 1, i down and j across, counted from 1."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **kwargs: drawn.append(figure))
    grid, control = subspace_similarity(torch.randn(3, 20), torch.randn(7, 20)), random_similarity(3, 7, 20)
    plot_similarity(grid, tmp_path / "a.png", control=control, title="layers.0.q")
    (figure,) = drawn
    assert figure.get_suptitle() == "layers.0.q"
    for axis, values, title in zip(figure.axes, (grid, control), ("phi(i, j)", "two random matrices"), strict=False):
        (image,) = axis.images
        assert torch.equal(torch.as_tensor(image.get_array().data), values) and image.get_clim() == (0, 1)
        assert (axis.get_title(), axis.get_xlabel(), axis.get_ylabel()) == (title, "j", "i")
        assert image.get_extent() == [0.5, 7.5, 3.5, 0.5]


def test_files(tmp_path):
    plot_similarity(torch.eye(4), tmp_path / "one.png")
    plot_similarity(torch.eye(4), str(tmp_path / "two.png"), control=torch.zeros(4, 4))
    plot_similarity(torch.eye(4), tmp_path / "one.svg")
    sizes = [struct.unpack(">II", (tmp_path / name).read_bytes()[16:24]) for name in ("one.png", "two.png")]
    assert sizes[1][0] > sizes[0][0] and sizes[1][1] == sizes[0][1]
    assert matplotlib.image.imread(tmp_path / "one.png").std() > 0.05, "not a blank sheet"
    assert (tmp_path / "one.svg").read_text().startswith("<?xml")


def test_a_missing_matplotlib_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'wanted matplotlib, .*pip install "lora_kernels\[plot\]"'):
        plot_similarity(torch.eye(4), tmp_path / "a.png")
