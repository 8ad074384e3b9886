"""Are the models of other programs found as those lay them out, and nothing else, whatever lies there?"""

import json
import os
from pathlib import Path

import pytest
from tests.support.other_programs import COMMIT, hf_cache, llama_cpp, ollama, sha256

from arriero.agent import found_files
from arriero.agent.found import by_content, by_name, scan
from arriero.agent.found_files import Found
from arriero.contracts import refs
from arriero.contracts.refs import HfRef

ONE, TWO, THREE = b"GGUF one", b"GGUF two two", b"GGUF three three"


def _scan(home: Path, **env: str) -> list[Found]:
    return scan(env, home, system=home / "system")


def _content(home: Path, *wanted: bytes) -> Found | None:
    sizes = [len(content) for content in wanted]
    return by_content({}, home, [sha256(content) for content in wanted], sizes, system=home / "system")


# --- The Hugging Face cache ------------------------------------------------------------------


def test_a_model_of_the_hf_cache_is_told_with_commit_and_checksum(tmp_path: Path) -> None:
    snapshot = hf_cache(tmp_path / ".cache/huggingface/hub", "o/r", {"m-Q8_0.gguf": ONE, "README.md": b"x"})
    (model,) = _scan(tmp_path)
    assert (model.source, model.name) == ("hf-cache", "o/r/m-Q8_0.gguf")
    assert model.model_ref == f"hf:o/r/m-Q8_0.gguf@{COMMIT}" and model.revision == COMMIT
    assert model.paths == (snapshot / "m-Q8_0.gguf",) and model.paths[0].read_bytes() == ONE
    assert (model.sha256s, model.size_bytes) == ((sha256(ONE),), len(ONE))


@pytest.mark.parametrize(
    ("env", "place"),
    [
        ({"HF_HUB_CACHE": "{home}/a"}, "a"),
        ({"HF_HUB_CACHE": "~/a", "HF_HOME": "/nowhere"}, "a"),
        ({"HUGGINGFACE_HUB_CACHE": "{home}/b"}, "b"),
        ({"HF_HOME": "{home}/c"}, "c/hub"),
        ({"XDG_CACHE_HOME": "{home}/d"}, "d/huggingface/hub"),
        ({"HF_HOME": ""}, ".cache/huggingface/hub"),
    ],
)
def test_the_hf_cache_is_where_the_environment_says(tmp_path: Path, env: dict[str, str], place: str) -> None:
    hf_cache(tmp_path / place, "o/r", {"m.gguf": ONE})
    given = {name: value.format(home=tmp_path) for name, value in env.items()}
    assert len(_scan(tmp_path, **given)) == 1


def test_split_models_are_joined_and_projectors_go_with_their_models(tmp_path: Path) -> None:
    parts = {f"Q8_0/m-{part:05d}-of-00002.gguf": b"GGUF%d" % part for part in (1, 2)}
    lone = {"Q2_K/m-00001-of-00002.gguf": b"GGUF lone"}
    hf_cache(tmp_path / ".cache/huggingface/hub", "o/r", {**parts, **lone, "mmproj-F16.gguf": ONE})
    (model,) = _scan(tmp_path)
    assert [path.name for path in model.paths] == [*(name[5:] for name in parts), "mmproj-F16.gguf"]
    assert model.projector == "mmproj-F16.gguf" and model.sizes == (5, 5, 8)
    assert model.model_ref == f"hf:o/r/Q8_0/m-00001-of-00002.gguf@{COMMIT}"


def test_a_file_of_several_commits_is_told_once_for_that_of_main(tmp_path: Path) -> None:
    hub = tmp_path / ".cache/huggingface/hub"
    for commit in ("d" * 40, "a" * 40, "e" * 40):
        hf_cache(hub, "o/r", {"m.gguf": ONE}, commit=commit, ref="main" if commit[0] == "a" else None)
    hf_cache(hub, "o/r", {"m.gguf": TWO}, commit="f" * 40, ref=None)
    assert [(model.revision[0], model.sha256s) for model in _scan(tmp_path)] == [
        ("a", (sha256(ONE),)),
        ("f", (sha256(TWO),)),
    ]


