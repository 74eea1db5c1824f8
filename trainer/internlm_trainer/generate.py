"""What a model says next: tokens drawn from its logits, with a cache of what it has read or without."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from internlm_trainer.errors import UserError
from internlm_trainer.kernels.attention import Documents, sdpa
from internlm_trainer.model.internlm import Block, InternLM, rotary_tables

_COLDEST = 1e-5  # temperature 0 is told apart; this only keeps the division finite
_CHUNK = 512  # tokens read at once after others: bounds the matrix of scores


class Sampling(NamedTuple):
    """How tokens are drawn: nucleus sampling (Holtzman et al., arXiv:1904.09751), as in Transformers."""

    temperature: float = 0.8
    """0 takes the likeliest."""
    top_p: float = 0.8
    top_k: int = 0
    """Draw from so many likeliest; 0 is no limit."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens that were there before (Keskar et al., arXiv:1909.05858)."""
    seed: int = 0


class Sampler:
    """Draws the next tokens of several rows on the logits' device; what a row draws does not depend on the others."""

    def __init__(self, rows: int, vocab: int, length: int, device: torch.device) -> None:
        """length: how many numbers are kept for the draws of a row; then they begin anew."""
        self.temperature, self.top_p, self.penalty = (torch.ones(rows, 1, device=device) for _ in range(3))
        self.top_k = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.seen = torch.zeros(rows, vocab, dtype=torch.bool, device=device)
        self.uniform = torch.zeros(rows, length, device=device)
        self.drawn = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.plain = [True] * rows
        """Which rows take the likeliest token, whatever else is asked."""

    def begin(self, row: int, sampling: Sampling, prompt: Sequence[int]) -> None:
        """Set how a row is drawn, which so far has `prompt`."""
        self.temperature[row], self.top_p[row] = sampling.temperature, sampling.top_p
        self.top_k[row] = sampling.top_k or self.seen.shape[1]
        self.penalty[row], self.drawn[row] = sampling.repetition_penalty, 0
        self.seen[row] = False
        self.seen[row, torch.tensor(prompt, device=self.seen.device)] = True
        numbers = torch.rand(
            self.uniform.shape[1], generator=torch.Generator().manual_seed(sampling.seed)
        )  # from the host, so that a seed is the same on all devices
        self.uniform[row] = numbers
        self.plain[row] = sampling.temperature == 0

    def draw(self, logits: Tensor, plain: bool) -> Tensor:
        """Tokens `[n]` of the first n rows from their logits `[n, vocab]`.

        plain: all of them take the likeliest.
        """
        n = len(logits)
        logits, seen, penalty = logits.float(), self.seen[:n], self.penalty[:n]
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
        words = logits.argmax(-1, keepdim=True)
        if not plain:
            words = torch.where(self.temperature[:n] == 0, words, self._nucleus(logits))
        seen.scatter_(1, words, True)
        self.drawn[:n] += 1
        return words[:, 0]

    def _nucleus(self, logits: Tensor) -> Tensor:
        """`[n, 1]`: the word at a row's number on the line that the kept words' probabilities make."""
        n, size = logits.shape
        scaled = logits / self.temperature[:n].clamp(min=_COLDEST)
        weights, words = scaled.softmax(-1).sort(-1, descending=True)
        weights = weights.masked_fill(torch.arange(size, device=logits.device) >= self.top_k[:n], 0.0)
        weights = weights / weights.sum(-1, keepdim=True)
        weights = weights.masked_fill(weights.cumsum(-1) - weights > self.top_p[:n], 0.0)
        line = weights.cumsum(-1)
        number = self.uniform[:n].gather(1, self.drawn[:n] % self.uniform.shape[1])
        place = (line <= number * line[:, -1:]).sum(-1, keepdim=True)
        return words.gather(1, place.minimum((weights > 0).sum(-1, keepdim=True) - 1))


@torch.no_grad()
def complete(
    model: nn.Module,
    prompt: list[int],
    *,
    stop: int,
    max_tokens: int = 64,
    context: int = 2048,
    sampling: Sampling = Sampling(),
) -> list[int]:
    """Tokens that follow `prompt`, up to and without `stop`; without a cache, so for a model under training too.

    Tokens are drawn on the host, so that ranks that share a sharded model choose alike.
    """
    device, host = next(model.parameters()).device, torch.device("cpu")
    tokens = list(prompt)
    sampler: Sampler | None = None
    for _ in range(max_tokens):
        seen = tokens[-context:]
        logits = model(torch.tensor(seen, device=device), Documents.of((len(seen),), device))[-1:].to(host)
        if sampler is None:
            sampler = Sampler(1, logits.shape[-1], max_tokens, host)
            sampler.begin(0, sampling, prompt)
        word = int(sampler.draw(logits, sampler.plain[0]))
        if word == stop:
            break
        tokens.append(word)
    return tokens[len(prompt) :]


