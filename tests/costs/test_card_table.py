"""The table of cards: whole, plausible, with the figures of the makers' sheets, and found by any name."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

from core.costs.card_table import GIB, TABLE, find_card, key_of, known_cards, read_table
from core.errors import DeviceError

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("3090", "RTX 3090"),
        ("rtx3090", "RTX 3090"),
        ("RTX-3090", "RTX 3090"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("3090 24GB", "RTX 3090"),
        ("3090ti", "RTX 3090 Ti"),
        ("5070ti", "RTX 5070 Ti"),
        ("4070 ti super", "RTX 4070 Ti Super"),
        ("3080", "RTX 3080 10GB"),
        ("3080 12gb", "RTX 3080 12GB"),
        ("3080 Ti", "RTX 3080 Ti"),
        ("2060", "RTX 2060"),
        ("2060 12 GB", "RTX 2060 12GB"),
        ("3060", "RTX 3060"),
        ("4060ti", "RTX 4060 Ti 8GB"),
        ("4060 Ti 16 GB", "RTX 4060 Ti 16GB"),
        ("rtx4060ti16gb", "RTX 4060 Ti 16GB"),
        ("1080ti", "GTX 1080 Ti"),
        ("GTX 1660 Super", "GTX 1660 Super"),
        ("NVIDIA TITAN X (Pascal)", "Titan X Pascal"),
        ("TITAN RTX", "Titan RTX"),
        ("4090 laptop", "RTX 4090 Laptop"),
        ("4090m", "RTX 4090 Laptop"),
        ("4090 Mobile", "RTX 4090 Laptop"),
        ("rtx 3070 ti m", "RTX 3070 Ti Laptop"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "RTX 4090 Laptop"),
        ("NVIDIA GeForce RTX 3050 6GB Laptop GPU", "RTX 3050 Laptop 6GB"),
        ("rtx a6000", "RTX A6000"),
        ("a6000", "RTX A6000"),
        ("Quadro RTX A6000", "RTX A6000"),
        ("Quadro RTX 6000", "Quadro RTX 6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("rtx pro 6000", "RTX PRO 6000 Blackwell"),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", "RTX PRO 6000 Blackwell Max-Q"),
        ("tesla p40", "P40"),
        ("Tesla P100-PCIE-12GB", "P100 12GB"),
        ("Tesla T4", "T4"),
        ("v100 32gb", "V100 32GB"),
        ("Tesla V100-SXM2-16GB", "V100 16GB"),
        ("NVIDIA A100-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100 SXM 80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("a100", "A100 40GB"),
        ("h100", "H100 PCIe"),
        ("H100 SXM", "H100 SXM"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("rx7900xtx", "RX 7900 XTX"),
        ("7900 XTX", "RX 7900 XTX"),
        ("AMD Radeon RX 7900 XT", "RX 7900 XT"),
        ("AMD Radeon PRO W7900", "Radeon PRO W7900"),
        ("AMD Instinct MI300X", "MI300X"),
        ("AMD Instinct MI250X / MI250", "MI250X"),
        ("a770", "Arc A770 16GB"),
        ("Intel(R) Arc(TM) A770 Graphics 8GB", "Arc A770 8GB"),
        ("arc pro b60", "Arc Pro B60"),
        ("b60", "Arc Pro B60"),
        ("Apple M2 Ultra", "M2 Ultra 64GB"),
        ("m2ultra192gb", "M2 Ultra 192GB"),
        ("M4 Max 128GB", "M4 Max 128GB"),
        ("m4 max 64gb", "M4 Max 64GB"),
        ("m3 max", "M3 Max 36GB"),
    ],
)
def test_cards_are_found_however_they_are_written(asked: str, name: str) -> None:
    assert find_card(asked).name == name


def test_every_card_is_found_by_its_own_name_and_no_two_share_one() -> None:
    cards = known_cards()
    assert len({card.name for card in cards}) == len(cards) > 200
    keys = [(key, card.memory_bytes) for card in cards for key in card.keys]
    assert len(set(keys)) == len(keys) and all(key for key, _ in keys)
    assert all(find_card(card.name) is card for card in cards)


def test_every_card_has_a_source_a_chip_and_figures_of_a_card() -> None:
    for card in known_cards():
        assert len(card.source) > 10 and card.source.split()[0] in ("NVIDIA", "AMD", "Intel", "Apple"), card.name
        assert card.chip.startswith(("sm_", "gfx", "Xe", "Apple")), card.name
        assert 2 * GIB <= card.memory_bytes <= 512 * GIB, card.name
        assert 60e9 < card.bandwidth_bytes_s <= 8e12, card.name
        assert 16 < card.flops / card.bandwidth_bytes_s < 480, card.name


def test_generations_have_the_chips_that_compilers_know() -> None:
    for asked, chip in (
        ("M40", "sm_52"), ("P100", "sm_60"), ("1080", "sm_61"), ("V100", "sm_70"), ("1660", "sm_75"), ("A30", "sm_80"),
        ("3090", "sm_86"), ("4090 laptop", "sm_89"), ("H200", "sm_90"), ("B200", "sm_100"), ("5090", "sm_120"),
        ("MI60", "gfx906"), ("MI210", "gfx90a"), ("MI355X", "gfx950"), ("6800", "gfx1030"), ("6700 XT", "gfx1031"),
        ("7600", "gfx1102"), ("9060 XT", "gfx1200"), ("9070", "gfx1201"),
    ):  # fmt: skip
        assert find_card(asked).chip == chip, asked
    assert (find_card("5090").compute_capability, find_card("6800").compute_capability) == (120, None)


@pytest.mark.parametrize(
    ("asked", "gib", "gb_s", "tflops"),
    [
        ("GTX 1080 Ti", 11, 484, 11.34),
        ("1060 6gb", 6, 192, 4.37),
        ("1660 Super", 6, 336, 10.05),
        ("2080 Ti", 11, 616, 53.8),
        ("3060", 12, 360, 25.5),
        ("3090", 24, 936, 71),
        ("4060 Ti 16GB", 16, 288, 44.1),
        ("4090", 24, 1008, 165.2),
        ("4090 laptop", 16, 576, 85.8),
        ("5060 Ti 16GB", 16, 448, 47.4),
        ("5070 Ti", 16, 896, 87.9),
        ("5090", 32, 1792, 209.5),
        ("5090 laptop", 24, 896, 114),
        ("M40 24GB", 24, 288, 6.8),
        ("P40", 24, 346, 11.8),
        ("P100 SXM", 16, 732, 21.2),
        ("V100 32GB", 32, 900, 125),
        ("T4", 16, 320, 65),
        ("A10", 24, 600, 125),
        ("A40", 48, 696, 149.7),
        ("A100 SXM 80GB", 80, 2039, 312),
        ("L4", 24, 300, 121),
        ("L40S", 48, 864, 362),
        ("H100 SXM", 80, 3350, 989),
        ("H200", 141, 4800, 989),
        ("RTX A4000", 16, 448, 76.7),
        ("RTX 6000 Ada", 48, 960, 364.2),
        ("RTX PRO 6000", 96, 1792, 500),
        ("6800 XT", 16, 512, 41.5),
        ("7900 XTX", 24, 960, 123),
        ("9070 XT", 16, 640, 195),
        ("MI50 32GB", 32, 1024, 26.5),
        ("MI300X", 192, 5300, 1307),
        ("A770", 16, 560, 131),
        ("B580", 12, 456, 116.5),
        ("M1 Max", 32, 400, 10.4),
        ("M2 Ultra", 64, 800, 27.2),
        ("M3 Ultra 512GB", 512, 819, 28.6),
        ("M4 Max 128GB", 128, 546, 17.2),
        ("M5", 16, 153, 3.6),
        ("M5 Max 128GB", 128, 614, 14.4),
    ],
)
def test_well_known_figures(asked: str, gib: int, gb_s: float, tflops: float) -> None:
    card = find_card(asked)
    assert (card.memory_bytes, card.bandwidth_bytes_s, card.flops) == (
        gib * GIB, pytest.approx(gb_s * 1e9), pytest.approx(tflops * 1e12),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("3095", "RTX 3090"),
        ("rtx 4070 supr", "RTX 4070 Super"),
        ("H300", "H200"),
        ("rtx 6000", "Did you mean Quadro RTX 6000, RTX A6000, RTX 6000 Ada, RTX PRO 6000 Blackwell?"),
        ("3090 48GB", "RTX 3090 has 24 GB"),
        ("4060 Ti 12GB", "RTX 4060 Ti 8GB has 8 GB, RTX 4060 Ti 16GB has 16 GB"),
        ("NVIDIA GeForce RTX 2080 with Max-Q Design", "Did you mean"),
        ("", "families GeForce GTX 10, "),
        ("nonsense", "families GeForce GTX 10, "),
    ],
)
def test_unknown_cards_are_refused_with_those_that_look_like_them(asked: str, said: str) -> None:
    with pytest.raises(DeviceError) as caught:
        find_card(asked)
    assert said in caught.value.message
    assert "24GiB@936GB/s" in caught.value.message
    assert caught.value.param == "gpu"


def test_a_name_is_apart_from_its_size() -> None:
    assert key_of("NVIDIA GeForce RTX 4060 Ti 16GB") == key_of("4060ti 16 gib") == ("4060ti", 16)
    assert key_of("RTX 2070 Super Laptop") == key_of("2070 super m") == ("2070superlaptop", None)
    assert key_of("M40") == ("m40", None)


ROW = "- {family: F, chip: sm_86, source: a sheet, cards: [{name: X, GiB: [8, 16], GB/s: 448, TFLOPS: 20}]}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ROW.replace("GB/s: 448", "GB/s: fast"), "Expected `float`, got `str`"),
        (ROW.replace("GB/s: 448", "GB/s: 0"), "> 0.0"),
        (ROW.replace(", TFLOPS: 20", ""), "missing required field `TFLOPS`"),
        (ROW.replace("TFLOPS: 20", "TFLOPS: 20, sm: 86"), "unknown field `sm`"),
        (ROW.replace("source: a sheet, ", ""), "missing required field `source`"),
        (ROW.replace("[8, 16]", "[]"), "length >= 1"),
        ("- {family", "line 1"),
    ],
)
def test_a_broken_table_is_refused_with_the_place(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(ROW)
    assert [card.name for card in read_table(path)["F"]] == ["X 8GB", "X 16GB"]
    path.write_text(text)
    with pytest.raises(DeviceError, match=r"mine\.yaml is no table of cards") as caught:
        read_table(path)
    assert said in caught.value.message


def test_a_family_may_be_in_several_places(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"{ROW}\n{ROW.replace('name: X', 'name: Y')}")
    assert [card.name for card in read_table(path)["F"]] == ["X 8GB", "X 16GB", "Y 8GB", "Y 16GB"]


def test_a_card_overrides_its_family(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    own = "chip: sm_80, source: another, remark: slow, also: [Z]"
    path.write_text(f"{ROW[:-2]}, {{name: Y, GiB: 4, GB/s: 1, TFLOPS: 1, {own}}}]}}")
    first, _, last = read_table(path)["F"]
    assert (first.chip, first.source, first.remark, first.keys) == ("sm_86", "a sheet", "", {"x"})
    assert (last.chip, last.source, last.remark, last.keys) == ("sm_80", "another", "slow", {"y", "z"})


def test_costs_and_cards_load_without_torch() -> None:
    program = (
        "import sys, core.costs, core.costs.card_notes as notes, core.costs.cards as cards\n"
        "assert notes.card_notes(cards.gpu_spec('1080 Ti'), serves_fp16=True)\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_the_table_is_part_of_the_package() -> None:
    listed = re.search(r'^"\*" = (\[.*\])$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert listed is not None and any(fnmatch(TABLE.name, pattern) for pattern in json.loads(listed[1]))
