"""What sentence-transformers' files say, and what is refused in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from embedding.encoders import lay_out, write

from core.embedding.layout import read_layout
from core.errors import CheckpointError, UnsupportedModelError


def test_modules_pooling_prompts_and_length_are_read(tmp_path: Path) -> None:
    lay_out(tmp_path, "cls_token", include_prompt=False)
    write(
        tmp_path,
        config_sentence_transformers={"prompts": {"query": "find: ", "document": ""}, "default_prompt_name": "query"},
        sentence_bert_config={"max_seq_length": 7, "do_lower_case": True},
    )
    layout = read_layout(tmp_path, otherwise="mean")
    assert layout.poolings == ("cls",)
    assert layout.normalize
    assert layout.named
    assert not layout.include_prompt
    assert layout.max_seq_length == 7
    assert layout.lower_case
    assert layout.prompt(None) == "find: "
    assert layout.prompt("document") == ""
    with pytest.raises(KeyError):
        layout.prompt("passage")


def test_without_files_pooling_is_assumed_and_vectors_have_length_1(tmp_path: Path) -> None:
    layout = read_layout(tmp_path, otherwise="lasttoken")
    assert (layout.poolings, layout.normalize, layout.named) == (("lasttoken",), True, False)


def test_a_layout_without_normalize_leaves_lengths_alone(tmp_path: Path) -> None:
    lay_out(tmp_path, "mean_tokens", normalize=False)
    assert not read_layout(tmp_path, otherwise="cls").normalize


def test_several_poolings_come_in_the_order_of_sentence_transformers(tmp_path: Path) -> None:
    lay_out(tmp_path, "mean_tokens", pooling_mode_max_tokens=True, pooling_mode_cls_token=True)
    assert read_layout(tmp_path, otherwise="mean").poolings == ("cls", "max", "mean")


def test_poolings_are_also_read_as_later_versions_write_them(tmp_path: Path) -> None:
    lay_out(tmp_path, None)
    write(tmp_path, **{"1_Pooling__config": {"embedding_dimension": 32, "pooling_mode": "lasttoken"}})
    modules = [{"type": "sentence_transformers.base.modules.Pooling", "path": "1_Pooling"}]
    write(tmp_path, modules=modules)
    assert read_layout(tmp_path, otherwise="mean").poolings == ("lasttoken",)


@pytest.mark.parametrize(
    ("files", "error", "said"),
    [
        ({"modules": [{"type": "a.Dense", "path": "2_Dense"}]}, UnsupportedModelError, "Dense"),
        ({"modules": [{"type": "a.Pooling", "path": "../x"}]}, CheckpointError, "not inside"),
        ({"modules": {"type": "a"}}, CheckpointError, "list modules"),
        ({"1_Pooling__config": {"pooling_mode_mean_tokens": False}}, UnsupportedModelError, "allowed: cls"),
        ({"1_Pooling__config": {"pooling_mode": "best"}}, UnsupportedModelError, "best"),
        ({"sentence_bert_config": {"max_seq_length": -3}}, CheckpointError, "max_seq_length"),
        ({"config_sentence_transformers": {"prompts": {"a": 3}}}, CheckpointError, "prompts"),
        ({"config_sentence_transformers": {"default_prompt_name": "b"}}, CheckpointError, "default_prompt_name"),
    ],
)
def test_what_cannot_be_served_is_refused(
    tmp_path: Path, files: dict[str, Any], error: type[Exception], said: str
) -> None:
    write(tmp_path, **files)
    with pytest.raises(error, match=said):
        read_layout(tmp_path, otherwise="mean")