def test_a_blob_shared_by_repositories_keeps_its_own_checksum(tmp_path: Path) -> None:
    """The file behind the blob is named by its Xet hash, which only looks like a sha256."""
    hub = tmp_path / ".cache/huggingface/hub"
    hf_cache(hub, "o/r", {"m.gguf": ONE})
    blob = hub / "models--o--r" / "blobs" / sha256(ONE)
    shared = hub / "blobs" / "ab" / ("ab" * 32)
    shared.parent.mkdir(parents=True)
    blob.rename(shared)
    blob.symlink_to(os.path.relpath(shared, blob.parent))
    (model,) = _scan(tmp_path)
    assert model.sha256s == (sha256(ONE),)
    (model.paths[0]).unlink()
    (model.paths[0]).symlink_to(shared)
    assert _scan(tmp_path)[0].sha256s == (None,)


def test_a_cache_without_links_tells_no_checksum(tmp_path: Path) -> None:
    snapshot = hf_cache(tmp_path / ".cache/huggingface/hub", "o/r", {"m.gguf": ONE})
    (snapshot / "m.gguf").unlink()
    (snapshot / "m.gguf").write_bytes(ONE)
    (model,) = _scan(tmp_path)
    assert model.sha256s == (None,) and model.size_bytes == len(ONE)


def test_a_name_that_is_no_reference_is_told_by_its_place(tmp_path: Path) -> None:
    snapshot = hf_cache(tmp_path / ".cache/huggingface/hub", "o/r", {"m (1) # ä?.gguf": ONE})
    (model,) = _scan(tmp_path)
    assert refs.parse(model.model_ref) == refs.FileRef(str(snapshot / "m (1) # ä?.gguf"))


def test_a_model_is_found_by_name_as_the_cache_last_saw_it(tmp_path: Path) -> None:
    hub = tmp_path / ".cache/huggingface/hub"
    hf_cache(hub, "o/r", {"m-Q8_0.gguf": ONE, "m-Q4_K_M.gguf": TWO, "mmproj-F16.gguf": THREE})
    hf_cache(hub, "o/r", {"m-Q2_K.gguf": ONE}, commit="d" * 40, ref="v1")

    def named(quant: str | None = None, path: str | None = None, revision: str | None = None) -> str | None:
        model = by_name({}, tmp_path, HfRef("o/r", quant, path, revision))
        return model.model_ref if model is not None else None

    assert named() == f"hf:o/r/m-Q4_K_M.gguf@{COMMIT}"
    assert named("Q8_0") == named(path="m-Q8_0.gguf", revision=COMMIT) == f"hf:o/r/m-Q8_0.gguf@{COMMIT}"
    assert named(revision="v1") == f"hf:o/r/m-Q2_K.gguf@{'d' * 40}"
    assert named("Q6_K") is named(revision="v2") is None
    assert by_name({}, tmp_path, HfRef("o/none")) is None
    model = by_name({}, tmp_path, HfRef("o/r"))
    assert model is not None and model.projector == "mmproj-F16.gguf" and model.sha256s[1] == sha256(THREE)


# --- Ollama ----------------------------------------------------------------------------------


def test_a_model_of_ollama_is_told_by_the_names_it_has_there(tmp_path: Path) -> None:
    models = tmp_path / ".ollama/models"
    ollama(models, "registry.ollama.ai/library/llama3.2/3b", ONE)
    ollama(models, "registry.ollama.ai/library/llama3.2/latest", ONE)
    ollama(models, "registry.ollama.ai/jim/vision/7b", TWO, THREE)
    ollama(models, "hf.co/o/r/Q8_0", THREE)
    found = {model.name: model for model in _scan(tmp_path)}
    assert set(found) == {"llama3.2:3b, llama3.2:latest", "jim/vision:7b", "hf.co/o/r:Q8_0"}
    model = found["jim/vision:7b"]
    assert model.source == "ollama" and model.sha256s == (sha256(TWO), sha256(THREE))
    assert [path.read_bytes() for path in model.paths] == [TWO, THREE]
    assert model.projector == f"sha256-{sha256(THREE)}"
    assert refs.parse(model.model_ref) == refs.FileRef(str(models / "blobs" / f"sha256-{sha256(TWO)}"))


