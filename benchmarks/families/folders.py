"""A model folder of a family as users bring it: config, random weights that all matter, tokenizer, chat template."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedTokenizerFast

from benchmarks.families.chats import Chat
from benchmarks.families.shapes import Family


def describe(family: Family, folder: Path) -> PreTrainedConfig:
    """Write the folder without weights; return the config."""
    tokenizer = tokenizer_of(family.chat)
    bos = tokenizer.convert_tokens_to_ids(family.chat.bos) if family.chat.bos else None
    eos = tokenizer.eos_token_id
    config = family.make({"vocab_size": len(tokenizer), "bos_token_id": bos, "eos_token_id": eos, "pad_token_id": eos})
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return config


def write_folder(family: Family, folder: Path, *, spread: float = 0.15, seed: int = 0) -> Path:
    """Write the folder; every parameter is moved at random by `spread`, norms and biases included."""
    config = describe(family, folder)
    bos, eos = config.bos_token_id, config.eos_token_id
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * spread)
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos, bos_token_id=bos)
    model.save_pretrained(folder)
    return folder


def tokenizer_of(chat: Chat) -> PreTrainedTokenizerFast:
    """Make a tokenizer of single bytes, or of characters with bytes for the rest, with the family's control tokens."""
    backend = _of_bytes() if chat.spells == "bytes" else _of_pieces(chat.prepends)
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in chat.special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=chat.special[0], bos_token=chat.bos or None)
    tokenizer.chat_template = chat.template
    return tokenizer


def _of_bytes() -> Tokenizer:
    backend = Tokenizer(models.BPE({byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return backend


def _of_pieces(prepends: bool) -> Tokenizer:
    pieces = ["<unk>", *(f"<0x{n:02X}>" for n in range(256)), "▁", *(chr(n) for n in range(33, 127))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prepends else spaces
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend
