"""Weights of several ranks: one loads them, and main memory holds them once."""

from support.ranks import rows_of

SENTENCE = (
    "Main memory cannot be shared by all ranks (not here): those that cannot load the weights for "
    "themselves, and they take as much of it again."
)


def test_one_rank_loads_what_all_have():
    rows = {row["name"]: row for row in rows_of(3, "weights")}
    assert all(row["same"] for row in rows.values())
    for precision in ("bf16", "int8", "fp8"):  # LoRAs in the weights, and beside them
        row = rows[precision]
        assert row["loads"] == [1, 0, 0]
        assert row["held_once"] == [True] * 3
        assert row["warnings"] == []


def test_where_memory_cannot_be_shared_ranks_load_for_themselves():
    rows = {row["name"]: row for row in rows_of(3, "weights")}
    assert rows["no share"]["loads"] == [1, 1, 1]
    assert rows["no share"]["held_once"] == [True, False, False]
    assert rows["no attach"]["loads"] == [1, 1, 0]
    assert rows["no attach"]["held_once"] == [True, False, True]
    assert rows["no share"]["warnings"] == rows["no attach"]["warnings"] == [SENTENCE]
