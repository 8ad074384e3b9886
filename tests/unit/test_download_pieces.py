"""Are the small decisions of a download right: names, marks, digests, speed, retries?"""

import asyncio
import base64
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from yarl import URL

from arriero.agent.app import provision_limits
from arriero.agent.fetch_http import redirected, told_sha256
from arriero.agent.partial import Mark
from arriero.agent.progress import Job, SpeedMeter
from arriero.agent.retries import AttemptFailed, FailureKind, Retries, RetryLimits
from arriero.agent.routes.model_files import parse_range
from arriero.agent.sources import safe_name
from arriero.contracts.errors import ArrieroError, ErrorCode
from arriero.runtime.clock import SystemClock
from arriero.runtime.entropy import SeededEntropy
from arriero.runtime.settings import Settings

DIGEST = hashlib.sha256(b"llama")
BASE64 = base64.b64encode(DIGEST.digest()).decode()


@given(st.text(max_size=300))
def test_any_address_gives_a_harmless_name(text: str) -> None:
    name = safe_name(f"https://host/{text}")
    assert name.isascii() and name.isprintable() and 0 < len(name) <= 130
    assert name.lower().endswith(".gguf") and not name.startswith(".")
    assert not set(name) & set("/\\\0\n")


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Linked-Etag": f'"{DIGEST.hexdigest()}"'},
        {"Repr-Digest": f"sha-512=:AAAA:, sha-256=:{BASE64}:"},
        {"Digest": f"SHA-256={BASE64}"},
    ],
)
def test_a_digest_is_found(headers: dict[str, str]) -> None:
    assert told_sha256(headers) == DIGEST.hexdigest()


@pytest.mark.parametrize(
    "headers", [{}, {"X-Linked-Etag": '"abc"'}, {"Digest": "sha-256=!!"}, {"Repr-Digest": "sha-256=:AAAA:"}]
)
def test_what_is_no_digest_is_none(headers: dict[str, str]) -> None:
    assert told_sha256(headers) is None


def test_bytes_are_gone_on_with_only_where_they_are_of_the_same_file() -> None:
    etag = Mark(url="u", etag='"1"', size_bytes=10)
    assert etag.is_same_file(Mark(url="u", etag='"1"', size_bytes=10))
    assert etag.is_same_file(Mark(url="u"))
    assert not etag.is_same_file(Mark(url="u", etag='"2"'))
    assert not etag.is_same_file(Mark(url="other", etag='"1"'))
    assert not etag.is_same_file(Mark(url="u", etag='"1"', size_bytes=11))
    assert not Mark(url="u").is_same_file(Mark(url="u"))
    hashed = Mark(url="u", sha256="a")
    assert hashed.is_same_file(Mark(url="moved", sha256="a"))
    assert not hashed.is_same_file(Mark(url="u", etag='"1"', sha256="b"))


def test_speed_is_over_the_last_seconds() -> None:
    meter = SpeedMeter()
    assert meter.rate_bytes_per_s() == 0.0
    for second in range(20):
        meter.add(float(second), second * 1000)
    assert meter.rate_bytes_per_s() == 1000.0
    meter.add(20.0, 0)  # From the start again.
    assert meter.rate_bytes_per_s() == 0.0
    meter.add(21.0, 500)
    assert meter.rate_bytes_per_s() == 500.0


class _HandClock(SystemClock):
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def monotonic_s(self) -> float:
        return self.now_s


def test_what_is_read_from_the_disk_is_no_speed_of_the_line() -> None:
    clock = _HandClock()
    job = Job(
        download_id="d-1", model_ref="demo", clock=clock, interval_s=0.0,
        on_change=lambda _: None, started_unix=0.0,
    )  # fmt: skip
    job.downloading()
    job.verifying()
    for done_bytes in (0, 50_000_000, 100_000_000):
        job.advance(done_bytes, 200_000_000)
        clock.now_s += 0.1
    job.downloading()
    job.advance(101_000_000, 200_000_000)
    assert (job.frame.speed_mbps, job.frame.eta_s) == (0.0, None)
    clock.now_s += 1.0
    job.advance(102_000_000, 200_000_000)
    assert (job.frame.speed_mbps, job.frame.eta_s) == (8.0, 98.0)


@pytest.mark.parametrize(
    ("header", "part"),
    [
        (None, None),
        ("bytes=0-", (0, 100)),
        ("bytes=10-19", (10, 20)),
        ("bytes=10-999", (10, 100)),
        ("bytes=-30", (70, 100)),
        ("bytes=-300", (0, 100)),
        ("bytes=0-1,5-6", None),
        ("bytes=9-3", None),
        ("lines=0-1", None),
        ("bytes=-", None),
    ],
)
def test_ranges(header: str | None, part: tuple[int, int] | None) -> None:
    assert parse_range(header, 100) == part


