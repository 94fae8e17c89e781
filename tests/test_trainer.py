"""transformers.Trainer and accelerate on a fused PEFT model, unchanged: the losses and gradients of the stock one, on real text."""

import contextlib
import copy
import io

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from bench.llama import blocks, fused, llama, stock
from lora_kernels import ops, parity

STEPS, LENGTH, BATCH = 6, 64, 4
DATA = blocks(LENGTH)
LINEARS = 2 * 7


pytestmark = pytest.mark.usefixtures("as_on_a_users_cpu")


@pytest.fixture(autouse=True)
def _quiet():
    logging.set_verbosity_error()


@pytest.fixture
def dtypes_seen(monkeypatch):
    """The dtype of x in each call of our forward pass."""
    seen, forward = [], ops.forward

    def watched(x, *args):
        seen.append(x.dtype)
        return forward(x, *args)

    monkeypatch.setattr(ops, "forward", watched)
    return seen


class FirstGradients(TrainerCallback):
    def __init__(self):
        self.of: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not self.of:
            self.of = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def trainer(model, folder, **changed) -> Trainer:
    settings = dict(per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=5e-3, max_grad_norm=0.0, seed=1)
    quiet = dict(logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True)
    return Trainer(model=model, args=TrainingArguments(output_dir=str(folder), **{**settings, **quiet, **changed}), train_dataset=DATA)


def losses(run: Trainer, **kwargs) -> torch.Tensor:
    """Float64 ``[steps]``."""
    with contextlib.redirect_stdout(io.StringIO()):
        run.train(**kwargs)
    return torch.tensor([entry["loss"] for entry in run.state.log_history if "loss" in entry], dtype=torch.float64)


def trained(model, folder, **changed) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of each step, and the first step's gradients."""
    run, first = trainer(model, folder, **changed), FirstGradients()
    run.add_callback(first)
    return losses(run), first.of


CHECKPOINTED = {"gradient_checkpointing": True}
CASES = {  # settings of the Trainer, the base's dtype, and the one that its layers compute in
    "float32": ({}, torch.float32, torch.float32),
    "checkpointing": (CHECKPOINTED | {"gradient_checkpointing_kwargs": {"use_reentrant": False}}, torch.float32, torch.float32),
    "reentrant checkpointing": (CHECKPOINTED | {"gradient_checkpointing_kwargs": {"use_reentrant": True}}, torch.float32, torch.float32),
    "accumulation": ({"gradient_accumulation_steps": 2}, torch.float32, torch.float32),
    "autocast": ({"bf16": True}, torch.float32, torch.bfloat16),
    "float32 adapters on bfloat16": ({}, torch.bfloat16, torch.bfloat16),
}
TWICE = ("checkpointing", "reentrant checkpointing", "accumulation")  # two forward passes a step


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_pefts(case, tmp_path, dtypes_seen):
    """Truth is the same training in float64. B is not zero at the first step, so that every gradient has a value."""
    changed, base, computed = CASES[case]
    theirs = stock(llama(2, dtype=base), init_lora_weights=False)
    exact, ours = copy.deepcopy(theirs).double(), fused(theirs)
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}, "PEFT's default"
    stock_losses, stock_grads = trained(theirs, tmp_path, **changed)
    assert not dtypes_seen
    our_losses, our_grads = trained(ours, tmp_path, **changed)
    assert dtypes_seen == [computed] * ((1 + (case in TWICE)) * STEPS * LINEARS)
    true_losses, true_grads = trained(exact, tmp_path, **{**changed, "bf16": False})
    assert parity.budget_used(our_losses, stock_losses, true_losses, computed) <= 1
    assert our_grads.keys() == stock_grads.keys() and len(our_grads) == 2 * LINEARS
    for name, truth in true_grads.items():
        ratio = parity.budget_used(our_grads[name], stock_grads[name], truth, computed)
        assert ratio <= 1, f"{name}: {ratio:.2f} of what is allowed"


def test_dropout_trains_and_the_seed_governs_it(tmp_path, dtypes_seen):
    """The mask is another than torch's, so the losses are not PEFT's: they fall as its do, and repeat with their seed."""
    model = stock(llama(2), lora_dropout=0.1)
    theirs, ours, again, other = (losses(trainer(m, tmp_path, max_steps=12, seed=seed)) for m, seed in trainings(model))
    assert len(dtypes_seen) == 3 * 12 * LINEARS
    assert torch.equal(ours, again) and not torch.equal(ours, other) and not torch.equal(ours, theirs)
    fall = theirs[0] - theirs[-1]
    assert fall > 0.1 and (ours[0] - ours[-1] - fall).abs() < 0.2 * fall


def trainings(model):
    """The same model stock and fused with one seed, fused again, and with another seed."""
    return (copy.deepcopy(model), 1), (fused(model), 1), (fused(model), 1), (fused(model), 2)


def test_resumed_training_is_the_uninterrupted_one(tmp_path):
    """Bit for bit, dropout included, because the checkpoint holds torch's generator; and PEFT reads what was saved."""
    model = stock(llama(2), lora_dropout=0.1)
    run = trainer(fused(model), tmp_path, save_strategy="steps", save_steps=3)
    whole = losses(run)
    resumed = trainer(fused(model), tmp_path, save_strategy="no")
    assert torch.equal(losses(resumed, resume_from_checkpoint=str(tmp_path / "checkpoint-3"))[-3:], whole[3:])
    run.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(llama(2), tmp_path / "saved").eval()
    x = DATA[0]["input_ids"][None]
    wanted = PeftModel.from_pretrained(llama(2).double(), tmp_path / "saved").double().eval()(x).logits
    with torch.no_grad():
        assert parity.budget_used(run.model.eval()(x).logits, loaded(x).logits, wanted) <= 1


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerates_loop(mixed_precision, dtypes_seen):
    """accelerate's own example of a loop, with accumulation and clipping: each step's loss is PEFT's, within the budget."""
    computed = torch.bfloat16 if mixed_precision == "bf16" else torch.float32

    def loop(model, precision: str) -> torch.Tensor:
        AcceleratorState._reset_state(True)
        accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        loader = torch.utils.data.DataLoader(DATA[: 2 * STEPS * BATCH], batch_size=BATCH)
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        found = []
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            found.append(loss.item())
        return torch.tensor(found, dtype=torch.float64)

    theirs = stock(llama(2), init_lora_weights=False)
    exact, ours = copy.deepcopy(theirs).double(), fused(theirs)
    stock_losses, our_losses, truth = loop(theirs, mixed_precision), loop(ours, mixed_precision), loop(exact, "no")
    assert dtypes_seen == [computed] * (2 * STEPS * LINEARS)
    assert truth[0] - truth[-1] > 0.1 and parity.budget_used(our_losses, stock_losses, truth, computed) <= 1
