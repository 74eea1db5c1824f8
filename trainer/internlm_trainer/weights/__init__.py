"""Weights from and to other formats: InternLM's files and Hugging Face's."""
