"""Is room made by the models that nobody used for longest, and never by one that must stay?"""

import dataclasses
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from arriero.domain.pruning import Candidate, Choice, FileLinks, choose, freed_by


def model(
    name: str, size: int, used: float = 0.0, *, added: float = 100.0, protected: bool = False
) -> Candidate:
    file = FileLinks((1, sum(name.encode())), size)
    return Candidate(name, added, (file,), used, protected)


def test_the_least_recently_used_goes_first() -> None:
    models = [model("a", 10, 30.0), model("b", 10, 10.0), model("c", 10, 20.0)]
    assert choose(models, 15) == Choice(("b", "c"), 20)
    assert choose(models, 10) == Choice(("b",), 10)


def test_what_was_never_used_counts_from_when_it_came() -> None:
    models = [model("new", 10, added=50.0), model("used", 10, 40.0, added=1.0)]
    assert choose(models, 1).model_ids == ("used",)
    assert choose([*models, model("old", 10, added=30.0)], 1).model_ids == ("old",)


def test_as_much_as_may_go_goes_where_that_is_less() -> None:
    models = [model("a", 10, protected=True), model("b", 7)]
    assert choose(models, 1000) == Choice(("b",), 7)
    assert choose(models[:1], 5) == Choice((), 0)


def test_a_file_with_two_names_is_free_when_both_are_gone() -> None:
    shared = FileLinks((1, 1), 100, links=2)
    one, other = Candidate("one", 1.0, (shared,)), Candidate("other", 3.0, (shared,))
    between = model("between", 10, added=2.0)
    assert choose([one, between, other], 100) == Choice(("one", "between", "other"), 110)
    assert choose([one, between, other], 10) == Choice(("between",), 10), "nothing goes for nothing"
    kept = Candidate("kept", 3.0, (shared,), is_protected=True)
    assert choose([one, between, kept], 100) == Choice(("between",), 10)


FILES = [FileLinks((1, number), size, links) for number, (size, links) in enumerate(
    [(0, 1), (1, 1), (5, 2), (50, 1), (70, 3), (100, 1), (100, 2)]
)]  # fmt: skip
CANDIDATES = st.lists(
    st.builds(
        Candidate,
        model_id=st.text("abcdef", min_size=1, max_size=4),
        added_unix=st.integers(1, 20).map(float),
        files=st.lists(st.sampled_from(FILES), max_size=3, unique=True).map(tuple),
        last_used_unix=st.integers(0, 20).map(float),
        is_protected=st.booleans(),
    ),
    max_size=8,
    unique_by=lambda one: one.model_id,
)


def consistent(candidates: list[Candidate]) -> list[Candidate]:
    """Return them with no file in more models than it has names."""
    seen: Counter[FileLinks] = Counter()
    found = []
    for one in candidates:
        files = tuple(file for file in one.files if seen[file] < file.links)
        seen.update(files)
        found.append(dataclasses.replace(one, files=files))
    return found


@given(CANDIDATES, st.integers(1, 400))
def test_what_holds_of_every_choice(candidates: list[Candidate], wanted: int) -> None:
    candidates = consistent(candidates)
    choice = choose(candidates, wanted)
    by_id = {one.model_id: one for one in candidates}
    chosen = [by_id[name] for name in choice.model_ids]
    assert not any(one.is_protected for one in chosen)
    assert [one.age_key for one in chosen] == sorted(one.age_key for one in chosen)
    assert freed_by(chosen) == choice.freed_bytes
    assert len(set(choice.model_ids)) == len(chosen)
    if choice.freed_bytes >= wanted:
        assert freed_by(chosen[:-1]) < wanted, "no smaller prefix would do"
    else:
        everything = [one for one in candidates if not one.is_protected]
        assert choice.freed_bytes == freed_by(everything), "all that may go went"
    for one in chosen:
        assert freed_by([other for other in chosen if other is not one]) < choice.freed_bytes
    if chosen:
        older = [one for one in candidates if one.age_key < chosen[-1].age_key and not one.is_protected]
        assert all(freed_by([*chosen, one]) == choice.freed_bytes for one in older if one not in chosen)
    assert choose(reversed(candidates), wanted) == choice
