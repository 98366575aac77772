"""Questions and answers about using VRAMancer: starting, loading, asking, planning, watching."""

from __future__ import annotations

from .facts import Fact
from .facts import fact as _fact

_START: list[Fact] = [
    _fact(
        "Run: python -m vramancer.main --api\nThe server then listens on 127.0.0.1:5000. vramancer serve is the same.",
        "What is the command to start the server?",
        "Start the server.",
        "Which command starts the API server?",
        "How do I get VRAMancer running?",
        tasks=("start the server", "start VRAMancer", "run the server", "launch VRAMancer", "start the API"),
        topics=("vramancer serve", "the serve command"),
    ),
    _fact(
        "Start the server: it uses all GPUs that it finds and splits the model over them. To choose, add --devices "
        "cuda:0=24GiB,cuda:1=16GiB",
        "How does VRAMancer use several GPUs?",
        "I have two GPUs. What do I do?",
        "I have a 24 GB card and a 16 GB card.",
        "What do I do with two graphics cards?",
        "Does VRAMancer use both of my GPUs?",
        "Can I combine a 24 GB and a 16 GB card?",
        topics=("--devices",),
        tasks=(
            "use two GPUs",
            "use both GPUs",
            "use two different cards",
            "combine two GPUs",
            "use several GPUs",
            "use my second GPU",
            "use two graphics cards",
            "split a model over two cards",
            "run a model on two GPUs",
            "choose the devices",
            "use three GPUs",
        ),
    ),
    _fact(
        "Run: vramancer serve --model ./my-model\nA folder with config.json and safetensors files, or a Hugging Face "
        "id. On a running server, POST /api/models/load does it.",
        "Which model can I load?",
        "How can I get better answers?",
        topics=("/api/models/load", "--model"),
        tasks=(
            "load a model",
            "load my own model",
            "load a larger model",
            "load another model",
            "use my own model",
            "use another model",
            "use a bigger model",
            "serve my own model",
            "run my own model",
            "change the model",
            "switch the model",
            "use a model from Hugging Face",
        ),
    ),
    _fact(
        "With no model named, VRAMancer serves the bundled demo model, vramancer-demo.",
        "What happens if I name no model?",
        "Which model is served by default?",
        "Do I have to choose a model?",
        "What model does the server use by default?",
        topics=("the default model",),
    ),
    _fact(
        "The API listens on port 5000. To change it, start the server with --port 8080 or set VRM_API_PORT.",
        "What port does the API use?",
        "Which port does the server use?",
        "On which port does VRAMancer listen?",
        "What port is the server on?",
        "Which port is the API on?",
        "What port?",
        "Port 5000 is taken.",
        topics=("the default port", "the port of the API", "the port", "--port"),
        tasks=(
            "change the port",
            "use another port",
            "set the port",
            "change the API port",
            "listen on another port",
            "start the server on a different port",
            "run the server on port 8080",
        ),
    ),
    _fact(
        "The server listens on 127.0.0.1, so only this machine reaches it. To change that, add --host 0.0.0.0 and set "
        "VRM_API_TOKEN to a token of your own.",
        "What address does the server listen on?",
        "Which host does the API use?",
        "Can other machines reach the server?",
        "Why can I not reach the server from another computer?",
        topics=("the default address", "the default host", "--host"),
        tasks=(
            "change the host",
            "change the address",
            "reach the server from another machine",
            "open the server to my network",
        ),
    ),
    _fact(
        "Press Ctrl-C. Requests under way may finish; a second Ctrl-C ends them.",
        "How do I end the server?",
        tasks=("stop the server", "stop VRAMancer", "shut down the server", "quit the server"),
    ),
    _fact(
        "Settings come from defaults, then config.yaml, then the environment, then flags. The later wins.",
        "Where is the configuration?",
        "In which order are settings read?",
        "Where do settings come from?",
        "Which settings are there?",
        topics=("config.yaml", "the configuration"),
        tasks=("configure VRAMancer", "change a setting", "set an option"),
    ),
    _fact(
        "Run: pip install -c constraints.txt -e .\nIt needs Python 3.10 or newer and a C compiler.",
        "How is VRAMancer installed?",
        tasks=("install VRAMancer", "set up VRAMancer", "get VRAMancer onto my machine"),
    ),
]

