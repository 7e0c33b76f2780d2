"""The metrics that the stages log in metrics.jsonl: title, unit, how to read it, healthy range. For plot.py and
report.py, and for the table "Reading the metrics" of docs/tuning.md.

A metric has a range only if the range holds for any task and any reward; the score's, for one, depends on both. It is
the range at the end of a run: `kl`, for one, starts at 0.
"""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    title: str
    unit: str = ""
    explanation: str = ""
    low: float | None = None  # the healthy range; None: it has none
    high: float | None = None


def bounded(metric: Metric) -> bool:
    """Does the metric have a healthy range?"""
    return metric.low is not None


# In the order in which to read them.
METRICS = {
    # ppo.py and grpo.py, once an iteration
    "score": Metric(
        "score",
        "reward",
        "Mean reward of the samples: the reward model's opinion, without penalties. It should rise. "
        "For a normalised reward model 0 is the SFT policy's mean and 1 its standard deviation.",
    ),
    "gold": Metric(
        "gold",
        "reward",
        "Mean true reward of the same samples, which training never sees. Score up and gold down is "
        "over-optimisation: the reward model is being exploited.",
    ),
    "kl": Metric(
        "KL",
        "nats a sequence",
        "How far the policy has moved from its start. Higher than 15: raise --kl_coef and look at the samples. "
        "The k1 estimate may dip below 0 by noise; if it stays there, something is wrong with the sampling.",
        low=0.5,
        high=15.0,
    ),
    "k3": Metric(
        "KL, never negative",
        "nats a sequence",
        "Another estimate of the same KL (k3), which can't be negative. The two should agree.",
        low=0.5,
        high=15.0,
    ),
    "objective": Metric(
        "objective",
        "reward",
        "What is maximised: the score with its penalties, less kl_coef times KL. If it falls while the score rises, "
        "the policy pays more in KL than it gets.",
    ),
    "entropy": Metric(
        "entropy",
        "nats a token",
        "How undecided the policy is at a token. It falls slowly. Near 0 early: the policy has collapsed; lower --lr.",
    ),
    "eos_rate": Metric(
        "EOS rate",
        "share of samples",
        "Share of answers that end by themselves. Falling: raise --eos_penalty.",
        low=0.95,
        high=1.0,
    ),
    "distinct": Metric(
        "distinct",
        "share of samples",
        "Share of different answers. Falling: the same answer to everything, which is reward hacking.",
        low=0.5,
        high=1.0,
    ),
    "length": Metric(
        "length",
        "tokens",
        "Mean length of an answer. A steady rise is often the reward model's liking for long answers.",
    ),
    "explained_variance": Metric(
        "explained variance",
        "share",
        "How much of the returns' variance the value model predicts. It rises towards 0.8; near or below 0 the value "
        "model doesn't learn: raise --value_lr.",
        low=0.2,
        high=1.0,
    ),
    "clip_fraction": Metric(
        "clip fraction",
        "share of tokens",
        "Share of tokens at which PPO's clip holds the update back. Higher: lower --lr or --ppo_epochs.",
        low=0.0,
        high=0.2,
    ),
    "value_clip_fraction": Metric(
        "value clip fraction", "share of tokens", "Share of tokens at which the value model's update is held back."
    ),
    "approx_kl": Metric(
        "step KL",
        "nats a token",
        "How far the updates of one iteration moved the policy. Beyond --stop_kl (0.1) the update ends early.",
        low=0.0,
        high=0.1,
    ),
    "first_ratio": Metric(
        "first ratio",
        "pi / pi_old",
        "The largest probability ratio before anything was updated. It must be 1: else the old log-probs and the "
        "update come from different code (padding, dropout, dtype).",
        low=1.0,
        high=1.001,
    ),
    "policy_loss": Metric("policy loss", "", "PPO's clipped loss. Its size says little: watch the score."),
    "value_loss": Metric("value loss", "reward squared", "Half the mean squared error of the values to the returns."),
    "kl_coef": Metric(
        "KL coefficient", "reward per nat", "Strength of the pull to the start; it moves only with --kl_target."
    ),
    "updates": Metric("updates", "optimiser steps", "Optimiser steps of an iteration."),
    "stopped_early": Metric("stopped early", "", "1 where --stop_kl ended an iteration's update."),
    # sft.py, reward_model.py, dpo.py
    "loss": Metric("training loss", "nats", "What the stage minimises, on its training batches."),
    "held_out_loss": Metric(
        "held-out loss",
        "nats a token",
        "The same on data that was not trained on. If it rises while the training loss falls, stop earlier.",
    ),
    "accuracy": Metric(
        "accuracy",
        "share of pairs",
        "Share of training pairs of which the better one gets the higher reward; 0.5 is a coin. Noisy annotators "
        "allow no more than their Bayes accuracy; towards 1.0 pairs are learned by heart.",
        low=0.6,
        high=0.95,
    ),
    "margin": Metric(
        "margin", "reward", "Chosen less rejected implicit reward, beta * log(pi / pi_ref): what DPO widens."
    ),
    "chosen_reward": Metric("chosen reward", "reward", "Implicit reward of the better completions."),
    "rejected_reward": Metric("rejected reward", "reward", "Implicit reward of the worse completions."),
    "chosen_logprob": Metric(
        "chosen log-prob",
        "nats a sequence",
        "Log-probability of the better completions. It may fall: only the margin is optimised.",
    ),
    "rejected_logprob": Metric(
        "rejected log-prob",
        "nats a sequence",
        "Log-probability of the worse completions. It should fall faster than the chosen ones'.",
    ),
    # all of them
    "grad_norm": Metric("gradient norm", "", "Before clipping to --grad_clip (1.0). Peaks are normal, growth is not."),
    "lr": Metric("learning rate", "", "Linear warm-up, then decay."),
    "tokens_per_s": Metric("speed", "tokens a second", "Training speed."),
    "seconds": Metric("time", "seconds an iteration", "Wall time of one iteration."),
    "share_rollout": Metric("sampling", "share of the time", "Share of the time that sampling takes."),
    "share_score": Metric("scoring", "share of the time", "Share that rewards, KL and values take."),
    "share_update": Metric("updating", "share of the time", "Share that the weight updates take."),
}
