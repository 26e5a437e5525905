"""The tokenizer: a small BPE in real CLIPTokenizer files."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from erase_diffusion.mini.captions import caption
from erase_diffusion.mini.world import sample_scene

POSITIONS = 32  # the longest caption is 30 tokens; SD's 77 would triple the text tower's work for nothing


def train_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level BPE with CLIP's own pre-tokenisation and special tokens, EOS as pad as in SD."""
    rng = random.Random(0)
    captions = [caption(sample_scene(rng), rng).lower() for _ in range(30_000)]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix="", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    bpe.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        end_of_word_suffix="</w>",
        min_frequency=20,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(captions, trainer)
    saved = json.loads(bpe.to_str())["model"]
    # As in CLIP's own vocabulary: every byte, every byte that ends a word, the merges, the two special tokens.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in saved["merges"]]
    tokens = dict.fromkeys([*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges)])
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizer(
        vocab=str(folder / "vocab.json"),
        merges=str(folder / "merges.txt"),
        model_max_length=POSITIONS,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )
    tokenizer.save_pretrained(folder)
    # transformers 4's slow tokenizer reads these two.
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    return tokenizer


def load_tokenizer(work: Path) -> CLIPTokenizer:
    """The tokenizer of this run, trained on first use."""
    folder = work / "tokenizer"
    return CLIPTokenizer.from_pretrained(folder) if (folder / "merges.txt").exists() else train_tokenizer(folder)


def save_tokenizer(work: Path, tokenizer: CLIPTokenizer, folder: Path) -> None:
    """Save with `vocab.json` and `merges.txt` beside `tokenizer.json`: transformers 4 and other tools read those."""
    tokenizer.save_pretrained(folder)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(work / "tokenizer" / name, folder / name)


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], device: str) -> torch.Tensor:
    """Token ids (n, POSITIONS), padded with EOS."""
    batch = tokenizer(texts, padding="max_length", max_length=POSITIONS, truncation=True, return_tensors="pt")
    return batch.input_ids.to(device)