def test_ollama_may_have_another_folder_and_one_of_its_own_user(tmp_path: Path) -> None:
    ollama(tmp_path / "else", "registry.ollama.ai/library/a/1b", ONE)
    ollama(tmp_path / ".ollama/models", "registry.ollama.ai/library/b/1b", TWO)
    ollama(tmp_path / "system/usr/share/ollama/.ollama/models", "registry.ollama.ai/library/c/1b", THREE)
    assert [model.name for model in _scan(tmp_path)] == ["b:1b", "c:1b"]
    assert [model.name for model in _scan(tmp_path, OLLAMA_MODELS=f"{tmp_path}/else")] == ["a:1b", "c:1b"]


@pytest.mark.parametrize(
    "layer",
    [
        {"digest": "sha256:../../../secret"},
        {"digest": "sha256:" + "g" * 64},
        {"digest": "md5:" + "a" * 64},
        {"digest": 7},
        {"digest": None},
        {"digest": "sha256:" + sha256(b"never pulled")},
        {"size": 9},
        {"size": -1},
        {"size": "8"},
        {"mediaType": "application/vnd.ollama.image.tensor"},
    ],
)
def test_a_manifest_of_ollama_that_is_not_as_it_should_be_is_passed_over(
    tmp_path: Path, layer: dict[str, object]
) -> None:
    models = tmp_path / ".ollama/models"
    good = ollama(models, "registry.ollama.ai/library/good/1b", TWO)
    bad = ollama(models, "registry.ollama.ai/library/bad/1b", ONE)
    manifest = json.loads(bad.read_text())
    manifest["layers"][0] |= layer
    bad.write_text(json.dumps(manifest))
    for name, content in {
        "empty": b"",
        "nested": b"[" * 100_000,
        "text": b"\xff",
        "large": good.read_bytes() + b" " * found_files.NOTE_BYTES_MAX,
        "list": b"[]",
    }.items():
        (good.parent / name).write_bytes(content)
    (models / "secret").write_bytes(ONE)
    assert [model.name for model in _scan(tmp_path)] == ["good:1b"]


# --- LM Studio and llama.cpp -----------------------------------------------------------------


def test_models_of_lm_studio_are_found_in_each_of_its_homes(tmp_path: Path) -> None:
    (tmp_path / ".lmstudio-home-pointer").write_text(f"{tmp_path}/pointed\n")
    (tmp_path / ".config/LM Studio").mkdir(parents=True)
    (tmp_path / ".config/LM Studio/settings.json").write_text(
        json.dumps({"downloadsFolder": f"{tmp_path}/chosen"})
    )
    homes = ["chosen", "pointed/models", ".cache/lm-studio/models", ".lmstudio/models"]
    for number, home in enumerate(homes):
        (tmp_path / home / "o/r").mkdir(parents=True)
        (tmp_path / home / "o/r" / f"m{number}.gguf").write_bytes(ONE)
    (tmp_path / "pointed/models/o/r/mmproj-m1-f16.gguf").write_bytes(TWO)
    found = _scan(tmp_path)
    assert [model.name for model in found] == [f"o/r/m{number}.gguf" for number in range(4)]
    assert {(model.source, model.sha256s[0]) for model in found} == {("lm-studio", None)}
    assert [model.projector for model in found] == ["", "mmproj-m1-f16.gguf", "", ""]


