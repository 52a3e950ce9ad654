from __future__ import annotations

import pytest

from mtj_loader.names import blank_indices, fold_names, indices, natural_key, number_set


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["h.0.w"], "h.0.w"),
        (["h.0.w", "h.1.w", "h.2.w"], "h.{0...2}.w"),
        (["h.10.w", "h.2.w"], "h.{2,10}.w"),
        (["h.5.w", "h.0.w", "h.6.w", "h.7.w", "h.2.w"], "h.{0,2,5...7}.w"),
        (["l.0.e.0.w", "l.0.e.1.w", "l.3.e.0.w", "l.3.e.1.w"], "l.{0,3}.e.{0...1}.w"),
        (["layer_0/~/linear_3 w", "layer_1/~/linear_3 w"], "layer_{0...1}/~/linear_3 w"),
        (["b.0.norm_1.w", "b.1.norm_1.w"], "b.{0...1}.norm_1.w"),
        (["wte.weight"], "wte.weight"),
    ],
)
def test_names_fold_where_only_indices_differ(names: list[str], folded: str):
    assert fold_names(names) == folded


def test_only_whole_numbers_between_dots_are_indices():
    assert indices("h.12.dense_4h_to_h.w2.7") == [12, 7]
    assert blank_indices("h.12.dense_4h_to_h.w2.7") == "h.#.dense_4h_to_h.w2.#"


@pytest.mark.parametrize("name", ["h.007.w", "h." + "9" * 5000 + ".w", "h.²."])
def test_numbers_that_would_not_come_back_as_they_were_are_text(name: str):
    assert indices(name) == []
    assert fold_names([name]) == name


def test_natural_order_counts():
    names = ["h.10.b", "h.2.b", "h.2.a", "wte", "h.10.a"]
    assert sorted(names, key=natural_key) == ["h.2.a", "h.2.b", "h.10.a", "h.10.b", "wte"]


def test_number_sets():
    assert number_set([3]) == "3"
    assert number_set([2, 1, 1, 0]) == "{0...2}"
    assert number_set([7, 1, 2]) == "{1...2,7}"
