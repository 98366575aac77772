"""Questions that are never in the training text, and what share of them a model answers correctly."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from . import dialogs, numbers, tables

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

UNKNOWN = dialogs.UNKNOWN

PARAPHRASES: list[tuple[str, str]] = [
    ("hey hello", "help you"),
    ("Good morning to you!", "Good morning"),
    ("Hi, how are you doing today?", "fine"),
    ("Could you tell me who you are?", "demo model"),
    ("So who exactly are you?", "demo model"),
    ("Please introduce yourself briefly.", "demo model"),
    ("What exactly is VRAMancer?", "OpenAI-compatible API"),
    ("Give me a short description of VRAMancer.", "OpenAI-compatible API"),
    ("In one sentence, what is VRAMancer?", "OpenAI-compatible API"),
    ("What command do I use to start the server?", "vramancer.main --api"),
    ("How can I start the API server?", "vramancer.main --api"),
    ("I want to start the server. What do I type?", "vramancer.main --api"),
    ("Which port is used by the API?", "5000"),
    ("What is the server's port?", "5000"),
    ("Tell me the default port of the API.", "5000"),
    ("Could you explain VRAM lending?", "borrow idle VRAM"),
    ("What do you mean by VRAM lending?", "borrow idle VRAM"),
    ("Describe the memory tiers.", "six memory tiers"),
    ("How many tiers of memory does VRAMancer have?", "six memory tiers"),
    ("Is it possible to combine different GPUs?", "40 GB"),
    ("How do I add another machine as a worker?", "--cluster-worker"),
    ("What is the variable VRM_LEND_RATIO?", "0.70"),
    ("What is the default value of VRM_API_PORT?", "5000"),
    ("Where do I find Grafana?", "3000"),
    ("How can I see the metrics?", "/metrics"),
    ("Which licence is it under?", "MIT"),
    ("Does it run on AMD GPUs?", "ROCm"),
    ("How does paging of the KV cache work?", "pages"),
    ("Could you list three fruits?", "Apple, banana and orange"),
    ("Please name five colours.", "Red, blue, green, yellow and black"),
    ("I would like a list of four animals.", "Dog, cat, horse and cow"),
    ("What city is the capital of France?", "Paris"),
    ("The capital of Japan is?", "Tokyo"),
    ("Which is the capital of Italy?", "Rome"),
    ("What's the opposite of hot?", "cold"),
    ("Grass has what colour?", "green"),
    ("Tell me what a dog is.", "animal with four legs"),
    ("Please tell me a very short story.", "Once upon a time"),
    ("I'd like a story about a dragon.", "dragon named"),
    ("Could you count from 1 to 10?", "1, 2, 3, 4, 5, 6, 7, 8, 9, 10"),
    ("Please count from 4 to 8 for me", "4, 5, 6, 7, 8"),
    ("Say hello using one word", "Hello."),
    ("Name all the days of the week.", "Monday, Tuesday"),
    ("thank you so much", "welcome"),
]

BEYOND: list[str] = [
    "Who won the Oscar for best actor in 1994?",
    "Explain string theory.",
    "Write a Haskell function that adds two lists.",
    "What is the capital of Bhutan?",
    "How do I bake sourdough?",
    "Who was Leonardo da Vinci?",
    "Translate 'house' to Turkish.",
    "What is the boiling point of lead?",
    "Summarize the plot of Moby Dick.",
    "How does a microwave work?",
    "What are the symptoms of the flu?",
    "Tell me about the Aztecs.",
    "What should I wear to a wedding?",
    "Which team won the league last year?",
    "Write a cover letter for a job.",
    "What is a zeppelin?",
    "How do I fix a flat tyre?",
    "What is the difference between a virus and a bacterium?",
    "Who is the mayor of Chicago?",
    "Why do cats purr?",
]


def answerer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, **options: object) -> Callable[[str], str]:
    """A function from a question to the model's answer."""

    def answer(question: str) -> str:
        batch = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        tokens = model.generate(**batch.to(model.device), max_new_tokens=100, **options)
        return tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    return answer


def _sums() -> dict[str, list[tuple[str, str]]]:
    """Arithmetic by group: the tables that training shows in full, and larger pairs that it never shows."""
    grid = [(a, b) for a in range(51) for b in range(51)]
    return {
        "addition to 10": [(f"What is {a} + {b}?", str(a + b)) for a in range(11) for b in range(11)][::3],
        "subtraction to 10": [(f"What is {a} - {b}?", str(a - b)) for a in range(11) for b in range(a + 1)][::3],
        "multiplication to 10": [(f"What is {a} times {b}?", str(a * b)) for a in range(1, 11) for b in range(1, 11)][
            ::3
        ],
        "addition, never shown": [(f"What is {a} + {b}?", str(a + b)) for a, b in grid if numbers.held_out(a, b, "+")][
            ::5
        ],
        "subtraction, never shown": [
            (f"What is {a} - {b}?", str(a - b)) for a, b in grid if b <= a and numbers.held_out(a, b, "-")
        ][::5],
    }


def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """The share of right greedy answers in each group; wrong ones are printed."""
    answer = answerer(model.eval(), tokenizer, do_sample=False, temperature=None, top_p=None)
    groups = {
        "paraphrases, never shown": PARAPHRASES,
        "questions to decline": [(q, UNKNOWN) for q in BEYOND],
        "capitals": [(f"What is the capital of {c}?", city) for c, city in tables.CAPITALS.items()],
    }
    scores = {}
    for name, pairs in (groups | _sums()).items():
        right = 0
        for question, wanted in pairs:
            got = answer(question)
            good = f"= {wanted}." in got if wanted.isdigit() and " = " in got else wanted in got
            right += good
            if not good:
                print(f"  wrong: {question!r} -> {got!r}", flush=True)
        scores[name] = right / len(pairs)
        print(f"{name}: {right} of {len(pairs)}", flush=True)
    return scores
