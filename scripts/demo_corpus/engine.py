"""Questions and answers about how VRAMancer works: memory, placement, serving, and the words one needs for that."""

from __future__ import annotations

from .facts import Fact
from .facts import fact as _fact

_MEMORY: list[Fact] = [
    _fact(
        "With lending, a device that has no room for KV blocks borrows memory from another device and gives it back "
        "later. Attention over borrowed blocks is computed where they are.",
        "Why does VRAMancer lend memory?",
        "What does it mean that a card lends memory?",
        "How do cards share their memory?",
        "Which card borrows from which?",
        "Do GPUs help each other with memory?",
        "What if one card is full and the other is not?",
        "Who lends memory to whom?",
        "Can one card use the memory of another?",
        "Why should one GPU borrow from another?",
        "Can a GPU borrow memory?",
        "What happens when a GPU runs out of memory?",
        "What does a card do that has no room for KV?",
        topics=("lending", "VRAM lending", "memory lending", "lent memory", "borrowed memory"),
        tasks=("borrow memory from another GPU", "lend VRAM"),
    ),
    _fact(
        "A GPU lends at most 70 percent of its memory. VRM_LEND_RATIO sets this.",
        "How much VRAM can a GPU lend?",
        "How much memory may be lent?",
        "How much memory does a card lend?",
        topics=("the lending limit", "the lend ratio"),
        tasks=("change how much is lent",),
    ),
    _fact(
        "A lender takes its memory back once it uses 80 percent of it itself. VRM_RECLAIM_THRESHOLD sets this.",
        "When does a lender reclaim memory?",
        "When is lent memory taken back?",
        "When does a GPU take its memory back?",
        topics=("the reclaim threshold", "reclaiming"),
    ),
    _fact(
        "Lenders are scored by free memory with 40 percent, link speed with 30 percent and idle time with 30 percent.",
        "How is a lender chosen?",
        "How are lenders scored?",
        "Which GPU lends its memory?",
    ),
    _fact(
        "Start with --no-lending or set VRM_LENDING_ENABLED=0. Lending is on by default.",
        "Is lending on by default?",
        tasks=("turn off lending", "switch lending off", "disable lending"),
    ),
    _fact(
        "There are six memory tiers: L1 own memory, L2 lent memory, L3 main memory, L4 another "
        "machine's memory, L5 a local disk, L6 remote storage.",
        "How many memory tiers are there?",
        "What are the names of the six tiers?",
        "Can you list the six tiers?",
        "What kinds of memory does VRAMancer use?",
        "In which places can KV be?",
        "Where does KV go when the GPU is full?",
        "Tell me L1 to L6.",
        "What do L1, L2, L3, L4, L5 and L6 mean?",
        "List all tiers from L1 to L6.",
        "List the memory tiers.",
        "Name the six memory tiers.",
        "Where do KV blocks live?",
        "What tiers are there?",
        "What are the tiers called?",
        "Which tiers of memory exist?",
        topics=("the memory tiers", "the six memory tiers", "the six tiers", "the memory hierarchy", "the tiers"),
    ),
    _fact("L1 is the device's own memory.", topics=("L1", "tier L1", "the first tier")),
    _fact("L2 is memory that other devices lend.", topics=("L2", "tier L2", "the second tier")),
    _fact("L3 is main memory, pinned for GPUs.", topics=("L3", "tier L3", "the third tier")),
    _fact(
        "L4 is the main memory of another machine. A worker offers it with --cluster-memory-bytes.",
        topics=("L4", "tier L4", "the fourth tier", "--cluster-memory-bytes"),
        tasks=("keep KV in the memory of another machine",),
    ),
    _fact("L5 is a directory on a local disk.", topics=("L5", "tier L5", "the fifth tier")),
    _fact("L6 is remote storage.", topics=("L6", "tier L6", "the sixth tier")),
    _fact(
        "Set --disk-path to a directory. Blocks of KV then go there and are found again after a restart.",
        "Does the cache survive a restart?",
        topics=("the disk tier", "--disk-path"),
        tasks=("keep KV on disk", "use a disk for the cache", "turn on the disk tier"),
    ),
    _fact(
        "The prefix cache keeps the KV of prompts, so that a beginning that was seen before is not computed again. It "
        "is on by default.",
        "How are repeated prompts made faster?",
        "What is the prefix cache for?",
        "What does a prefix cache save?",
        "What is a prefix?",
        "Why is the cache for prefixes useful?",
        "Is the same system prompt computed each time?",
        "Are beginnings of prompts kept?",
        "What is cached of a prompt?",
        "Why is the second request faster?",
        "What happens to prompts that begin alike?",
        "Is the beginning of a prompt computed twice?",
        topics=("the prefix cache", "prefix caching", "prefix cache", "prefix reuse"),
        tasks=("reuse the beginning of a prompt", "make repeated prompts faster"),
    ),
    _fact(
        "A paged KV cache keeps keys and values in small blocks of 16 tokens, so that memory is shared and little is "
        "wasted.",
        "How big is a block of KV?",
        topics=("a paged KV cache", "the KV cache", "the paged KV cache", "paged attention", "KV"),
    ),
    _fact(
        "Layers for which there is no room stay in main memory and are copied in for every step. That is slower; "
        "nothing has to be switched on.",
        "What if the model is too large?",
        "What happens if a model does not fit?",
        "My model is too big for my GPU.",
        topics=("weight streaming", "layer streaming", "streamed layers"),
        tasks=(
            "run a model that is larger than my GPU",
            "run a model that does not fit",
            "stream layers from main memory",
        ),
    ),
]

