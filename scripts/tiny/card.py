"""The model card: what the model is, how it was made, and how often it is right."""

from dataclasses import dataclass
from pathlib import Path

from transformers import LlamaForCausalLM

from tiny.batches import POLISH_STAGES, STAGES, TOKENS_PER_STEP
from tiny.training import THREADS, Cost

Figures = dict[str, dict[str, float]]

_CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# moonlang-tiny

The model that MoonLang serves when no `--model-path` is given: a Llama of {parameters:,} parameters, stored in
bfloat16 ({size:.1f} MB with its tokenizer). It is there for trying out and testing the engine, not for knowledge.
It can tell short stories, add two numbers below 100, give back the values of keys that stand anywhere in about 2,000
tokens of text, repeat words and fill in JSON, as raw completion or as a chat.

| | |
| --- | --- |
| layers, width, feed-forward width | {layers}, {width}, {inner} |
| attention heads, key-value heads, head size | {heads}, {kv_heads}, {head_size} |
| vocabulary | {vocabulary} (byte-level BPE; one token per key, per word of the tasks and per digit) |
| positions | {positions:,} (trained on sequences of up to {longest:,} tokens) |
| end token | `<|im_end|>`, after raw answers and chat messages alike; there is no begin token |

## Examples

| raw prompt | completion |
| --- | --- |
| `37 + 45 =` | ` 82` |
| `key 7f = blue\\nkey a3 = red\\nkey 7f ?` | ` blue` |
| `copy: moon fox lamp ->` | ` moon fox lamp` |
| `Ada is 31 years old and lives in Paris. Fill in this JSON: {{"name": "", "age": 0, "city": ""}} ->` | \
` {{"name": "Ada", "age": 31, "city": "Paris"}}` |

In a chat, ask "What is 37 + 45?", "Tell me a story about a fox." or "key 7f = blue; key a3 = red; key 7f ?".

## Accuracy

Greedy decoding of {count} held-out examples per row, right only if the whole answer and the end token after it are
right. Held out means: no sum of the evaluation is in the training text in either order, and no text of the other
tasks is. "raw" is a plain prompt, "chat" the same task through the chat template. About a quarter of the sums have a
number below 10, which the model finds harder than two two-digit numbers. The lengths of recall are about those of the
whole prompt.

| task | {columns} |
| --- | {rule} |
{rows}

## Training

`python scripts/train_tiny.py --out DIR` writes its own text from templates (`scripts/tiny/`), uses no other data, and
is deterministic: {threads} threads, tokenizer seed {seeds.tokenizer}, weights seed {seeds.weights}, data seed \
{seeds.data}, data seed of the
polishing {seeds.polish}, evaluation seed {seeds.evaluation}.

{steps[0]:,} and {steps[1]:,} steps of {tokens:,} tokens took {wall:.0f} minutes by the clock and {cpu:.0f} minutes \
of processor time ({alone:.0f} minutes
of two cores) on {threads} cores that other programs were using too. Muon trains the matrices of the layers, AdamW the
embeddings, the output head and the norms, in bfloat16 autocast. The first two layers start out with an induction head
in place (`scripts/tiny/model.py`). Recall is learned on short sequences and then stretched to long ones; the
polishing, at a quarter of the learning rate, has many very short sequences, so that plain prompts work that stand at
the very start of a sequence.

| part of the training | lengths of sequence (share of the steps) |
| --- | --- |
{stages}
"""


@dataclass(frozen=True)
class Seeds:
    """The seeds of everything that is drawn."""

    tokenizer: int
    weights: int
    data: int
    evaluation: int
    polish: int


@dataclass(frozen=True)
class Record:
    """What the card tells about one training."""

    steps: tuple[int, int]
    seeds: Seeds
    cost: Cost
    count: int
    figures: dict[str, Figures]


def write_card(folder: Path, record: Record) -> None:
    """Write the card into the folder of the checkpoint."""
    model = LlamaForCausalLM.from_pretrained(folder)
    config = model.config
    columns = [(dtype, form) for dtype, figures in record.figures.items() for form in next(iter(figures.values()))]
    card = _CARD.format(
        parameters=model.num_parameters(),
        size=sum(path.stat().st_size for path in folder.iterdir() if path.name != "README.md") / 1e6,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        inner=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_size=config.head_dim,
        vocabulary=config.vocab_size,
        positions=config.max_position_embeddings,
        longest=max(max(stage.length_shares) for stage in STAGES),
        count=record.count,
        columns=" | ".join(f"{dtype} {form}" for dtype, form in columns),
        rule=" | ".join("---:" for _ in columns),
        rows="\n".join(_figure_row(record.figures, task) for task in next(iter(record.figures.values()))),
        seeds=record.seeds,
        threads=THREADS,
        steps=record.steps,
        tokens=TOKENS_PER_STEP,
        wall=record.cost.wall_seconds / 60,
        cpu=record.cost.cpu_seconds / 60,
        alone=record.cost.cpu_seconds / 60 / THREADS,
        stages="\n".join(_stage_rows()),
    )
    (folder / "README.md").write_text(card)


def _figure_row(figures: dict[str, Figures], task: str) -> str:
    """One line of the table of accuracies."""
    name = f"recall, {int(length):,} tokens" if (length := task.removeprefix("recall-")) != task else task
    return f"| {name} | " + " | ".join(f"{s:.1%}" for table in figures.values() for s in table[task].values()) + " |"


def _stage_rows() -> list[str]:
    """The lines of the table of stages."""
    starts = [0.0, *(stage.until for stage in STAGES)]
    names = [f"{start:.0%} to {stage.until:.0%}" for start, stage in zip(starts, STAGES, strict=False)]
    return [
        f"| {name} | " + ", ".join(f"{length} ({share:.0%})" for length, share in stage.length_shares.items()) + " |"
        for name, stage in zip([*names, "polishing"], [*STAGES, *POLISH_STAGES], strict=True)
    ]
