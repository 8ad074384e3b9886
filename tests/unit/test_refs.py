"""Model references: what is accepted, what is refused, and how it is told."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.contracts.refs import DemoRef, FileRef, HfRef, HttpsRef, ModelRef, parse


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("demo", DemoRef()),
        ("hf:org/repo", HfRef("org/repo")),
        ("hf:org/repo:Q4_K_M", HfRef("org/repo", quant="Q4_K_M")),
        ("hf:org/repo:Q4_K_M@main", HfRef("org/repo", quant="Q4_K_M", revision="main")),
        ("hf:org/repo@refs/pr/3", HfRef("org/repo", revision="refs/pr/3")),
        ("hf:org/repo/sub/file.gguf", HfRef("org/repo", path="sub/file.gguf")),
        ("hf:org/repo/file.gguf@v1.0", HfRef("org/repo", path="file.gguf", revision="v1.0")),
        ("file:///models/a%20b.gguf", FileRef("/models/a b.gguf")),
        ("file://localhost/m.gguf", FileRef("/m.gguf")),
        ("https://example.org/m.gguf?x=1", HttpsRef("https://example.org/m.gguf?x=1")),
        ("http://127.0.0.1:9/m.gguf", HttpsRef("http://127.0.0.1:9/m.gguf")),
    ],
)
def test_accepted_forms(text: str, expected: ModelRef) -> None:
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "demo ", "llama", "hf:", "hf:org", "hf:org/", "hf:/repo", "hf:../repo", "hf:org/repo:", "hf:org/repo@",
        "hf:org/repo:Q4/../x", "hf:org/repo/../x.gguf", "hf:org/repo/x.bin", "hf:org/repo/", "hf:org/repo@../../x",
        "hf:org/repo/x.gguf:Q4", "file://host/m.gguf", "file:m.gguf", "file:///a/../b.gguf", "file:///a%2F..%2F../b",
        "file:///a%00b.gguf", "http://example.org/m.gguf", "https://user:pw@example.org/m.gguf", "https:///m.gguf",
        "https://example.org/", "https://[::1/m.gguf", "ftp://example.org/m.gguf", "hf:org/repo\n", "x" * 3000,
        "file://[/m.gguf", "file://C:\uff0f/m.gguf", "file:///a/.hidden.gguf", "file:///a/", "file:///", "file:///a%0Ab.gguf", "file:///a%1B%5B2J.gguf", "file:///a%E2%80%AE.gguf",
    ],
)  # fmt: skip
def test_refused_forms(text: str) -> None:
    with pytest.raises(ArrieroError) as refused:
        parse(text)
    assert refused.value.code is ErrorCode.INVALID_MODEL_REFERENCE
    assert "hf:org/repo" in refused.value.details["accepted"]
    assert len(refused.value.message) < 600


def test_a_reference_that_is_no_utf8_can_be_told() -> None:
    with pytest.raises(ArrieroError) as refused:
        parse("file:///caf\udce9.gguf")
    assert b"file:///caf\\\\udce9.gguf" in msgspec.json.encode(refused.value.body())


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pth", ".pkl", ".PT", ".pickle", ".joblib"])
@pytest.mark.parametrize(
    "form",
    [
        "hf:org/repo/x{}",
        "hf:org/repo/a/x.gguf{}@main",
        "https://h/x{}?a=.gguf",
        "http://localhost/a/x{}",
        "file:///x{}",
    ],
)
def test_pickles_are_refused_since_they_run_code(form: str, suffix: str) -> None:
    with pytest.raises(ArrieroError) as refused:
        parse(form.format(suffix))
    assert refused.value.code is ErrorCode.INVALID_MODEL_REFERENCE
    assert f"{suffix.lower()} files are pickles, which run code when they are loaded" in refused.value.message


@given(
    st.text(max_size=60)
    | st.from_regex(r"hf:[a-z./:@]{1,30}|file:/{1,4}[a-z./%]{1,30}|https?://[a-z./:@\[\]]{1,30}")
)
def test_any_text_is_parsed_or_refused_and_paths_stay_put(text: str) -> None:
    try:
        ref = parse(text)
    except ArrieroError as error:
        assert error.code is ErrorCode.INVALID_MODEL_REFERENCE
        return
    match ref:
        case HfRef():
            assert ".." not in ref.repo and ".." not in (ref.path or "").split("/")
        case FileRef():
            assert ref.path.startswith("/") and ".." not in ref.path.split("/")
        case _:
            pass
