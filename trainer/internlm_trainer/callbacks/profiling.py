"""A trace of some steps."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from internlm_trainer.callbacks.base import Callback, StepResult
from internlm_trainer.storage import join, write_whole

log = logging.getLogger(__name__)


class Profiling(Callback):
    """Traces the steps of `telemetry.profile` on its ranks; a trace that cannot be written is only told."""

    _profile: profile | None = None

    def start(self) -> None:
        self._begin_before(self.trainer.step + 1)

    def after_step(self, result: StepResult) -> None:
        asked = self.trainer.spec.telemetry.profile
        if self._profile and asked and result.step >= asked.first_step + asked.steps - 1:
            self._end()
        self._begin_before(result.step + 1)

    def close(self) -> None:
        if self._profile:  # the job ends in the middle
            self._end()

    def _begin_before(self, step: int) -> None:
        asked, world = self.trainer.spec.telemetry.profile, self.trainer.world
        if asked and step == asked.first_step and world.rank < asked.ranks:
            activities = [ProfilerActivity.CPU]
            if world.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def _end(self) -> None:
        asked, done, self._profile = self.trainer.spec.telemetry.profile, self._profile, None
        assert asked
        assert done
        name = f"step-{asked.first_step:08d}-rank-{self.trainer.world.rank:05d}.json.gz"
        url = join(asked.path, name)
        try:
            if self.trainer.world.device.type == "cuda":
                torch.cuda.synchronize()
            done.stop()
            with tempfile.TemporaryDirectory() as scratch:
                local = Path(scratch, name)
                done.export_chrome_trace(str(local))
                with write_whole(url) as file:
                    file.write(local.read_bytes())
        except Exception as error:
            log.warning("spec.telemetry.profile: the trace cannot be written to %s: %s", url, error)
        else:
            log.info("traced %d steps: %s", asked.steps, url)
