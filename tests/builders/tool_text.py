"""Checkpoint folders whose chat templates know tools and reasoning, in the published format of a family."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer

from tests.builders.tiny_text import byte_level_json, write_tiny_model

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": "Of a city.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
    for name in ("get_weather", "now")
]
MARKS = ["<|python_tag|>", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]", "<|other|>"]
"""Special tokens, ids 400 and up."""
VOCAB_SIZE = 400 + len(MARKS)

QWEN3 = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n<tools>' }}"
    "{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}"
    '{{- \'\\n</tools>\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>'
    "<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.reasoning_content is string %}"
    "{{- '<think>\\n' + message.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}"
    "{{- message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    '{{- \'<tool_call>\\n{"name": "\' + call.function.name + \'", "arguments": \' }}'
    "{%- if call.function.arguments is string %}{{- call.function.arguments }}"
    "{%- else %}{{- call.function.arguments | tojson }}{%- endif %}{{- '}\\n</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
LLAMA3 = (
    "{{- bos_token }}{%- if not tools is defined %}{%- set tools = none %}{%- endif %}"
    '{%- if tools is not none %}{{- \'Respond in the format {"name": function name, '
    '"parameters": dictionary of argument name and its value}.\' }}'
    "{%- for t in tools %}{{- t | tojson(indent=4) }}{%- endfor %}{%- endif %}"
    "{%- for message in messages %}{{- message.role + ': ' + message.content }}"
    "{%- for call in message.tool_calls or [] %}{{- '<|python_tag|>' + call.function.arguments }}{%- endfor %}"
    "{%- endfor %}{{- 'assistant: ' }}"
)
MISTRAL = (
    "{{- bos_token }}{%- if tools %}{{- '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}{%- endif %}"
    "{%- for message in messages %}{%- if message.tool_calls %}"
    "{{- '[TOOL_CALLS] ' + (message.tool_calls | map(attribute='function') | list | tojson) + eos_token }}"
    "{%- else %}{{- '[INST]' + message.content + '[/INST]' }}{%- endif %}{%- endfor %}"
)
R1 = (
    "{{- bos_token }}{%- for message in messages %}"
    "{{- '<\uff5c' + message.role + '\uff5c>' + message.content.split('</think>')[-1] }}"
    "{%- endfor %}{{- '<\uff5cAssistant\uff5c><think>\\n' }}"
)


def write_tool_model(folder: Path, template: str) -> Path:
    """A tiny model with this template and special tokens for marks."""
    write_tiny_model(folder)
    backend = Tokenizer.from_str(byte_level_json())
    backend.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in MARKS])
    backend.save(str(folder / "tokenizer.json"))
    config = json.loads((folder / "tokenizer_config.json").read_text()) | {"chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    config = json.loads((folder / "config.json").read_text()) | {"vocab_size": VOCAB_SIZE}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
