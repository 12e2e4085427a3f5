"""When a rollout is given up."""

from __future__ import annotations

from berth.ray.patience import Patience


def out(*passes: tuple[float, bool]) -> list[bool]:
    patience = Patience(timeout_s=900, slot_timeout_s=180)
    return [patience.is_out(elapsed_s, joining) for elapsed_s, joining in passes]


def test_a_head_that_is_too_busy_for_one_pass_of_a_long_rollout_is_waited_for() -> None:
    assert out((0, False), (300, False), (331, True), (340, False), (600, True), (770, True)) == [False] * 6


def test_slots_that_do_not_come_are_given_up_after_their_time_at_a_stretch() -> None:
    assert out((2, True), (182, True), (183, True)) == [False, False, True]
    assert out((300, True), (400, False), (410, True), (590, True), (591, True))[-2:] == [False, True]


def test_the_whole_takes_no_longer_than_its_own_time_whatever_is_waited_for() -> None:
    assert out((899, False), (901, False)) == [False, True]
    assert out((800, True), (901, True)) == [False, True]


def test_nobody_looks_on_for_longer_than_there_is_time() -> None:
    patience = Patience(timeout_s=900, slot_timeout_s=180)
    assert (patience.left_s(0), patience.left_s(890), patience.left_s(950)) == (900, 10, 0)
    patience.is_out(100, joining=True)
    assert patience.left_s(270) == 10
    patience.is_out(271, joining=False)
    assert patience.left_s(280) == 620
