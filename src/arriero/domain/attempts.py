"""Has a download come so much further that its attempts count from the first one again?"""


class Progress:
    """Whether a download came further, so that its attempts count from the first one again."""

    def __init__(self, done_bytes: int, step_bytes: int, *, anew_max: int) -> None:
        self._furthest_bytes = done_bytes
        self._step_bytes = step_bytes
        self._anew_left = anew_max

    def look(self, done_bytes: int) -> bool:
        """Return whether the bytes that are there have grown by a step since the last time they had.

        A download that had to begin anew is measured anew, but only so often: a source that changes
        all the time would be fetched for ever.
        """
        if done_bytes < self._furthest_bytes and self._anew_left > 0:
            self._anew_left -= 1
            self._furthest_bytes = done_bytes
            return False
        if done_bytes < self._furthest_bytes + self._step_bytes:
            return False
        self._furthest_bytes = done_bytes
        return True
