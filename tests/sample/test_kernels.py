"""The sampling kernels against the torch code, token for token: in the interpreter by default, and on a GPU."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quire.core.contracts.sampler import SamplingBatch
from quire.core.sample.filters import apply_filters
from quire.core.sample.inputs import SamplingColumns
from quire.core.sample.kernels.argmax_kernel import launch_argmax
from quire.core.sample.kernels.launch_sample import launch_sample
from quire.core.sample.kernels.logprobs_kernel import launch_logsumexp_and_rank
from quire.core.sample.kernels.workspace import Tiles, Workspace
from quire.core.sample.noise import gumbel
from quire.core.sample.sampler import GumbelSampler

CPU = torch.device("cpu")
TINY = Tiles(groups_per_chunk=2, group_size=8, tile_size=8, num_parts=2, max_candidates=32, max_topk=12)
VOCAB = 61  # of four chunks of 16
PARAMS = [
    {"temperature": 0.0, "top_k": 3, "top_p": 0.5},
    {},
    {"temperature": 0.8, "top_p": 0.95},
    {"temperature": 1.3, "top_p": 0.3},
    {"min_p": 0.05},
    {"temperature": 0.7, "top_p": 0.6, "min_p": 0.3},
    {"top_k": 1},
    {"top_k": 50},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.5, "top_k": 100, "top_p": 0.5, "min_p": 0.02},
    {"top_k": 400, "top_p": 0.9},
    {"top_p": 1e-4},
]


def columns_of(params: list[dict], seed: int, device: str) -> SamplingColumns:
    def column(name: str, default: float, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor([each.get(name, default) for each in params], dtype=dtype, device=device)

    gen = torch.Generator().manual_seed(seed)
    n = len(params)
    return SamplingColumns(
        column("temperature", 1.0, torch.float32),
        column("top_k", 0, torch.int32),
        column("top_p", 1.0, torch.float32),
        column("min_p", 0.0, torch.float32),
        torch.randint(-(2**63), 2**63 - 1, (n,), generator=gen).to(device),
        torch.randint(0, 2**31 - 1, (n,), generator=gen, dtype=torch.int32).to(device),
    )


def sampling_gaps(logits: torch.Tensor, columns: SamplingColumns, tokens: torch.Tensor) -> torch.Tensor:
    """By how much each token falls short of the best allowed one (noised), in float64; infinite where not allowed.

    The filters get a little slack, so that a token on their edge counts by its noise alone.
    """
    c = columns
    random = c.temperature > 0
    x = logits.double() / torch.where(random, c.temperature, 1.0).double()[:, None]
    noise = gumbel(c.seed, c.position.long(), logits.shape[1]).double() * random[:, None]
    short = []
    for slack in (-1e-5, 1e-5):
        top_p = torch.where(c.top_p < 1, c.top_p.double() + slack, 2.0).clamp(min=1e-9)
        min_p = c.min_p.double() * (1 - slack)
        batch = SamplingBatch(
            c.temperature, torch.where(random, c.top_k, 0), top_p, min_p, c.seed, c.position, True, True, True, True
        )
        noised = torch.where(random[:, None], apply_filters(x.clone(), batch), x) + noise
        short.append(noised.amax(-1) - noised.gather(-1, tokens.long()[:, None])[:, 0])
    return torch.minimum(*short)


def sample_torch(logits: torch.Tensor, c: SamplingColumns) -> torch.Tensor:
    batch = SamplingBatch(
        c.temperature, c.top_k, c.top_p, c.min_p, c.seed, c.position.long(), True, True, True, True
    )  # fmt: skip
    random = c.temperature > 0
    x = logits.float() / torch.where(random, c.temperature, 1.0)[:, None]
    noised = apply_filters(x, batch) + gumbel(c.seed, c.position.long(), logits.shape[1])
    return torch.where(random[:, None], noised, logits.float()).argmax(-1).int()


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**31),
    spread=st.sampled_from([0.1, 1.0, 4.0, 20.0]),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 12, 30, 100]),
    top_p=st.sampled_from([1.0, 0.95, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
    coarse=st.booleans(),
)
def test_sampling_is_the_torch_code(
    seed: int, spread: float, temperature: float, top_k: int, top_p: float, min_p: float, coarse: bool
) -> None:
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(seed)) * spread
    if coarse:  # many ties
        logits = logits.round()
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    columns = columns_of([params, {"temperature": 0.9, "top_p": 0.8}], seed, "cpu")
    out = torch.full((2,), -1, dtype=torch.int32)
    launch_sample(logits, columns, Workspace(2, VOCAB, CPU, TINY), out)
    expected = sample_torch(logits, columns)
    assert torch.equal(out, expected) or sampling_gaps(logits, columns, out).max() < 1e-5


@pytest.mark.parametrize(
    "params", [{"top_k": 5, "top_p": 0.9}, {"top_k": 40, "top_p": 0.4}, {"top_p": 0.7}, {}], ids=str
)
def test_masked_logits_are_never_sampled(params: dict) -> None:
    logits = torch.full((1, VOCAB), float("-inf"))
    logits[0, [3, 40, 58]] = torch.tensor([0.0, 0.5, 0.2])
    for seed in range(3):
        columns, out = columns_of([params], seed, "cpu"), torch.full((1,), -1, dtype=torch.int32)
        launch_sample(logits, columns, Workspace(1, VOCAB, CPU, TINY), out)
        assert out.item() == sample_torch(logits, columns).item()


def test_more_equals_than_candidates() -> None:
    logits = torch.zeros(1, VOCAB)
    columns, out = columns_of([{"top_k": 2, "top_p": 0.5}], 5, "cpu"), torch.full((1,), -1, dtype=torch.int32)
    launch_sample(logits, columns, Workspace(1, VOCAB, CPU, TINY), out)
    assert out.item() == sample_torch(logits, columns).item()


def table_of(device: str) -> tuple[SamplingColumns, torch.Tensor, torch.Tensor]:
    """Columns of a table of four rows and padding, its tokens, and logits rows of rows 2, 0, padding, padding."""
    columns = columns_of([{}, {"top_k": 4}, {"top_p": 0.9}, {}, {"temperature": 0.0}], 1, device)
    columns.position.copy_(torch.tensor([3, 4, 5, 6, 0]))
    tokens = torch.full((5, 9), -1, dtype=torch.int32, device=device)
    return columns, tokens, torch.tensor([2, 0, 4, 4], device=device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("greedy", [True, False])
def test_tokens_are_appended_to_their_rows(device: str, greedy: bool) -> None:
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(2)).to(device)
    columns, table, rows = table_of(device)
    if greedy:
        expected = logits.argmax(-1)
    else:
        of_rows = SamplingColumns(*(getattr(columns, name)[rows] for name in SamplingColumns._fields))
        expected = sample_torch(logits, of_rows)
    out = torch.full((4,), -1, dtype=torch.int32, device=device)
    work = Workspace(4, VOCAB, torch.device(device), TINY)
    if greedy:
        launch_argmax(logits, work, out, rows, table, columns.position)
    else:
        launch_sample(logits, columns, work, out, rows, table)
    assert out[:2].tolist() == expected[:2].tolist()
    assert columns.position.tolist() == [4, 4, 6, 6, 0]
    assert (table[2, 5].item(), table[0, 3].item()) == (out[0].item(), out[1].item())
    assert (table >= 0).sum().item() == 2
    assert not work.parts.num_arrived.any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_greedy_takes_the_first_of_equals_and_stays_in_the_vocabulary(device: str) -> None:
    logits = torch.zeros(4, VOCAB, device=device)
    logits[0, [17, 33, 50]] = 2.0
    logits[1, 60] = 1.0
    logits[2] = float("-inf")
    logits[3] = float("nan")
    out = torch.full((4,), -1, dtype=torch.int32, device=device)
    launch_argmax(logits, Workspace(4, VOCAB, torch.device(device), TINY), out)
    assert out[:3].tolist() == [17, 60, 0]
    assert 0 <= out[3].item() < VOCAB


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [151936, 50257, 128256])
def test_greedy_on_a_gpu(dtype: torch.dtype, vocab: int) -> None:
    for n in (1, 7, 256):
        logits = torch.randn(n, vocab, device="cuda").to(dtype)
        out = torch.full((n,), -1, dtype=torch.int32, device="cuda")
        launch_argmax(logits, Workspace(n, vocab, logits.device), out)
        first = (logits == logits.amax(-1, keepdim=True)).int().argmax(-1)
        assert torch.equal(out.long(), first)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 12, 120, 256])
@pytest.mark.parametrize("spread", [0.7, 3.0, 12.0])
def test_sampling_at_full_size(n: int, spread: float) -> None:
    vocab = 151936
    torch.manual_seed(n)
    logits = (torch.randn(n, vocab, device="cuda") * spread).bfloat16()
    columns = columns_of([PARAMS[(i + int(spread)) % len(PARAMS)] for i in range(n)], n, "cuda")
    out = torch.full((n,), -1, dtype=torch.int32, device="cuda")
    work = Workspace(n, vocab, logits.device)
    launch_sample(logits, columns, work, out)
    step = 32
    for i in range(0, n, step):
        part = SamplingColumns(*(getattr(columns, name)[i : i + step] for name in SamplingColumns._fields))
        assert sampling_gaps(logits[i : i + step], part, out[i : i + step]).max() < 1e-4
        # a row samples the same whatever stands beside it, to the bit
        alone = torch.full_like(out[i : i + step], -1)
        launch_sample(logits[i : i + step], part, work, alone)
        assert torch.equal(alone, out[i : i + step])


@pytest.mark.gpu
def test_sampling_survives_capture() -> None:
    n, vocab = 48, 32000
    logits = torch.randn(n, vocab, device="cuda").bfloat16() * 2
    columns = columns_of([PARAMS[i % len(PARAMS)] for i in range(n)], 3, "cuda")
    work, out = Workspace(n, vocab, logits.device), torch.zeros(n, dtype=torch.int32, device="cuda")
    launch_sample(logits, columns, work, out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch_sample(logits, columns, work, out)
    for turn in range(5):
        logits.copy_(torch.randn(n, vocab, device="cuda") * (turn + 1))
        columns.position.add_(1)
        graph.replay()
        assert sampling_gaps(logits, columns, out).max() < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize("params", [{}, {"temperature": 0.5}, {"top_p": 0.7}, {"top_k": 5}, {"min_p": 0.1}], ids=str)
def test_samples_follow_the_distribution_on_a_gpu(params: dict) -> None:
    count, vocab = 40_000, 24
    logits = torch.randn(1, vocab, generator=torch.Generator().manual_seed(3)) * 2
    columns = columns_of([params] * count, 0, "cuda")
    batch = SamplingBatch(
        columns.temperature, columns.top_k, columns.top_p, columns.min_p, torch.zeros_like(columns.seed),
        torch.arange(count, device="cuda"), True, True, True, True,
    )  # fmt: skip
    sampler = GumbelSampler(vocab, torch.device("cuda"))
    tokens = sampler.sample(logits.cuda().expand(count, -1).clone(), batch)
    one = SamplingColumns(*(getattr(columns, name)[:1].cpu() for name in SamplingColumns._fields))
    filters = SamplingBatch(one.temperature, one.top_k, one.top_p, one.min_p, one.seed, one.position, *[True] * 4)
    expected = apply_filters(logits / one.temperature[:, None], filters).softmax(-1)[0].double() * count
    counts = torch.bincount(tokens.cpu().long(), minlength=vocab).double()
    assert counts[expected == 0].sum() == 0
    big = expected > 5
    freedom = int(big.sum()) - 1
    value = ((counts - expected) ** 2 / expected)[big].sum().item()
    assert value < freedom + 4.5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize(
    ("device", "dtype", "vocab"),
    [
        ("cpu", torch.float32, 5000),
        pytest.param("cuda", torch.bfloat16, 151936, marks=pytest.mark.gpu),
        pytest.param("cuda", torch.float16, 32003, marks=pytest.mark.gpu),
    ],
)
def test_logsumexp_and_rank_are_those_of_float64(device: str, dtype: torch.dtype, vocab: int) -> None:
    gen = torch.Generator().manual_seed(3)
    wide = 8 * torch.randn(7, vocab + 3, generator=gen)
    logits = wide.to(device, dtype)[:, :vocab]  # rows apart, as in a padded vocabulary
    logits[1] = -100.0
    chosen = torch.randint(vocab, (7,), generator=gen, dtype=torch.int32).to(device)
    chosen[2] = logits[2].argmax()
    log_sum, rank = launch_logsumexp_and_rank(logits, chosen)
    exact = logits.double()
    torch.testing.assert_close(log_sum.double(), exact.logsumexp(-1), atol=1e-5, rtol=1e-6)
    chosen_logit = exact.gather(1, chosen.long()[:, None])
    assert rank.tolist() == ((exact > chosen_logit).sum(-1) + 1).tolist()