_SERVING: list[Fact] = [
    _fact(
        "With overlap all devices work at the same time, on different requests or on different pieces of a long "
        "prompt. --cohorts says how many steps are in flight.",
        "How do several GPUs work together?",
        "How are all GPUs kept busy?",
        "What does overlap bring?",
        "Why does overlap make it faster?",
        "How are steps overlapped?",
        "Are the cards busy at the same time?",
        "Does one card wait while the other computes?",
        "How can two cards work at the same time?",
        "What is meant by steps in flight?",
        "Do the GPUs work at the same time?",
        "Do cards wait for each other?",
        topics=("overlap", "pipeline parallelism", "overlapping", "--cohorts", "overlap of stages"),
    ),
    _fact(
        "VRAMancer splits a model by measured speed: profiled is the default. vram splits by memory, balanced evenly, "
        "and --layers 20,12 by hand.",
        "How are layers placed?",
        "How does VRAMancer split a model?",
        "What placement strategies are there?",
        "How are layers split across GPUs?",
        "Which strategies can split a model?",
        "Who decides which card gets which layers?",
        topics=("placement", "profiled placement", "the split", "--placement", "--layers"),
        tasks=("split a model by hand", "choose the split", "choose which layers go where"),
    ),
    _fact(
        "Continuous batching lets requests join and leave the batch at every step.",
        "How does VRAMancer serve many requests?",
        "Can it serve many users?",
        topics=("continuous batching", "batching", "the batch"),
    ),
    _fact(
        "When the queue is full, the answer is 429 with Retry-After.",
        "What happens when the queue is full?",
        "Why do I get a 429?",
        topics=("error 429",),
    ),
    _fact(
        "POST /api/pipeline/place moves the running model to other devices while its requests go on.",
        "Can a running model move?",
        topics=("/api/pipeline/place",),
        tasks=("move a running model", "move the model to another GPU"),
    ),
    _fact(
        "If a device no longer answers, the model moves to the others and the requests go on.",
        "What happens if a GPU fails?",
        "What if a card dies?",
        "Is my request lost when a GPU fails?",
    ),
    _fact(
        "Yes. Weights are read as data: pickled weights and code from model repositories are refused.",
        "Is it safe to load a model?",
        "Does VRAMancer run code from a model?",
        "Can I load pickled weights?",
        topics=("safetensors",),
    ),
    _fact(
        "Send tools in a chat request. The answer then has tool_calls; tool_choice says whether it must.",
        "Does VRAMancer support tools?",
        "Does it support function calling?",
        topics=("tool calling", "function calling", "tool_choice"),
        tasks=("use tools", "call functions"),
    ),
    _fact(
        "Set response_format to json_object or to a json_schema. The answer then always keeps to it.",
        "Can I get structured output?",
        "Can the answer keep to a JSON schema?",
        topics=("structured output", "response_format"),
        tasks=("get JSON output from the API", "force JSON", "use a JSON schema"),
    ),
    _fact(
        "What a model thinks before it answers comes as reasoning_content, apart from the answer.",
        "Does VRAMancer support reasoning models?",
        topics=("reasoning_content", "reasoning"),
        tasks=("see what the model thinks",),
    ),
    _fact(
        "POST /v1/embeddings turns texts into vectors. --embedding-model names a model for it; a tiny one is bundled.",
        "Does VRAMancer support embeddings?",
        topics=("embeddings", "--embedding-model"),
        tasks=("get embeddings", "use an embedding model", "turn text into vectors"),
    ),
    _fact(
        "POST /v1/rerank orders documents by how well they answer a query. --reranker-model names a model for it.",
        "Does VRAMancer support reranking?",
        topics=("reranking", "a reranker", "--reranker-model"),
        tasks=("rerank documents", "sort documents by a query"),
    ),
    _fact(
        "Entries of --upstreams with the same name are replicas. Requests go where the answer is expected first.",
        "Can several servers share the load?",
        topics=("replicas", "a replica", "a fleet"),
        tasks=("use replicas", "share the load between servers"),
    ),
]

