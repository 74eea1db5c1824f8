"""A job through every failure at every moment: the operator keeps its rules and comes to rest.

The operator here is `reconcile` and the shell's rule about caches: a plan that does more than note progress
is made on what is there now, any other one may be made on an old view.  It may die between any two actions.
"""

from __future__ import annotations

import copy
from datetime import timedelta

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from operator_world import SETTINGS, World, make_report, message

from internlm_operator import failures, objects
from internlm_operator.plan import Observed
from internlm_operator.reconcile import reconcile
from internlm_operator.times import parse_time

REASONS = ("Error", "UserError", "Diverged", "Stopped")
TERMINAL = ("Succeeded", "Failed")


class JobLife(RuleBasedStateMachine):
    """Rules are what may happen around the operator, and the operator's own steps."""

    @initialize(
        nodes=st.integers(1, 4),
        max_restarts=st.integers(0, 5),
        window=st.sampled_from([60, 3600, 86400]),
        ttl=st.sampled_from([None, 0, 300]),
        suspend=st.booleans(),
    )
    def create(self, nodes: int, max_restarts: int, window: int, ttl: int | None, suspend: bool) -> None:
        extra = {} if ttl is None else {"ttlSecondsAfterFinished": ttl}
        recovery = {"maxRestarts": max_restarts, "windowSeconds": window}
        self.world = World(nodes=nodes, recovery=recovery, suspend=suspend, **extra)
        self.cached: tuple[dict[str, object], Observed] = (copy.deepcopy(self.world.job), Observed(SETTINGS))
        self.terminal: list[object] | None = None
        self.restarts = 0
        self.checkpoint = 0
        self.restarted_at: list[float] = []

    # The operator

    @rule(dies_after=st.none() | st.integers(-1, 6))
    def operator_steps(self, dies_after: int | None) -> None:
        world = self.world
        if world.deleted_job:
            return
        plan = reconcile(*copy.deepcopy(self.cached), world.now)
        if plan.important:
            plan = world.plan()
        elif self.cached[0]["metadata"]["resourceVersion"] != world.job["metadata"]["resourceVersion"]:  # type: ignore[index]
            return  # the status write is refused: the job is not the one that was looked at
        world.carry_out(plan, dies_after)
        if dies_after is not None:
            world.report, world.applied = None, ""

    @rule()
    def caches_catch_up(self) -> None:
        self.cached = copy.deepcopy(self.world.job), self.world.observed()

    # The cluster

    def _pick(self, choice: int) -> str | None:
        names = sorted(self.world.pods)
        return names[choice % len(names)] if names else None

    @rule(choice=st.integers(0, 9))
    def a_worker_starts(self, choice: int) -> None:
        name = self._pick(choice)
        if name and not failures.is_over(self.world.pods[name]):
            self.world.run(failures.index_of(self.world.pods[name]))

    @rule()
    def all_workers_start(self) -> None:
        for pod in self.world.pods.values():
            if not failures.is_over(pod):
                self.world.run(failures.index_of(pod))

    @rule(choice=st.integers(0, 9), reason=st.sampled_from(REASONS), step=st.integers(0, 400))
    def a_worker_fails(self, choice: int, reason: str, step: int) -> None:
        name = self._pick(choice)
        if name and failures.is_running(self.world.pods[name]):
            self.world.end(failures.index_of(self.world.pods[name]), 1, message(reason, "why", step))

    @rule(choice=st.integers(0, 9), code=st.sampled_from([1, 134, 137, 139]))
    def a_worker_crashes(self, choice: int, code: int) -> None:
        name = self._pick(choice)
        if name and failures.is_running(self.world.pods[name]):
            self.world.end(failures.index_of(self.world.pods[name]), code, "Segmentation fault")

    @rule()
    def all_running_workers_complete(self) -> None:
        for pod in self.world.pods.values():
            if failures.is_running(pod):
                self.world.complete(failures.index_of(pod))

    @rule(choice=st.integers(0, 9))
    def a_pod_vanishes(self, choice: int) -> None:
        name = self._pick(choice)
        if name:
            self.world.pods.pop(name)

    @rule(choice=st.integers(0, 9))
    def a_pod_is_evicted(self, choice: int) -> None:
        name = self._pick(choice)
        if name:
            self.world.delete(name)

    @rule()
    def the_kubelets_end_what_is_deleted(self) -> None:
        self.world.reap()

    @rule(seconds=st.sampled_from([1, 3, 20, 100, 4000]))
    def time_passes(self, seconds: int) -> None:
        self.world.wait(seconds)

    @rule(attempt=st.integers(1, 4), step=st.integers(0, 400), checkpoint=st.none() | st.integers(0, 400))
    def a_report_comes(self, attempt: int, step: int, checkpoint: int | None) -> None:
        found = None
        if checkpoint is not None:
            found = {"step": checkpoint, "uri": "s3://b/c", "time": "2026-01-01T00:00:00Z"}
        self.world.tell(make_report(attempt, step, checkpoint=found))

    # The user

    @precondition(lambda self: not self.world.job["metadata"].get("deletionTimestamp"))
    @rule(suspend=st.booleans(), nodes=st.none() | st.integers(1, 4))
    def the_user_edits(self, suspend: bool, nodes: int | None) -> None:
        # The CRD's rules let the gang's size change only while the job is suspended.
        frozen = not self.world.job["spec"]["suspend"]
        self.world.edit(suspend=suspend, **({} if nodes is None or frozen else {"nodes": nodes}))

    @rule()
    def the_user_deletes_the_job(self) -> None:
        # In the foreground: the object stays until its pods are gone.
        if self.world.phase in TERMINAL:
            self.world.job["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"

    # What always holds. That no two attempts' pods meet is checked wherever a pod is made.

    @invariant()
    def a_terminal_condition_never_flips(self) -> None:
        conditions = self.world.status.get("conditions") or []
        verdict = [(c["type"], c["status"], c["reason"]) for c in conditions if c["type"] in TERMINAL]
        if self.terminal is not None:
            assert verdict == self.terminal
        if any(status == "True" for _, status, _ in verdict):
            self.terminal = verdict

    @invariant()
    def restarts_stay_within_their_limit(self) -> None:
        status, recovery = self.world.status, self.world.job["spec"]["recovery"]
        restarts = status.get("restarts", 0)
        assert restarts in (self.restarts, self.restarts + 1), "a restart was lost or counted twice"
        if restarts > self.restarts:
            self.restarted_at.append(self.world.now.timestamp())
        self.restarts = restarts
        # Restarts that share a bucket expire together, up to a 64th of the window early.
        since = self.world.now.timestamp() - recovery["windowSeconds"] * 63 / 64
        assert sum(at > since for at in self.restarted_at) <= recovery["maxRestarts"]

    @invariant()
    def the_checkpoint_never_goes_back(self) -> None:
        step = (self.world.status.get("checkpoint") or {}).get("step", 0)
        assert step >= self.checkpoint
        self.checkpoint = step

    @invariant()
    def attempts_are_numbered_in_order_and_only_the_last_is_open(self) -> None:
        attempts = self.world.status.get("attempts") or []
        numbers = [attempt["number"] for attempt in attempts]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
        assert len(attempts) <= 10
        assert all(attempt.get("endTime") for attempt in attempts[:-1])

    @invariant()
    def a_running_phase_means_a_gang_and_conditions_that_agree(self) -> None:
        status = self.world.status
        if not status:
            return
        values = {c["type"]: c["status"] == "True" for c in status["conditions"]}
        assert values["Running"] == (status["phase"] == "Running")
        assert values["Suspended"] == (status["phase"] == "Suspended")
        assert values["Succeeded"] == (status["phase"] == "Succeeded")
        assert values["Failed"] == (status["phase"] == "Failed")
        assert not (values["Succeeded"] and values["Failed"])

    def teardown(self) -> None:
        """Once nothing fails any more, the job comes to its end, and nothing of it is left to run."""
        world = getattr(self, "world", None)
        if world is None or world.deleted_job or world.job["metadata"].get("deletionTimestamp"):
            return
        world.edit(suspend=False)
        for _ in range(60):
            self._calm_round(world)
            if world.deleted_job or (world.phase in TERMINAL and not world.plan().actions):
                break
        assert world.deleted_job or world.phase in TERMINAL, f"never ends: {world.status}"
        if world.phase == "Succeeded" and self.terminal is None:
            assert len(world.pods) in (0, world.job["spec"]["nodes"])
        assert all(map(failures.is_over, world.pods.values())), "a finished job has a pod that runs"

    def _calm_round(self, world: World) -> None:
        for _ in range(3):
            plan = world.step()
            if world.deleted_job:
                return
        world.reap()
        world.now += timedelta(seconds=plan.wake_after or 0)
        world.step()
        current = str(world.status["attempts"][-1]["number"]) if world.status["attempts"] else ""
        gang = [p for p in world.pods.values() if p["metadata"]["labels"][objects.ATTEMPT_LABEL] == current]
        for pod in gang:
            if not failures.is_over(pod) and not pod["metadata"].get("deletionTimestamp"):
                self.world.complete(failures.index_of(pod))
        assert parse_time(world.status["startTime"]) is not None


JobLife.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_a_job_through_every_failure_at_every_moment = JobLife.TestCase