class Request(NamedTuple):
    """A prompt to go on from, up to and without one of the tokens `stop`."""

    prompt: list[int]
    stop: frozenset[int]
    max_tokens: int
    sampling: Sampling


class Made(NamedTuple):
    """A row's next token; none where it ended before one.

    finish: why the row has ended: on one of its stop tokens, or at `max_tokens` or the end of the context.
    """

    row: int
    token: int | None
    finish: Literal["stop", "length"] | None


class _Row:
    """What a row of the cache holds (`read`), and what is to come."""

    def __init__(self) -> None:
        self.read: list[int] = []
        self.next = 0  # made, and not read yet
        self.made = 0
        self.request: Request | None = None


class Decoder:
    """A model that keeps the keys and values of what it reads: `rows` prompts at a time, of up to `context` tokens.

    Rows begin and end independently, each at a position of its own, so that no prompt is padded.  A row that has ended
    keeps what it read, and a prompt that begins like it is read from where they differ on.

    `compiled`, a step has the same shapes whatever the rows hold (for GPUs: the first takes a minute); either way its
    only wait for the device is for the tokens themselves.
    """

    def __init__(self, model: InternLM, context: int, rows: int = 1, compiled: bool = False) -> None:
        self.model, self.context, self.compiled = model, context, compiled
        shape, weight = model.shape, model.norm.weight
        self.head_dim = shape.hidden_size // shape.heads
        size = (rows, shape.kv_heads, context, self.head_dim)
        device = weight.device
        try:
            # Zeros: masked places are multiplied by 0, which makes no number of a NaN.
            self._cache = [
                tuple(torch.zeros(size, device=device, dtype=weight.dtype) for _ in ("keys", "values"))
                for _ in model.blocks
            ]
        except torch.OutOfMemoryError:
            needed = 2 * shape.layers * rows * shape.kv_heads * context * self.head_dim * weight.itemsize
            raise UserError(
                f"{rows} x {context} tokens of context need {needed / 2**30:.1f} GiB beside the model, which the "
                f"device does not have; give a smaller --context"
            ) from None
        self._sampler = Sampler(rows, shape.vocab_size, context, device)
        self._tokens, self._positions, self._active = (
            torch.zeros(rows, dtype=torch.int64, device=device) for _ in range(3)
        )
        self._rows = [_Row() for _ in range(rows)]
        self._step: Callable[[int, int, bool], None] = self._decode
        if compiled:
            kept = [one for pair in self._cache for one in pair]
            kept += [self._tokens, self._positions, self._active]
            kept += [one for one in vars(self._sampler).values() if isinstance(one, Tensor)]
            for one in kept:
                torch._dynamo.mark_static_address(one)  # written in place: a CUDA graph needs to know
            self._step = torch.compile(self._decode, mode="reduce-overhead", fullgraph=True, dynamic=False)

    @property
    def free(self) -> int:
        """Rows that can begin."""
        return sum(row.request is None for row in self._rows)

    def begin(self, request: Request) -> int:
        """Read a prompt into a free row; its number.  A prompt that does not fit is for the caller to refuse."""
        prompt = request.prompt
        assert 0 < len(prompt) <= self.context
        free = [number for number, row in enumerate(self._rows) if row.request is None]
        number = max(free, key=lambda one: _common(self._rows[one].read, prompt))
        row = self._rows[number]
        last = len(prompt) - 1
        known = min(_common(row.read, prompt), last)
        while known < last:
            # What follows others is read in parts, which bounds the matrix of scores; what comes first needs none.
            end = min(known + _CHUNK, last) if known else last
            self._read(number, prompt[known:end], known)
            known = end
        row.read, row.next, row.made, row.request = prompt[:-1], prompt[-1], 0, request
        self._sampler.begin(number, request.sampling, prompt)
        self._tokens[number], self._positions[number], self._active[number] = prompt[-1], len(prompt) - 1, 1
        return number

    def end(self, number: int) -> None:
        """Let a row go, whether it has finished or not."""
        row = self._rows[number]
        row.request, row.read = None, row.read[: self.context - 1]  # idle rows write in the place after
        self._active[number] = 0

    @torch.no_grad()
    def step(self) -> list[Made]:
        """The next token of each row that is under way; rows that finish are let go."""
        busy = [number for number, row in enumerate(self._rows) if row.request]
        if not busy:
            return []
        if self.compiled:
            rows, window = len(self._rows), self.context
        else:
            rows = busy[-1] + 1
            window = 1 + max(len(row.read) for row in self._rows[:rows])
        self._step(rows, min(window, self.context), all(self._sampler.plain[number] for number in busy))
        tokens = self._tokens[:rows].tolist()
        return [self._made(number, tokens[number]) for number in busy]

    def _made(self, number: int, token: int) -> Made:
        row = self._rows[number]
        request = row.request
        assert request
        row.read.append(row.next)
        row.next, row.made = token, row.made + 1
        if token in request.stop:
            made = Made(number, None, "stop")
        elif row.made == request.max_tokens or len(row.read) == self.context:
            made = Made(number, token, "length")
        else:
            return Made(number, token, None)
        self.end(number)
        return made

    def answer(self, request: Request) -> Generator[Made]:
        """One prompt's tokens as they are made, where nothing else is under way."""
        number = self.begin(request)
        finish = None
        try:
            while not finish:
                (made,) = self.step()
                finish = made.finish
                yield made
        finally:
            if not finish:
                self.end(number)

    def generate(self, requests: Sequence[Request]) -> list[list[int]]:
        """The tokens of each prompt, as many at a time as there are rows."""
        answers: list[list[int]] = [[] for _ in requests]
        waiting = iter(range(len(requests)))
        under_way: dict[int, int] = {}
        while True:
            while self.free and (index := next(waiting, None)) is not None:
                under_way[self.begin(requests[index])] = index
            if not under_way:
                return answers
            for made in self.step():
                if made.token is not None:
                    answers[under_way[made.row]].append(made.token)
                if made.finish:
                    del under_way[made.row]

    @torch.no_grad()
    def _read(self, number: int, tokens: list[int], begin: int) -> None:
        """Put the keys and values of `tokens` into a row, which has `begin` already."""
        documents = Documents.of((len(tokens),), self._tokens.device)
        end, positions = begin + len(tokens), documents.positions + begin

        def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            keys[number, :, begin:end], values[number, :, begin:end] = k.transpose(0, 1), v.transpose(0, 1)
            if not begin:
                return sdpa(q, k, v, documents)
            return F.scaled_dot_product_attention(
                q.transpose(0, 1)[None],
                keys[number : number + 1, :, :end],
                values[number : number + 1, :, :end],
                attn_mask=torch.arange(end, device=q.device) <= positions[:, None],
                enable_gqa=q.shape[1] != k.shape[1],
            )[0].transpose(0, 1)

        self._blocks(torch.tensor(tokens, device=self._tokens.device), positions, attend)

    def _decode(self, rows: int, window: int, plain: bool) -> None:
        """Each of the first `rows` rows reads its token, looks at `window` places of the cache, and gets the next."""
        tokens, positions = self._tokens[:rows], self._positions[:rows]
        index = torch.arange(rows, device=tokens.device)
        seen = (torch.arange(window, device=tokens.device) <= positions[:, None])[:, None, None]

        def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            keys[index, :, positions], values[index, :, positions] = k, v
            # The queries that share a key stand where those of different places would: no copy of the keys for each.
            grouped = q.view(rows, k.shape[1], -1, self.head_dim)
            out = F.scaled_dot_product_attention(
                grouped, keys[:rows, :, :window], values[:rows, :, :window], attn_mask=seen
            )
            return out.flatten(1, 2)

        x = self._blocks(tokens, positions, attend)
        made = self._sampler.draw(self.model.head(self.model.norm(x)), plain)
        tokens.copy_(made)
        positions.add_(self._active[:rows]).clamp_(max=self.context - 1)

    def _blocks(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """The model's blocks on tokens, with `attend` for attention: it gets the block's part of the cache, too."""
        cos, sin = rotary_tables(positions, self.head_dim, self.model.shape.rope_base)
        x: Tensor = self.model.embedding(tokens)
        for module, (keys, values) in zip(self.model.blocks, self._cache, strict=True):
            block = cast(Block, module)
            q, k, v = block.before_attention(x, cos, sin)
            x = block.after_attention(x, attend(q, k, v, keys, values))
        return x


def _common(read: list[int], prompt: list[int]) -> int:
    """How many tokens both begin with."""
    return next(
        (place for place, pair in enumerate(zip(read, prompt, strict=False)) if pair[0] != pair[1]),
        min(len(read), len(prompt)),
    )
