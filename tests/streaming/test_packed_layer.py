"""A layer's tensors as one run of bytes: same values, same objects, every tensor aligned."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from core.streaming.packed_layer import PackedLayer


class Odd(nn.Module):
    """Tensors of many kinds: shared, transposed, expanded, empty, of several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 40)
        self.tied = nn.Linear(24, 40, bias=False)
        self.tied.weight = self.linear.weight
        self.transposed = nn.Parameter(torch.randn(7, 5).t())
        self.narrow = nn.Parameter(torch.randn(33).to(torch.bfloat16))
        self.register_buffer("mask", torch.ones(13, dtype=torch.bool))
        self.register_buffer("expanded", torch.tensor([2.5]).expand(6))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("count", torch.tensor(3))
        self.moves = 0

    def tensors_moved(self) -> None:
        self.moves += 1


class Child(nn.Linear):
    """Remembers where its weight is."""

    def tensors_moved(self) -> None:
        self.place = self.weight.data_ptr()


class Parent(nn.Module):
    """Remembers what its child does."""

    def __init__(self) -> None:
        super().__init__()
        self.child = Child(4, 4)

    def tensors_moved(self) -> None:
        self.place = self.child.place


def all_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters(remove_duplicate=False)), **dict(module.named_buffers())}


def test_values_objects_strides_and_ties_survive() -> None:
    layer = Odd()
    before = {name: (tensor, tensor.clone(), tensor.stride()) for name, tensor in all_tensors(layer).items()}
    packed = PackedLayer(layer)
    run = torch.zeros(packed.nbytes, dtype=torch.uint8)
    packed.store(run)
    packed.move(run)
    assert layer.moves == 1
    start = run.data_ptr()
    for name, tensor in all_tensors(layer).items():
        same, value, stride = before[name]
        assert tensor is same
        assert torch.equal(tensor, value)
        if tensor.numel():
            assert start <= tensor.data_ptr() < start + packed.nbytes
        assert name == "expanded" or tensor.stride() == stride
    assert layer.tied.weight is layer.linear.weight
    run.zero_()
    assert not layer.linear.weight.any(), "the tensors are the run's memory"


def test_children_hear_of_the_move_before_their_parents() -> None:
    parent = Parent()
    packed = PackedLayer(parent)
    packed.move(torch.zeros(packed.nbytes, dtype=torch.uint8))
    assert parent.place == parent.child.weight.data_ptr()


def test_no_byte_is_wasted() -> None:
    layer = Odd()
    unique = {id(tensor): tensor.nbytes for tensor in all_tensors(layer).values()}
    assert PackedLayer(layer).nbytes == sum(unique.values())


@given(
    st.lists(
        st.tuples(
            st.integers(1, 300), st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.uint8))
        ),
        min_size=1, max_size=12,
    )
)  # fmt: skip
def test_every_tensor_begins_at_a_multiple_of_its_element(shapes: list[tuple[int, torch.dtype]]) -> None:
    layer = nn.Module()
    for index, (size, dtype) in enumerate(shapes):
        layer.register_buffer(f"b{index}", torch.zeros(size, dtype=dtype))
    packed = PackedLayer(layer)
    run = torch.zeros(packed.nbytes, dtype=torch.uint8)
    packed.move(run)
    places = []
    for tensor in layer.buffers():
        offset = tensor.data_ptr() - run.data_ptr()
        assert offset % tensor.element_size() == 0
        assert tensor.nbytes % 64 or offset % 64 == 0
        places.append((offset, offset + tensor.nbytes))
    places.sort()
    assert all(end <= start for (_, end), (start, _) in pairwise(places))