@pytest.mark.parametrize("header", ["bytes=100-", "bytes=500-600", "bytes=-0"])
def test_ranges_without_a_byte(header: str) -> None:
    with pytest.raises(ValueError, match="no byte"):
        parse_range(header, 100)


@given(st.text(max_size=30), st.integers(0, 10**6))
def test_any_range_stays_within_the_file(header: str, size_bytes: int) -> None:
    try:
        part = parse_range(f"bytes={header}", size_bytes)
    except ValueError:
        return
    assert part is None or 0 <= part[0] < part[1] <= size_bytes


class _Clock(SystemClock):
    """A real clock whose waits are noted and not waited for."""

    def __init__(self) -> None:
        self.waits_s: list[float] = []

    async def sleep_s(self, seconds: float) -> None:
        self.waits_s.append(seconds)


class _Watch:
    def __init__(self) -> None:
        self.attempts: list[int] = []
        self.waits: list[tuple[str, float]] = []

    def attempting(self, attempt: int) -> None:
        self.attempts.append(attempt)

    def waiting(self, reason: str, delay_s: float) -> None:
        self.waits.append((reason, delay_s))


async def _run(kinds: list[FailureKind], attempts: int = 6, retry_after_s: float | None = None) -> _Watch:
    clock, watch = _Clock(), _Watch()
    left = list(kinds)

    async def attempt() -> str:
        await asyncio.sleep(0)
        if not left:
            return "whole"
        raise AttemptFailed("it was so", left.pop(0), retry_after_s)

    retries = Retries(RetryLimits(attempts=attempts), clock, SeededEntropy(3))
    assert await retries.run(attempt, watch, what="fetching m") == "whole"
    assert clock.waits_s == [wait_s for _, wait_s in watch.waits]
    return watch


async def test_delays_are_jittered_and_bounded() -> None:
    watch = await _run([FailureKind.BROKEN] * 5)
    assert watch.attempts == [1, 2, 3, 4, 5, 6]
    assert all(0 <= wait_s < 0.1 * 2**number for number, (_, wait_s) in enumerate(watch.waits))


async def test_retry_after_is_the_least_that_is_waited() -> None:
    watch = await _run([FailureKind.BROKEN], retry_after_s=120.0)
    assert watch.waits == [("it was so", 120.0)]


@pytest.mark.parametrize(
    ("kinds", "code"),
    [
        ([FailureKind.STALLED, FailureKind.STALLED], ErrorCode.DOWNLOAD_TIMEOUT),
        ([FailureKind.BROKEN, FailureKind.STALLED], ErrorCode.DOWNLOAD_FAILED),
        ([FailureKind.STALLED, FailureKind.CORRUPTED], ErrorCode.MODEL_CORRUPTED),
        ([FailureKind.CORRUPTED, FailureKind.BROKEN], ErrorCode.DOWNLOAD_FAILED),
    ],
)
async def test_the_verdict_follows_the_attempts(kinds: list[FailureKind], code: ErrorCode) -> None:
    with pytest.raises(ArrieroError) as failed:
        await _run(kinds, attempts=2)
    assert failed.value.code is code
    told = failed.value.details["attempts"]
    assert [entry["attempt"] for entry in told] == [1, 2]
    assert told[0]["delay_s"] is not None and told[1]["delay_s"] is None


@pytest.mark.parametrize(
    ("here", "location", "there"),
    [
        ("https://a/x", "/y?z=%2F", "https://a/y?z=%2F"),
        ("https://a/x", "https://b/y", "https://b/y"),
        ("http://a/x", "http://b/y", "http://b/y"),
        ("http://a/x", "https://b/y", "https://b/y"),
        ("https://a/x", "http://a/x", None),
        ("https://a/x", "file:///etc/passwd", None),
        ("http://a/x", "ftp://b/y", None),
        ("http://a/x", "http://[broken", None),
    ],
)
def test_redirects_lead_nowhere_weaker(here: str, location: str, there: str | None) -> None:
    if there is not None:
        assert str(redirected(URL(here), location)) == there
        return
    with pytest.raises(AttemptFailed, match="not https"):
        redirected(URL(here), location)


def test_the_settings_reach_the_fetch() -> None:
    limits = provision_limits(Settings(download_connections=7, download_rate_max_mbps=80.0)).fetch
    assert (limits.connections, limits.rate_bytes_per_s) == (7, 10_000_000.0)
