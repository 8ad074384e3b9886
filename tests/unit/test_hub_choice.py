"""Which file of a repository is meant?  On file lists as they are found on the Hub."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arriero.agent.hub import NAME_LENGTH_MAX, local_names
from arriero.agent.hub_choice import (
    HubFile,
    choose,
    is_head,
    part_names,
    projector_for,
    quant_of,
    quants_available,
)
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.refs import HfRef, parse


def _files(*names: str) -> list[HubFile]:
    return [HubFile(name, 1000 + position, None) for position, name in enumerate(names)]


def _chosen(ref: str, *names: str) -> list[str]:
    parsed = parse(ref)
    assert isinstance(parsed, HfRef)
    return [file.path for file in choose(parsed, _files(*names))]


QUANTS = ("m-IQ4_XS.gguf", "m-Q4_K_S.gguf", "m-Q4_K_M.gguf", "m-Q5_K_M.gguf", "m-Q8_0.gguf", "m-bf16.gguf")


def test_without_a_quantisation_the_usual_ones_come_first() -> None:
    assert _chosen("hf:o/r", "README.md", *QUANTS) == ["m-Q4_K_M.gguf"]
    assert _chosen("hf:o/r", "m-Q2_K.gguf", "m-q8_0.gguf") == ["m-q8_0.gguf"]
    assert _chosen("hf:o/r", "m-Q6_K.gguf", "m-F16.gguf") == ["m-Q6_K.gguf"]
    assert _chosen("hf:o/r", "model.gguf", "config.json") == ["model.gguf"]


@pytest.mark.parametrize("quant", ["Q4_K_M", "q4_k_m"])
def test_a_quantisation_is_matched_whatever_its_case(quant: str) -> None:
    assert _chosen(f"hf:o/r:{quant}", *QUANTS) == ["m-Q4_K_M.gguf"]


def test_a_quantisation_is_a_word_of_its_own() -> None:
    assert _chosen("hf:o/r:Q4_K", *QUANTS, "m.Q4_K.gguf") == ["m.Q4_K.gguf"]
    with pytest.raises(ArrieroError) as refused:
        _chosen("hf:o/r:Q4_K", *QUANTS)
    assert refused.value.code is ErrorCode.MODEL_NOT_FOUND
    assert refused.value.details["available"] == sorted(
        ["IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q8_0", "BF16"]
    )
    assert "it has BF16, IQ4_XS, Q4_K_M" in refused.value.message


def test_a_folder_may_tell_the_quantisation() -> None:
    assert _chosen("hf:o/r:Q8_0", "Q4_K_M/model.gguf", "Q8_0/model.gguf") == ["Q8_0/model.gguf"]


def test_all_parts_of_a_split_model_are_meant() -> None:
    parts = [f"Q8_0/m-Q8_0-{part:05d}-of-00003.gguf" for part in (1, 2, 3)]
    assert _chosen("hf:o/r:Q8_0", parts[2], parts[0], parts[1], "m-Q2_K.gguf") == parts
    assert _chosen(f"hf:o/r/{parts[0]}", *parts) == parts
    with pytest.raises(ArrieroError, match="lacks 1 of the 3 parts") as refused:
        _chosen("hf:o/r:Q8_0", parts[0], parts[1])
    assert "look for another one" in refused.value.details["suggested_action"]


def test_a_split_model_counts_with_all_its_parts_when_the_smallest_is_chosen() -> None:
    parts = [HubFile(f"m-Q6_K-{part:05d}-of-00002.gguf", 600, None) for part in (1, 2)]
    whole = HubFile("m-Q5_K_M.gguf", 1000, None)
    assert choose(HfRef("o/r"), [*parts, whole]) == [whole]


def test_what_is_no_model_of_its_own_is_never_chosen() -> None:
    assert _chosen("hf:o/r", "mmproj-F16.gguf", "m.imatrix.gguf", "m-BF16.gguf") == ["m-BF16.gguf"]


def test_a_path_is_taken_as_it_is() -> None:
    assert _chosen("hf:o/r/sub/m-Q8_0.gguf", "sub/m-Q8_0.gguf", "m-Q8_0.gguf") == ["sub/m-Q8_0.gguf"]
    with pytest.raises(ArrieroError, match=r"has no file sub/x\.gguf; it has Q8_0"):
        _chosen("hf:o/r/sub/x.gguf", "m-Q8_0.gguf")


def test_a_repository_without_gguf_says_so() -> None:
    with pytest.raises(ArrieroError, match="holds no GGUF file at all"):
        _chosen("hf:o/r", "model.safetensors", "pytorch_model.bin")


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("Qwen2.5-0.5B-Instruct-Q4_K_M.gguf", "Q4_K_M"),
        ("qwen2.5-0.5b-instruct-q5_0.gguf", "Q5_0"),
        ("model.IQ2_XXS.gguf", "IQ2_XXS"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("Q3_K_XL/part-00001-of-00002.gguf", "Q3_K_XL"),
        ("m-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("model.gguf", None),
    ],
)
def test_names_tell_their_quantisation(name: str, quant: str | None) -> None:
    assert quant_of(name) == quant


def test_a_nameless_quantisation_is_listed_by_its_file() -> None:
    assert quants_available(_files("model.gguf", "m-Q8_0.gguf")) == ["Q8_0", "model.gguf"]


# --- Projectors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "others", "projector"),
    [
        ("m-Q8_0.gguf", ["mmproj-BF16.gguf", "mmproj-F16.gguf", "mmproj-F32.gguf"], "mmproj-F16.gguf"),
        ("m-Q8_0.gguf", ["mmproj-model-bf16.gguf", "mmproj-model-q4_0.gguf"], "mmproj-model-bf16.gguf"),
        ("m-Q8_0.gguf", ["mmproj-m.gguf", "mmproj-Q8_0.gguf"], "mmproj-Q8_0.gguf"),
        ("Q8_0/m.gguf", ["mmproj-F16.gguf", "Q8_0/mmproj-F32.gguf"], "Q8_0/mmproj-F32.gguf"),
        ("Q8_0/m.gguf", ["mmproj-F16.gguf", "Q2_K/mmproj-F16.gguf"], "mmproj-F16.gguf"),
        ("m.gguf", ["mmproj/m-f16.gguf"], "mmproj/m-f16.gguf"),
        (
            "gemma-3-4b-it-Q4_K_M.gguf",
            ["mmproj-gemma-3-12b-it-f16.gguf", "mmproj-gemma-3-4b-it-bf16.gguf"],
            "mmproj-gemma-3-4b-it-bf16.gguf",
        ),
        ("m.gguf", ["other/mmproj-F16.gguf", "mmproj.json", "imatrix.gguf"], None),
        ("mmproj-F16.gguf", ["mmproj-BF16.gguf"], None),
        ("model.safetensors", ["mmproj-F16.gguf"], None),
    ],
)
def test_the_projector_that_belongs_to_a_model_is_taken(
    model: str, others: list[str], projector: str | None
) -> None:
    for files in (_files(model, *others), _files(*reversed(others), model)):
        found = projector_for(HubFile(model, 1, None), files)
        assert (found.path if found else None) == projector


# --- What names may be -----------------------------------------------------------------------


def test_an_incomplete_model_does_not_stand_in_the_way_of_a_complete_one() -> None:
    assert _chosen("hf:o/r:Q8_0", "Q8_0-00001-of-00002.gguf", "a-longer-name-Q8_0.gguf") == [
        "a-longer-name-Q8_0.gguf"
    ]


QUANT = st.one_of(
    st.sampled_from(["F16", "BF16", "F32", "MXFP4", "UD-IQ1_S", "TQ1_0"]),
    st.from_regex(r"I?Q[1-8]_(K|K_[SML]|K_XL|[01]|XXS|NL)", fullmatch=True),
)
STEM = st.from_regex(r"[A-Za-z][a-z]{0,8}([.-][0-9]{1,2}[bB])?", fullmatch=True).filter(
    lambda stem: quant_of(stem) is None
)


@pytest.mark.costly
@given(stem=STEM, quant=QUANT, separator=st.sampled_from("-."), lower=st.booleans())
def test_a_quantisation_is_read_from_any_usual_name_and_chosen_by_it(
    stem: str, quant: str, separator: str, lower: bool
) -> None:
    name = f"{stem}{separator}{quant.lower() if lower else quant}.gguf"
    assert quant_of(name) == quant
    wanted = quant.removeprefix("UD-")
    assert choose(HfRef("o/r", quant=wanted), _files("x-Q9_9.gguf", name))[0].path == name


@given(st.text(max_size=300))
@example("Q" * 300)
@example("Q4" + "_K" * 149)
def test_any_name_has_a_quantisation_of_few_letters_or_none(name: str) -> None:
    quant = quant_of(name)
    assert quant is None or re.fullmatch(r"[A-Z0-9_-]+", quant)


@given(stem=STEM, count=st.integers(0, 99_999))
def test_the_parts_of_a_model_are_counted_within_bounds(stem: str, count: int) -> None:
    first = f"{stem}-00001-of-{count:05d}.gguf"
    names = part_names(first)
    assert len(names) == (count if count <= 1000 else 0)
    assert names[:1] == ([first] if names else []) and is_head(first)
    assert not any(is_head(name) for name in names[1:])


PATH = st.lists(st.text(min_size=1, max_size=150), min_size=1, max_size=4).map("/".join)


@given(st.lists(PATH.map(lambda path: path + ".gguf"), min_size=1, max_size=20))
@example(["a/m.gguf", "b/m.gguf", "B/M.gguf", "b_m.gguf"])
@example([f"{letter}/{'m' * 200}.gguf" for letter in "abcde"])
@example(["…/..gguf", "../..gguf", ".gguf"])
def test_local_names_are_safe_and_all_different(paths: list[str]) -> None:
    names = local_names(paths)
    assert len({name.casefold() for name in names}) == len(paths) == len(names)
    for name in names:
        assert re.fullmatch(r"[A-Za-z0-9+][A-Za-z0-9 ._+-]*", name) and name.endswith(".gguf")
        assert len(name) <= NAME_LENGTH_MAX + len("20-.gguf")


@given(stem=st.text(min_size=1, max_size=300), count=st.integers(2, 30))
def test_local_names_of_parts_still_belong_together(stem: str, count: int) -> None:
    names = local_names(part_names(f"{stem.replace(chr(10), '')}x-00001-of-{count:05d}.gguf"))
    assert names == part_names(names[0]) and len(names) == count
