"""Tiny World's words: a `CLIPTokenizer` that knows the captions' words, and a text encoder."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

MAX_TOKENS = 24
END = "</w>"  # of a word, in CLIP's vocabularies


def save_tokenizer(words: tuple[str, ...], folder: Path) -> CLIPTokenizer:
    """Write a byte-pair tokenizer in which each of `words` is one token.

    Byte-pair encoding learnt on the bare word list goes on merging until every word is one piece.
    Words outside the list fall into several; `closed_vocabulary` lets the program say so to the
    person who typed them, and which words there are.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    singles = [*letters, *(letter + END for letter in letters)]
    learner = Tokenizer(BPE(end_of_word_suffix=END))
    trainer = BpeTrainer(
        vocab_size=100_000,
        min_frequency=0,
        # Not that letters are special: named here they keep their order, and so do all merges.
        special_tokens=["<|startoftext|>", "<|endoftext|>", *singles],
        end_of_word_suffix=END,
        show_progress=False,
    )
    learner.train_from_iterator(words, trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = CLIPTokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],
        model_max_length=MAX_TOKENS,
        closed_vocabulary=list(words),
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Three narrow layers: captions of twenty words from a vocabulary of a hundred need no more."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
