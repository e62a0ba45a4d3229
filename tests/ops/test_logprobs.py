"""Log-probabilities and entropy: against torch.distributions, chunked equal to plain, and never (N, V) at once."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Categorical
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from whet.ops import entropy, linear_collision, linear_logprobs, log_softmax, token_logprobs

from .helpers import close, f64, grad_of, inf

# probabilities 0.1 0.2 0.3 0.4; at temperature 1/2 they are squared: 1 4 9 16 of 30
LOGITS = f64([1.0, 2.0, 3.0, 4.0]).log()


@pytest.mark.parametrize(("temperature", "p"), [(1.0, [0.1, 0.2, 0.3, 0.4]), (0.5, [1 / 30, 4 / 30, 9 / 30, 16 / 30])])
def test_by_hand_and_by_scipy(temperature: float, p: list[float]) -> None:
    for shift in (0.0, 500.0):  # a constant on every logit changes nothing
        ids = torch.tensor([[0, 1], [2, 3]])
        close(token_logprobs((LOGITS + shift).expand(2, 2, 4), ids, temperature=temperature).exp().flatten(), p)
        close(entropy(LOGITS + shift, temperature=temperature), stats.entropy(p))


def test_the_default_temperature_is_one() -> None:
    close(token_logprobs(LOGITS[None], torch.tensor([1])), [math.log(0.2)])
    close(entropy(LOGITS[None]), [stats.entropy([0.1, 0.2, 0.3, 0.4])])
    close(entropy(f64([[0.0] * 8, [7.0] * 8])), [math.log(8)] * 2)


def test_a_logit_of_minus_infinity_has_probability_zero_and_adds_nothing() -> None:
    logits = f64([[0.0, -inf, 0.0], [-inf, 5.0, -inf]])
    close(entropy(logits), [math.log(2), 0.0])
    close(token_logprobs(logits, torch.tensor([2, 1])), [-math.log(2), 0.0])
    assert token_logprobs(logits, torch.tensor([1, 0])).tolist() == [-inf, -inf]


def test_the_entropy_has_a_gradient_beside_a_logit_of_minus_infinity() -> None:
    # -p (log p + H) with p = 1/4, 3/4 on the two that are left
    h = stats.entropy([0.25, 0.75])
    grad = grad_of(entropy, f64([0.0, math.log(3), -inf]))[0]
    close(grad, [-0.25 * (math.log(0.25) + h), -0.75 * (math.log(0.75) + h), 0.0])


# --- from hidden states: N tokens, H hidden, V vocabulary; every token is asked for once, so chunk borders are hit

N, H, V = 11, 4, 11
CHUNKS = [1, 3, 4, 10, 11, 100]


def problem(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight, bias, ids, temperature of each token)."""
    noise = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        scale * torch.randn(*shape, dtype=torch.float64, generator=noise) for shape in [(N, H), (V, H), (V,)]
    )
    return hidden, weight, bias, torch.randperm(V, generator=noise), torch.linspace(0.5, 2.0, N, dtype=torch.float64)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.7, "per token"])
