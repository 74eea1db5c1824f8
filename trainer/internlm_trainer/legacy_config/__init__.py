"""InternLM's own configurations, Python files of 2023: read without running them, and turned into a job."""

from internlm_trainer.legacy_config.convert import Conversion, Machine, convert, job_yaml
from internlm_trainer.legacy_config.evaluate import Config, evaluate

__all__ = ["Config", "Conversion", "Machine", "convert", "evaluate", "job_yaml"]