@pytest.mark.parametrize("is_old", [False, True])
def test_models_of_llama_cpp_have_the_checksums_of_their_manifests(tmp_path: Path, is_old: bool) -> None:
    cache = tmp_path / ".cache/llama.cpp"
    path = llama_cpp(cache, "o/r", "sub/m-Q8_0.gguf", ONE, projector=("mmproj-F16.gguf", TWO), is_old=is_old)
    llama_cpp(cache, "o/other", "x.gguf", THREE)
    found = {model.name: model for model in _scan(tmp_path)}
    assert set(found) == {"o_r_sub_m-Q8_0.gguf", "o_other_x.gguf"}
    model = found["o_r_sub_m-Q8_0.gguf"]
    assert model.paths == (path, cache / "o_r_mmproj-F16.gguf") and model.projector == "o_r_mmproj-F16.gguf"
    assert model.sha256s == (sha256(ONE), sha256(TWO))
    assert found["o_other_x.gguf"].projector == ""
    path.write_bytes(ONE + b"fetched anew")
    found = {model.name: model for model in _scan(tmp_path)}
    assert found["o_r_sub_m-Q8_0.gguf"].sha256s[0] is None


@pytest.mark.parametrize("env", [{"LLAMA_CACHE": "~/a"}, {"XDG_CACHE_HOME": "~/b"}, {}])
def test_llama_cpp_keeps_its_models_where_the_environment_says(tmp_path: Path, env: dict[str, str]) -> None:
    for place in ("a", "b/llama.cpp", "Library/Caches/llama.cpp"):
        llama_cpp(tmp_path / place, "o/r", f"{place[0]}.gguf", ONE)
    names = [model.name for model in _scan(tmp_path, **env)]
    if "LLAMA_CACHE" in env:
        assert names == ["o_r_a.gguf"]
    else:
        assert names == (["o_r_b.gguf"] if env else []) + ["o_r_L.gguf"]


# --- By content ------------------------------------------------------------------------------


def test_what_is_about_to_be_fetched_is_found_by_its_checksum(tmp_path: Path) -> None:
    hf_cache(tmp_path / ".cache/huggingface/hub", "o/r", {"m-Q8_0.gguf": ONE, "mmproj-F16.gguf": TWO})
    ollama(tmp_path / ".ollama/models", "registry.ollama.ai/library/a/1b", THREE)
    both = _content(tmp_path, ONE, TWO)
    assert both is not None and [path.read_bytes() for path in both.paths] == [ONE, TWO]
    assert both.projector == "mmproj-F16.gguf"
    alone = _content(tmp_path, ONE)
    assert alone is not None and alone.paths == both.paths[:1] and alone.projector == ""
    other = _content(tmp_path, THREE)
    assert other is not None and other.source == "ollama"
    assert _content(tmp_path, b"GGUF") is _content(tmp_path, ONE, THREE) is _content(tmp_path) is None
    assert by_content({}, tmp_path, [sha256(ONE)], [len(ONE) + 1], tmp_path) is None
    assert by_content({}, tmp_path, [sha256(ONE)], [None], tmp_path) is not None


def test_a_program_without_checksums_is_believed_by_the_size_if_nobody_knows_better(tmp_path: Path) -> None:
    (tmp_path / ".lmstudio/models/o/r").mkdir(parents=True)
    (tmp_path / ".lmstudio/models/o/r/m.gguf").write_bytes(ONE)
    ollama(tmp_path / ".ollama/models", "registry.ollama.ai/library/a/1b", b"GGUF two")
    likely = _content(tmp_path, ONE)
    assert likely is not None and (likely.source, likely.sha256s) == ("lm-studio", (None,))
    assert by_content({}, tmp_path, [sha256(ONE)], [None], tmp_path) is None
    llama_cpp(tmp_path / ".cache/llama.cpp", "o/r", "other.gguf", b"GGUF two")
    llama_cpp(tmp_path / "Library/Caches/llama.cpp", "o/r", "m.gguf", ONE)
    sure = _content(tmp_path, ONE)
    assert sure is not None and sure.sha256s == (sha256(ONE),)


# --- Whatever lies there ---------------------------------------------------------------------


