"""The demo model before it has learnt anything, its tokenizer, and how both are written."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import demo_corpus as corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 2048
CONTEXT = 2048
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}{{ '<|system|>' }}"
    "{% if messages[0]['role'] in ['system', 'developer'] %}"
    "{{ (messages[0]['content'] or '') | trim + '\n' }}{% endif %}"
    "{{ 'Tools:' }}{% for tool in tools %}{% set f = tool['function'] or tool %}{% set p = f['parameters'] or {} %}"
    "{{ '\n' + f['name'] + '(' }}{% for name, of in (p['properties'] or {}).items() %}"
    "{{ name }}{% if name not in (p['required'] or []) %}{{ '?' }}{% endif %}"
    "{% if of['type'] is string %}{{ ': ' + of['type'] }}{% endif %}{% if not loop.last %}{{ ', ' }}{% endif %}"
    "{% endfor %}{{ ')' }}{% if f['description'] %}{{ ': ' + f['description'] }}{% endif %}"
    "{% endfor %}{{ '<|end|>' }}{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] in ['system', 'developer'] %}{% if not (tools and loop.first) %}"
    "{{ '<|system|>' + (message['content'] or '') | trim + '<|end|>' }}{% endif %}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' + (message['content'] or '') | trim }}"
    "{% for call in message['tool_calls'] or [] %}{% set f = call['function'] or call %}"
    "{% if message['content'] or not loop.first %}{{ '\n' }}{% endif %}"
    "{{ '<tool_call>\n{\"name\": \"' + f['name'] + '\", \"arguments\": ' }}"
    "{{ f['arguments'] if f['arguments'] is string else f['arguments'] | tojson }}{{ '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|end|>' }}"
    "{% elif message['role'] == 'tool' %}"
    "{{ '<|user|><tool_response>\n' + (message['content'] or '') | trim + '\n</tool_response><|end|>' }}"
    "{% else %}{{ '<|user|>' + (message['content'] or '') | trim + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
"""A tool is a line, `name(parameter: type, optional?: type): description`; a small model reads that before schemas.
Calls and results are written as Hermes and Qwen write them. `demo_corpus.calling` writes the same."""


def build_tokenizer(seed: int, documents: int = 20_000) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: any text survives it. Digits and spaces are tokens of their own, so that a word is
    the same tokens behind a space, a quotation mark and a bracket: it is copied more easily into a call."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Split(" ", "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=corpus.SPECIAL_TOKENS,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = ("".join(text for text, _ in segments) for segments in islice(corpus.documents(seed), documents))
    marks = str.maketrans({"<": "\n", ">": "\n", "|": "\n"})
    tokenizer.train_from_iterator((text.translate(marks) for text in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{corpus.BOS} $A", special_tokens=[(corpus.BOS, tokenizer.token_to_id(corpus.BOS))]
    )
    return wrap(tokenizer)


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer with the chat format and the names of the special tokens."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=corpus.BOS,
        eos_token=corpus.END,
        pad_token=corpus.PAD,
        additional_special_tokens=[corpus.SYSTEM, corpus.USER, corpus.ASSISTANT],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )
    wrapped.chat_template = CHAT_TEMPLATE
    return wrapped


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """The untrained model: Llama-shaped, six layers, grouped-query attention, tied embeddings."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config._attn_implementation = "sdpa"
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=True,
        temperature=0.3,
        top_p=0.9,
        max_new_tokens=256,
    )
    return model


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint, under names that older releases of transformers read as well."""
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    settings = out / "tokenizer_config.json"
    text = settings.read_text(encoding="utf-8")
    settings.write_text(text.replace("TokenizersBackend", "PreTrainedTokenizerFast"), encoding="utf-8")
    for file in out.iterdir():
        file.chmod(0o644)
