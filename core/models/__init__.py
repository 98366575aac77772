"""From a model name to stages on devices: finding files, reading safetensors, tokenizer and chat template."""
