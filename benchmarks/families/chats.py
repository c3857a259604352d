"""The shapes of public chat templates: marks of turns, where a system message goes, which roles there are, how tools are shown.

They are written here, after the published formats; what matters is where text and control tokens stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

ToolsIn = Literal["template", "system", "user", ""]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A chat template, the control tokens that it needs, and how a recipe tells it the tools.

    Args:
        template: Jinja.
        special: The control tokens; the first one is the tokenizer's eos.
        bos: The token that begins every text; empty: none.
        tools_in: `model.chat_tools` of a recipe: the first value that the template can be used with;
            empty: none.
        kwargs: `model.chat_template_kwargs` of a recipe.
        spells: "bytes": byte-level BPE; "pieces": SentencePiece's, with a space before a text where `prepends`.
    """

    template: str
    special: Sequence[str]
    bos: str = ""
    tools_in: ToolsIn = "template"
    kwargs: str = "{}"
    spells: Literal["bytes", "pieces"] = "bytes"
    prepends: bool = False


def _turns(each: str, begin: str, *, bos: str = "", first: str = "") -> str:
    """A template: `bos`, what stands before all messages, each message, and the beginning of an assistant turn."""
    loop = f"{{% for m in messages %}}{each}{{% endfor %}}"
    return f"{{{{ '{bos}' }}}}{first}{loop}{{% if add_generation_prompt %}}{{{{ '{begin}' }}}}{{% endif %}}"


