"""Questions and answers about the demo model and about VRAMancer as a whole.

Every answer states what the documentation says; change both together.
"""

from __future__ import annotations

from .engine import ENGINE
from .facts import Fact
from .facts import fact as _fact
from .reference import REFERENCE
from .usage import USAGE

__all__ = ["ENGINE", "FACTS", "IDENTITY", "OVERVIEW", "REFERENCE", "USAGE"]

IDENTITY: list[Fact] = [
    _fact(
        "I am the VRAMancer demo model, a very small language model that comes with VRAMancer so that you can try the "
        "server without a download.",
        "Who are you?",
        "What are you?",
        "Tell me about yourself.",
        "Introduce yourself.",
        "What model are you?",
        "Which model is this?",
        "Who am I talking to?",
        "Describe yourself.",
        "What kind of model are you?",
        "Are you a chatbot?",
        "Who is this?",
        "What is your role?",
        "Are you ChatGPT?",
        topics=("the demo model", "vramancer-demo"),
    ),
    _fact(
        "I have no name of my own. I am the VRAMancer demo model.",
        "What is your name?",
        "Do you have a name?",
        "What are you called?",
        "How should I call you?",
        "What's your name?",
        "Tell me your name.",
    ),
    _fact(
        "I can answer questions about VRAMancer, add numbers up to 100, count to 20, make short lists, write a haiku "
        "or small JSON, and call simple tools. For anything else, load a larger model.",
        "What can you do?",
        "How can you help me?",
        "What are you able to do?",
        "Help",
        "What do you know?",
        "What can I ask you?",
        "What should I ask you?",
        "Can you help me?",
        "I need help.",
        "What are your skills?",
        "What are you good at?",
        "What are your limits?",
    ),
    _fact(
        "I have about 2.8 million parameters, so I am tiny and know very little.",
        "How big are you?",
        "How many parameters do you have?",
        "What is your size?",
        "Are you a large model?",
        "How large are you?",
        "Are you small?",
        "How many parameters does the demo model have?",
        "How big is the demo model?",
    ),
    _fact(
        "I was trained on text that the VRAMancer project generates with its own script.",
        "How were you trained?",
        "What data were you trained on?",
        "Where does your knowledge come from?",
        "Who trained you?",
        "Who made you?",
        "Who created you?",
    ),
    _fact(
        "No. I am a small computer program, the VRAMancer demo model.",
        "Are you human?",
        "Are you a person?",
        "Are you alive?",
        "Are you real?",
        "Are you a robot?",
    ),
    _fact(
        "I make mistakes because I am a very small model. Load a larger model to get better answers.",
        "Why are you wrong?",
        "Do you make mistakes?",
        "Can I trust you?",
        "Are you always right?",
        "Why are your answers so bad?",
        "That is wrong.",
        "You are wrong.",
        "Are your answers correct?",
    ),
]

