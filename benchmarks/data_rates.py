"""How fast text becomes tokens and tokens become rows, each beside what it is measured against, in the same run.

    python benchmarks/data_rates.py tokenize [--tokenizer FILE.model] [--megabytes 64] [--rounds 5]
    python benchmarks/data_rates.py rows [--megatokens 50]

`tokenize`: `internlm tokenize` from a .jsonl file to .bin and .meta on disk, against SentencePiece's own batch encode
of the same texts in memory with as many threads as cores, turn by turn.  `rows`: tokens a second of one RowLoader
from local disk.  The text is the sources of this Python, repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from internlm_trainer.config import SourceSpec
from internlm_trainer.data.bin_format import write_bin
from internlm_trainer.data.loader import RowLoader
from internlm_trainer.data.tokenize import tokenize_files
from internlm_trainer.data.tokenizer import Tokenizer, train_tokenizer

CORES = len(os.sched_getaffinity(0))


def documents(megabytes: float) -> list[str]:
    """Pieces of some thousand characters."""
    pieces: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        pieces += [text[start : start + 3000] for start in range(0, len(text), 3000)]
    random.Random(0).shuffle(pieces)
    kept: list[str] = []
    size = 0
    while size < megabytes * 1e6:
        kept.append(pieces[len(kept) % len(pieces)])
        size += len(kept[-1])
    return kept


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(seconds, CPU seconds of this process and of its children that ended)."""
    start, before = time.perf_counter(), os.times()
    work()
    after = os.times()
    return time.perf_counter() - start, sum(after[:4]) - sum(before[:4])


def tokenize(model: Path | None, megabytes: float, rounds: int) -> None:
    texts = documents(megabytes)
    tokenizer = Tokenizer(model.read_bytes() if model else train_tokenizer(texts[:2000], 32000))
    processor = tokenizer._model
    tokens = sum(len(ids) + 1 for ids in processor.encode(texts, num_threads=CORES))
    with tempfile.TemporaryDirectory() as folder:
        source, out = f"{folder}/text.jsonl", f"{folder}/text.bin"
        Path(source).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        rates: dict[str, list[float]] = {"SentencePiece": [], "internlm tokenize": []}
        for _ in range(rounds):
            for name, work in (
                ("SentencePiece", lambda: processor.encode(texts, num_threads=CORES)),
                ("internlm tokenize", lambda: tokenize_files([source], tokenizer, out, workers=CORES)),
            ):
                for path in Path(folder).glob("text.bin*"):
                    path.unlink()
                seconds, cpu = timed(work)
                rates[name].append(tokens / seconds)
                print(f"{name}: {tokens / seconds:,.0f} tokens/s, {cpu / tokens * 1e9:.0f} ns of CPU a token")
        assert Path(out).stat().st_size
    medians = {name: statistics.median(values) for name, values in rates.items()}
    pairs = [ours / theirs for theirs, ours in zip(*rates.values(), strict=True)]
    print(
        f"{CORES} cores, {tokens:,} tokens, medians {medians}; ratio by rounds {[round(p, 3) for p in pairs]}"
    )
    print(f"ratio of medians {medians['internlm tokenize'] / medians['SentencePiece']:.3f}")


def rows(megatokens: float) -> None:
    random_ = np.random.RandomState(0)
    with tempfile.TemporaryDirectory() as folder:
        url, tokens = f"{folder}/x.bin", 0
        with write_bin(url) as writer:
            while tokens < megatokens * 1e6:
                ids = random_.randint(3, 103168, int(random_.lognormal(6.3, 1.0)) + 5)
                writer.write([1, *ids.tolist()])
                tokens += len(ids) + 1
        for row_tokens, taken in ((2048, 8), (16384, 4), (65536, 1)):
            loader = RowLoader(
                [SourceSpec(path=url)],
                row_tokens=row_tokens,
                seq_len=2048,
                packing="documents",
                seed=1,
                vocab_size=103168,
            )
            steps = int(megatokens * 1e6 / (row_tokens * taken) / 2)
            loader.next_step(taken, range(taken))

            def work(loader: RowLoader = loader, steps: int = steps, taken: int = taken) -> None:
                for _ in range(steps):
                    loader.next_step(taken, range(taken))

            seconds, cpu = timed(work)
            done = steps * taken * row_tokens
            rate, per_cpu = done / seconds / 1e6, done / cpu / 1e6
            print(f"rows of {row_tokens}: {rate:.2f} M tokens/s, {per_cpu:.2f} M tokens a CPU second")
            loader.close()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["tokenize", "rows"])
    parser.add_argument("--tokenizer", type=Path)
    parser.add_argument("--megabytes", type=float, default=64)
    parser.add_argument("--megatokens", type=float, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.what == "tokenize":
        tokenize(options.tokenizer, options.megabytes, options.rounds)
    else:
        rows(options.megatokens)


if __name__ == "__main__":
    main()
