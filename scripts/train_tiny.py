"""Train ``moonlang-tiny``, the model that MoonLang serves when no ``--model-path`` is given.

    python scripts/train_tiny.py --out python/moonlang/models/embedded/moonlang-tiny

The script writes its own training text, needs no network, and takes less than 45 minutes on two cores.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tiny.card import Figures, Record, write_card
from tiny.evaluation import evaluate
from tiny.model import build_model
from tiny.tokenizer import build_tokenizer
from tiny.training import make_deterministic, train

TOKENIZER_SEED, MODEL_SEED, DATA_SEED, EVALUATION_SEED = 1, 2, 3, 4
STEPS = 1500
VOCAB_SIZE = 1728
EVALUATION_COUNT = 200


def main() -> None:
    """Train, save and evaluate, or evaluate only."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS, help="how many steps to train")
    parser.add_argument("--eval-only", action="store_true", help="evaluate the checkpoint that the folder holds")
    arguments = parser.parse_args()

    make_deterministic()
    if arguments.eval_only:
        evaluate_saved(arguments.out)
        return
    tokenizer = build_tokenizer(TOKENIZER_SEED, VOCAB_SIZE)
    model = build_model(tokenizer, MODEL_SEED)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer):,} tokens", flush=True)
    cost = train(model, tokenizer, arguments.steps, DATA_SEED)
    print(f"{cost.wall_seconds:.0f} s by the clock, {cost.cpu_seconds:.0f} s of processor time", flush=True)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    seeds = (TOKENIZER_SEED, MODEL_SEED, DATA_SEED, EVALUATION_SEED)
    figures = evaluate_saved(arguments.out)
    write_card(arguments.out, model, Record(arguments.steps, seeds, cost, EVALUATION_COUNT, figures))


def evaluate_saved(folder: Path) -> dict[str, Figures]:
    """The accuracy of the saved checkpoint, computed in float32 and in bfloat16."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    figures = {}
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        print(f"computed in {name}:", flush=True)
        model = LlamaForCausalLM.from_pretrained(folder, dtype=dtype)
        figures[name] = evaluate(model, tokenizer, EVALUATION_COUNT, EVALUATION_SEED)
    return figures


if __name__ == "__main__":
    main()
