"""May this model be started again on this node, after how it ended before?

After `intensity_max` crashes within `window_s` a model is refused for `refuse_s`, twice as long
each further time, until it has run well for `window_s`.  Source of the idea: the restart
intensity of Erlang/OTP supervisors.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Limits of restarting."""

    intensity_max: int = 3
    window_s: float = 60.0
    refuse_s: float = 60.0
    refuse_s_max: float = 3600.0


@dataclass(slots=True)
class CrashHistory:
    """Crashes of one model on one node."""

    policy: RestartPolicy = field(default_factory=RestartPolicy)
    crashes_at_s: list[float] = field(default_factory=list)
    refused_until_s: float = 0.0
    refusals: int = 0

    def crashed(self, at_s: float) -> None:
        """Note a crash; the model may be refused from now on."""
        if self.refusals and at_s - self.refused_until_s > self.policy.window_s:
            self.refusals = 0
        recent = [at for at in self.crashes_at_s if at_s - at < self.policy.window_s]
        self.crashes_at_s = [*recent, at_s]
        if len(self.crashes_at_s) >= self.policy.intensity_max:
            wait_s = min(self.policy.refuse_s * 2**self.refusals, self.policy.refuse_s_max)
            self.refused_until_s = at_s + wait_s
            self.refusals += 1
            self.crashes_at_s = []

    def refused_for_s(self, now_s: float) -> float:
        """Return for how many seconds the model is still refused; 0 if it may start."""
        return max(0.0, self.refused_until_s - now_s)
