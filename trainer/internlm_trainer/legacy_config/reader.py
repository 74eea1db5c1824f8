"""Reading fields by path, with their types, until every one of them is accounted for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from internlm_trainer.legacy_config.evaluate import Config

# Fields that change no number here, and what to tell of them.
_WITHOUT_EFFECT: Mapping[str, str] = {
    "DO_ALERT": "",
    "monitor": "alerts come from Prometheus, which reads this job's metrics",
    "alert_address": "alerts come from Prometheus, which reads this job's metrics",
    "cudnn_deterministic": "this model has no convolutions",
    "cudnn_benchmark": "this model has no convolutions",
    "resume_tb_folder": "a resumed job writes into its own folder",
    "ckpt.async_upload": "",
    "ckpt.async_upload_tmp_folder": "",
    "ckpt.oss_snapshot_freq": "there are no snapshots beside checkpoints",
    "ckpt.snapshot_ckpt_folder": "there are no snapshots beside checkpoints",
    "ckpt.stop_file_path": "a job is stopped by Ctrl-C or spec.suspend",
    "ckpt.load_optimizer": "a job always resumes with its optimizer states",
    "ckpt.is_old_api": "",
    "ckpt.auto_save_time": "checkpoints come after steps, not after minutes",
    "data.valid_bsz": "an evaluation looks at training.validationRows rows",
    "data.packed_length": "InternLM ignores it too: a row has micro_bsz x seq_len tokens",
    "data.gradient_accumulation": "InternLM ignores it too: micro_num says it",
    "data.valid_micro_num": "an evaluation looks at training.validationRows rows",
    "data.empty_cache_and_diag_interval": "",
    "data.diag_outlier_ratio": "",
    "data.num_worker": "",
    "grad_scaler.min_scale": "",
    "grad_scaler.max_scale": "",
    "grad_scaler.hysteresis": "every overflow halves fp16's scale here",
    "hybrid_zero_optimizer.zero_overlap_communication": "",
    "hybrid_zero_optimizer.overlap_sync_grad": "",
    "hybrid_zero_optimizer.overlap_sync_param": "",
    "hybrid_zero_optimizer.reduce_bucket_size": "a bucket is a block of the model",
    "lr_scheduler.last_epoch": "",
    "beta2_scheduler.cur_iter": "",
    "model.embed_split_hidden": "",
    "model.parallel_output": "",
    "model.use_flash_attn": "the fastest attention that fits the card is used",
    "model.num_chunks": "",
    "model.sequence_parallel": "",
    "parallel.sequence_parallel": "",
}
# Fields that have one value here: (path, what may stand there, what InternLM does where it is left out).
_FIXED: tuple[tuple[str, tuple[Any, ...], Any], ...] = (
    ("loss.label_smoothing", (0, None), 0),
    ("lr_scheduler.init_steps", (0,), 0),
    ("model.embed_grad_scale", (1,), 1),
    ("model.apply_post_layer_norm", (False,), False),
    ("model.norm_type", ("rmsnorm",), "rmsnorm"),
)


class Reader:
    """Hands out fields by path, and knows in the end which ones nobody asked for."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.notes: list[str] = []
        self._taken: set[str] = set()

    def get(self, path: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value at `path`, of one of these types; `default` where there is none.

        A boolean is no number, and a whole number may stand where a float is meant.
        """
        self._taken.add(path)
        section, _, key = path.rpartition(".")
        values = self.section(section) if section else self.config.values
        if key not in values:
            return default
        value = values[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if kind is object:
            return value
        if isinstance(value, bool) and bool not in kinds:
            self.refuse(path, f"is {value}, which is no {_kinds(kinds)}")
        if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
            value = float(value)
        if value is not None and not isinstance(value, kinds):
            self.refuse(path, f"is {value!r:.80}, which is no {_kinds(kinds)}")
        return default if value is None else value

    def need(self, path: str, kind: type | tuple[type, ...]) -> Any:
        value = self.get(path, kind)
        if value is None:
            self.refuse(path, "must be given")
        return value

    def section(self, path: str) -> Mapping[str, Any]:
        values: Any = self.config.values
        for part in path.split("."):
            values = values.get(part)
            if values is None:
                return {}
            if not isinstance(values, dict):
                self.refuse(path, "must be a dict")
        self._taken.add(path)
        found: Mapping[str, Any] = values
        return found

    def note(self, path: str, sentence: str) -> None:
        self.notes.append(f"{path}: {sentence}")

    def refuse(self, path: str, sentence: str) -> Any:
        self.config.refuse(path, f"{path}: {sentence}")

    def settle_the_rest(self) -> None:
        """Check the fields that must have one value; note those without effect; refuse unknown ones."""
        for path, allowed, default in _FIXED:
            value = self.get(path, object, default)
            if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
                self.refuse(path, f"is {value!r:.80}, which is not supported; only {allowed[0]!r} is")
        for path, value in self._paths():
            if path in self._taken or path in _WITHOUT_EFFECT:
                if _WITHOUT_EFFECT.get(path) and path not in self._taken:
                    self.note(path, f"has no effect: {_WITHOUT_EFFECT[path]}")
            elif "." in path or not (path.isupper() or isinstance(value, str)):
                self.refuse(
                    path, "is not known here, and might change what is computed; take it out if it does not"
                )

    def _paths(self) -> list[tuple[str, Any]]:
        """All fields: top-level names, and the keys of the sections that are known."""
        found: list[tuple[str, Any]] = []
        for name, value in self.config.values.items():
            if name in self._taken and isinstance(value, dict):
                found += [(f"{name}.{key}", item) for key, item in value.items()]
            else:
                found.append((name, value))
        return found


def _kinds(kinds: tuple[type, ...]) -> str:
    words = {int: "whole number", float: "number", str: "text", bool: "boolean", dict: "dict"}
    return " or ".join(words.get(kind, kind.__name__) for kind in kinds)
