"""What the name of a wheel says, compared with the library that knows all of it."""

import platform
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging import tags
from packaging.utils import InvalidWheelFilename, parse_wheel_filename

from arriero.agent.engine_builds import this_platform
from arriero.domain.engine_builds import Platform
from arriero.domain.wheels import normal_name, parse, public_version, why_not

LINUX = Platform(os="linux", arch="x86_64", python=(3, 12), glibc=(2, 36))
MAC = Platform(os="darwin", arch="arm64", python=(3, 12))
PREFIX = "xllamacpp-2026.10.11549-"


@pytest.mark.parametrize(
    ("tag", "linux", "mac"),
    [
        ("cp310-abi3-manylinux_2_17_x86_64.manylinux2014_x86_64", True, False),
        ("cp310-abi3-linux_x86_64", True, False),
        ("cp310-abi3-manylinux_2_35_x86_64", True, False),
        ("cp310-abi3-manylinux_2_39_x86_64", False, False),
        ("cp310-abi3-manylinux_2_17_aarch64", False, False),
        ("cp310-abi3-musllinux_1_2_x86_64", False, False),
        ("cp310-abi3-macosx_13_0_arm64", False, True),
        ("cp310-abi3-macosx_13_0_x86_64", False, False),
        ("cp310-abi3-macosx_13_0_universal2", False, True),
        ("cp310-abi3-win_amd64", False, False),
        ("cp312-cp312-linux_x86_64", True, False),
        ("cp313-abi3-linux_x86_64", False, False),
        ("cp311-cp311-linux_x86_64", False, False),
        ("cp312-cp312t-linux_x86_64", False, False),
        ("py3-none-any", True, True),
        ("py2-none-any", False, False),
    ],
)
def test_a_wheel_fits_where_it_is_made_for(tag: str, linux: bool, mac: bool) -> None:
    wheel = parse(f"{PREFIX}{tag}.whl")
    assert wheel is not None
    assert [why_not(wheel, LINUX) == "", why_not(wheel, MAC) == ""] == [linux, mac]


def test_names() -> None:
    wheel = parse("xllamacpp-2026.10.11549+cu128-1-cp310-abi3-linux_x86_64.whl")
    assert wheel is not None and (wheel.package, wheel.version) == ("xllamacpp", "2026.10.11549+cu128")
    assert public_version(wheel.version) == "2026.10.11549" == public_version("2026.10.11549")
    assert normal_name("XLlama_CPP") == "xllama-cpp"
    for name in ("", "x.whl", "xllamacpp-1-cp310-abi3.whl", "../x-1-cp310-abi3-any.whl", "a-1-b-c-d.zip",
                 "x-1-cp310-abi3-any.whl\n", ".x-1-cp310-abi3-any.whl", "x/y-1-cp310-abi3-any.whl"):  # fmt: skip
        assert parse(name) is None, name


@given(st.text(alphabet="abcpx0123-_.+/\\\n", max_size=40).map(lambda text: f"{text}.whl"))
def test_no_name_leads_out_of_a_folder_or_is_understood_otherwise_than_by_others(name: str) -> None:
    wheel = parse(name)
    if wheel is None:
        return
    assert "/" not in name and not name.startswith(".") and "\n" not in name
    try:
        package, _, _, found = parse_wheel_filename(name)
    except InvalidWheelFilename:
        return
    assert package == wheel.package
    assert {tag.platform for tag in found} == set(wheel.platforms)


def test_what_fits_here_is_what_pip_would_take() -> None:
    this = this_platform()
    assert (this.python, this.os) == (sys.version_info[:2], platform.system().lower())
    for tag in list(tags.sys_tags())[:400]:
        wheel = parse(f"{PREFIX}{tag}.whl")
        assert wheel is not None
        if tag.interpreter.startswith(("cp", "py3")) and "musl" not in tag.platform:
            assert why_not(wheel, this) == "" or tag.abi not in (
                "abi3",
                "none",
                f"cp{this.python[0]}{this.python[1]}",
            )