def test_links_are_followed_inside_of_the_folder_alone(tmp_path: Path) -> None:
    models = tmp_path / ".lmstudio/models"
    (models / "o/r").mkdir(parents=True)
    (models / "o/r/m.gguf").write_bytes(ONE)
    (models / "o/r/same.gguf").symlink_to("m.gguf")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside/secret.gguf").write_bytes(TWO)
    (models / "o/r/out.gguf").symlink_to(tmp_path / "outside/secret.gguf")
    (models / "o/up.gguf").symlink_to("../../../outside/secret.gguf")
    (models / "folder").symlink_to(tmp_path / "outside")
    (models / "again").symlink_to(models)
    (models / "circle.gguf").symlink_to("circle.gguf")
    (models / "gone.gguf").symlink_to("nothing.gguf")
    assert [model.name for model in _scan(tmp_path)] == ["o/r/m.gguf", "o/r/same.gguf"]
    root = found_files.Root(models)
    assert root.entries(models / "folder") == [] != root.entries(models / "again")
    hub = tmp_path / ".cache/huggingface/hub"
    (hf_cache(hub, "o/r", {}) / "x").mkdir(parents=True)
    (hub / f"models--o--r/snapshots/{COMMIT}/out.gguf").symlink_to(tmp_path / "outside/secret.gguf")
    (hub / "models--o--r/refs/v1").symlink_to(tmp_path / "outside/secret.gguf")
    assert not [model for model in _scan(tmp_path) if model.source == "hf-cache"]
    assert by_name({}, tmp_path, HfRef("o/r", revision="v1")) is None


def test_what_is_no_model_is_passed_over(tmp_path: Path) -> None:
    models = tmp_path / ".lmstudio/models/o/r"
    models.mkdir(parents=True)
    os.mkfifo(models / "pipe.gguf")
    (models / "folder.gguf").mkdir()
    (models / "text.gguf").write_text("hello")
    (models / "empty.gguf").touch()
    (models / "m.gguf.part").write_bytes(ONE)
    (models / "a\nb.gguf").write_bytes(ONE)
    (models / os.fsdecode(b"\xff.gguf")).write_bytes(ONE)
    (models / "x.imatrix.gguf").write_bytes(ONE)
    (models / "good.gguf").write_bytes(ONE)
    assert [model.name for model in _scan(tmp_path)] == ["o/r/good.gguf"]


def test_places_that_are_no_folders_hold_nothing(tmp_path: Path) -> None:
    (tmp_path / ".cache").write_text("a file")
    (tmp_path / ".lmstudio-home-pointer").write_bytes(b"\xff\x00relative")
    (tmp_path / ".ollama").symlink_to(tmp_path / ".ollama")
    env = {"HF_HOME": "relative", "OLLAMA_MODELS": "/dev/null", "LLAMA_CACHE": "/\0"}
    assert _scan(tmp_path, **env) == _scan(tmp_path / "nowhere") == []


def test_a_scan_has_an_end(tmp_path: Path) -> None:
    deep = tmp_path / ".lmstudio/models" / Path(*["d"] * (found_files.DEPTH_MAX + 1))
    deep.mkdir(parents=True)
    (deep / "deep.gguf").write_bytes(ONE)
    (deep.parent.parent / "shallow.gguf").write_bytes(ONE)
    assert [model.paths[0].name for model in _scan(tmp_path)] == ["shallow.gguf"]

    budget = found_files.Budget(entries=3)
    root = found_files.Root(tmp_path, budget)
    for number in range(10):
        (tmp_path / f"{number}.gguf").write_bytes(ONE)
    assert len(list(root.files(tmp_path, depth=1))) <= 3 and budget.entries < 0


@pytest.mark.costly
def test_of_many_models_so_many_are_told(tmp_path: Path) -> None:
    models = tmp_path / ".lmstudio/models/o/r"
    models.mkdir(parents=True)
    for number in range(found_files.MODELS_MAX + 10):
        (models / f"m{number}.gguf").write_bytes(ONE)
    assert len(_scan(tmp_path)) == found_files.MODELS_MAX
