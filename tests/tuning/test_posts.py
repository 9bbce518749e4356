"""Which posts there are, which is next, and what their time is charged to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from pipeline.tuning.posts import Post, Posts


@dataclass
class Places:
    posts: int
    post_names: Sequence[str] = ()


def posts(places: Places) -> Posts:
    made = Posts(places)
    made.muster(0.0)
    return made


def changes(made: Posts, now: float = 1.0) -> list[tuple[str, str]]:
    return [(each.name, each.state) for each in made.muster(now)]


def test_a_single_post_has_no_name_and_several_have_numbers() -> None:
    assert posts(Places(1)).names == ()
    assert posts(Places(1)).take().name == ""
    assert posts(Places(3)).names == ("1", "2", "3")
    assert posts(Places(2, ("east", "west"))).names == ("east", "west")
    assert posts(Places(0)).count == 0


def test_the_first_is_first_and_then_whoever_was_busy_last() -> None:
    made = posts(Places(3))
    first, second = made.take(), made.take()
    assert (first.name, second.name) == ("1", "2")
    made.give_back(second)
    made.give_back(first)
    assert [made.take().name for _ in range(3)] == ["1", "2", "3"]
    assert not made.has_free


def test_nothing_changes_unless_the_engine_says_so() -> None:
    made = posts(Places(2))
    assert changes(made) == []
    made.give_back(made.take())
    assert changes(made) == []


@pytest.mark.parametrize("names", [(), ("east", "west", "north")])
def test_a_post_that_is_lost_comes_back_when_the_engine_has_it_again(names: tuple[str, ...]) -> None:
    places = Places(3, names)
    made = posts(places)
    post = made.take()
    lost = names[0] if names else "1"
    assert post.name == lost
    places.posts, places.post_names = 2, tuple(each for each in names if each != lost)
    made.lose(post)
    made.give_back(post)
    assert (made.count, changes(made)) == (2, [])
    assert lost not in made.names
    places.posts, places.post_names = 3, names
    assert changes(made, 50.0) == [(lost, "back")]
    assert (made.count, post.losses, post.since) == (3, 1, 50.0)


def test_a_post_that_the_engine_still_has_is_back_at_once() -> None:
    made = posts(Places(2))
    post = made.take()
    made.lose(post)
    assert changes(made) == [("1", "back")]
    assert made.count == 2


def test_posts_may_come_and_free_ones_may_go() -> None:
    places = Places(1, ("a",))
    made = posts(places)
    places.posts, places.post_names = 2, ("a", "b")
    assert changes(made) == [("b", "new")]
    places.posts, places.post_names = 1, ("b",)
    assert changes(made) == [("a", "lost")]
    assert (made.count, made.take().name, made.has_free) == (1, "b", False)


def test_a_post_that_goes_while_it_is_busy_is_gone_when_its_batch_is_over() -> None:
    places = Places(2, ("a", "b"))
    made = posts(places)
    post = made.take()
    places.posts, places.post_names = 1, ("b",)
    assert changes(made) == []
    made.give_back(post)
    assert changes(made) == [("a", "lost")]
    assert made.names == ("b",)


def test_time_is_charged_once_and_idle_time_to_nobody() -> None:
    post = Post("", 10.0)
    post.begin(picked=12.0)
    assert post.charge(15.0) == (10.0, 5.0), "what lies between two batches belongs to the next"
    assert post.charge(17.0) == (15.0, 2.0)
    post.is_idle = True
    post.begin(picked=40.0)
    assert post.charge(45.0) == (40.0, 5.0)


def test_those_idle_for_which_nothing_is_on_its_way() -> None:
    made = posts(Places(3))
    made.rest(1)
    taken = [made.take() for _ in range(3)]
    assert [each.is_idle for each in taken] == [False, True, True]
