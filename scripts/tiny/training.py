"""The training loop."""

import time
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tiny.batches import TOKENS_PER_STEP, Batch, Curriculum
from tiny.evaluation import FORMS, accuracy, held_out_turns

THREADS = 2
MATRIX_RATE, VECTOR_RATE = 0.02, 0.002
WEIGHT_DECAY = 0.01
WARMUP_STEPS = 30
DECAY_SHARE = 0.4
"""The learning rate stays at its top until this share of the steps is left, and then falls to zero in a line."""
LOG_EVERY = 25
TRY_EVERY, TRY_COUNT = 100, 16


@dataclass(frozen=True)
class Cost:
    """The time that a training took, by the clock and summed over the processor cores."""

    wall_seconds: float
    cpu_seconds: float


def make_deterministic() -> None:
    """Let the same command give the same weights."""
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, seed: int) -> Cost:
    """Train the model in place; returns what it cost."""
    curriculum = Curriculum(tokenizer, seed)
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if all(weight is not matrix for matrix in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=WEIGHT_DECAY),
        torch.optim.AdamW(others, lr=VECTOR_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedulers = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate_factor(step, steps)) for optimizer in optimizers
    ]
    started, cpu_started = time.perf_counter(), time.process_time()
    for step in range(steps):
        batch = curriculum.batch(step / steps)
        loss = weighted_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        if step % LOG_EVERY == 0 or step == steps - 1:
            seconds = time.perf_counter() - started
            speed = (step + 1) * TOKENS_PER_STEP / seconds
            shape = "x".join(map(str, batch.ids.shape))
            print(f"step {step:5d}  {seconds:6.0f} s  {speed:6.0f} tokens/s  {shape:>8}  loss {loss:.4f}", flush=True)
        if (step + 1) % TRY_EVERY == 0:
            _try_out(model, tokenizer)
    return Cost(time.perf_counter() - started, time.process_time() - cpu_started)


def _try_out(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print how the model does on a few examples that it is not trained on."""
    model.eval()
    for task in ("recall-60", "recall-250", "addition", "copying", "json"):
        turns = held_out_turns(task, TRY_COUNT, seed=0)
        shares = (f"{form} {accuracy(model, tokenizer, turns, form):.0%}" for form in FORMS)
        print(f"    {task:12}", *shares, flush=True)
    model.train()


def _rate_factor(step: int, steps: int) -> float:
    """The learning rate at a step, as a share of the highest."""
    return min((step + 1) / WARMUP_STEPS, (1 - step / steps) / DECAY_SHARE, 1.0)


def weighted_loss(model: LlamaForCausalLM, batch: Batch) -> torch.Tensor:
    """The mean of the cross entropies of all tokens, weighted."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1]
    targets, weights = batch.ids[:, 1:].flatten(), batch.weights[:, 1:].flatten()
    losses = functional.cross_entropy(logits.float().flatten(0, 1), targets, reduction="none")
    return (losses * weights).sum() / weights.sum()
