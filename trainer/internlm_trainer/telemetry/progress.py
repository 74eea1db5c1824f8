"""How a run shows itself: a live line on a terminal, a JSON line an event in a pod, a plain line elsewhere."""

from __future__ import annotations

import logging
import math
import os
import sys
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from internlm_trainer.checkpoint import CommittedCheckpoint
from internlm_trainer.telemetry.logs import JsonFormatter
from internlm_trainer.telemetry.report import Reporter
from internlm_trainer.telemetry.sinks import Sinks, Values
from internlm_trainer.telemetry.stragglers import Slowest, Stragglers

log = logging.getLogger(__name__)


def set_up_logging(rank: int) -> None:
    """Rank 0 tells everything, the others only what is wrong."""
    handler: logging.Handler
    if "INTERNLM_REPORT_URL" in os.environ:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(JsonFormatter())
    elif sys.stdout.isatty():
        handler = RichHandler(
            console=CONSOLE, show_path=False, show_level=rank != 0, markup=False, highlighter=None
        )
        handler.setFormatter(logging.Formatter("%(message)s", "%H:%M:%S"))
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING)
    logging.getLogger("internlm_trainer").setLevel(logging.INFO if rank == 0 else logging.WARNING)


CONSOLE = Console()


class Telemetry:
    """Rank 0's view of the run, told to people and to the operator."""

    def __init__(
        self, total_steps: int, start_step: int, attempt: int, reporter: Reporter, sinks: Sinks
    ) -> None:
        self._report: dict[str, Any] = {
            "attempt": attempt,
            "rank": 0,
            "startStep": start_step,
            "step": start_step,
            "totalSteps": total_steps,
            "skippedSteps": 0,
            "checkpointStallSeconds": 0.0,
        }
        self._reporter, self._sinks = reporter, sinks
        self._request, self._requested_at = "", 0
        self._stragglers = Stragglers()
        self._live: Progress | None = None
        if sys.stdout.isatty() and "INTERNLM_REPORT_URL" not in os.environ:
            self._live = Progress(
                TextColumn("[bold]step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[state]}"),
                TextColumn("ETA"),
                TimeRemainingColumn(),
                console=CONSOLE,
            )
            self._task = self._live.add_task("", total=total_steps, completed=start_step, state="")
            self._live.start()

    def begin(self, load_seconds: float) -> None:
        """The first step starts now, so long after all processes found each other."""
        self._report["loadSeconds"] = round(load_seconds, 1)
        self._send()

    def step(self, step: int) -> None:
        """A step is done."""
        if self._live:
            self._live.update(self._task, completed=step)

    def save_asked(self, step: int) -> bool:
        """Whether the operator asks for a checkpoint after the next step, which is heard once; `step` are done."""
        request = self._reporter.checkpoint_request
        if not request or request == self._request:
            return False
        log.info("a checkpoint is asked for: %s", request)
        self._request, self._requested_at = request, step
        return True

    def compared(self, found: Slowest | None) -> None:
        """The ranks' computing times since the last time are known."""
        straggler, known = self._stragglers.look(found), self._report.get("stragglerRank")
        rank, score = (straggler.rank, round(straggler.score, 3)) if straggler else (None, None)
        self._report |= {"stragglerRank": rank, "stragglerScore": score}
        if rank is not None and rank != known:  # once for each time that it becomes one
            log.warning(
                "rank %d is a straggler: it computes %.2f times as long as the median rank, and all wait for it",
                rank,
                score,
                extra={"fields": {"straggler_rank": rank, "straggler_score": score}},
            )

    def measured(self, values: Values) -> None:
        """A step's values are known: show and report them.  docs/telemetry.md says what they are."""
        step, total, tokens = values["step"], self._report["totalSteps"], values["num_consumed_tokens"]
        speed = values["tokens_per_second"]
        eta = (total - step) * (tokens / step) / speed if speed else None
        self._report |= {
            "step": step,
            "tokens": tokens,
            "loss": _finite(values["loss"]),
            "tokensPerSecond": round(speed, 1),
            "tokensPerGpuPerSecond": round(values["tgs"], 1),
            "tflopsPerGpu": float(f"{values['tflops']:.4g}"),
            "etaSeconds": round(eta) if eta is not None else None,
        }
        self._send()
        self._sinks.write(round(step), values)
        if self._live:
            self._show()
        else:
            text = f"step {step}/{total}  loss {values['loss']:.4f}  {_si(speed)} tokens/s"
            text += f"  grad norm {values['grad_norm']:.2f}  lr {values['lr']:.2e}"
            eta_text = "" if eta is None else f"  ETA {_duration(eta)}"
            log.info("%s%s%s", text, eta_text, self._saved(), extra={"fields": _rounded(values)})

    def skipped(self, total: int, last: int) -> None:
        """Updates left out so far, of which step `last`'s is the newest; for the next `measured`."""
        if total > self._report["skippedSteps"] and last > self._report["startStep"]:
            log.warning(
                "step %d: the update was skipped, as its loss or gradient norm is a spike or no number; %d so far",
                last,
                total,
                extra={"fields": {"step": last, "inf_nan_skip_batches": total}},
            )
        self._report["skippedSteps"] = total

    def validated(self, step: int, values: Values) -> None:
        """An evaluation on held-out data is done."""
        loss = values["validation_loss"]
        self._report["validationLoss"] = _finite(loss)
        self._send()
        self._sinks.write(step, values)
        log.info("validation loss %.4f", loss, extra={"fields": _rounded({"step": step, **values})})

    def compared_float8(self, step: int, values: Values) -> None:
        """Training in float8 was compared with bf16."""
        self._sinks.write(step, values)
        log.info(
            "fp8 beside bf16: loss %+.3f%%, cosine of the gradients %.4f",
            100 * values["fp8_loss_difference"],
            values["fp8_gradient_cosine"],
            extra={"fields": _rounded({"step": step, **values})},
        )

    def saved(
        self, committed: CommittedCheckpoint, seconds: float | None = None, stall: float | None = None
    ) -> None:
        """A checkpoint is committed, after `seconds`, for `stall` of which training stood still; or, without
        them, was resumed from."""
        self._report["checkpoint"] = {
            "step": committed.step,
            "uri": committed.uri,
            "time": committed.time,
            "bytes": committed.bytes,
            "digest": committed.digest,
            "verified": committed.verified,
        }
        self._report["failedSaves"] = 0
        self._report["checkpointStallSeconds"] += stall or 0.0
        if committed.step > self._requested_at and self._request:
            self._report["checkpointRequest"] = self._request
        self._report["step"] = max(self._report["step"], committed.step)
        self._send()
        if seconds is not None and stall is not None:
            numbers = {
                "checkpoint_step": committed.step,
                "checkpoint_size": committed.bytes,
                "save_time": seconds,
                "checkpoint_stall": stall,
                "failed_saves": 0,
            }
            self._sinks.write(committed.step, numbers)
            if not self._live:
                log.info(
                    "saved %s (%sB in %.1f s, checkpoint stall %.3f s)",
                    committed.uri,
                    _si(committed.bytes),
                    seconds,
                    stall,
                    extra={"fields": _rounded({"step": committed.step, **numbers})},
                )
        if self._live:
            self._show()

    def save_failed(self, step: int, failures: int) -> None:
        """The save of a step failed, the `failures`-th in a row; the log has its reason."""
        self._report["failedSaves"] = failures
        self._send()
        self._sinks.write(step, {"failed_saves": failures})

    def close(self) -> None:
        if self._live:
            self._live.stop()
        self._reporter.close()
        self._sinks.close()

    def _send(self) -> None:
        self._reporter.send(dict(self._report))

    def _saved(self) -> str:
        checkpoint = self._report.get("checkpoint")
        return f"  checkpoint {checkpoint['step']}" if checkpoint else ""

    def _show(self) -> None:
        assert self._live
        loss, speed = self._report.get("loss"), self._report.get("tokensPerSecond")
        text = (f"loss {loss:.3f}" if loss is not None else "") + (f"  {_si(speed)} tok/s" if speed else "")
        self._live.update(self._task, state=text + self._saved())


