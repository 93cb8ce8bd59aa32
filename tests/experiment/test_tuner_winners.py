"""``run_param_tuner.py --best-seeds``: the winners of a grid with more seeds; runs are a stand-in's (tuner_cases.py)."""

import re

from tuner_cases import Tune, Workshop, shop_fixture, tune_fixture  # noqa: F401


def test_the_winner_of_each_length_and_no_other_runs_with_more_seeds(shop: Workshop, tune: Tune) -> None:
    path = shop.grid(shop.space(topk=[8, 4, 2], max_len=[10, 20]))
    done = tune(path, "--seeds", 1, "--best-seeds", 2, 3)
    assert (done.code, done.err) == (0, "")
    assert sorted(shop.who()) == sorted([(topk, 1) for topk in (2, 4, 8)] * 2 + [(8, 2), (8, 3)] * 2)
    assert {call["params"]["max_len"] for call in shop.calls() if call["params"]["seed"] > 1} == {10, 20}
    assert "10 of 10 runs done, 0 failed, 0 left" in done.out
    ranked = re.findall(r"topk=(\d) max_len=\d+ +(\d) ", done.out)
    assert sorted(ranked) == sorted([("8", "3"), ("4", "1"), ("2", "1")] * 2)


def test_a_winners_runs_are_resumed_and_skipped_like_any_other(shop: Workshop, tune: Tune) -> None:
    path = shop.grid(shop.space(topk=[8, 4]))
    tune(path, "--seeds", 1, "--best-seeds", 2)
    before = shop.calls()
    again = tune(path, "--seeds", 1, "--best-seeds", 2, 3)
    assert again.code == 0
    assert [call["who"] for call in shop.calls()][len(before) :] == [[8, 3]]
    assert "4 of 4 runs done" in again.out


def test_the_best_mean_wins_and_seeds_of_the_grid_do_not_run_twice(shop: Workshop, tune: Tune) -> None:
    path = shop.grid(shop.space(topk=[8, 4]))
    done = tune(path, "--seeds", 1, 2, "--best-seeds", 2, 5)
    assert sorted(shop.who()) == [(4, 1), (4, 2), (8, 1), (8, 2), (8, 5)]
    assert "5 of 5 runs done" in done.out


def test_a_configuration_with_a_failed_run_does_not_win(shop: Workshop, tune: Tune) -> None:
    shop.plan({8: ["refuse"]})
    path = shop.grid(shop.space(topk=[8, 4, 2]))
    done = tune(path, "--seeds", 1, "--best-seeds", 2)
    assert done.code == 1
    assert (4, 2) in shop.who() and (8, 2) not in shop.who()


def test_without_a_winner_it_says_so(shop: Workshop, tune: Tune) -> None:
    shop.plan({8: ["none"], 4: ["refuse"]})
    path = shop.grid(shop.space(topk=[8, 4]))
    done = tune(path, "--seeds", 1, "--best-seeds", 2)
    assert done.code == 1
    assert "TWIN on tiny" in done.out and "no configuration has a validation figure for all of its seeds" in done.out
    assert sorted(shop.who()) in ([(4, 1), (8, 1)], [(4, 1), (8, 1), (8, 1)])


def test_a_search_has_no_winners_to_repeat(shop: Workshop, tune: Tune) -> None:
    path = shop.grid(shop.space(topk=[8, 4]))
    refused = tune(path, "--search", "optuna", "--best-seeds", 2)
    assert refused.code == 2 and "--best-seeds is for grids" in refused.err
