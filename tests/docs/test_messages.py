"""The messages that `docs/troubleshooting.md` quotes are those of the code."""

from __future__ import annotations

import ast
import functools

from doc_pages import REPOSITORY, inline_code

PAGE = REPOSITORY / "docs" / "troubleshooting.md"
LEAST = 9
"""Characters of a piece of a message, on average, that are looked for; fewer could stand anywhere."""
OTHERS = {
    "Out of memory", "SW Power Cap", "HW Thermal Slowdown", "SW Thermal Slowdown", '"temperature": 0', "-p 5000:5000",
    "Authorization: Bearer TOKEN",
}  # fmt: skip
"""What other programs say or are told."""


@functools.cache
def texts() -> str:
    """Every string of the code; where a value is put in, a line break."""
    found = []
    for file in sorted([*(REPOSITORY / "core").rglob("*.py"), *(REPOSITORY / "vramancer").rglob("*.py")]):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "\n" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\0".join(found)


def quoted() -> list[str]:
    """Texts of code that are sentences or parts of them, not commands, settings or paths."""
    code = inline_code(PAGE.read_text(encoding="utf-8"))
    starts = (
        "--",
        "vramancer ",
        "sudo ",
        "xcode-select ",
        "hf ",
        "pip ",
        "export ",
        "litellm.",
        "ChatOpenAI(",
        "OPENAI_",
        "http",
    )
    return [text for text in code if " " in text and not text.startswith(starts) and text not in OTHERS]


def pieces(part: str) -> list[str]:
    """The longest pieces of code's strings that make up `part`, as messages are put together of several. A last one
    that no string has is left out."""
    found = []
    while part := part.strip(" :;,.()"):
        length = next((size for size in range(len(part), 0, -1) if part[:size] in texts()), 0)
        if not length:
            return []
        found.append(part[:length])
        part = part[length:]
    return found


def missing(message: str) -> list[str]:
    """Parts of a message between "…" that the code's strings make up only in crumbs, or not at all."""
    parts = [part for part in message.split("…") if len(part.strip(" :;,.()")) >= LEAST]
    return [part.strip() for part in parts if sum(map(len, found := pieces(part))) < LEAST * max(1, len(found))]


def test_messages_are_quoted_as_the_code_has_them() -> None:
    assert len(quoted()) > 40
    assert not {message: missing(message) for message in quoted() if missing(message)}


def test_a_message_that_the_code_does_not_have_is_found() -> None:
    assert missing("… the model was eaten by …") == ["the model was eaten by"]
    assert missing("No GPU, sorry: no CUDA device at all")