_ASKING: list[Fact] = [
    _fact(
        "The token is in ~/.local/state/vramancer/api-token. It is generated at the first start and shown once. Set "
        "VRM_API_TOKEN to use your own.",
        "Where is the token?",
        "Where is the API token stored?",
        "Where do I get a token?",
        "What if I have no token?",
        "I lost my token.",
        "I forgot the token.",
        "Where is my API key?",
        "Is a token required?",
        "Which file holds the token?",
        topics=("the API token", "my token", "VRM_API_TOKEN", "the API key"),
        tasks=("find the token", "find my token", "get the token", "get an API key", "see the token", "set the token"),
    ),
    _fact(
        "Send the token as Authorization: Bearer, or in the header X-API-TOKEN or x-api-key.",
        "Where do I put the API token?",
        "Which header carries the token?",
        "Why do I get a 401?",
        "Why is my request unauthorized?",
        topics=("the token header", "X-API-TOKEN"),
        tasks=("authenticate", "send the token", "pass the token", "log in to the API"),
    ),
    _fact(
        'from openai import OpenAI\nclient = OpenAI(base_url="http://127.0.0.1:5000/v1", api_key="TOKEN")\n'
        'client.chat.completions.create(model="vramancer-demo", messages=[{"role": "user", "content": "Hello"}])',
        "How do I ask in Python?",
        "Is there a Python client?",
        "Show me an example in Python.",
        "Give me a Python example.",
        topics=("the Python client", "the Python API"),
        tasks=(
            "use it from Python",
            "use VRAMancer from Python",
            "call the API from Python",
            "use the OpenAI library",
            "use the OpenAI client",
            "send a request in Python",
            "connect with Python",
        ),
    ),
    _fact(
        'curl http://127.0.0.1:5000/v1/chat/completions -H "Authorization: Bearer TOKEN" -H "Content-Type: '
        'application/json" -d \'{"model": "vramancer-demo", "messages": [{"role": "user", "content": "Hello"}]}\'',
        "How do I ask with curl?",
        "Show me a curl example.",
        "Give me an example with curl.",
        "What is the curl command?",
        "Show me a curl request.",
        tasks=(
            "use curl",
            "use it with curl",
            "call the API with curl",
            "send a request with curl",
            "ask from the shell",
        ),
    ),
    _fact(
        "Use any OpenAI client with the base URL http://127.0.0.1:5000/v1 and your token as the API key.",
        "Is the API compatible with OpenAI?",
        "Which base URL do I use?",
        "Which clients work with VRAMancer?",
        "Does it work with LangChain?",
        topics=("the base URL", "the URL of the API"),
        tasks=("connect an OpenAI client", "connect my app", "connect another program"),
    ),
    _fact(
        'Set "stream": true in the request. The answer then arrives as server-sent events.',
        "Does VRAMancer support streaming?",
        "How does streaming work?",
        "How do I get the answer word by word?",
        tasks=("stream the answer", "turn on streaming", "stream tokens"),
    ),
    _fact(
        'Run: vramancer run\nIt chats in the terminal; /bye leaves. vramancer run "question" asks once.',
        "What does vramancer run do?",
        topics=("the run command", "vramancer run"),
        tasks=(
            "chat in the terminal",
            "chat with the model",
            "talk to the model in the terminal",
            "chat on the command line",
            "ask one question from the shell",
        ),
    ),
    _fact(
        "Type /bye or press Ctrl-D. /exit works too.",
        "How does the chat end?",
        topics=("/bye", "/exit"),
        tasks=("leave the chat", "end the chat", "quit the chat", "exit vramancer run", "close the conversation"),
    ),
    _fact(
        "In the chat there are /help, /set, /system, /model, /save, /clear and /bye.",
        "Which commands does the chat have?",
        "What can I type in the chat?",
        "What are the slash commands?",
        "Which slash commands are there?",
        topics=("the chat commands", "the slash commands", "/help"),
    ),
    _fact("/clear forgets what was said.", topics=("/clear",), tasks=("clear the chat", "start the chat over")),
    _fact(
        "/save FILE writes the conversation as JSON.",
        topics=("/save",),
        tasks=("save the chat", "save the conversation"),
    ),
    _fact(
        "/model NAME answers by another model from now on.", topics=("/model",), tasks=("change the model in the chat",)
    ),
    _fact(
        "/set temperature 0 always takes the likeliest token; /set alone lists what can be set.",
        topics=("/set",),
        tasks=("change the temperature", "set the temperature in the chat"),
    ),
    _fact("/system TEXT changes the system message.", topics=("/system",), tasks=("change the system message",)),
]

