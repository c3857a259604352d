"""The door of a model folder: whole files, plain weights, one head, before anything heavy is imported. Imports no torch.

    config.json -> other JSON -> index and shards -> the header of each shard -> quantised?  tied as config.json says?

Headers are read, and of the weights at most head and embedding; the rest is checked where it is loaded.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from oldlogits.core.environment import MODELS
from oldlogits.core.errors import ModelFolderError, reading

MODEL_FIX: Final = (
    f"pass --model.path FOLDER, or a starting model ({', '.join(MODELS.names)}), such as --model.path {MODELS.names[0]}"
)
WHOLE: Final = "a folder with config.json, *.safetensors and a tokenizer with a chat template"

_AGAIN: Final = "copy the file again from where the model came from"
_POINTER: Final = b"version https://git-lfs.github.com/spec"
_JSON: Final = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
_SIZES: Final = {
    "vocab_size": 2**31,
    "hidden_size": 2**24,
    "intermediate_size": 2**24,
    "moe_intermediate_size": 2**24,
    "max_position_embeddings": 2**31,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "head_dim": 2**16,
    "num_experts": 10_000,
    "num_local_experts": 10_000,
}
"""Sizes in config.json, and the most that each may be: libraries make modules and tensors of them before they look."""
_PLAIN: Final = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Types of weights that are numbers as they stand, and the bytes of each."""
_QUANTISED: Final = ("qweight", "qzeros", "weight_packed", "weight_scale", "weight_scale_inv", "absmax", "quant_map")
"""What quantised folders call the parts of a weight."""
_CHUNK: Final = 2**24
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """A tensor in a file: its type, its shape, and where its bytes are."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    def same_as(self, other: _Stored) -> bool:
        """Whether both hold the same bytes as the same type."""
        alike = (self.dtype, self.shape) == (other.dtype, other.shape)
        return alike and all(a == b for a, b in zip(self._chunks(), other._chunks(), strict=True))

    def _chunks(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(self.start)
            for at in range(self.start, self.end, _CHUNK):
                yield file.read(min(_CHUNK, self.end - at))


def check_model_folder(folder: Path, fix: str = MODEL_FIX, *, needs_weights: bool = True) -> None:
    """Refuse a model folder that is incomplete, damaged, quantised, or at odds with itself.

    Args:
        folder: The folder.
        fix: What to do where it is no model folder at all.
        needs_weights: Whether weights and tokenizer must be there; if not, those that are there are checked.

    Raises:
        ModelFolderError: What is wrong, in which file.
    """
    with reading(ModelFolderError, "the model folder cannot be read", got=str(folder), allowed=WHOLE, fix=fix):
        _check(folder, fix, needs_weights)


def _check(folder: Path, fix: str, needs_weights: bool) -> None:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if needs_weights:
        _check_parts(folder, fix)
    if not (folder / "config.json").is_file():
        return
    config = _read_json(folder / "config.json")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method", "unnamed") if isinstance(quantised, Mapping) else quantised
        raise _quantised(f"quantization_config ({method}) in {folder / 'config.json'}")
    for key, most in _SIZES.items():
        if (size := config.get(key)) is not None and not (type(size) is int and 0 < size <= most):
            raise _damaged(folder / "config.json", f"{key} = {repr(size)[:80]}", f"{key} from 1 to {most}")
    for name in _JSON:
        if (folder / name).is_file():
            _read_json(folder / name)
    if (template := folder / "chat_template.jinja").is_file():
        _read_text(template)
    if needs_weights or single.is_file() or index.is_file():
        tensors = _stored(folder, index, single)
        for name, one in tensors.items():
            if name.endswith(_QUANTISED) or (name.endswith("weight") and one.dtype not in _PLAIN):
                raise _quantised(f"{name} of type {one.dtype} in {one.path}")
        _check_tie(config, tensors, folder)


def _check_parts(folder: Path, fix: str) -> None:
    if not folder.is_dir():
        raise ModelFolderError("model.path is no folder", got=str(folder), allowed=WHOLE, fix=fix)
    for what, found in {
        "config.json": (folder / "config.json").is_file(),
        "weights (*.safetensors)": any(folder.glob("*.safetensors")),
        "tokenizer.json": (folder / "tokenizer.json").is_file() or (folder / "tokenizer_config.json").is_file(),
    }.items():
        if not found:
            raise ModelFolderError(f"the model folder lacks {what}", got=str(folder), allowed=WHOLE, fix=fix)


def _stored(folder: Path, index: Path, single: Path) -> dict[str, _Stored]:
    """Every tensor of the folder, by name; the headers of all shards are read."""
    if single.is_file() or not index.is_file():
        _require([single.name], folder)
        return _header(single)
    shard_of = _read_json(index).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(s, str) and s == Path(s).name for s in shard_of.values()):
        raise _damaged(index, "a weight_map that is none", "a weight_map of names of weights to names of files")
    _require(sorted(set(shard_of.values())), folder)
    headers = {shard: _header(folder / shard) for shard in sorted(set(shard_of.values()))}
    for name, shard in shard_of.items():
        if name not in headers[shard]:
            raise _damaged(folder / shard, f"no {name}", f"{name}, as {index.name} says")
    if unnamed := {name for header in headers.values() for name in header} - shard_of.keys():
        raise _damaged(index, f"no {min(unnamed)}", "every weight of its shards")
    return {name: headers[shard][name] for name, shard in shard_of.items()}


def _require(shards: list[str], folder: Path) -> None:
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise ModelFolderError(
            "the model folder lacks weights",
            got=f"no {', '.join(missing)} in {folder}",
            allowed="model.safetensors, or model.safetensors.index.json and its shards",
            fix="copy what is missing, or save the model with save_pretrained",
        )


def _header(path: Path) -> dict[str, _Stored]:
    """What a safetensors file holds, if the file is as long as its header says."""
    _refuse_pointer(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8).ljust(8, b"\0"))
        if not 2 <= length <= size - 8:
            raise _damaged(path, f"{size:,} bytes, of which the header would take {length:,}", "a whole safetensors file")
        header = _parsed(path, file.read(length))
    begin, found = 8 + length, {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if not isinstance(entry, dict):
            raise _damaged(path, f"{name}: {entry!r}", "a shape, a type and a range of bytes for every tensor")
        (start, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
        if not all(type(n) is int and n >= 0 for n in (start, end, *shape)) or start > end or not isinstance(dtype, str):
            raise _damaged(path, f"{name}: {entry}", "a shape, a type and a range of bytes for every tensor")
        if dtype in _PLAIN and end - start != math.prod(shape) * _PLAIN[dtype]:
            raise _damaged(path, f"{name}: {end - start} bytes", f"those of {dtype} values of shape {shape}")
        found[name] = _Stored(path=path, dtype=dtype, shape=tuple(shape), start=begin + start, end=begin + end)
    whole = max((one.end for one in found.values()), default=begin)
    if whole != size:
        raise _damaged(path, f"{size:,} bytes", f"{whole:,} bytes, as its header says: " + "it was cut off" * (size < whole))
    if not found or not any(math.prod(one.shape) for one in found.values()):
        raise _damaged(path, "no weights", "at least one tensor")
    return found


def _check_tie(config: Mapping[str, object], tensors: Mapping[str, _Stored], folder: Path) -> None:
    """Refuse a head that config.json ties to the embedding and the weights do not, and one that is tied to nothing."""
    tied, head, embedding = config.get("tie_word_embeddings"), tensors.get(_HEAD), tensors.get(_EMBEDDING)
    if embedding is None or not isinstance(tied, bool):
        return
    if tied and head is not None and not head.same_as(embedding):
        got, fix = f"true, and {_HEAD} differs from {_EMBEDDING}", "false"
    elif not tied and head is None:
        got, fix = f"false, and there is no {_HEAD}", "true, if the head is the embedding; else copy the weights again"
    else:
        return
    raise ModelFolderError(
        "config.json and the weights disagree about the output head",
        got=f"tie_word_embeddings = {got}, in {folder}",
        allowed=f"true without {_HEAD} (or with a copy of {_EMBEDDING}), false with it",
        fix=f'in config.json set "tie_word_embeddings": {fix}',
    )


def _read_json(path: Path) -> dict[str, object]:
    return _parsed(path, _read_text(path))


def _parsed(path: Path, content: str | bytes) -> dict[str, object]:
    with reading(ModelFolderError, f"{path.name} is damaged", got=str(path), allowed="a JSON object in UTF-8", fix=_AGAIN):
        found = json.loads(content)
    if not isinstance(found, dict):
        raise _damaged(path, f"a {type(found).__name__}", "a JSON object")
    return found


def _read_text(path: Path) -> str:
    _refuse_pointer(path)
    with reading(ModelFolderError, f"{path.name} is damaged", got=str(path), allowed="text in UTF-8", fix=_AGAIN):
        return path.read_text(encoding="utf-8")


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(len(_POINTER)) == _POINTER:
            raise ModelFolderError(
                f"{path.name} is a Git LFS pointer, not the file itself",
                got=str(path),
                allowed="the file",
                fix=f"git lfs pull in {path.parent}, or download the file",
            )


def _damaged(path: Path, got: str, allowed: str) -> ModelFolderError:
    return ModelFolderError(f"{path.name} is damaged", got=f"{got} in {path}", allowed=allowed, fix=_AGAIN)


def _quantised(got: str) -> ModelFolderError:
    return ModelFolderError(
        "the weights are quantised: they can be neither trained nor scored exactly",
        got=got,
        allowed="weights of float32, bfloat16 or float16, without quantization_config",
        fix="take the folder of the original model; engine.precision rounds the engine's copy of its weights",
    )