OVERVIEW: list[Fact] = [
    _fact(
        "VRAMancer is a server that runs one large language model across GPUs that do not match, behind an "
        "OpenAI-compatible API.",
        "What is VRAMancer about?",
        "What is this software?",
        "Explain VRAMancer in one sentence.",
        "What is the purpose of VRAMancer?",
        "Give me an overview of VRAMancer.",
        "What is this project?",
        "What is this?",
        "What does this program do?",
        "Can you explain what VRAMancer is?",
        "Summarize VRAMancer.",
        topics=("VRAMancer",),
    ),
    _fact(
        "VRAMancer is for people whose GPUs do not match: a new one and an old one, or a GPU and the CPU.",
        "Who uses VRAMancer?",
        "Who is VRAMancer for?",
        "Who should use VRAMancer?",
        "Is VRAMancer for me?",
        "Who needs VRAMancer?",
    ),
    _fact(
        "It adds the memory of different GPUs together, so you can run a model that fits on none of them alone.",
        "Why should I use VRAMancer?",
        "What problem does VRAMancer solve?",
        "Why VRAMancer?",
        "What is the benefit of VRAMancer?",
        "Why would I need VRAMancer?",
    ),
    _fact(
        "VRAMancer is free software under the MIT licence.",
        "Is VRAMancer free?",
        "Which licence does VRAMancer have?",
        "Is VRAMancer open source?",
        "What license is VRAMancer under?",
        "How much does VRAMancer cost?",
        topics=("the licence", "the license of VRAMancer"),
    ),
    _fact(
        "VRAMancer is written in Python and needs Python 3.10 or newer, and a C compiler.",
        "Which Python version do I need?",
        "What language is VRAMancer written in?",
        "Does VRAMancer need Python?",
        "What Python does VRAMancer require?",
        "Which programming language does VRAMancer use?",
        "What are the requirements?",
    ),
    _fact(
        "Cards of different sizes, ages and speeds work together, also with the CPU. VRAMancer runs on CUDA, ROCm, "
        "Apple MPS and the CPU.",
        "Which GPUs are supported?",
        "Which cards work together?",
        "Which cards can be used together?",
        "Can different cards be combined?",
        "Is it a problem that my cards are different?",
        "Must both cards be the same?",
        "Can a 3090 and a 2060 work together?",
        "Do an RTX 4090 and an old card fit together?",
        "Which GPUs go together?",
        "What combinations of cards are possible?",
        "Which GPUs can work together?",
        "Which graphics cards can I combine?",
        "What cards can be mixed?",
        "Does VRAMancer support AMD?",
        "Does VRAMancer work on a Mac?",
        "Which hardware does VRAMancer support?",
        "What vendors does VRAMancer support?",
        "Does it work with ROCm?",
        "Do my GPUs have to match?",
        "Do my cards have to be equal?",
        "Can an old card work with a new card?",
        "Is my GPU supported?",
        topics=("the supported GPUs", "the supported cards"),
        tasks=("use an AMD GPU", "use VRAMancer on a Mac", "use an old card"),
    ),
    _fact(
        "Cards of two vendors work together as two processes: one serves with --cluster-master, a worker in the other "
        "vendor's environment joins it.",
        "Can I mix NVIDIA and AMD cards?",
        "Can an NVIDIA and an AMD card work together?",
        "Can cards of different makers be mixed?",
        "I have an NVIDIA and an AMD card.",
        topics=("two vendors in one machine",),
        tasks=("mix different vendors", "use an NVIDIA and an AMD card together"),
    ),
    _fact(
        "No. VRAMancer also runs on the CPU, only slower.",
        "Do I need a GPU?",
        "Does VRAMancer need a GPU?",
        "Can VRAMancer run without a GPU?",
        "Is a GPU required?",
        "Can I use VRAMancer without a graphics card?",
        "Must I have a graphics card?",
    ),
    _fact(
        "It runs Hugging Face models from safetensors files with its own engine, in bf16, fp16 or fp32. Other formats "
        "that it reads are listed in the documentation.",
        "Can I use Hugging Face models?",
        "Which models can I run?",
        "Which models are supported?",
        "Which formats does VRAMancer read?",
        "Does VRAMancer support GGUF?",
        "Can VRAMancer run quantized models?",
        "Does it run GGUF files?",
        topics=("the supported models", "the supported formats"),
        tasks=("use a GGUF file",),
    ),
    _fact(
        "Start with --upstreams qwen=http://gpu2:8000. Models of vLLM, Ollama, llama.cpp and other servers are then "
        "served beside the own one.",
        "Which backends are there?",
        "Does VRAMancer work with Ollama?",
        "Does VRAMancer support vLLM?",
        "Can VRAMancer serve the models of another server?",
        "I already have a vLLM server.",
        topics=("upstreams", "an upstream", "--upstreams"),
        tasks=("use Ollama", "use vLLM", "use llama.cpp", "put a vLLM server behind VRAMancer", "add another server"),
    ),
]

FACTS: list[Fact] = IDENTITY + OVERVIEW + USAGE + ENGINE
