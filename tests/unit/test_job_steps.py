"""What is kept of what a job told, for those who come late?"""

from arriero.contracts.events import TaskDownloading, TaskPlacing
from arriero.domain.placement import Wants
from arriero.orchestrator.provisioning import Job


def test_hours_of_a_download_are_one_step_and_the_rest_is_kept() -> None:
    job = Job(Wants("hf:o/r", None, None, None))
    job.tell(TaskPlacing(node="attic", message="chosen"))
    for count in range(10_000):
        job.tell(TaskDownloading(bytes_downloaded=count, bytes_total=10_000))
    job.tell(TaskPlacing(node="cellar", message="attic refused"))
    job.tell(TaskDownloading(bytes_downloaded=1, bytes_total=10_000))
    assert [type(step) for _, step in job.steps] == [
        TaskPlacing,
        TaskDownloading,
        TaskPlacing,
        TaskDownloading,
    ]
    numbers = [number for number, _ in job.steps]
    # Whoever was told one of the steps in between gets the newest, and nothing twice.
    assert numbers == [1, 10_001, 10_002, 10_003]
    first = job.steps[1][1]
    assert isinstance(first, TaskDownloading) and first.bytes_downloaded == 9_999
