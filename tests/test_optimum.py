"""Answers known in advance: the stages' own code against closed forms, on a space small enough to enumerate.

    pytest -q -s tests/test_optimum.py        # -s shows the measured distances

Four tokens, EOS among them, and completions of at most three: 40 completions of each of 3 prompts, so every
probability, reward and expectation can be summed exactly. A completion of three tokens without EOS is a cut one, and an
element of the space like any other. The prompts have unequal lengths, and one of them contains the EOS id. For a
reference pi_ref and rewards r the objective

    J(pi) = E[r] - beta KL(pi || pi_ref)    has the maximum beta log Z at
    pi*(y|x) = pi_ref(y|x) exp(r(x,y) / beta) / Z(x)

and J* - J(pi) = beta KL(pi || pi*), so one number says how far a trained policy is from the optimum in both senses.
"""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor

import dpo
import grpo
import ppo
import reward_model
from lib.train import generator_for, lr_at
from frame import completion_mask, token_logprobs
from model import GPT, GPTConfig, ScalarModel
from sampling import Rollout, generate

EOS, V, LENGTH = 2, 4, 3
PROMPTS = [[1], [3, EOS], [0, 1, 3]]
LETTERS = [t for t in range(V) if t != EOS]
COMPLETIONS = [[*w, EOS] for n in range(LENGTH) for w in itertools.product(LETTERS, repeat=n)] + [
    list(w) for w in itertools.product(LETTERS, repeat=LENGTH)
]
INDEX = {tuple(c): i for i, c in enumerate(COMPLETIONS)}
P, N = len(PROMPTS), len(COMPLETIONS)  # 3, 40
BETAS, SEEDS = (0.7, 1.4), (0, 1, 2)
GROUP = 10  # completions of a prompt in GRPO's runs
CPU = torch.device("cpu")


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Every completion of every prompt: tokens (P*N, T), prompt_lens (P*N,), lens (P*N,)."""
    ids = [p + c for p in PROMPTS for c in COMPLETIONS]
    T = max(map(len, ids))
    tokens = torch.tensor([i + [EOS] * (T - len(i)) for i in ids])
    return tokens, torch.tensor([len(p) for p in PROMPTS for _ in COMPLETIONS]), torch.tensor([len(i) for i in ids])


TOKENS, PROMPT_LENS, LENS = rows()
MASK = completion_mask(PROMPT_LENS, LENS, TOKENS.size(1))[:, 1:]  # (P*N, T-1)


def token_table(model: GPT, temperature: float = 1.0) -> Tensor:
    """log pi of every token of every row, (P*N, T-1), by a plain log-softmax."""
    logp = (model(TOKENS) / temperature).log_softmax(-1)
    return logp[:, :-1].gather(-1, TOKENS[:, 1:, None]).squeeze(-1)


def enumerate_logprobs(model: GPT) -> Tensor:
    """log pi(y|x) (P, N) in float64 with gradient, by a plain log-softmax of the whole sequence."""
    return (token_table(model) * MASK).sum(1).view(P, N)


def logprobs(model: GPT) -> Tensor:
    with torch.no_grad():
        return enumerate_logprobs(copy.deepcopy(model).double())


def kl(logp: Tensor, logq: Tensor) -> float:
    """KL(p || q), nats, mean over prompts."""
    return (logp.exp() * (logp - logq)).sum(1).mean().item()


def world(seed: int) -> tuple[GPT, Tensor]:
    """A reference whose distributions are far from flat, and a reward of every completion, (P, N), N(0, 1)."""
    torch.manual_seed(seed)
    reference = GPT(GPTConfig(V, 16, n_layer=2, n_head=2, n_embd=32)).eval().requires_grad_(False)
    for name, p in reference.named_parameters():
        if name == "wte.weight":
            torch.nn.init.normal_(p, std=32**-0.5)
        elif name == "ln_f.weight":
            p.mul_(0.6)
        elif p.dim() == 2 and name != "wpe.weight":
            p.mul_(2.0)
    return reference, torch.randn(P, N, dtype=torch.float64)


def optimum(reference: GPT, reward: Tensor, beta: float) -> tuple[Tensor, float]:
    """log pi* (P, N) and the maximum J* = beta log Z, mean over prompts."""
    unnormalised = logprobs(reference) + reward / beta
    log_z = unnormalised.logsumexp(1, keepdim=True)
    return unnormalised - log_z, beta * log_z.mean().item()


def objective(logp: Tensor, reference_logp: Tensor, reward: Tensor, beta: float) -> float:
    return (logp.exp() * (reward - beta * (logp - reference_logp))).sum(1).mean().item()


# ------------------------------------------------------------------------------------------------ training runs


def sample(policy: GPT, which: list[int], reward: Tensor, generator: torch.Generator) -> tuple[Rollout, Tensor]:
    """A completion of each of the prompts, and its reward, float32."""
    rollout = generate(policy, [PROMPTS[i] for i in which], LENGTH, eos_id=EOS, generator=generator)
    written = zip(which, rollout.completions(), rollout.ended.tolist(), strict=True)
    scores = [reward[i, INDEX[(*c, EOS) if ended else tuple(c)]] for i, c, ended in written]
    return rollout, torch.tensor(scores, dtype=torch.float32)


def run_ppo(beta: float, seed: int, iterations: int = 130, rollouts: int = 510) -> dict:
    """ppo.py's own rollout, experience and update. Whitening only rescales the advantages here (their
    mean is near 0, since the value model is the baseline), so the optimum stays where it is; the learning
    rate decays to 0, so the noise does too."""
    reference, reward = world(seed)
    star, best = optimum(reference, reward, beta)
    policy = copy.deepcopy(reference).requires_grad_(True)
    value_model = ScalarModel.from_gpt(policy)
    torch.nn.init.zeros_(value_model.head.weight)
    settings = {"lr": 3e-3, "value_lr": 6e-3, "minibatch": 102, "micro_batch": 0, "ppo_epochs": 1}
    config = ppo.Config(kl_coef=beta, value_clip=0.0, lam=0.95, **settings)
    optimizer = ppo.make_optimizer(policy, value_model, config)
    which = [i % P for i in range(rollouts)]
    for iteration in range(iterations):
        rollout, scores = sample(policy, which, reward, generator_for(CPU, seed, iteration, 1))
        experience = ppo.make_experience(policy, reference, value_model, rollout, scores, beta, config)
        for group, peak in zip(optimizer.param_groups, (config.lr, config.value_lr), strict=True):
            group["lr"] = peak * lr_at(iteration, iterations, 5, "linear")
        ppo.update(policy, value_model, optimizer, experience, config, generator_for(CPU, seed, iteration, 2))
    return distances(beta, reference, reward, logprobs(policy), star, best)


def run_grpo(beta: float, seed: int, kind: str, penalty: str, iterations: int = 130, rollouts: int = 510) -> dict:
    """grpo.py's own experience and update, on as many samples as run_ppo has; groups of ten."""
    reference, reward = world(seed)
    star, best = optimum(reference, reward, beta)
    policy = copy.deepcopy(reference).requires_grad_(True)
    settings = {"lr": 3e-3, "minibatch": 102, "micro_batch": 0, "max_new_tokens": LENGTH, "rollouts": rollouts}
    config = grpo.Config(kind=kind, kl=penalty, kl_coef=beta, group=GROUP, ppo_epochs=1, **settings)
    optimizer = torch.optim.Adam(policy.parameters(), eps=1e-5)
    which = [i // GROUP % P for i in range(rollouts)]
    for iteration in range(iterations):
        rollout, scores = sample(policy, which, reward, generator_for(CPU, seed, iteration, 1))
        experience = grpo.make_experience(policy, reference, rollout, scores, config)
        for group in optimizer.param_groups:
            group["lr"] = config.lr * lr_at(iteration, iterations, 5, "linear")
        grpo.update(policy, optimizer, experience, config, generator_for(CPU, seed, iteration, 2))
    figures = distances(beta, reference, reward, logprobs(policy), star, best)
    if kind == "dr_grpo":  # R is in the mean that is subtracted from it, so it counts (group - 1) / group
        point = fixed_point(reference, reward, beta * GROUP / (GROUP - 1), penalty)
        figures["elsewhere"] = kl(logprobs(policy), point)
    return figures


def fixed_point(reference: GPT, reward: Tensor, beta: float, penalty: str) -> Tensor:
    """Where a policy stops whose loss has k2 or k3 of each sampled token as a penalty: log pi (P, N), exactly.

    The gradient pulls at each token by the divergence at that token alone, in the states that the policy comes to; that
    a token leads to states of larger divergence costs nothing (in the reward it does). Over samples of pi, k2 has the
    gradient of KL(pi || ref), and k3 that of KL(ref || pi). So with Q(s, a) the expected reward after token a, and V(s)
    = sum pi Q, state by state from the last to the first:

    k2:  pi (Q - V - beta (log pi/ref - KL)) = 0,  so  pi ~ ref exp(Q / beta)
    k3:  pi (Q - V) + beta (ref - pi) = 0,         so  pi = ref beta / (beta + V - Q), with the V that makes it sum to 1

    pi* is like k2's, but with V = beta log sum ref exp(Q / beta): what is still to be paid is in it."""
    found = torch.zeros(P, N, dtype=torch.float64)
    reference = copy.deepcopy(reference).double()

    def solve(prompt: int, prefix: tuple[int, ...]) -> tuple[float, dict[tuple[int, ...], float]]:
        """V of the state, and log pi of every completion from here on."""
        with torch.no_grad():
            ref = reference(torch.tensor([[*PROMPTS[prompt], *prefix]]))[0, -1].softmax(-1).tolist()
        Q, below = [], []
        for a in range(V):
            y = (*prefix, a)
            last = a == EOS or len(y) == LENGTH
            value, logp = (reward[prompt, INDEX[y]].item(), {y: 0.0}) if last else solve(prompt, y)
            Q.append(value)
            below.append(logp)
        if penalty == "k2":
            tilted = [r * math.exp(q / beta) for r, q in zip(ref, Q, strict=True)]
            pi = [x / sum(tilted) for x in tilted]
        else:
            low, high = max(Q) - beta, max(Q)  # the sum over a falls from infinity to below 1 between these two
            for _ in range(100):
                value = (low + high) / 2
                total = sum(r * beta / (beta + value - q) for r, q in zip(ref, Q, strict=True))
                low, high = (value, high) if total > 1 else (low, value)
            pi = [r * beta / (beta + high - q) for r, q in zip(ref, Q, strict=True)]
        logp = {y: math.log(p) + rest for p, part in zip(pi, below, strict=True) for y, rest in part.items()}
        return sum(p * q for p, q in zip(pi, Q, strict=True)), logp

    for prompt in range(P):
        for y, logp in solve(prompt, ())[1].items():
            found[prompt, INDEX[y]] = logp
    return found


def run_dpo(beta: float, seed: int, steps: int = 400) -> dict:
    """dpo.py's log-probs and loss on all pairs of completions, each order weighted by its
    Bradley-Terry probability: the expected loss of infinitely many preferences. Its minimum is at pi*
    exactly (Rafailov et al. 2023, section 5)."""
    reference, reward = world(seed)
    star, best = optimum(reference, reward, beta)
    policy = copy.deepcopy(reference).requires_grad_(True)
    i, j = torch.triu_indices(N, N, offset=1)
    preferred = torch.sigmoid(reward[:, i] - reward[:, j]).float().flatten()  # P(i above j)
    mask = completion_mask(PROMPT_LENS, LENS, TOKENS.size(1))
    with torch.no_grad():
        ref = dpo.sequence_logprobs(reference, TOKENS, mask).view(P, N)
    ref_i, ref_j = ref[:, i].flatten(), ref[:, j].flatten()
    optimizer = torch.optim.Adam(policy.parameters(), lr=4e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * lr_at(step, steps, 20, "cosine")
        logp = dpo.sequence_logprobs(policy, TOKENS, mask).view(P, N)
        pi_i, pi_j = logp[:, i].flatten(), logp[:, j].flatten()
        one, other = dpo.dpo_loss(pi_i, pi_j, ref_i, ref_j, beta)[0], dpo.dpo_loss(pi_j, pi_i, ref_j, ref_i, beta)[0]
        loss = (preferred * one + (1 - preferred) * other).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    logp = logprobs(policy)
    figures = distances(beta, reference, reward, logp, star, best)
    implicit = beta * (logp - logprobs(reference))
    error = (implicit - implicit.mean(1, keepdim=True)) - (reward - reward.mean(1, keepdim=True))
    return {**figures, "implicit_reward_error": error.abs().mean().item()}


def distances(beta: float, reference: GPT, reward: Tensor, logp: Tensor, star: Tensor, best: float) -> dict:
    start = logprobs(reference)
    j0, j1 = objective(start, start, reward, beta), objective(logp, start, reward, beta)
    before, after = kl(start, star), kl(logp, star)
    print(f"\nKL(pi || pi*) {before:.4f} -> {after:.4f}; J {j0:.4f} -> {j1:.4f}, maximum {best:.4f}")
    assert best - j1 == pytest.approx(beta * after, abs=1e-9)  # the identity that ties the two distances
    return {"before": before, "after": after, "closed": (j1 - j0) / (best - j0)}


# One seed, at one beta, is among the quick tests: the other runs take a minute and prove the same.
ONE_SEED = [pytest.param(s, marks=pytest.mark.slow if s else ()) for s in SEEDS]
ONE_RUN = [pytest.param(b, s, marks=pytest.mark.slow if s or b != BETAS[0] else ()) for b in BETAS for s in SEEDS]


@pytest.mark.parametrize(("beta", "seed"), ONE_RUN)
def test_ppo_reaches_the_optimum(beta, seed):
    """PPO with the k1 penalty in the reward, GAE and a value model: within 0.03
    nats of pi*, 98% of the gap to J* closed."""
    r = run_ppo(beta, seed)
    assert r["before"] > (0.5 if beta == BETAS[0] else 0.1)
    assert r["after"] <= 0.03 and r["closed"] >= 0.98


@pytest.mark.parametrize("seed", ONE_SEED)
def test_rloo_reaches_the_optimum(seed):
    """No value model and no GAE: the others of the group as baseline, the k1 penalty in the reward; the same pi*."""
    r = run_grpo(BETAS[0], seed, "rloo", "k1")
    assert r["before"] > 0.5 and r["after"] <= 0.03 and r["closed"] >= 0.98


@pytest.mark.parametrize("seed", ONE_SEED)
def test_where_dr_grpo_ends_instead(seed):
    """With the penalty in the loss it isn't pi*: Dr. GRPO comes to a point of its own, which is known exactly."""
    r = run_grpo(BETAS[0], seed, "dr_grpo", "k3")
    assert r["elsewhere"] <= 0.03 and r["after"] > 2 * r["elsewhere"] + 0.03


@pytest.mark.slow
def test_where_dr_grpo_ends_with_k2():
    """At another point, and it is on its way more slowly: k2 of a rare token is large, and noisy."""
    r = run_grpo(BETAS[0], SEEDS[0], "dr_grpo", "k2")
    assert r["elsewhere"] <= 0.06 and r["after"] > 2 * r["elsewhere"]


@pytest.mark.parametrize("seed", ONE_SEED)
def test_grpo_does_not_end_at_the_optimum(seed):
    """Its advantages are divided by each group's std."""
    r = run_grpo(BETAS[0], seed, "grpo", "k3")
    assert 0.05 < r["after"] < 0.5 * r["before"]


@pytest.mark.parametrize(("beta", "seed"), ONE_RUN)
def test_dpo_reaches_the_same_optimum(beta, seed):
    """DPO on exact Bradley-Terry preferences: within 0.005 nats of the same pi*; its implicit
    rewards are r up to a constant a prompt."""
    r = run_dpo(beta, seed)
    assert r["after"] <= 0.005
    assert r["implicit_reward_error"] < 0.1


# ------------------------------------------------------------------------------------------ losses with a known minimum


def minimise(loss_of, steps: int = 400) -> Tensor:
    """Minimise over the distribution of two completions, (2,) logits in float64 -> its log-probs."""
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([theta], lr=0.5, max_iter=steps, tolerance_grad=1e-12, tolerance_change=1e-14)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(theta.log_softmax(0))
        loss.backward()
        return loss

    optimizer.step(closure)
    return theta.detach().log_softmax(0)


REF = torch.tensor([0.2, 0.8], dtype=torch.float64).log()


def margin(logp: Tensor) -> float:
    """h = log pi/pi_ref (first) - log pi/pi_ref (second)."""
    return ((logp - REF)[0] - (logp - REF)[1]).item()


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("eps", [0.1, 0.3])
def test_label_smoothing_has_its_optimum(beta, eps):
    """The first completion always preferred, smoothing eps: sigmoid(beta h*) = 1 -
    eps, so beta h* = log((1 - eps) / eps)."""
    logp = minimise(lambda lp: dpo.dpo_loss(lp[:1], lp[1:], REF[:1], REF[1:], beta, eps)[0].mean())
    assert beta * margin(logp) == pytest.approx(math.log((1 - eps) / eps), abs=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("p", [1.0, 0.8])
def test_ipo_has_its_optimum(beta, p):
    """The first completion preferred with probability p: p (h - c)^2 + (1 - p) (-h - c)^2 with c = 1 /
    (2 beta) is least at h* = (2p - 1) c."""

    def loss(lp):
        one = dpo.dpo_loss(lp[:1], lp[1:], REF[:1], REF[1:], beta, kind="ipo")[0]
        other = dpo.dpo_loss(lp[1:], lp[:1], REF[1:], REF[:1], beta, kind="ipo")[0]
        return (p * one + (1 - p) * other).mean()

    assert margin(minimise(loss)) == pytest.approx((2 * p - 1) / (2 * beta), abs=1e-6)


@pytest.mark.parametrize("p", [0.6, 0.9])
def test_dpo_has_its_optimum_on_two_completions(p):
    """beta h* = log(p / (1 - p)): the reward difference that Bradley-Terry gives that preference."""
    beta = 0.3

    def loss(lp):
        one = dpo.dpo_loss(lp[:1], lp[1:], REF[:1], REF[1:], beta)[0]
        other = dpo.dpo_loss(lp[1:], lp[:1], REF[1:], REF[:1], beta)[0]
        return (p * one + (1 - p) * other).mean()

    assert beta * margin(minimise(loss)) == pytest.approx(math.log(p / (1 - p)), abs=1e-6)


# ------------------------------------------------------------------------------------------------ the reward model


@pytest.mark.slow
@pytest.mark.parametrize(("K", "rankings"), [(2, 240_000), (4, 80_000)])
def test_reward_model_recovers_the_rewards(K, rankings):
    """Rankings of K of 8 completions drawn from Plackett-Luce: scores equal the true rewards
    up to a constant a prompt, within 0.1."""
    generator = torch.Generator().manual_seed(K)
    reference, reward = world(5)
    picked = torch.arange(0, N, N // 8)[:8]
    true = reward[:, picked]  # (P, 8)
    prompt = torch.randint(P, (rankings,), generator=generator)
    shown = torch.rand(rankings, 8, generator=generator).argsort(1)[:, :K]  # K different completions each
    gumbel = -torch.log(-torch.log(torch.rand(rankings, K, generator=generator, dtype=torch.float64)))
    order = (true[prompt[:, None], shown] + gumbel).argsort(1, descending=True)  # an exact Plackett-Luce draw
    ranked = shown.gather(1, order)  # (rankings, K), best first
    torch.manual_seed(0)
    model = ScalarModel.from_gpt(reference.requires_grad_(True))
    some = (torch.arange(P)[:, None] * N + picked).flatten()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(250):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * lr_at(step, 250, 10, "cosine")
        scores = model.score(TOKENS[some], LENS[some]).view(P, 8)
        loss = reward_model.ranking_loss(scores[prompt[:, None], ranked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    scores = scores.detach().double()
    error = (scores - scores.mean(1, keepdim=True)) - (true - true.mean(1, keepdim=True))
    print(f"\nreward recovered from {rankings:,} rankings of K = {K}: ", end="")
    print(f"largest centred error {error.abs().max():.3f} (rewards from {true.min():.1f} to {true.max():.1f})")
    assert error.abs().max() < 0.1


# ------------------------------------------------------------------------------------------------ gradients


def flat_gradient(loss: Tensor, model: GPT) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double()


def moved(reference: GPT, seed: int) -> GPT:
    """A policy somewhere between the reference and nowhere: log-ratios of order one."""
    torch.manual_seed(100 + seed)
    policy = copy.deepcopy(reference).requires_grad_(True)
    with torch.no_grad():
        for p in policy.parameters():
            p += 0.15 * torch.randn_like(p)
    return policy


def test_ppo_gradient_is_the_gradient_of_the_objective():
    """First minibatch (ratio 1), lambda 1, no baseline, no whitening: minus PPO's gradient is an unbiased estimate of
    the exact gradient of J, so the error shrinks as 1 / sqrt(samples)."""
    beta = 0.7
    reference, reward = world(0)
    policy = moved(reference, 0)
    exact_policy = copy.deepcopy(policy).double()
    logp = enumerate_logprobs(exact_policy)
    exact = flat_gradient((logp.exp() * (reward - beta * (logp - logprobs(reference)))).sum(1).mean(), exact_policy)
    value_model = ScalarModel.from_gpt(reference)
    torch.nn.init.zeros_(value_model.head.weight)  # V = 0
    config = ppo.Config(kl_coef=beta, lam=1.0, gamma=1.0, whiten_advantages=False, micro_batch=0)
    sizes, repeats = (192, 768, 3072), 6
    errors = []
    for size in sizes:
        found = []
        for repeat in range(repeats):
            which = [i % P for i in range(size)]
            rollout, scores = sample(policy, which, reward, generator_for(CPU, size, repeat))
            e = ppo.make_experience(policy, reference, value_model, rollout, scores, beta, config)
            new = token_logprobs(policy, e.tokens)
            loss, _ = ppo.policy_loss(new, e.logprobs, e.advantages, e.action_mask, config.clip, n_tokens=size)
            found.append(((-flat_gradient(loss, policy) - exact).norm() / exact.norm()).item())
        errors.append(math.sqrt(sum(x * x for x in found) / repeats))
    x, y = torch.tensor(sizes).double().log(), torch.tensor(errors).double().log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()
    print(
        "\nPPO gradient, relative error by samples: "
        + ", ".join(f"{n}: {e:.3f}" for n, e in zip(sizes, errors, strict=True))
        + f"; slope {slope:.2f}"
    )
    assert -0.65 < slope < -0.35
    assert errors[-1] < 0.1


def enumerated_penalty_gradient(policy: GPT, penalty: Tensor) -> Tensor:
    """The exact expectation, over all completions, of the policy gradient whose reward
    is -penalty at each token, (P*N, T-1)."""
    returns, _ = ppo.gae(-penalty.detach(), torch.zeros_like(penalty), MASK, 1.0, 1.0)  # reward to go
    logp = token_table(policy)
    weight = (logp * MASK).sum(1).exp().detach()  # pi(y|x)
    return flat_gradient((weight[:, None] * logp * returns * MASK).sum() / P, policy)


def test_kl_penalties_against_enumeration():
    """k1: its expectation is the KL and its gradient as a penalty is the KL's. k3: the same
    expectation, another gradient. k2: neither."""
    reference, _ = world(0)
    reference = reference.double()
    policy = moved(reference, 0)
    logp, ref = enumerate_logprobs(policy), enumerate_logprobs(reference)
    divergence = (logp.exp() * (logp - ref)).sum(1).mean()
    true_gradient = -flat_gradient(divergence, policy)
    with torch.no_grad():
        tokens_logp, tokens_ref = token_table(policy), token_table(reference)
        weight = logp.exp().flatten()
    cosine, value = {}, {}
    for kind in ("k1", "k2", "k3"):
        penalty = torch.where(MASK, ppo.kl_penalty(tokens_logp, tokens_ref, kind), 0.0)
        value[kind] = ((weight * penalty.sum(1)).sum() / P).item()
        gradient = enumerated_penalty_gradient(policy, penalty)
        cosine[kind] = torch.nn.functional.cosine_similarity(gradient, true_gradient, dim=0).item()
        if kind == "k1":
            assert torch.allclose(gradient, true_gradient, atol=1e-9)
    print(
        f"\nKL {divergence.item():.4f} nats; expectations "
        + ", ".join(f"{k} {v:.4f}" for k, v in value.items())
        + "; cosine of the penalty's gradient with the KL's "
        + ", ".join(f"{k} {v:.3f}" for k, v in cosine.items())
    )
    assert value["k1"] == pytest.approx(divergence.item(), abs=1e-9)
    assert value["k3"] == pytest.approx(divergence.item(), abs=1e-9)
    assert abs(value["k2"] / divergence.item() - 1) > 0.02
    assert cosine["k1"] > 1 - 1e-9
    assert cosine["k2"] < 0.99 and cosine["k3"] < 0.99


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_exact_kl_is_the_enumerated_one(temperature):
    """--kl exact: the per-token divergences, summed along a completion and averaged over all of them, are the KL of the
    sequences (the chain rule), at the sampling temperature."""
    reference = world(1)[0].double()
    policy = moved(reference, 1)
    tables = []
    for model in (policy, reference):
        tables.append((token_table(model, temperature) * MASK).sum(1).view(P, N).detach())
    rollout = Rollout(TOKENS, PROMPT_LENS, LENS, TOKENS[torch.arange(P * N), LENS - 1] == EOS)
    config = ppo.Config(kl="exact", temperature=temperature)
    value_model = ScalarModel.from_gpt(reference)
    e = ppo.make_experience(policy, reference, value_model, rollout, torch.zeros(P * N), 0.1, config)
    found = (tables[0].exp().flatten() * e.kl.sum(1)).sum().item() / P
    assert found == pytest.approx(kl(*tables), rel=1e-10)
    whole = tables[0].exp().sum(1).tolist()
    assert whole == pytest.approx([1.0] * P, abs=1e-9)  # the 40 completions are the whole space


@pytest.mark.parametrize("kind", ["k1", "exact"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_penalty_in_the_advantages_has_the_gradient_of_the_kl(kind, temperature):
    """make_experience on all completions, no score: the enumerated policy gradient is minus beta times
    the gradient of the KL. For `exact` that needs more than the penalty in the reward: a state's KL is
    the same for all tokens chosen there."""
    beta = 0.3
    reference = world(0)[0].double()
    policy = moved(reference, 0)

    logp, ref = ((token_table(model, temperature) * MASK).sum(1).view(P, N) for model in (policy, reference))
    true = flat_gradient(-beta * (logp.exp() * (logp - ref)).sum(1).mean(), policy)

    value_model = ScalarModel.from_gpt(reference)
    torch.nn.init.zeros_(value_model.head.weight)
    rollout = Rollout(TOKENS, PROMPT_LENS, LENS, TOKENS[torch.arange(P * N), LENS - 1] == EOS)
    config = ppo.Config(kl=kind, temperature=temperature, lam=1.0, whiten_advantages=False)
    e = ppo.make_experience(policy, reference, value_model, rollout, torch.zeros(P * N), beta, config)
    tokens_logp = token_table(policy, temperature)
    weight = (tokens_logp * MASK).sum(1).exp().detach()
    found = flat_gradient((weight[:, None] * tokens_logp * e.advantages * MASK).sum() / P, policy)
    assert (found - true).norm() / true.norm() < 1e-9
