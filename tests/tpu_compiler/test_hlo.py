"""Reading the text of compiled TPU programs."""

from __future__ import annotations

import re

import pytest

from mtj_loader.tpu_compiler.findings import collectives, is_weight, weight_copies
from mtj_loader.tpu_compiler.hlo import Array, parse
from mtj_loader.tpu_compiler.time_estimate import estimate
from tests.tpu_compiler.texts import COPIES, LOOP, STEP, program


@pytest.mark.parametrize(
    ("dtype", "sizes", "layout", "expected"),
    [
        ("bf16", (1, 6144, 2304), "2,1,0:T(8,128)(2,1)", 6144 * 2304 * 2),
        ("bf16", (1, 2304), "1,0:T(2,128)(2,1)", 2 * 2304 * 2),  # a row is padded to two
        ("bf16", (1, 2048, 8, 96), "1,3,2,0:T(8,128)(2,1)", 2048 * 8 * 96 * 2),
        ("bf16", (1, 2048, 8, 96), "3,2,1,0:T(8,128)(2,1)", 2048 * 8 * 128 * 2),
        ("f32", (1, 12), "1,0:T(1,128)", 128 * 4),
        ("s32", (), ":T(128)", 4),
        ("pred", (2048,), "0:T(1024)(128)(4,1)", 2048),
    ],
)
def test_bytes_count_the_padding_of_tiles(dtype, sizes, layout, expected):
    assert Array(dtype, sizes, layout).bytes == expected


def test_memory_spaces():
    assert Array("bf16", (8,), "0:T(128)").in_hbm
    assert not Array("bf16", (8,), "0:T(128)S(1)").in_hbm


def test_instructions_of_the_entry():
    module = parse(STEP)
    entry = module.computations[module.entry]
    assert module.entry == "main.1_spmd"
    assert [one.opcode for one in entry] == [
        "parameter",
        "parameter",
        "copy-start",
        "copy-done",
        "fusion",
        "all-reduce",
    ]
    fusion = entry[4]
    assert fusion.operands == ("param.1", "copy-done.1")
    assert fusion.called == ("fused.1",)
    assert fusion.cycles == 11880
    assert fusion.op_name == "jit(run)/layer_1/linear_4/dot_general"
    assert [array.sizes for array in fusion.arrays] == [(8, 3072)]
    assert entry[-1].is_root
    assert [is_weight(one) for one in module.parameters] == [False, True]


def test_collectives_are_counted_with_their_bytes():
    (found,) = collectives(parse(STEP))
    assert (found.kind, found.count, found.bytes) == ("all-reduce", 1, 8 * 3072 * 4)


def test_what_a_loop_runs_counts_as_often_as_it_runs():
    (found,) = collectives(parse(LOOP))
    assert (found.kind, found.count, found.bytes) == ("all-gather", 8, 8 * 1024 * 4)


def test_a_loop_over_data_runs_as_often_as_it_is_told():
    """Such as attention's, over the blocks of keys that a row sees."""
    cycles = '%gathered.1 = f32[1024]{0:T(1024)S(1)} negate(%i.1), "estimated_cycles":"1000"'
    known = re.sub(r"%gathered.1 = .*", cycles, LOOP)
    unknown = parse(known.replace("constant(8)", "get-tuple-element(%state.2), index=0"))
    assert [unknown.trips(one) for one, _ in unknown.executed() if one.opcode == "while"] == [None]
    for trips in (1, 3):
        assert estimate(unknown, hertz=1e3, bandwidth=1e15, trips=trips).seconds == pytest.approx(
            trips
        )
    assert estimate(parse(known), hertz=1e3, bandwidth=1e15, trips=3).seconds == pytest.approx(8)


def test_a_prefetched_weight_is_not_a_copy():
    assert weight_copies(parse(STEP)) == []


@pytest.mark.parametrize("name", COPIES)
def test_copies_of_weights(name: str):
    (found,) = weight_copies(parse(program(COPIES[name])))
    assert found.bytes == 2048 * 1024 * 2
    assert found.operation == "jit(run)/move"


def test_a_weight_is_followed_into_a_loop():
    (found,) = weight_copies(parse(LOOP))
    assert found.operation == "jit(run)/slice_of_expert"


def test_what_is_computed_from_a_weight_is_not_a_copy():
    body = "fusion(%w), kind=kLoop, calls=%computes"
    assert weight_copies(parse(program(body))) == []


def test_time_is_that_of_cycles_or_of_memory_whichever_is_longer():
    step = parse(STEP)
    weight, product = 6144 * 3072 * 2, 11880
    fast = estimate(step, hertz=1e9, bandwidth=1e15)
    assert fast.seconds == pytest.approx(product / 1e9 + weight / 1e15)
    slow = estimate(step, hertz=1e15, bandwidth=1e9)
    assert slow.seconds == pytest.approx(weight / 1e9, rel=1e-2)  # waits for the prefetch
    assert slow.operations[0].name == "wait"
    assert slow.hbm_bytes == weight


def test_operations_of_all_layers_are_one_kind():
    names = [cost.name for cost in estimate(parse(STEP), hertz=1e9, bandwidth=1e9).operations]
    assert "jit(run)/layer/linear_4/dot_general" in names


def test_a_part_of_an_array_is_all_that_is_read():
    module = parse(program("fusion(%w, %i), kind=kLoop, calls=%takes_a_row"))
    assert estimate(module, hertz=1e9, bandwidth=1e9).hbm_bytes == 2 * 1024 * 2  # and written
