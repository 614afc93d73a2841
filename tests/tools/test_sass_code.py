"""How the gate on the kernels' machine code reads code: the bulk path of functions written by hand."""

from __future__ import annotations

import pytest
from tools.sass.code import Data, Path, SassError, bulk_path, parse


def _bulk(*lines: str, reads: int = 1, writes: int = 1) -> Path:
    """The bulk path of a function of the disassembler's lines; those that end in ":" are labels."""
    text = "\n".join(line if line.endswith(":") else f"        /*0000*/      {line} ;" for line in lines)
    function = parse(f'\t.section\t.text.hand,"ax",@progbits\nhand:\n{text}\n')["hand"]
    return bulk_path(function, Data(4, reads, writes, 0))


def _names(path: Path) -> list[str]:
    return [each.name for each in path.outer]


LOAD, STORE = "LDG.E.128 R4, desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64+0x10], R4"
NARROW_LOAD, NARROW_STORE = "LDG.E.U16 R4, desc[UR4][R2.64]", "STG.E.U16 desc[UR4][R2.64], R4"
ADD = "FADD R4, R4, 1"


def loop(label: str, *lines: str) -> list[str]:
    return [f"{label}:", *lines, f"@P0 BRA `({label})"]


def test_code_without_a_loop_is_one_path_and_what_follows_the_end_is_not_counted():
    path = _bulk(LOAD, "@P0 EXIT", STORE, "EXIT", ".L_x_0:", "BRA `(.L_x_0)", "NOP")
    assert not path.loop
    assert _names(path) == ["LDG", "EXIT", "STG", "EXIT"]
    assert (path.accesses("load"), path.accesses("store")) == ([16], [16])


def test_a_loop_of_wide_accesses_is_the_bulk_path_however_much_a_narrow_one_does():
    wide, narrow = loop(".L_x_1", LOAD, ADD, STORE), loop(".L_x_2", *[NARROW_LOAD, ADD, NARROW_STORE] * 20)
    for loops in ((wide, narrow), (narrow, wide)):
        path = _bulk("MOV R2, R3", *loops[0], *loops[1], "EXIT")
        assert path.loop and _names(path) == ["LDG", "FADD", "STG", "BRA"]


def test_without_loops_of_wide_accesses_it_is_the_whole_with_some_or_the_loop_that_moves_most():
    loops = loop(".L_x_1", NARROW_LOAD, ADD) + loop(".L_x_2", NARROW_LOAD, NARROW_STORE)
    assert _names(_bulk(*["LDG.E R4, desc[UR4][R2.64]"] * 3, *loops, "EXIT")) == ["LDG", "STG", "BRA"]
    path = _bulk(LOAD, *loops, STORE, "EXIT")
    assert not path.loop and path.accesses("load") == [16] and len(path.inner) == 6


def test_of_several_loops_it_is_the_slowest_that_does_all_that_is_asked_for():
    code = [
        *loop(".L_x_1", LOAD, STORE, LOAD, STORE),
        *loop(".L_x_2", LOAD, ADD, STORE),
        *loop(".L_x_3", LOAD, *[ADD] * 9),
        "EXIT",
    ]
    assert _names(_bulk(*code)) == ["LDG", "FADD", "STG", "BRA"]
    assert _bulk(*code, writes=0).instructions == 11
    assert _bulk(*code, reads=3).instructions == 11  # none does: then any


def test_of_two_ways_through_a_loop_the_one_that_moves_more_counts_then_the_longer():
    def way(*other: str) -> list[str]:
        lines = [".L_x_1:", "@P0 BRA `(.L_x_2)", LOAD, STORE, "BRA `(.L_x_3)", ".L_x_2:", *other, ".L_x_3:"]
        return _names(_bulk(*lines, "@P1 BRA `(.L_x_1)", "EXIT"))

    assert way(*[ADD] * 20) == ["BRA", "LDG", "STG", "BRA", "BRA"]
    assert way(LOAD, ADD, ADD, STORE) == ["BRA", "LDG", "FADD", "FADD", "STG", "BRA"]
    # Unless it serves rare cases.
    assert way(LOAD, ADD, "CALL.REL.NOINC `($slow)", STORE) == ["BRA", "LDG", "STG", "BRA", "BRA"]
    assert way(LOAD, ".L_x_4:", ADD, ADD, "@P2 BRA `(.L_x_4)", STORE) == ["BRA", "LDG", "STG", "BRA", "BRA"]


def test_of_nested_loops_the_inner_one_counts_if_it_moves_the_data_and_is_reported_if_not():
    path = _bulk(".L_x_1:", "MOV R2, R3", *loop(".L_x_2", LOAD, STORE), "@P1 BRA `(.L_x_1)", "EXIT")
    assert _names(path) == ["LDG", "STG", "BRA"] and not path.inner
    path = _bulk(".L_x_1:", LOAD, *loop(".L_x_2", NARROW_LOAD, ADD), STORE, "@P1 BRA `(.L_x_1)", "EXIT")
    assert _names(path) == ["LDG", "STG", "BRA"] and path.accesses("load") == [16]
    assert [each.name for each in path.inner] == ["LDG", "FADD", "BRA"] and path.instructions == 6


def test_branches_on_predicates_among_the_operands_may_fall_through():
    path = _bulk(".L_x_1:", LOAD, "BRA.U UP0, `(.L_x_2)", STORE, ".L_x_2:", "BRA.U !UP1, `(.L_x_1)", "EXIT")
    assert _names(path) == ["LDG", "BRA", "STG", "BRA"]
    path = _bulk(".L_x_1:", LOAD, "BRA.DIV ~URZ, `(.L_x_2)", STORE, "@P0 BRA P1, `(.L_x_1)", "EXIT", ".L_x_2:", "EXIT")
    assert _names(path) == ["LDG", "BRA", "STG", "BRA"]
    table = '(*"BRANCH_TARGETS .L_x_1,.L_x_2"*)'
    path = _bulk(".L_x_1:", LOAD, STORE, f"BRX R8 -0x10 {table}", ADD, ".L_x_2:", "EXIT")
    assert _names(path) == ["LDG", "STG", "BRX"]


def test_the_call_of_a_label_is_a_jump_and_that_of_a_function_is_noted():
    path = _bulk(".L_x_1:", LOAD, STORE, "@P0 CALL.REL.NOINC `(.L_x_2)", "BRA `(.L_x_1)", ".L_x_2:", "EXIT")
    assert path.loop and path.calls == 0
    assert _bulk(LOAD, "CALL.REL.NOINC `($slow)", STORE, "EXIT", "$slow:", "RET.REL.NODEC R4 `(hand)").calls == 1


def test_accesses_under_opposite_guards_count_once():
    path = _bulk(f"@P1 {NARROW_LOAD}", f"@P1 {LOAD}", f"@!P1 {LOAD}", STORE, "EXIT")
    assert (path.accesses("load"), path.accesses("store")) == ([2, 16], [16])


def test_unknown_targets_and_empty_text_are_errors():
    with pytest.raises(SassError, match=r"hand: the target of `BRX R4 -0x10` is unknown"):
        _bulk("BRX R4 -0x10", "EXIT")
    with pytest.raises(SassError, match="no code sections"):
        parse("")
    with pytest.raises(SassError, match="hand: no instructions"):
        _bulk()
