"""The HTML report of the behaviour suite: one file, nothing from outside."""

from html import escape
from itertools import groupby
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin: 2rem 0 .2rem; }
.about { color: #666; margin: 0 0 .6rem; }
.bar { height: .6rem; background: #d33; border-radius: .3rem; overflow: hidden; }
.bar div { height: 100%; background: #2a7; }
details { border-left: .3rem solid #2a7; margin: .25rem 0; padding: .1rem .7rem; background: #f7f7f7; }
details.failed { border-color: #d33; } details.skipped { border-color: #c90; }
summary { cursor: pointer; } .time { color: #888; float: right; }
ol { margin: .4rem 0; padding-left: 1.4rem; } li.failed { color: #b00; font-weight: 600; } li.unreached { color: #aaa; }
pre { background: #fff; border: 1px solid #ddd; overflow-x: auto; padding: .5rem; font-size: 12px; }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd; } details { background: #222; } pre { background: #111; border-color: #333; }
}
"""


def page(scenarios: list[dict[str, Any]], rate: float, lines: list[str]) -> str:
    """Return the report of a run."""
    told = [s for s in scenarios if "feature" in s]
    told.sort(key=lambda s: (s["feature"], s["id"]))
    features = "".join(
        _feature(name, list(group)) for name, group in groupby(told, key=lambda s: s["feature"])
    )
    mute = "".join(_scenario({**s, "name": s["id"], "steps": []}) for s in scenarios if "feature" not in s)
    summary = "<br>".join(escape(line) for line in lines)
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>arriero: scenarios</title>"
        f"<style>{_STYLE}</style><h1>arriero: scenarios</h1><p>{summary}</p>"
        f'<div class=bar><div style="width:{rate:.1f}%"></div></div>{features}'
        + (f"<h2>Not begun</h2>{mute}" if mute else "")
        + "</html>\n"
    )


def _feature(name: str, scenarios: list[dict[str, Any]]) -> str:
    passed = sum(1 for s in scenarios if s["outcome"] == "passed")
    about = escape(" ".join(scenarios[0]["about"].split()))
    return (
        f"<h2>{escape(name)} <span class=time>{passed} of {len(scenarios)}</span></h2><p class=about>{about}</p>"
        + "".join(_scenario(s) for s in scenarios)
    )


def _scenario(scenario: dict[str, Any]) -> str:
    outcome = scenario["outcome"]
    is_past_failure = False
    steps = []
    for step in scenario["steps"]:
        kind = "failed" if step["failed"] else "unreached" if is_past_failure else ""
        is_past_failure = is_past_failure or step["failed"]
        steps.append(
            f'<li class="{kind}">{escape(step["text"])} <span class=time>{step["duration_s"]:.2f} s</span></li>'
        )
    why = f"<pre>{escape(scenario['why'][-6000:])}</pre>" if scenario["why"] else ""
    log = f"<pre>{escape(scenario['log'][-6000:])}</pre>" if scenario["log"] else ""
    return (
        f'<details class="{outcome}"{" open" if outcome == "failed" else ""}><summary>{escape(scenario["name"])}'
        f"{'' if outcome == 'passed' else ' — ' + outcome}<span class=time>{scenario['duration_s']:.1f} s</span></summary>"
        f"<ol>{''.join(steps)}</ol>{why}{log}</details>"
    )