def test_chunked_equals_torch_distributions_in_value_and_gradient(chunk: int, with_bias: bool, temperature) -> None:
    hidden, weight, bias, ids, per_token = problem()
    noise = torch.Generator().manual_seed(1)
    of_logp, of_entropy = torch.randn(2, N, dtype=torch.float64, generator=noise)
    hot = per_token if temperature == "per token" else temperature
    divisor = per_token[:, None] if temperature == "per token" else temperature

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        given = bias if with_bias else None
        return linear_logprobs(hidden, weight, ids, bias=given, temperature=hot, workspace=chunk * N)

    def theirs(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        full = Categorical(logits=(hidden @ weight.T + (bias if with_bias else 0 * bias)) / divisor)
        return full.log_prob(ids), full.entropy()

    def loss(function: Callable[..., tuple[Tensor, Tensor]], of_entropy: Tensor = of_entropy) -> Callable[..., Tensor]:
        def weighted(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            logp, entropy = function(hidden, weight, bias)
            return of_logp * logp + of_entropy * entropy + 0 * bias.sum()

        return weighted

    for one, other in zip(ours(hidden, weight, bias), theirs(hidden, weight, bias), strict=True):
        close(one, other, within=1e-10)
    for both in (of_entropy, 0 * of_entropy):  # with and without the entropy in the loss
        grads = zip(*(grad_of(loss(f, both), hidden, weight, bias) for f in (ours, theirs)), strict=True)
        for one, other in grads:
            close(one, other, within=1e-10)


def products(run: Callable[[], object]) -> float:
    """How many products of N x H x V one call makes."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / (2 * N * H * V)


@pytest.mark.parametrize(("rows", "again"), [(1, 10 / 11), (4, 7 / 11), (N, 0)])
def test_only_needed_gradients_are_computed_and_logits_that_fit_only_once(rows: int, again: float) -> None:
    """The chunks have `rows` tokens: 11 with 1, (4, 4, 3) with 4, or 1 with all. The first one is kept."""
    hidden, weight, bias, ids, temperature = problem()
    grads = []
    for frozen in (False, True):
        for with_entropy in (False, True):
            own, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
            early = frozen and not with_entropy
            workspace = rows * V * (1 if rows == N and not with_entropy else 2 + (with_entropy and rows != N))

            def forward(
                own: Tensor = own, head: Tensor = head, on: bool = with_entropy, size: int = workspace
            ) -> Tensor:
                return linear_logprobs(
                    own, head, ids, bias=bias, temperature=temperature, with_entropy=on, workspace=size
                )[0]

            assert products(forward) == 1 + early
            logp = forward()
            expected = 0 if early else again + 1 + (not frozen)
            assert products(lambda logp=logp: logp.sum().backward()) == pytest.approx(expected)
            grads.append(own.grad)
    for one in grads[1:]:
        close(one, grads[0], within=1e-12)


@pytest.mark.parametrize("workspace", [1, 3 * V, 1000])
@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1, 2)])
def test_a_second_backward_pass_gives_the_same_bits(
    workspace: int, with_entropy: bool, trained: tuple[int, ...]
) -> None:
    inputs = [x.clone().requires_grad_(n in trained) for n, x in enumerate(problem()[:3])]
    logp, h = linear_logprobs(*inputs[:2], problem()[3], bias=inputs[2], with_entropy=with_entropy, workspace=workspace)
    loss = (logp * torch.linspace(-1, 1, N)).sum() + (0.0 if h is None else (h * torch.linspace(2, 1, N)).sum())
    own = [x for x in inputs if x.requires_grad]
    first, second = (torch.autograd.grad(loss, own, retain_graph=True) for _ in "12")
    assert all(torch.equal(*pair) for pair in zip(first, second, strict=True))


@pytest.mark.parametrize("workspace", [1, 3 * V, 1000])
def test_the_entropy_alone_has_its_gradient(workspace: int) -> None:
    hidden, weight, bias, ids, _ = problem()

    def ours(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_logprobs(h, w, ids, bias=b, workspace=workspace)[1]  # type: ignore[return-value]

    def theirs(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return Categorical(logits=h @ w.T + b).entropy()

    for one, other in zip(*(grad_of(f, hidden, weight, bias) for f in (ours, theirs)), strict=True):
        close(one, other, within=1e-10)


@pytest.mark.parametrize("workspace", [1, 3 * V, 1000])
@pytest.mark.parametrize("sampled", [[True, False], [False, False], [True, True]])
def test_the_entropy_of_some_tokens_is_0_elsewhere_and_has_no_gradient(workspace: int, sampled: list[bool]) -> None:
    hidden, weight, bias, ids, temperature = problem()
    some = torch.tensor((sampled * N)[:N])
    given = partial(linear_logprobs, ids=ids, bias=bias, temperature=temperature, workspace=workspace)
    own, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    for one in (own, own.detach()):
        logp, h = given(one, head, with_entropy=some)
        assert h is not None
        assert not h.requires_grad
        full = Categorical(logits=(hidden @ weight.T + bias) / temperature[:, None])
        close(h, full.entropy() * some)
        close(logp.detach(), full.log_prob(ids))
    assert logp.requires_grad  # the head is trained
    alone = grad_of(lambda x: given(x, weight, with_entropy=False)[0], hidden)[0]
    close(grad_of(lambda x: given(x, weight, with_entropy=some)[0], hidden)[0], alone)


@pytest.mark.parametrize("workspace", [1, 3 * V, 1000])
def test_a_temperature_of_one_does_not_change_a_bit(workspace: int) -> None:
    hidden, weight, bias, ids, _ = (x.float() if x.is_floating_point() else x for x in problem())
    results = []
    for temperature in (None, 1.0, 1, torch.ones(N)):
        inputs = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        logp, h = linear_logprobs(*inputs[:2], ids, bias=inputs[2], temperature=temperature, workspace=workspace)
        results.append((logp, h, *torch.autograd.grad((logp + h).sum(), inputs)))  # type: ignore[operator]
    for one in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(one, results[0], strict=True))


def test_without_gradient_nothing_is_kept() -> None:
    hidden, weight, bias, ids, _ = problem()
    with torch.no_grad():
        assert linear_logprobs(hidden.requires_grad_(), weight, ids, bias=bias)[0].grad_fn is None
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
        linear_logprobs(hidden, weight, ids, bias=bias, with_entropy=False)
    assert kept == [(N, H)]  # a frozen head keeps no more than the gradient of the hidden states


def test_gradcheck_in_chunks() -> None:
    hidden, weight, bias, ids, temperature = problem()
    inputs = [x.requires_grad_() for x in (hidden[:3, :2].clone(), weight[:5, :2].clone(), bias[:5].clone())]
    ids, temperature = torch.tensor([4, 0, 2]), temperature[:3]
    assert torch.autograd.gradcheck(
        lambda h, w, b: linear_logprobs(h, w, ids, bias=b, temperature=temperature, workspace=6), inputs
    )


@pytest.mark.parametrize("chunk", [1, 2, 3, 4])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [3, 2, 1, 0], [2, 0, 3, 1]])
def test_logits_of_thousands_do_not_overflow(order: list[int], chunk: int) -> None:
    weight, ids = f64([[1000.0], [3000.0], [6000.0], [6000.5]])[order], torch.tensor([order.index(2), order.index(0)])
    logits = torch.stack([weight[:, 0], -weight[:, 0]])  # all far above 0, all far below
    logp, h = linear_logprobs(f64([[1.0], [-1.0]]), weight, ids, workspace=2 * chunk)
    close(logp, Categorical(logits=logits).log_prob(ids))
    close(h, Categorical(logits=logits).entropy(), within=1e-10)


@pytest.mark.parametrize("workspace", [1, 100])
def test_no_tokens_no_numbers(workspace: int) -> None:
    hidden, weight, _, ids, _ = problem()
    logp, h = linear_logprobs(hidden[:0], weight, ids[:0], workspace=workspace)
    assert (logp.shape, h.shape) == ((0,), (0,))


def test_an_entropy_nobody_asked_for_is_none() -> None:
    hidden, weight, _, ids, _ = problem()
    expected = Categorical(logits=hidden @ weight.T)
    for chunk in CHUNKS:
        logp, h = linear_logprobs(hidden, weight, ids, with_entropy=False, workspace=chunk * N)
        close(logp, expected.log_prob(ids))
        assert h is None


@pytest.mark.parametrize("workspace", [1, 3 * N, 1000])
def test_half_precision_is_summed_in_float32(workspace: int) -> None:
    hidden, weight, bias, ids, temperature = (x.bfloat16() if x.is_floating_point() else x for x in problem())
    logits = torch.nn.functional.linear(hidden, weight, bias).double() / temperature.double()[:, None]
    inputs = [x.requires_grad_() for x in (hidden, weight, bias)]
    logp, h = linear_logprobs(hidden, weight, ids, bias=bias, temperature=temperature, workspace=workspace)
    close(logp, Categorical(logits=logits).log_prob(ids).float(), within=1e-5)
    close(h, Categorical(logits=logits).entropy().float(), within=1e-5)
    assert {grad.dtype for grad in torch.autograd.grad((logp + h).sum(), inputs)} == {torch.bfloat16}


class Shapes(TorchDispatchMode):
    """Keeps the shape of every result, of the backward too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        results = out if isinstance(out, tuple | list) else [out]
        self.seen |= {tuple(x.shape) for x in results if isinstance(x, Tensor)}
        return out


@pytest.mark.parametrize(
    ("workspace", "trained", "with_entropy", "rows"),
    [
        (1, True, False, 1),
        (1, False, False, 1),
        (1999, True, False, 14),  # 19 tokens would fit twice: 3 chunks of 14, 13 and 13
        (2000, True, False, 40),
        (3999, True, True, 20),  # 26 would fit three times: 2 chunks
        (4000, True, True, 40),
        (1500, False, False, 20),  # nothing is kept: 30 fit
        (1999, False, False, 20),
        (2000, False, False, 40),
    ],
)
def test_no_chunk_of_the_logits_is_larger_than_the_workspace(
    workspace: int, trained: bool, with_entropy: bool, rows: int
) -> None:
    n, h, v = 40, 1, 50
    hidden, weight, bias = (torch.ones(*shape).requires_grad_() for shape in [(n, h), (v, h), (v,)])
    if not trained:
        weight, bias = weight.detach(), bias.detach()
    with Shapes() as shapes:
        logp, entropy = linear_logprobs(
            hidden, weight, torch.arange(n), bias=bias, with_entropy=with_entropy, workspace=workspace
        )
        (logp if entropy is None else logp + entropy).sum().backward()
    assert max(math.prod(shape) // v for shape in shapes.seen if v in shape and shape != (v, h)) == rows


@pytest.mark.parametrize("trained", [True, False])
def test_the_memory_does_not_grow_with_the_tokens(trained: bool) -> None:
    """Bytes that are held at once, of the forward and the backward pass: the workspace and what one row of hidden states has."""
    v, h, workspace = 1000, 4, 100_000

    def most(n: int) -> int:
        hidden, weight = torch.ones(n, h).requires_grad_(), torch.ones(v, h).requires_grad_(trained)
        with torch.profiler.profile(profile_memory=True) as profiled:
            linear_logprobs(hidden, weight, torch.arange(n) % v, with_entropy=False, workspace=workspace)[
                0
            ].sum().backward()
        held, top = 0, 0
        for event in profiled.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                top = max(top, held)
        return top

    few, many = most(400), most(4000)
    assert few <= 4 * (workspace + 3 * v * h + 400 * 60)
    assert many - few <= 4 * 3600 * 60
    assert 4 * 3600 * v / 10 > 4 * 3600 * 60


@pytest.mark.parametrize("workspace", [2, 4, 100])
def test_a_vocabulary_entry_can_be_ruled_out_by_its_bias(workspace: int) -> None:
    hidden, weight, bias, ids = f64([[1.0], [1.0]]), f64([[0.0]] * 4), f64([-inf, 0.0, 0.0, -inf]), torch.tensor([1, 2])
    logp, h = linear_logprobs(hidden, weight, ids, bias=bias, workspace=workspace)
    close(logp, [-math.log(2)] * 2)
    close(h, [math.log(2)] * 2)


# --- a support: the tokens that could be drawn -----------------------------------------------------------------------


def test_a_support_renormalizes_by_hand() -> None:
    # of 0.1 0.2 0.3 0.4: {1, 3} leaves 1/3 2/3; {2} leaves certainty; nothing listed is the whole vocabulary
    logits, support = LOGITS.expand(4, 4), torch.tensor([[3, 1, -1], [2, -1, -1], [-1, -1, -1], [0, 2, 3]])
    ids = torch.tensor([1, 2, 1, 0])
    for shift in (0.0, 500.0):
        close(token_logprobs(logits + shift, ids, support=support).exp(), [1 / 3, 1.0, 0.2, 1 / 8])
        expected = [stats.entropy(p) for p in ([1, 2], [1], [1, 2, 3, 4], [1, 3, 4])]
        close(entropy(logits + shift, support=support), expected)
    # temperature first, then the cut: 4 and 16 of 20
    close(token_logprobs(logits[:1], ids[:1], temperature=0.5, support=support[:1]).exp(), [0.2])
    close(entropy(logits[:1], temperature=0.5, support=support[:1]), [stats.entropy([1, 4])])


def test_a_token_outside_the_support_cannot_be_drawn() -> None:
    assert token_logprobs(LOGITS[None], torch.tensor([0]), support=torch.tensor([[1, 3]])).tolist() == [-inf]


def test_a_support_of_nobody_is_the_whole_vocabulary() -> None:
    ids = torch.tensor([0, 1, 2, 3])
    for support in (None, torch.full((4, 3), -1), torch.empty(4, 0, dtype=torch.int64), torch.arange(4).expand(4, 4)):
        close(token_logprobs(LOGITS.expand(4, 4), ids, support=support).exp(), [0.1, 0.2, 0.3, 0.4])
        close(entropy(LOGITS.expand(4, 4), support=support), [stats.entropy([0.1, 0.2, 0.3, 0.4])] * 4)


def test_a_support_goes_along_with_any_batch_shape() -> None:
    support = torch.tensor([[[0, 1], [1, -1]], [[2, 3], [-1, -1]]])
    got = token_logprobs(LOGITS.expand(2, 2, 4), torch.tensor([[0, 1], [3, 3]]), support=support)
    close(got.exp(), [[1 / 3, 1.0], [4 / 7, 0.4]])


def test_the_gradient_within_a_support_is_the_one_of_the_small_softmax() -> None:
    support = torch.tensor([[3, 1, -1]])
    grad = grad_of(lambda x: token_logprobs(x[None], torch.tensor([1]), support=support), LOGITS)[0]
    close(grad, [0.0, 2 / 3, 0.0, -2 / 3])  # 1[y] - p with p = 1/3, 2/3
    h = stats.entropy([1, 2])
    grad = grad_of(lambda x: entropy(x[None], support=support), LOGITS)[0]
    close(grad, [0.0, -(math.log(1 / 3) + h) / 3, 0.0, -2 * (math.log(2 / 3) + h) / 3])


@pytest.mark.parametrize("workspace", [1, 1000])
@pytest.mark.parametrize("with_entropy", [True, False])
def test_a_token_outside_the_support_has_no_gradient_of_its_own(workspace: int, with_entropy: bool) -> None:
    """The gradient is that of -log sum e^l over the support, and of the entropy there."""
    support, one = torch.tensor([[1, 3, -1]]), f64([[1.0]])

    # p = 1/3, 2/3
    h = stats.entropy([1, 2]) if with_entropy else None
    expected = [-p - (0.0 if h is None else p * (math.log(p) + h)) for p in (1 / 3, 2 / 3)]
    weight = LOGITS[:, None].detach().requires_grad_()
    outputs = linear_logprobs(
        one, weight, torch.tensor([0]), support=support, with_entropy=with_entropy, workspace=workspace
    )
    assert outputs[0].tolist() == [-inf]
    wanted = [x for x in outputs if x is not None]
    (grad,) = torch.autograd.grad(wanted, weight, [torch.ones(1, dtype=torch.float64) for _ in wanted])
    close(grad[:, 0], [0.0, expected[0], 0.0, expected[1]])


def supports(ids: Tensor) -> list[list[int]]:
    """For each token a set of every size that contains it, one of them empty: the whole vocabulary."""
    order = torch.randperm(V, generator=torch.Generator().manual_seed(3)).tolist()
    return [[y, *[v for v in order if v != y][:n]] if n else [] for n, y in enumerate(ids.tolist())]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("with_entropy", [True, False])
def test_chunks_within_a_support_equal_a_softmax_over_the_subset(chunk: int, with_entropy: bool) -> None:
    hidden, weight, bias, ids, temperature = problem()
    own = supports(ids)
    support = torch.full((N, V + 1), -1)
    for row, tokens in enumerate(own):
        support[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.int64)
    of_logp, of_entropy = torch.randn(2, N, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logp, h = linear_logprobs(
            hidden, weight, ids, bias=bias, temperature=temperature, support=support, workspace=chunk * N,
            with_entropy=with_entropy,
        )  # fmt: skip
        return torch.stack([of_logp * logp, of_entropy * h if with_entropy and h is not None else 0 * logp])

    def theirs(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits, out = (hidden @ weight.T + bias) / temperature[:, None], []
        for row, tokens in enumerate(own):
            kept = tokens or list(range(V))
            small = Categorical(logits=logits[row, kept])
            h = of_entropy[row] * small.entropy() if with_entropy else 0 * logits[0, 0]
            out.append(torch.stack([of_logp[row] * small.log_prob(torch.tensor(kept.index(int(ids[row])))), h]))
        return torch.stack(out, 1)

    close(ours(hidden, weight, bias), theirs(hidden, weight, bias), within=1e-10)
    for one, other in zip(*(grad_of(f, hidden, weight, bias) for f in (ours, theirs)), strict=True):
        close(one, other, within=1e-10)


# --- collisions ------------------------------------------------------------------------------------------------------


def test_a_collision_is_the_sum_of_squared_probabilities() -> None:
    one = f64([[1.0], [1.0]])
    # 0.01 + 0.04 + 0.09 + 0.16; at temperature 1/2 p is 1 4 9 16 of 30: 1 + 16 + 81 + 256 of 900
    close(linear_collision(one, LOGITS[:, None], temperature=f64([1.0, 0.5])), [0.3, 354 / 900])
    support = torch.tensor([[1, 3], [-1, -1]])
    close(linear_collision(one, LOGITS[:, None], temperature=f64([1.0, 1.0]), support=support), [5 / 9, 0.3])


@pytest.mark.parametrize("workspace", [1, V, 3 * V, 1000])
def test_collisions_in_chunks_of_tokens(workspace: int) -> None:
    hidden, weight, bias, ids, temperature = problem()
    support = torch.stack([ids, (ids + 1) % V, torch.full_like(ids, -1)], 1)
    logits = (hidden @ weight.T + bias) / temperature[:, None]
    got = linear_collision(hidden, weight, bias=bias, temperature=temperature, workspace=workspace)
    close(got, (Categorical(logits=logits).probs ** 2).sum(-1))
    got = linear_collision(hidden, weight, bias=bias, temperature=temperature, support=support, workspace=workspace)
    close(got, (Categorical(logits=logits.gather(1, support[:, :2])).probs ** 2).sum(-1))
    assert not got.requires_grad


def test_a_collision_carries_no_gradient() -> None:
    hidden, weight, bias, _, temperature = problem()
    assert not linear_collision(hidden.requires_grad_(), weight, bias=bias, temperature=temperature).requires_grad
    assert linear_collision(hidden[:0], weight, temperature=temperature[:0]).shape == (0,)


# --- real vocabularies: float32 within 1e-6 of float64 ----------------------------------------------------------------


def trained(vocabulary: int, tokens: int = 48, hidden: int = 16) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight, bias, ids) of peaked logits, as of a trained model: most ids are far above thousands of others."""
    noise = torch.Generator().manual_seed(0)
    states, weight = torch.randn(tokens, hidden, generator=noise), torch.randn(vocabulary, hidden, generator=noise)
    ids = torch.randperm(vocabulary, generator=noise)[:tokens]
    weight = 0.6 * weight
    weight[ids] += 0.8 * states
    return states, weight, torch.randn(vocabulary, generator=noise), ids


def mean_within(actual: Tensor, expected: Tensor, within: float = 1e-6) -> None:
    assert actual.dtype == torch.float32
    assert float(actual.double().mean()) == pytest.approx(float(expected.mean()), rel=within)


@pytest.mark.parametrize("chunk", [997, 9000, 10**6])
@pytest.mark.parametrize("vocabulary", [50_000, 152_000])
def test_the_numbers_over_a_real_vocabulary_are_those_of_float64(vocabulary: int, chunk: int) -> None:
    hidden, weight, bias, ids = trained(vocabulary)

    def exact(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        logp = (hidden @ weight.T + bias).log_softmax(-1)
        return logp.gather(-1, ids[:, None])[:, 0], -(logp.exp() * logp).sum(-1)

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return linear_logprobs(hidden, weight, ids, bias=bias, workspace=chunk * len(ids))

    inputs = (hidden, weight, bias)
    doubled = tuple(x.double() for x in inputs)
    for one, other in zip(ours(*inputs), exact(*doubled), strict=True):
        mean_within(one, other)

    def together(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
        return lambda *x: torch.stack(function(*x)) * f64([[1.0], [0.3]])

    both = grad_of(together(ours), *inputs), grad_of(together(exact), *doubled)
    for one, other in zip(*both, strict=True):
        assert (one.double() - other).norm() <= 3e-6 * other.norm()


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("vocabulary", [49_152, 151_936])
def test_the_mean_log_prob_has_no_bias(vocabulary: int, frozen: bool) -> None:
    """Logits near each other, where every term of the sum counts: float32 `log_softmax` is off by 2.4e-6 and 1.3e-5 nats."""
    noise = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(24, 16, generator=noise), 0.05 * torch.randn(vocabulary, 16, generator=noise)
    ids = torch.randint(0, vocabulary, (24,), generator=noise)
    logp, h = linear_logprobs(
        hidden.requires_grad_(), weight.requires_grad_(not frozen), ids, with_entropy=True, workspace=10 * vocabulary
    )
    full = (hidden.detach().double() @ weight.detach().double().T).log_softmax(-1)
    assert h is not None
    assert abs(float((logp.detach().double() - full.gather(1, ids[:, None])[:, 0]).mean())) < 2e-7
    assert abs(float((h.detach().double() + (full.exp() * full).sum(-1)).mean())) < 2e-6


@pytest.mark.parametrize("vocabulary", [50_000, 152_000])
def test_logits_over_a_real_vocabulary_give_the_numbers_of_float64(vocabulary: int) -> None:
    hidden, weight, bias, ids = trained(vocabulary)
    logits = hidden @ weight.T + bias
    for shift in (0.0, 1000.0):  # exact in float64 of the shifted logits: their own rounding is no fault of the sum
        shifted = logits + shift
        full = shifted.double().log_softmax(-1)
        expected = full.gather(-1, ids[:, None])[:, 0]
        mean_within(token_logprobs(shifted, ids), expected)
        mean_within(log_softmax(shifted).gather(-1, ids[:, None])[:, 0], expected)
        mean_within(entropy(shifted), -(full.exp() * full).sum(-1))
    few = ids[:, None].expand(-1, 1000).clone()
    few[:, 1:] = torch.arange(999) * 50
    inside = torch.full_like(logits, -torch.inf).scatter(-1, few, 0.0) + logits
    expected = inside.double().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
    mean_within(token_logprobs(logits, ids, support=few), expected)
    p = (hidden.double() @ weight.double().T + bias.double()).softmax(-1)
    got = linear_collision(hidden, weight, bias=bias, temperature=torch.ones(len(ids)), workspace=7 * vocabulary)
    mean_within(got, p.square().sum(-1))


def test_the_log_softmax_has_the_gradient_of_the_softmax() -> None:
    weights = f64([[1.0, -2.0, 0.5, 3.0]])
    close(log_softmax(LOGITS[None]).exp(), [[0.1, 0.2, 0.3, 0.4]])
    # w - p sum w, sum w = 2.5
    grad = grad_of(lambda x: weights * log_softmax(x), LOGITS[None] + 7)[0]
    close(grad, [[1 - 0.25, -2 - 0.5, 0.5 - 0.75, 3 - 1.0]])
    assert torch.autograd.gradcheck(log_softmax, f64([[0.3, -2.0, 5.0], [1.0, 1.0, 1.0]], grad=True))
    assert log_softmax(f64([0.0, -inf, 0.0])).tolist() == pytest.approx([-math.log(2), -inf, -math.log(2)])


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_logits_of_half_precision_are_summed_in_float32(kind: torch.dtype) -> None:
    logits, ids = LOGITS.to(kind).expand(2, 4), torch.tensor([0, 2])
    full = logits.double().log_softmax(-1)
    close(token_logprobs(logits, ids), full.gather(-1, ids[:, None])[:, 0].float(), within=1e-6)
    close(log_softmax(logits), full.float(), within=1e-6)
    close(entropy(logits), -(full.exp() * full).sum(-1).float(), within=1e-6)


def test_a_gradient_of_half_precision_does_not_depend_on_the_chunks() -> None:
    hidden, weight, _, ids = (x.bfloat16() if x.is_floating_point() else x for x in trained(4000))
    p = (hidden @ weight.T).double().softmax(-1)  # of logits that are rounded to half precision, as there
    expected = (torch.nn.functional.one_hot(ids, 4000) - p) @ weight.double()
    for chunk in (1, 50, 10**6):
        ours = partial(linear_logprobs, weight=weight, ids=ids, workspace=chunk * len(ids))
        grad = grad_of(lambda x, ours=ours: ours(x)[0], hidden)[0]
        assert (grad.double() - expected).norm() <= 2**-8 * expected.norm()


@pytest.mark.parametrize("function", [log_softmax, entropy, lambda x: token_logprobs(x, torch.tensor([1]))])
def test_a_second_derivative_is_refused_rather_than_wrong(function: Callable[[Tensor], Tensor]) -> None:
    logits = f64([[0.3, -2.0, 5.0]], grad=True)
    (first,) = torch.autograd.grad(function(logits).sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()


@pytest.mark.parametrize("rows", [[[2, -1], [-1, -1], [2, 6]], [[-1, -1], [-1, -1], [-1, -1]]], ids=["some", "none"])
def test_a_head_without_a_few_tokens_is_the_one_whose_logits_are_minus_infinity_there(rows: list[list[int]]) -> None:
    """The codes -2 - id of tokens that cannot come, as end tokens before a shortest length; -1 is no token."""
    generator = torch.Generator().manual_seed(3)
    hidden, weight = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (9, 4)))
    support = torch.tensor([[-1 if one < 0 else -2 - one for one in row] for row in rows])
    logits = hidden @ weight.T
    for number, row in enumerate(rows):
        for one in row:
            if one >= 0:
                logits[number, one] = -torch.inf
    ids = torch.tensor([5, 0, 8])
    expected = logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]
    got = linear_logprobs(hidden, weight, ids, support=support)[0]
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
