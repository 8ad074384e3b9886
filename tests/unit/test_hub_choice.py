"""Which file of a repository is meant?  On file lists as they are found on the Hub."""

import pytest

from arriero.agent.hub import HubFile, choose, quant_of, quants_available
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
    with pytest.raises(ArrieroError, match="lacks 1 of the 3 parts"):
        _chosen("hf:o/r:Q8_0", parts[0], parts[1])


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
