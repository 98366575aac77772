"""Forms that an answer keeps to: which are taken, and what is said of those that are not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from api_client import ApiClient
from fake_pipeline import GRAMMARS, FakePipeline

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
HARD = {"allOf": [{"type": "string", "pattern": f"a{number}.*b"} for number in range(30)]}
FORMAT = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
OBJECT = (b'{"a": 1}', b'{"a": "x"}')


def body(path: str, **fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "a"}], **fields} if path == CHAT else {"prompt": "a", **fields}


def takes(pipeline: FakePipeline, text: bytes) -> bool:
    """Whether the last request's answer may be this."""
    grammar = pipeline.submitted[-1][1].grammar
    assert grammar is not None
    matcher = GRAMMARS.matcher(grammar)
    return matcher.validate_tokens(list(text)) == len(text) and matcher.consume_tokens(list(text)) and (
        matcher.is_accepting()
    )  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, b'{"x":[1,{"y":null}]}', b"[1]"),
        ({"response_format": FORMAT}, *OBJECT),
        ({"guided_json": SCHEMA}, *OBJECT),
        ({"guided_json": json.dumps(SCHEMA)}, *OBJECT),
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": "x*"}, b'{"a"xx:1}', b'{"a": 1}'),
        ({"guided_json": {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "null"}}, b"null", b"1"),
        ({"guided_regex": r"a/\d{2}", "guided_decoding_backend": "auto"}, b"a/12", b"a/1"),
        ({"guided_choice": ["yes", 'say "no"\n', "é"]}, "é".encode(), b"y"),
        ({"guided_choice": ["yes", 'say "no"\n']}, b'say "no"\n', b"no"),
        ({"guided_grammar": 'start: "a"+ B\nB: /[0-9]/'}, b"aa1", b"1"),
        ({"guided_grammar": 'root ::= "a" rest\nrest ::= [0-9]+ | "x"'}, b"a12", b"ay"),
        ({"structured_outputs": {"json": SCHEMA}}, *OBJECT),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, *OBJECT),
        ({"json_schema": SCHEMA}, *OBJECT),
        ({"grammar": 'root ::= "a"{3,3}'}, b"aaa", b"aab"),
        ({"structured_outputs": {"json_object": True}}, b"{}", b"1"),
        ({"structured_outputs": {"regex": "a+", "choice": None}}, b"aa", b"b"),
        ({"structured_outputs": {"choice": ["a"], "disable_fallback": True}}, b"a", b"b"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, b"a", b"b"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_forms_are_taken(
    client: ApiClient, pipeline: FakePipeline, path: str, fields: dict[str, Any], good: bytes, bad: bytes
) -> None:
    assert client.post(path, body(path, **fields)).status_code == 200
    assert takes(pipeline, good)
    assert not takes(pipeline, bad)


@pytest.mark.parametrize("fields", [{"response_format": {"type": "text"}}, {"guided_json": None}, {}])
def test_text_has_no_grammar(client: ApiClient, pipeline: FakePipeline, fields: dict[str, Any]) -> None:
    assert client.post(CHAT, body(CHAT, **fields)).status_code == 200
    assert pipeline.submitted[-1][1].grammar is None


def test_what_cannot_be_kept_to_is_left_out_where_the_schema_is_not_strict(
    client: ApiClient, pipeline: FakePipeline
) -> None:
    schema = {"type": "array", "uniqueItems": True, "items": {"type": "integer"}}
    given = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": False}}
    assert client.post(CHAT, body(CHAT, response_format=given)).status_code == 200
    assert takes(pipeline, b"[1,1]")
    assert not takes(pipeline, b'["x"]')


@pytest.mark.parametrize("path", [CHAT, TEXT])
@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", ""),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema", ""),
        ({"guided_json": 3}, "guided_json", "JSON schema"),
        ({"guided_json": "{"}, "guided_json", "no JSON"),
        ({"guided_json": {"properties": {"a": {"type": "str"}}}}, "guided_json", "/properties/a/type"),
        ({"guided_json": {"properties": {"a": {"not": {"const": 1}}}}}, "guided_json", "/properties/a/not"),
        ({"guided_json": {"type": "integer", "minimum": 3, "maximum": 2}}, "guided_json", "minimum"),
        ({"guided_json": {"$ref": "http://a/b"}}, "guided_json", "/$ref"),
        ({"guided_json": HARD}, "guided_json", "2 s"),
        ({"guided_json": {"enum": ["x" * 200_000]}}, "guided_json", "bytes"),
        ({"guided_regex": "("}, "guided_regex", ""),
        ({"response_format": {"type": "json_object", "schema": {"type": "hiccup"}}}, "response_format.schema", "/type"),
        ({"json_schema": {"type": 3}}, "json_schema", "/type"),
        ({"grammar": "root ::= ("}, "grammar", ""),
        ({"grammar": 'root ::= "x"', "json_schema": {}}, "grammar", "one form only"),
        ({"guided_regex": "(?=a)b"}, "guided_regex", "look"),
        ({"guided_regex": ["a"]}, "guided_regex", "text"),
        ({"guided_choice": []}, "guided_choice", "list"),
        ({"guided_choice": ["a", 3]}, "guided_choice", "texts"),
        ({"guided_grammar": "start: nobody"}, "guided_grammar", "nobody"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar", ""),
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "guided_regex", "one form only"),
        ({"guided_json": SCHEMA, "response_format": {"type": "json_object"}}, "response_format", "one form only"),
        ({"structured_outputs": {}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs", "one of"),
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", ""),
        ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs", "structural_tag"),
        ({"structured_outputs": {"regex": "a", "disable_any_whitespace": True}},
         "structured_outputs.disable_any_whitespace", ""),
        ({"guided_decoding_backend": "outlines", "guided_regex": "a"}, "guided_decoding_backend", "guidance"),
    ],
    ids=lambda value: str(value)[:60],
)  # fmt: skip
def test_bad_forms_are_refused_where_they_are(
    client: ApiClient, pipeline: FakePipeline, path: str, fields: dict[str, Any], param: str, said: str
) -> None:
    error = client.error(path, body(path, **fields), status=400)
    assert error["param"] == param
    assert said in error["message"]
    assert len(error["message"]) < 1000
    assert not pipeline.submitted
