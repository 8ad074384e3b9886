"""How is it told where a request would go, and why nowhere else?"""

from arriero.contracts.events import TaskPlacing
from arriero.contracts.placements import (
    BeingMade,
    Evicted,
    NodeCandidate,
    PlacementExplained,
    Refused,
    WorkerCandidate,
)
from arriero.domain.placement import Candidate, Refusal, Wants, WorkerView, choose_worker, gib
from arriero.domain.placement_decision import Decision, Evict, Hold, Wake
from arriero.domain.placement_eviction import Eviction, Stage
from arriero.domain.placement_wants import count
from arriero.domain.placement_workers import chosen, worker_rank, worker_refusal
from arriero.orchestrator.provisioning import Job
from arriero.orchestrator.room import RoomFinder
from arriero.orchestrator.views import PoolViews


def explain(views: PoolViews, room: RoomFinder, wants: Wants, running: Job | None) -> PlacementExplained:
    """Return what would happen to a request now, with all numbers; nothing is done.

    `running`: the job that the request would join if no worker takes it.
    """
    known = views.workers.of_model(wants.model_ref)
    worker = choose_worker(known, wants)
    best = views.workers.best(wants)
    if best is not None:
        worker = chosen(best, worker.refused)
    foreseen = room.foresee(wants)
    choice = foreseen.choice
    joined = _being_made(running) if running is not None and worker.worker_id is None else None
    is_new = worker.worker_id is None and joined is None
    needed = foreseen.needed
    then = foreseen.decision if is_new else None
    wakes = then.node if isinstance(then, Wake) else None
    message = worker.message
    if joined is not None:
        message += f"; joins the worker being made{_on(joined.node)}: {joined.message}"
    elif is_new:
        message += f"; {choice.message}{_then(views, then)}"
    return PlacementExplained(
        model_ref=wants.model_ref,
        worker_id=worker.worker_id,
        node=joined.node if joined is not None else choice.node if is_new else None,
        code=choice.code.value if is_new and choice.code is not None else None,
        message=message,
        refused_workers=[_refused(refusal) for refusal in worker.refused],
        refused_nodes=[_refused(refusal) for refusal in choice.refused] if is_new else [],
        needed_mb=needed.full_mb if needed is not None else None,
        needed_least_mb=needed.least_mb if needed is not None else None,
        workers=_workers(known, wants),
        nodes=[_node(views, candidate) for candidate in foreseen.candidates],
        would_join=joined,
        would_evict=_evicted(views, then.plan) if isinstance(then, Evict) else [],
        would_wait_for=then.plan.node if isinstance(then, Hold) else None,
        would_wake=wakes.name if wakes is not None else None,
        wake_cost_s=wakes.wake_cost_s if wakes is not None else None,
    )


def _being_made(job: Job) -> BeingMade:
    if not job.steps:
        return BeingMade(node=None, message="its place is being looked for")
    step = job.steps[-1][1]
    return BeingMade(node=step.node if isinstance(step, TaskPlacing) else step.actor, message=step.message)


def _on(node: str | None) -> str:
    return f" on {node}" if node is not None else ""


def _then(views: PoolViews, then: Decision) -> str:
    if isinstance(then, Evict):
        plan = then.plan
        wait = "once nothing computes there, " if any(each.is_busy for each in _evicted(views, plan)) else ""
        return (
            f"; {wait}{count(len(plan.worker_ids), 'worker')} on {plan.node} would be stopped, "
            f"which frees {gib(plan.freed_mb)} GiB"
        )
    if isinstance(then, Hold):
        return f"; workers on {then.plan.node} that load or end would be waited for"
    if isinstance(then, Wake):
        return f"; {then.node.name} would be woken"
    return ""


def _refused(refusal: Refusal) -> Refused:
    return Refused(candidate=refusal.candidate, code=refusal.code.value, why=refusal.why)


def _workers(known: list[WorkerView], wants: Wants) -> list[WorkerCandidate]:
    able = sorted((view for view in known if worker_refusal(view, wants) is None), key=worker_rank)
    ranks = {view.worker_id: number for number, view in enumerate(able, 1)}
    others = sorted((view for view in known if view.worker_id not in ranks), key=lambda view: view.worker_id)
    found = []
    for view in (*able, *others):
        refusal = worker_refusal(view, wants)
        found.append(
            WorkerCandidate(
                worker_id=view.worker_id,
                node=view.node,
                state=str(view.state),
                rank=ranks.get(view.worker_id),
                slots_free=max(view.slots_free, 0),
                queued=view.queued,
                speed_tokens_per_s=round(view.speed, 2),
                code=refusal[0].value if refusal is not None else None,
                why=refusal[1] if refusal is not None else "",
            )
        )
    return found


def _node(views: PoolViews, candidate: Candidate) -> NodeCandidate:
    view = views.node(candidate.name)
    assert view is not None, "it is a candidate"
    room, refusal = candidate.room, candidate.refusal
    return NodeCandidate(
        name=candidate.name,
        status=str(view.state),
        rank=candidate.rank,
        device=room.device if room is not None else "",
        free_mb=max(room.free_mb, 0) if room is not None else None,
        promised_mb=room.promised_mb if room is not None else 0,
        disk_free_mb=view.disk_free_mb,
        has_model=candidate.has_model,
        is_fetched_from_neighbour=candidate.is_fetched_from_neighbour,
        speed_tokens_per_s=round(candidate.speed, 2),
        load=candidate.load,
        labels=dict(view.labels),
        code=refusal.code.value if refusal is not None else None,
        why=refusal.why if refusal is not None else "",
    )


def _evicted(views: PoolViews, plan: Eviction) -> list[Evicted]:
    here = {occupant.worker_id: occupant for occupant in views.occupants(plan.node)}
    return [
        Evicted(
            worker_id=worker_id,
            node=plan.node,
            model_ref=here[worker_id].model_ref,
            memory_mb=here[worker_id].memory_mb,
            is_busy=here[worker_id].stage is Stage.BUSY,
        )
        for worker_id in plan.worker_ids
    ]