_ALTERNATE = (
    "{% if loop.index0 > 0 and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
)
_NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
_SYSTEM = "messages[0].content if messages[0].role == 'system' else ''"
_CALLS = (
    '{% for c in m.tool_calls or [] %}{{ \'\\n<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \''
    " + (c.function.arguments | tojson) + '}\\n</tool_call>' }}{% endfor %}"
)
_CHATML = "{{ '<|im_start|>' + m.role + '\\n' + (m.content or '') + '<|im_end|>\\n' }}"
_QWEN_FIRST = (
    "{% if tools %}{{ '<|im_start|>system\\n' + (" + _SYSTEM + ") + '\\n\\n# Tools\\n<tools>' }}"
    "{% for tool in tools %}{{ '\\n' + (tool | tojson) }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}"
    "{% elif messages[0].role == 'system' %}{{ '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}{% endif %}"
)
_QWEN_TURN = (
    "{% if m.role == 'user' %}{{ '<|im_start|>user\\n' + m.content + '<|im_end|>\\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\\n' + THINKS + (m.content or '') }}"
    + _CALLS
    + "{{ '<|im_end|>\\n' }}"
    "{% elif m.role == 'tool' %}"
    "{% if loop.first or messages[loop.index0 - 1].role != 'tool' %}{{ '<|im_start|>user' }}{% endif %}"
    "{{ '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
    "{% if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\\n' }}{% endif %}{% endif %}"
)
_QWEN_BEGIN = "<|im_start|>assistant\\n"
_THINKS = "('<think>\\n\\n</think>\\n\\n' if loop.last else '')"
_QWEN_TOKENS = (
    "<|im_end|>",
    "<|im_start|>",
    "<|endoftext|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
_PHI_TURN = "{{ '<|' + m.role + '|>' + GAP + m.content + '<|end|>' + GAP }}"

CHATML = Chat(template=_turns(_CHATML, _QWEN_BEGIN), special=("<|im_end|>", "<|im_start|>"), tools_in="system")
QWEN_25 = Chat(template=_turns(_QWEN_TURN.replace("THINKS + ", ""), _QWEN_BEGIN, first=_QWEN_FIRST), special=_QWEN_TOKENS)
QWEN_3 = Chat(  # without thoughts in the history; with enable_thinking = false an empty one begins the turn
    template=_turns(_QWEN_TURN.replace("THINKS", _THINKS), _QWEN_BEGIN + "<think>\\n\\n</think>\\n\\n", first=_QWEN_FIRST),
    special=(*_QWEN_TOKENS, "<think>", "</think>"),
    kwargs='{"enable_thinking": false}',
)
LLAMA_3 = Chat(  # tools in the first user message, results of the role ipython, contents trimmed
    template=_turns(
        "{% if m.role != 'system' %}{% set role = 'ipython' if m.role == 'tool' else m.role %}"
        "{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}"
        "{% if tools and loop.index0 == (1 if messages[0].role == 'system' else 0) %}"
        "{{ 'Given the following functions, answer with JSON for a function call.\\n\\n' }}"
        "{% for tool in tools %}{{ (tool | tojson(indent=4)) + '\\n\\n' }}{% endfor %}{% endif %}"
        '{% for c in m.tool_calls or [] %}{{ \'{"name": "\' + c.function.name + \'", "parameters": \''
        " + (c.function.arguments | tojson) + '}' }}{% endfor %}"
        "{{ (m.content or '') | trim + '<|eot_id|>' }}{% endif %}",
        "<|start_header_id|>assistant<|end_header_id|>\\n\\n",
        bos="<|begin_of_text|>",
        first="{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' }}{% if tools %}{{ 'Environment: ipython\\n' }}{% endif %}"
        "{{ (" + _SYSTEM + ") | trim + '<|eot_id|>' }}",
    ),
    special=("<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|python_tag|>"),
    bos="<|begin_of_text|>",
)
MISTRAL = Chat(  # system message and tools stand before the *last* user message, wherever the conversation is
    template=_turns(
        _ALTERNATE + "{% if m.role == 'user' %}"
        "{% if tools and m == (messages | selectattr('role', 'equalto', 'user') | list | last) %}"
        "{{ '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{% endif %}"
        "{{ '[INST] ' }}{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}"
        "{{ m.content + '[/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ ' ' + (m.content or '') + '</s>' }}"
        "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}{% endif %}",
        "",
        bos="<s>",
    ),
    special=(
        "</s>",
        "<s>",
        "[INST]",
        "[/INST]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
    ),
    bos="<s>",
    tools_in="user",
    spells="pieces",
    prepends=True,
)
MISTRAL_7 = Chat(  # a system message of its own
    template=_turns(
        "{% if m.role == 'system' %}{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
        "{% elif m.role == 'user' %}{{ '[INST]' + m.content + '[/INST]' }}"
        "{% elif m.role == 'assistant' %}{{ (m.content or '') + '</s>' }}"
        "{% else %}{{ raise_exception('Only user, system and assistant roles are supported!') }}{% endif %}",
        "",
        bos="<s>",
    ),
    special=("</s>", "<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    bos="<s>",
    tools_in="system",
)
_GEMMA_TURN = (
    _ALTERNATE
    + "{% if m.role != 'system' %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}FIRST"
    "{{ m.content | trim + '<end_of_turn>\\n' }}{% endif %}"
)
_GEMMA_TOKENS = ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
GEMMA_2 = Chat(  # no system role
    template=_turns(_GEMMA_TURN.replace("FIRST", ""), "<start_of_turn>model\\n", bos="<bos>", first=_NO_SYSTEM),
    special=_GEMMA_TOKENS,
    bos="<bos>",
    tools_in="user",
    spells="pieces",
)
GEMMA_3 = Chat(  # the system message begins the first user turn
    template=_turns(
        _GEMMA_TURN.replace(
            "FIRST", "{% if loop.index0 == 1 and messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}"
        ),
        "<start_of_turn>model\\n",
        bos="<bos>",
    ),
    special=_GEMMA_TOKENS,
    bos="<bos>",
    tools_in="system",
    spells="pieces",
)
PHI_3 = Chat(
    template=_turns(_PHI_TURN.replace("GAP", "'\\n'"), "<|assistant|>\\n"),
    special=("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
    tools_in="system",
    spells="pieces",
    prepends=True,
)
PHI_4_MINI = Chat(
    template=_turns(_PHI_TURN.replace(" + GAP", ""), "<|assistant|>"),
    special=("<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|/tool|>"),
    tools_in="system",
)
PHI_4 = Chat(
    template=_turns(
        "{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}", "<|im_start|>assistant<|im_sep|>"
    ),
    special=("<|im_end|>", "<|im_start|>", "<|im_sep|>"),
    tools_in="system",
)
OLMO_2 = Chat(  # roles are plain text; only the end of a turn is a token
    template=_turns(
        "{{ '<|' + m.role + '|>\\n' + m.content + ('<|endoftext|>' if m.role == 'assistant' else '') + '\\n' }}",
        "<|assistant|>\\n",
        bos="<|endoftext|>",
    ),
    special=("<|endoftext|>",),
    tools_in="system",
)
OLMO_3 = Chat(
    template=_turns(
        "{% set role = 'environment' if m.role == 'tool' else m.role %}"
        "{% if m.role != 'system' %}{{ '<|im_start|>' + role + '\\n' + (m.content or '') + '<|im_end|>\\n' }}{% endif %}",
        _QWEN_BEGIN,
        first="{{ '<|im_start|>system\\n' + (" + _SYSTEM + ") }}"
        "{% if tools %}{{ '<functions>' + (tools | tojson) + '</functions>' }}{% endif %}{{ '<|im_end|>\\n' }}",
    ),
    special=("<|im_end|>", "<|im_start|>", "<functions>", "</functions>"),
)
GRANITE = Chat(
    template=_turns(
        "{% if m.role != 'system' %}{% set role = 'tool_response' if m.role == 'tool' else m.role %}"
        "{{ '<|start_of_role|>' + role + '<|end_of_role|>' + (m.content or '') + '<|end_of_text|>\\n' }}{% endif %}",
        "<|start_of_role|>assistant<|end_of_role|>",
        first="{{ '<|start_of_role|>system<|end_of_role|>' + (" + _SYSTEM + ") + '<|end_of_text|>\\n' }}"
        "{% if tools %}{{ '<|start_of_role|>tools<|end_of_role|>' + (tools | tojson(indent=4)) }}"
        "{{ '<|end_of_text|>\\n' }}{% endif %}",
    ),
    special=("<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>"),
)
SMOLLM_3 = Chat(  # a head of its own before the system message; tools come under another name than `tools`
    template=_turns(
        _CHATML.replace("m.role +", "('user' if m.role == 'tool' else m.role) +").replace(
            "{{", "{% if m.role != 'system' %}{{", 1
        )
        + "{% endif %}",
        _QWEN_BEGIN + "<think>\\n\\n</think>\\n",
        first="{{ '<|im_start|>system\\n## Metadata\\n\\nReasoning Mode: /no_think\\n\\n## Custom Instructions\\n\\n' + ("
        + _SYSTEM
        + ") + '<|im_end|>\\n' }}",
    ),
    special=("<|im_end|>", "<|im_start|>", "<think>", "</think>"),
    tools_in="system",
    kwargs='{"enable_thinking": false}',
)
COHERE = Chat(
    template=_turns(
        "{% set role = {'system': 'SYSTEM', 'user': 'USER', 'assistant': 'CHATBOT'}[m.role] %}"
        "{{ '<|START_OF_TURN_TOKEN|><|' + role + '_TOKEN|>' + (m.content | trim) + '<|END_OF_TURN_TOKEN|>' }}",
        "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
        bos="<BOS_TOKEN>",
    ),
    special=(
        *("<|END_OF_TURN_TOKEN|>", "<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>"),
        *("<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    ),
    bos="<BOS_TOKEN>",
    tools_in="system",
)
GLM_4 = Chat(  # a turn ends where the next one begins
    template=_turns("{{ '<|' + m.role + '|>\\n' + (m.content or '') }}", "<|assistant|>", bos="[gMASK]<sop>"),
    special=("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    tools_in="",
)
HARMONY = Chat(  # the sampled turn names its channel itself
    template=_turns(
        "{% if m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' + (m.content or '') + '<|end|>' }}"
        "{% elif m.role != 'system' %}{{ '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{% endif %}",
        "<|start|>assistant",
        first="{{ '<|start|>system<|message|>You are a model.<|end|>' }}{% if messages[0].role == 'system' %}"
        "{{ '<|start|>developer<|message|># Instructions\\n\\n' + messages[0].content + '<|end|>' }}{% endif %}",
    ),
    special=("<|return|>", "<|start|>", "<|message|>", "<|end|>", "<|channel|>", "<|call|>"),
    tools_in="system",
)
