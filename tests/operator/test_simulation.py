"""A job through every failure at every moment: the operator keeps its rules and comes to rest.

The operator here is `reconcile` and the shell's rules about caches: a plan that begins or ends an attempt is made
on what is there now, any other one may be made on an old view, in which the operator's own writes are, and its status
is refused if the job has changed since.  It may die between any two actions, and begins by reading all then.
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from datetime import timedelta
from typing import Any

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import initialize, invariant, precondition, rule
from operator_happenings import FOUND, Happenings
from operator_world import SETTINGS, START, World

from internlm_operator import failures, objects
from internlm_operator.api import Goodput, RecoverySpec
from internlm_operator.goodput import KINDS, total
from internlm_operator.plan import Create, Delete, Observed, Plan
from internlm_operator.reconcile import reconcile
from internlm_operator.recovery import CLUSTERS
from internlm_operator.times import parse_time

TERMINAL = ("Succeeded", "Failed")
LIMITS: tuple[dict[str, object], ...] = (
    {},
    {"activeDeadlineSeconds": 4000},
    {"startupDeadlineSeconds": 60},
    {"cleanPodPolicy": "All", "startupDeadlineSeconds": 1},
)
EVALUATIONS: tuple[dict[str, object], ...] = (
    {},
    {"evaluation": {"text": ["s3://b/text"]}},
    {"evaluation": {"text": ["s3://b/text"], "everySteps": 100}},
)
# A night's run simulates thousands: see CONTRIBUTING.md.
JOBS = int(os.environ.get("INTERNLM_SIMULATED_JOBS", "150"))


def version_of(job: dict[str, Any]) -> str:
    return str(job["metadata"]["resourceVersion"])


class JobLife(Happenings):
    """Rules are what may happen around the operator, and the operator's own steps."""

    @initialize(
        nodes=st.integers(1, 4),
        max_restarts=st.integers(0, 5),
        max_attempts=st.integers(1, 5),
        window=st.sampled_from([60, 3600, 86400]),
        ttl=st.sampled_from([None, 0, 300]),
        suspend=st.booleans(),
        limits=st.sampled_from(LIMITS),
        evaluation=st.sampled_from(EVALUATIONS),
    )
    def create(
        self,
        nodes: int,
        max_restarts: int,
        max_attempts: int,
        window: int,
        ttl: int | None,
        suspend: bool,
        limits: dict[str, object],
        evaluation: dict[str, object],
    ) -> None:
        extra = limits if ttl is None else limits | {"ttlSecondsAfterFinished": ttl}
        recovery = {
            "maxRestarts": max_restarts,
            "maxAttemptsWithoutProgress": max_attempts,
            "windowSeconds": window,
        }
        self.world = World(nodes=nodes, recovery=recovery, suspend=suspend, **extra, **evaluation)
        self.cached: tuple[dict[str, Any], Observed] = (copy.deepcopy(self.world.job), Observed(SETTINGS))
        self.terminal: list[tuple[str, str, str]] | None = None
        self.restarts = 0
        self.starts: dict[int, int] = {}
        self.checkpoint = self.checkpoint_of = self.evaluated = 0
        self.furthest = 0
        self.committed: dict[int, int] = {}
        self.formed = False
        self.restarted_at: list[float] = []
        self.own_failures = self.counted = 0
        self.ended: set[int] = set()
        self.person_looked = self.status_edited = self.end_edited = False
        self.ledger = Goodput()

    # The operator

    @rule(dies_after=st.none() | st.integers(-1, 6))
    def operator_steps(self, dies_after: int | None) -> None:
        world = self.world
        if world.deleted_job:
            return
        job, observed = self.cached
        plan = reconcile(copy.deepcopy(job), copy.deepcopy(observed), world.now)
        if plan.decisive:
            self.caches_catch_up()
            (job, _), plan = self.cached, world.plan()
        elif plan.status is not None and version_of(job) != version_of(world.job):
            self.caches_catch_up()  # the write is refused
            return
        world.carry_out(plan, dies_after, job)
        if dies_after is not None:
            world.report, world.applied = None, ""
            self.caches_catch_up()
        else:
            self._remember(plan)

    def _remember(self, plan: Plan) -> None:
        """Put the answers to the operator's own writes into its caches."""
        job, observed = self.cached
        if plan.status is not None:
            job = copy.deepcopy(self.world.job)
        names = {a.object["metadata"]["name"] for a in plan.actions if isinstance(a, Create)}
        names |= {a.name for a in plan.actions if isinstance(a, Delete)}
        kept = [pod for pod in observed.pods if pod["metadata"]["name"] not in names]
        kept += [copy.deepcopy(pod) for name, pod in self.world.pods.items() if name in names]
        self.cached = job, replace(observed, pods=kept, applied=self.world.applied)

    @rule()
    def caches_catch_up(self) -> None:
        self.cached = copy.deepcopy(self.world.job), self.world.observed()

    @rule()
    def a_gang_comes_to_run(self) -> None:
        """All that it takes, so that many gangs may come and go in one life."""
        world = self.world
        for _ in range(6):
            if world.deleted_job:
                return
            plan = world.step()
            self.caches_catch_up()
            self.restarts_without_progress_stay_within_their_limits()  # a deadline may pass in the next round
            world.reap()
            world.wait(plan.wake_after or 0)
        self.all_workers_start()

    # The user

    @rule(is_known=st.booleans())
    def the_description_is_one_of_another_version_or_not(self, is_known: bool) -> None:
        self.world.job["spec"].pop("optimiser", None)
        self.world.edit(**({} if is_known else {"optimiser": "adam"}))

    @precondition(lambda self: not self.world.job["metadata"].get("deletionTimestamp"))
    @rule(suspend=st.booleans(), nodes=st.none() | st.integers(1, 4))
    def the_user_edits(self, suspend: bool, nodes: int | None) -> None:
        # The CRD's rules let the gang's size change only while the job is suspended.
        frozen = not self.world.job["spec"]["suspend"]
        self.person_looked |= not frozen
        self.world.edit(suspend=suspend, **({} if nodes is None or frozen else {"nodes": nodes}))

    @precondition(lambda self: self.world.status and not self.end_edited and not self._is_gone())
    @rule(choice=st.integers(0, 99), how=st.sampled_from(["taken out", "emptied", "turned"]))
    def somebody_edits_the_status(self, choice: int, how: str) -> None:
        """A field is taken out or emptied, or a condition turned; the operator sees it before anything else."""
        world, status = self.world, copy.deepcopy(self.world.status)
        # Of a job that has finished, two of three places say so.
        self.end_edited = world.phase in TERMINAL
        name = sorted(status)[choice % len(status)]
        if how == "turned":
            turned = status["conditions"][choice % len(status["conditions"])]
            turned["status"] = "False" if turned["status"] == "True" else "True"
        elif how == "emptied":
            status[name] = type(status[name])()
        else:
            del status[name]
        world.edit_status(status)
        for _ in range(2):  # the first may still wait for a worker that failed by itself
            world.wait(20)
            world.step()
        self.caches_catch_up()
        self._learn_anew()

    def _is_gone(self) -> bool:
        return self.world.deleted_job or bool(self.world.job["metadata"].get("deletionTimestamp"))

    def _learn_anew(self) -> None:
        """What the operator cannot know any more is not expected of it; but what has ended has ended."""
        status = self.world.status
        self.status_edited = True
        self.restarts, self.restarted_at = status.get("restarts", 0), []
        self.counted, self.own_failures = status.get("attemptsWithoutProgress", 0), 0
        self.ended = {number for number, attempt in self.attempts().items() if attempt.get("endTime")}
        self.furthest = self.checkpoint = self.checkpoint_of = self.evaluated = 0
        self.committed, self.formed = {}, False
        self.ledger = Goodput.model_validate(status["goodput"])
        if self.terminal is not None:
            verdict = self._verdict()
            assert [one[:2] for one in verdict] == [one[:2] for one in self.terminal]
            self.terminal = verdict

    @rule()
    def the_user_deletes_the_job(self) -> None:
        # In the foreground: the object stays until its pods are gone.
        if self.world.phase in TERMINAL:
            self.world.job["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"

    # What always holds. That no two attempts' pods meet is checked wherever a pod is made.

    @invariant()
    def a_terminal_condition_never_flips(self) -> None:
        verdict = self._verdict()
        if self.terminal is not None:
            assert verdict == self.terminal
        if any(status == "True" for _, status, _ in verdict):
            self.terminal = verdict

    def _verdict(self) -> list[tuple[str, str, str]]:
        conditions = self.world.status.get("conditions") or []
        return [(c["type"], c["status"], c["reason"]) for c in conditions if c["type"] in TERMINAL]

    @invariant()
    def a_pod_that_is_not_valid_ends_only_a_job_whose_pods_never_were(self) -> None:
        self.formed |= any(attempt.get("formed") for attempt in self.attempts().values())
        assert not (self.formed and ("Failed", "True", "InvalidTemplate") in self._verdict())
        assert ("Failed", "True", "PolicyDenied") not in self._verdict()

    @invariant()
    def restarts_without_progress_stay_within_their_limits(self) -> None:
        status, recovery = self.world.status, self.world.job["spec"]["recovery"]
        furthest = max([status.get("checkpoint", {}).get("step", 0), *self._starts()])
        # A person's edit counts once the operator has seen it, by which time its own counts are gone.
        seen = (
            self.person_looked
            and not status.get("attemptsWithoutProgress")
            and not status.get("recentRestarts")
        )
        committed = {number: one.get("checkpointStep") or 0 for number, one in self.attempts().items()}
        newer = any(step > self.committed.get(number, 0) for number, step in committed.items())
        if furthest > self.furthest or newer or seen:
            self.restarted_at, self.own_failures, self.person_looked = [], 0, False
            self.counted = status.get("attemptsWithoutProgress", 0)
        self.furthest, self.committed = max(furthest, self.furthest), committed
        for attempt in status.get("attempts") or []:
            if attempt.get("endTime") and attempt["number"] not in self.ended:
                self.ended.add(attempt["number"])
                if attempt.get("class") and self.world.phase != "Failed":
                    self._expect_restart(attempt)
        assert status.get("restarts", 0) == self.restarts, "a restart was lost or counted twice"
        # Restarts that share a bucket expire together, up to a 64th of the window early.
        since = self.world.now.timestamp() - recovery["windowSeconds"] * 63 / 64
        assert sum(at > since for at in self.restarted_at) <= recovery["maxRestarts"]
        assert self.own_failures < recovery["maxAttemptsWithoutProgress"]
        assert self.counted + self.own_failures >= status.get("attemptsWithoutProgress", 0)

    def _expect_restart(self, attempt: dict[str, Any]) -> None:
        self.restarts += 1
        failure = self.world.status["lastFailure"]
        assert failure["action"] != "Fail"
        assert (failure["attempt"], failure["class"]) == (attempt["number"], attempt["class"])
        if attempt["class"] != "Preemption" and attempt.get("checkpointStep") is None:
            ended = parse_time(attempt["endTime"])
            assert ended is not None
            self.restarted_at.append(ended.timestamp())
            self.own_failures += attempt["class"] not in CLUSTERS

    def _starts(self) -> list[int]:
        return [a.get("startStep") or 0 for a in self.world.status.get("attempts") or []]

    @invariant()
    def the_ledger_adds_up_to_the_time_and_takes_nothing_back(self) -> None:
        status = self.world.status
        if not status:
            return
        ledger = Goodput.model_validate(status["goodput"])
        as_of = parse_time(ledger.as_of)
        assert as_of is not None
        assert total(ledger) == (as_of - START).total_seconds()
        assert all(getattr(ledger, kind) >= getattr(self.ledger, kind) for kind in KINDS)
        self.ledger = ledger

    @invariant()
    def the_last_failure_is_explained_and_its_node_is_left_out_for_a_while_only(self) -> None:
        status = self.world.status
        failure = status.get("lastFailure")
        if failure is not None:
            assert failure["class"]
            assert failure["evidence"]
            assert (failure["action"] == "Fail") <= (self.world.phase == "Failed")
            assert failure.get("lostSteps", 0) >= 0
            if failure["action"] == "GangRestartAvoidingNode" and not self.status_edited:
                assert (
                    failure["node"] in [e["node"] for e in status["excludedNodes"]]
                    or len(status["attempts"]) > 1
                )
        for attempt in status.get("attempts") or []:
            assert len(attempt.get("excludedNodes") or []) <= 1, "the cap of a few nodes is one"

    @invariant()
    def the_checkpoint_never_goes_back_but_by_an_attempt_that_began_before_it(self) -> None:
        step = (self.world.status.get("checkpoint") or {}).get("step", 0)
        starts = {number: one["startStep"] for number, one in self.attempts().items() if "startStep" in one}
        if step < self.checkpoint:
            assert any(n > self.checkpoint_of and start < self.checkpoint for n, start in starts.items())
        if step != self.checkpoint:
            self.checkpoint, self.checkpoint_of = step, max(starts, default=0)

    @invariant()
    def attempts_in_a_row_that_do_no_step_are_further_and_further_apart(self) -> None:
        attempts = list(self.attempts().values())
        for before, last, following in zip(attempts, attempts[1:], attempts[2:], strict=False):
            if _did_nothing(before) and _did_nothing(last) and "gang" not in following:
                ended, began = parse_time(last["endTime"]), parse_time(following["startTime"])
                assert ended is not None
                assert began is not None
                assert (began - ended).total_seconds() >= RecoverySpec().backoff_seconds

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
        stages = ("Queued", "Starting", "Running", "Suspended", "Succeeded", "Failed")
        assert sum(values[type] for type in stages) <= 1, "a job is in one stage at most"

    @invariant()
    def at_most_one_evaluation_is_under_way_and_it_is_in_the_status(self) -> None:
        running = [pod for pod in self.world.evaluations.values() if not failures.is_over(pod)]
        assert len(running) <= 1
        state = self.world.status.get("evaluation") or {}
        assert state.get("evaluatedStep", 0) >= self.evaluated
        self.evaluated = state.get("evaluatedStep", 0)

    def teardown(self) -> None:
        """Once nothing fails any more, the job comes to its end, and nothing of it is left to run."""
        world = getattr(self, "world", None)
        if world is None or world.deleted_job or world.job["metadata"].get("deletionTimestamp"):
            return
        world.job["spec"].pop("optimiser", None)
        world.refused = None
        world.edit(suspend=False)
        # One that is complete and deleted would leave a job that succeeds with fewer pods than it had.
        world.reap()
        for _ in range(60):
            self._calm_round(world)
            if world.deleted_job or (world.phase in TERMINAL and not world.plan().actions):
                break
        assert world.deleted_job or world.phase in TERMINAL, f"never ends: {world.status}"
        if world.phase == "Succeeded" and self.terminal is None:
            assert len(world.pods) in (0, world.job["spec"]["nodes"])
        world.reap()
        pods = [*world.pods.values(), *world.evaluations.values()]
        assert all(map(failures.is_over, pods)), "a finished job has a pod that runs"

    def _calm_round(self, world: World) -> None:
        for _ in range(3):
            plan = world.step()
            if world.deleted_job:
                return
        world.reap()
        world.end_evaluation(0, FOUND)
        world.now += timedelta(seconds=plan.wake_after or 0)
        world.step()
        current = str(world.status["attempts"][-1]["number"]) if world.status["attempts"] else ""
        gang = [p for p in world.pods.values() if p["metadata"]["labels"][objects.ATTEMPT_LABEL] == current]
        for pod in gang:
            if not failures.is_over(pod) and not pod["metadata"].get("deletionTimestamp"):
                self.world.complete(failures.index_of(pod))
        assert parse_time(world.status["startTime"]) is not None


def _did_nothing(attempt: dict[str, Any]) -> bool:
    return bool(attempt.get("class")) and (attempt.get("endStep") or 0) <= (attempt.get("startStep") or 0)


JobLife.TestCase.settings = settings(max_examples=JOBS, stateful_step_count=40, deadline=None)
test_a_job_through_every_failure_at_every_moment = JobLife.TestCase
