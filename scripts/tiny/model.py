"""The model before training: a small Llama with random weights and one circuit that is put in by hand.

To recall the value of a key, a token has to find the place where the same key stood before and take what came next. Two
attention heads of the first layer and one of the second can do this together (an "induction head"), but each of them
is of use only once the others are there, so that training finds them late. Here they start in place, and training only
has to fit the rest of the model around them.
"""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tiny.tokenizer import MAX_POSITIONS

HEAD_SIZE = 32
EMBEDDING_SCALE, HEAD_SCALE = 0.1, 0.02
"""The spread of the first embeddings, and of the weights of the output head, which start as a copy of them."""
CONSTANT, WITH_BLANK = 0.5, 0.5
"""The first entry of all embeddings, and the second one of the words that have a blank before them."""
BLANK = "Ġ"
"""How the vocabulary writes a blank."""
LOOK_BACK_SHARPNESS = 1.8
FAST, SLOW, SLOW_WEIGHT = 8, 2, -2.5
"""How many of the fastest and slowest rotary frequencies look back, and the weight of a slow one; a fast one has 1."""
MATCH_SHARPNESS = 1.8
FIRST_MATCHED = 6
"""Keys are compared at the rotary frequencies from this one on: those that distance hardly turns."""
CARRIED, COPIED = 0.1, 0.3
"""How strongly the heads write: the token that was looked back at, and the token that was found."""


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    """A model that has random weights but for its induction head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=HEAD_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,  # pyright: ignore[reportArgumentType]
        pad_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportArgumentType]
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        embeddings = nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING_SCALE)
        _pair_up_words(embeddings, tokenizer.get_vocab())
        model.lm_head.weight.copy_(embeddings * (HEAD_SCALE / EMBEDDING_SCALE))
        embeddings[:, 0] = CONSTANT
        _look_back(model)
        _find_and_copy(model)
    return model


def _pair_up_words(embeddings: torch.Tensor, vocabulary: dict[str, int]) -> None:
    """Give a word with a blank before it the embedding of the same word without, but for the second entry.

    An answer in a chat begins without a blank, while the same word has one in the question.
    """
    embeddings[:, 1] = 0
    for token, index in vocabulary.items():
        if token.startswith(BLANK):
            if token[1:] in vocabulary:
                embeddings[index] = embeddings[vocabulary[token[1:]]]
            embeddings[index, 1] = WITH_BLANK


def _look_back(model: LlamaForCausalLM) -> None:
    """Let head 0 of the first layer carry on the token one position back, and head 1 that two positions back.

    Rotary embeddings make this simple: when all keys are the same vector and the query is that vector turned on by
    the angles of an offset, the score is highest at that offset. The same vector for every token comes from the first
    entry that all embeddings share; it is only about the same after the norm, so slow frequencies, which hardly change
    with the position, are subtracted to keep the scores small but for their differences.
    """
    size = HEAD_SIZE
    attention: Any = model.model.layers[0].self_attn
    angles: Any = model.model.rotary_emb.inv_freq
    weights = torch.zeros_like(angles)
    weights[:FAST], weights[-SLOW:] = 1.0, SLOW_WEIGHT
    attention.k_proj.weight[:size] = 0
    attention.k_proj.weight[: size // 2, 0] = LOOK_BACK_SHARPNESS
    for head in (0, 1):
        turned = torch.cat([weights * torch.cos(angles * (head + 1)), -weights * torch.sin(angles * (head + 1))])
        attention.q_proj.weight[head * size : (head + 1) * size] = 0
        attention.q_proj.weight[head * size : (head + 1) * size, 0] = LOOK_BACK_SHARPNESS * turned
    nn.init.orthogonal_(attention.v_proj.weight[:size])
    attention.v_proj.weight[:size, :2] = 0
    nn.init.orthogonal_(attention.o_proj.weight[:, : 2 * size], gain=CARRIED)


def _find_and_copy(model: LlamaForCausalLM) -> None:
    """Let head 0 of the second layer find where the token before this one was two tokens back, and copy from there.

    In "key 7f = blue" the key is two tokens before the value; in "key 7f ?" it is one token before the question mark.
    """
    size = HEAD_SIZE
    layers: Any = model.model.layers
    first, second = layers[0].self_attn, layers[1].self_attn
    one_back, two_back = first.o_proj.weight[:, :size], first.o_proj.weight[:, size : 2 * size]
    matched = (torch.arange(size) % (size // 2) >= FIRST_MATCHED)[:, None] * (MATCH_SHARPNESS / CARRIED)
    second.q_proj.weight[:size] = one_back.T * matched
    second.k_proj.weight[:size] = two_back.T * matched
    values = nn.init.orthogonal_(second.v_proj.weight[:size])
    values[:, :2] = 0
    second.o_proj.weight[:, :size] = values.T * COPIED
