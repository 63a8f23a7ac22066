"""Ollama's Modelfile: the GGUF file, the template of a conversation and where an answer ends."""

from tinier.checkpoint import Checkpoint
from tinier.tokenizer import load_tokenizer

# conversations in Go's templates, which Ollama has in place of Jinja, by a word of the Jinja one
_TEMPLATES = {
    "<|im_start|>": """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}<|im_end|>
{{ end }}<|im_start|>assistant
""",
    "<|start_header_id|>": """{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>

""",
    "<start_of_turn>": """{{- range .Messages }}<start_of_turn>
{{- if eq .Role "assistant" }}model{{ else }}user{{ end }}
{{ .Content }}<end_of_turn>
{{ end }}<start_of_turn>model
""",
}
_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")


def modelfile(source: Checkpoint) -> str:
    """For `ollama create NAME -f Modelfile` in the folder."""
    tokenizer = load_tokenizer(source)
    lines = ["FROM ./model.gguf"]
    jinja = str(tokenizer.inner.chat_template or "")
    template = next((text for word, text in _TEMPLATES.items() if word in jinja), None)
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    stops = [text for text in tokenizer.special_ids if text in _ENDS]
    lines += [f'PARAMETER stop "{text}"' for text in stops]
    return "\n".join(lines) + "\n"