_CLUSTER: list[Fact] = [
    _fact(
        "VTP is VRAMancer's transport for tensors between machines. A cluster's master and its workers use it.",
        "How do machines exchange tensors?",
        "What is VTP for?",
        "Is there VTP?",
        "Which protocol connects machines?",
        "How do tensors travel between machines?",
        "Does this version have VTP?",
        "I read about VTP in the documentation.",
        "Is VTP ready?",
        "Can I use VTP?",
        "What does VTP stand for?",
        "Does VRAMancer use VTP?",
        topics=("VTP", "the VTP transport", "the VTP protocol"),
        tasks=("turn on VTP", "use VTP"),
    ),
    _fact(
        "Start vramancer serve --cluster-master on one machine. It prints what to type on the other one.",
        "Does VRAMancer support clusters?",
        "Can I use more than one computer?",
        "I have two computers.",
        "Can a model run on two machines?",
        "Does it work over the network with several computers?",
        "Can two computers share a model?",
        "Can my laptop and my desktop work together?",
        "Is it possible to use GPUs of another computer?",
        "Can I use the GPU of a second computer?",
        "What does --cluster-master do?",
        "Is there a cluster mode?",
        "How many machines can serve one model?",
        "My second PC has a GPU too.",
        topics=("the cluster", "a cluster master", "--cluster-master", "several machines"),
        tasks=(
            "use two machines",
            "add a second machine",
            "connect another computer",
            "start a cluster",
            "make a cluster",
            "split a model over two computers",
            "serve a model from several machines",
        ),
    ),
    _fact(
        "A worker computes layers for a master on another machine. Start one with python -m vramancer.main "
        "--cluster-worker.",
        "What does --cluster-worker do?",
        "How does a worker find its master?",
        topics=("a worker", "--cluster-worker", "a cluster worker"),
        tasks=("start a worker", "join a cluster", "join a master"),
    ),
    _fact(
        "Add --cluster-tls on all machines. It is TLS 1.3; the cluster's token proves both ends.",
        "Is the traffic between machines encrypted?",
        "Is a cluster safe?",
        topics=("--cluster-tls", "TLS", "encryption"),
        tasks=("encrypt a cluster", "encrypt the traffic between machines", "use TLS"),
    ),
    _fact(
        "VRM_CLUSTER_MASTER is the master's host and port, for a worker that does not find it by itself.",
        topics=("VRM_CLUSTER_MASTER",),
        tasks=("tell a worker where its master is",),
    ),
    _fact(
        "Streams go on with the same tokens: the layers move to the other machines.",
        "What happens when a machine goes away?",
        "What if a worker dies?",
        "What if I pull the network cable?",
        "Do streams survive the loss of a machine?",
    ),
    _fact(
        "vramancer cluster status shows the machines and what each of them holds.",
        "Which machines are in my cluster?",
        topics=("vramancer cluster", "vramancer cluster status"),
        tasks=("see my machines", "list the machines of the cluster"),
    ),
    _fact(
        "Set VRM_TRACING=1. Traces of requests then go to an OpenTelemetry collector.",
        "Does VRAMancer support OpenTelemetry?",
        topics=("VRM_TRACING", "tracing"),
    ),
]

_WORDS: list[Fact] = [
    _fact("VRAM is the memory of a graphics card.", topics=("VRAM",)),
    _fact(
        "A GPU is a chip that does many calculations at the same time. Language models run fast on it.",
        topics=("a GPU", "a graphics card"),
    ),
    _fact("A token is a small piece of text, such as a word or a part of a word.", topics=("a token", "tokens")),
    _fact(
        "A language model is a program that predicts the next piece of a text.",
        topics=("a language model", "an LLM", "a large language model"),
    ),
]

ENGINE: list[Fact] = _MEMORY + _SERVING + _CLUSTER + _WORDS