_PLANNING: list[Fact] = [
    _fact(
        "Run: vramancer plan ./my-model --gpu 3090 --gpu 5070ti\nIt predicts split and speed for cards by name, before "
        "you buy them. It needs no weights and no GPU.",
        "Will my model fit?",
        "Does my model fit on my cards?",
        "Which card should I buy?",
        "Is a second card worth it?",
        "What does a second GPU bring?",
        "How fast would my model be on a 4090?",
        topics=("vramancer plan", "the plan command", "--gpu"),
        tasks=(
            "plan before buying a card",
            "plan before I buy a GPU",
            "see if a model fits",
            "predict the speed",
            "know if a card is worth it",
            "see where the layers go",
            "try out a card that I do not have",
            "compare cards before buying",
        ),
    ),
    _fact(
        "Run: vramancer doctor\nIt measures the devices and the links between them, and says what limits them and what "
        "is wrong.",
        "Something is broken. What can I run?",
        "Why is it so slow?",
        "Why is my GPU not used?",
        topics=("vramancer doctor", "the doctor command"),
        tasks=("diagnose my machine", "find problems with my setup", "check my devices", "measure my GPUs"),
    ),
    _fact(
        "Run: vramancer bench\nIt measures this machine against other engines, from a checkout of the source.",
        topics=("vramancer bench", "the bench command"),
        tasks=("run a benchmark", "benchmark VRAMancer", "compare it with other engines"),
    ),
]

_WATCHING: list[Fact] = [
    _fact(
        "Metrics for Prometheus are at /metrics, without a token on port 9108. --metrics-port changes the port.",
        "Where are the metrics?",
        "Which port serves the metrics?",
        "Does VRAMancer have metrics?",
        "Does it work with Prometheus?",
        topics=("the metrics", "the metrics port", "/metrics"),
        tasks=(
            "see metrics",
            "see the metrics",
            "get the metrics",
            "use Prometheus",
            "monitor the server",
            "scrape the metrics",
        ),
    ),
    _fact(
        "Run: vramancer status --watch\nIt shows the model, the memory of every device, requests and tiers.",
        "Is there a dashboard?",
        "What does vramancer status do?",
        "What is the server doing?",
        topics=("vramancer status", "the status command"),
        tasks=("see the state of the server", "watch my GPUs", "see the memory of my GPUs", "check the server"),
    ),
    _fact(
        "The commands are serve, run, plan, doctor, status and bench.",
        "What commands are there?",
        "List the VRAMancer commands.",
        "Which subcommands does vramancer have?",
        "What can the vramancer command do?",
        "Show me the commands.",
        topics=("the commands",),
    ),
    _fact(
        "Set VRM_PRODUCTION=1. The server then refuses to start on a weak setting.",
        "How do I run VRAMancer in production?",
        topics=("production mode", "strict mode"),
        tasks=("turn on production mode", "make the server strict"),
    ),
    _fact(
        "A dashboard of its own, Grafana and a Docker image are not in this version. vramancer status draws the server "
        "in the terminal.",
        "Is there a Docker image?",
        "Does VRAMancer have Grafana?",
        "Is there a web dashboard?",
        "Where is Grafana?",
        topics=("vramancer dashboard", "docker compose"),
        tasks=("use Docker", "run VRAMancer with Docker", "open Grafana", "open the dashboard"),
    ),
]

USAGE: list[Fact] = _START + _ASKING + _PLANNING + _WATCHING