class Silence:
    """The telemetry of the ranks that say nothing."""

    def begin(self, load_seconds: float) -> None: ...
    def step(self, step: int) -> None: ...
    def save_asked(self, step: int) -> bool:  # noqa: ARG002
        return False

    def compared(self, found: Slowest | None) -> None: ...
    def measured(self, values: Values) -> None: ...
    def skipped(self, total: int, last: int) -> None: ...
    def validated(self, step: int, values: Values) -> None: ...
    def compared_float8(self, step: int, values: Values) -> None: ...
    def saved(
        self, committed: CommittedCheckpoint, seconds: float | None = None, stall: float | None = None
    ) -> None: ...
    def save_failed(self, step: int, failures: int) -> None: ...
    def close(self) -> None: ...


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _rounded(values: Values) -> dict[str, float | None]:
    """Values with as many digits as mean something; a number that is none is null, as JSON wants it."""
    return {
        name: value if isinstance(value, int) else _finite(float(f"{value:.6g}"))
        for name, value in values.items()
    }


def _si(number: float) -> str:
    units = ["", "k", "M", "G", "T"]
    while abs(number) >= 1000 and len(units) > 1:
        number /= 1000
        del units[0]
    return f"{number:.3g}{units[0]}" if units[0] else f"{number:.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m" if hours else f"{minutes}m{rest:02}s"
