"""Train ``moonlang-tiny``, the model that MoonLang serves when no ``--model-path`` is given.

    python scripts/train_tiny.py --out python/moonlang/models/embedded/moonlang-tiny

The script writes its own training text, needs no network, and takes less than 45 minutes on two cores.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import nn
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from tiny.card import Figures, Record, Seeds, write_card
from tiny.evaluation import evaluate
from tiny.model import build_model
from tiny.tokenizer import build_tokenizer
from tiny.training import MAIN, POLISH, Cost, make_deterministic, train

SEEDS = Seeds(tokenizer=1, weights=2, data=3, evaluation=4, polish=5)
STEPS, POLISH_STEPS = 2200, 700
VOCAB_SIZE = 1728
EVALUATION_COUNT = 200


def main() -> None:
    """Train, save and evaluate, or evaluate only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the main phase")
    parser.add_argument("--polish-steps", type=int, default=POLISH_STEPS, help="steps of the phase after it")
    parser.add_argument("--eval-only", action="store_true", help="evaluate the checkpoint that the folder holds")
    arguments = parser.parse_args()

    make_deterministic()
    if arguments.eval_only:
        evaluate_saved(arguments.out)
        return
    steps = (arguments.steps, arguments.polish_steps)
    cost = train_and_save(arguments.out, steps)
    figures = evaluate_saved(arguments.out)
    write_card(arguments.out, Record(steps, SEEDS, cost, EVALUATION_COUNT, figures))


def train_and_save(folder: Path, steps: tuple[int, int]) -> Cost:
    """Train both phases; the second starts from the weights that the first one saved."""
    tokenizer = build_tokenizer(SEEDS.tokenizer, VOCAB_SIZE)
    model = build_model(tokenizer, SEEDS.weights)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens", flush=True)
    main_cost = train(model, tokenizer, MAIN, steps[0], SEEDS.data)
    save(model, tokenizer, folder)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    polish_cost = train(model, tokenizer, POLISH, steps[1], SEEDS.polish)
    save(model, tokenizer, folder)
    cost = main_cost + polish_cost
    print(f"{cost.wall_seconds:.0f} s by the clock, {cost.cpu_seconds:.0f} s of processor time", flush=True)
    return cost


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the checkpoint in bfloat16, so that older versions of transformers can read it too."""
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    _amend(folder / "config.json", rope_theta=model.config.to_dict()["rope_parameters"]["rope_theta"])
    _amend(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def _amend(path: Path, **entries: object) -> None:
    """Set entries of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | entries, indent=2, sort_keys=True) + "\n")


def evaluate_saved(folder: Path) -> dict[str, Figures]:
    """The accuracy of the saved checkpoint, computed in float32 and in bfloat16."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    figures = {}
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        print(f"computed in {name}:", flush=True)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        figures[name] = evaluate(model, tokenizer, EVALUATION_COUNT, SEEDS.evaluation)
    return figures


if __name__ == "__main__":
    main()
