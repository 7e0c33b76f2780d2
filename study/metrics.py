"""What the stages log in metrics.jsonl: a name, a unit, the healthy range and a line on how to read it, for plot.py and
report.py. docs/tuning.md, "Reading the metrics", has them as a table.

A range is given only where it holds for any task and any reward: the score's, say, depends on both. It is that of the
end of a run; `kl`, for one, starts at 0.
"""

from __future__ import annotations

from typing import NamedTuple


class Metric(NamedTuple):
    title: str
    unit: str
    low: float | None  # healthy from here; None: no lower limit
    high: float | None  # healthy up to here
    explanation: str


def bounded(metric: Metric) -> bool:
    """Is there a healthy range to shade?"""
    return metric.low is not None or metric.high is not None


# In the order in which one reads them.
METRICS = {
    # ppo.py and grpo.py, once an iteration
    "score": Metric(
        "score",
        "reward",
        None,
        None,
        "Mean reward of the samples: the reward model's opinion, without penalties. It should rise. "
        "For a normalised reward model 0 is the SFT policy's mean and 1 its standard deviation.",
    ),
    "gold": Metric(
        "gold",
        "reward",
        None,
        None,
        "Mean true reward of the same samples, which training never sees. Score up and gold down is "
        "over-optimisation: the reward model is being exploited.",
    ),
    "kl": Metric(
        "KL",
        "nats a sequence",
        0.5,
        15.0,
        "How far the policy has moved from its start. Higher than 15: raise --kl_coef and look at the samples. "
        "The k1 estimate may dip below 0 by noise; if it stays there, something is wrong with the sampling.",
    ),
    "k3": Metric(
        "KL, never negative",
        "nats a sequence",
        0.5,
        15.0,
        "Another estimate of the same KL (k3), which can't be negative. The two should agree.",
    ),
    "objective": Metric(
        "objective",
        "reward",
        None,
        None,
        "What is maximised: the score with its penalties, less kl_coef times KL. If it falls while the score rises, "
        "the policy pays more in KL than it gets.",
    ),
    "entropy": Metric(
        "entropy",
        "nats a token",
        None,
        None,
        "How undecided the policy is at a token. It falls slowly. Near 0 early: the policy has collapsed; lower --lr.",
    ),
    "eos_rate": Metric(
        "EOS rate",
        "share of samples",
        0.95,
        1.0,
        "Share of answers that end by themselves. Falling: raise --eos_penalty.",
    ),
    "distinct": Metric(
        "distinct",
        "share of samples",
        0.5,
        1.0,
        "Share of different answers. Falling: the same answer to everything, which is reward hacking.",
    ),
    "length": Metric(
        "length",
        "tokens",
        None,
        None,
        "Mean length of an answer. A steady rise is often the reward model's liking for long answers.",
    ),
    "explained_variance": Metric(
        "explained variance",
        "share",
        0.2,
        1.0,
        "How much of the returns' variance the value model predicts. It rises towards 0.8; near or below 0 the value "
        "model doesn't learn: raise --value_lr.",
    ),
    "clip_fraction": Metric(
        "clip fraction",
        "share of tokens",
        0.0,
        0.2,
        "Share of tokens at which PPO's clip holds the update back. Higher: lower --lr or --ppo_epochs.",
    ),
    "value_clip_fraction": Metric(
        "value clip fraction",
        "share of tokens",
        None,
        None,
        "Share of tokens at which the value model's update is held back.",
    ),
    "approx_kl": Metric(
        "step KL",
        "nats a token",
        0.0,
        0.1,
        "How far the updates of one iteration moved the policy. Beyond --stop_kl (0.1) the update ends early.",
    ),
    "first_ratio": Metric(
        "first ratio",
        "pi / pi_old",
        1.0,
        1.001,
        "The largest probability ratio before anything was updated. It must be 1: else the old log-probs and the "
        "update come from different code (padding, dropout, dtype).",
    ),
    "policy_loss": Metric("policy loss", "", None, None, "PPO's clipped loss. Its size says little: watch the score."),
    "value_loss": Metric(
        "value loss",
        "reward squared",
        None,
        None,
        "Half the mean squared error of the values to the returns.",
    ),
    "kl_coef": Metric(
        "KL coefficient",
        "reward per nat",
        None,
        None,
        "Strength of the pull to the start; it moves only with --kl_target.",
    ),
    "updates": Metric("updates", "optimiser steps", None, None, "Optimiser steps of an iteration."),
    "stopped_early": Metric("stopped early", "", None, None, "1 where --stop_kl ended an iteration's update."),
    # sft.py, reward_model.py, dpo.py
    "loss": Metric("training loss", "nats", None, None, "What the stage minimises, on its training batches."),
    "held_out_loss": Metric(
        "held-out loss",
        "nats a token",
        None,
        None,
        "The same on data that was not trained on. If it rises while the training loss falls, stop earlier.",
    ),
    "accuracy": Metric(
        "accuracy",
        "share of pairs",
        0.6,
        0.95,
        "Share of training pairs of which the better one gets the higher reward; 0.5 is a coin. Noisy annotators "
        "allow no more than their Bayes accuracy; towards 1.0 pairs are learned by heart.",
    ),
    "margin": Metric(
        "margin",
        "reward",
        None,
        None,
        "Chosen less rejected implicit reward, beta * log(pi / pi_ref): what DPO widens.",
    ),
    "chosen_reward": Metric("chosen reward", "reward", None, None, "Implicit reward of the better completions."),
    "rejected_reward": Metric("rejected reward", "reward", None, None, "Implicit reward of the worse completions."),
    "chosen_logprob": Metric(
        "chosen log-prob",
        "nats a sequence",
        None,
        None,
        "Log-probability of the better completions. It may fall: only the margin is optimised.",
    ),
    "rejected_logprob": Metric(
        "rejected log-prob",
        "nats a sequence",
        None,
        None,
        "Log-probability of the worse completions. It should fall faster than the chosen ones'.",
    ),
    # all of them
    "grad_norm": Metric(
        "gradient norm",
        "",
        None,
        None,
        "Before clipping to --grad_clip (1.0). Peaks are normal, growth is not.",
    ),
    "lr": Metric("learning rate", "", None, None, "Linear warm-up, then decay."),
    "tokens_per_s": Metric("speed", "tokens a second", None, None, "Training speed."),
    "seconds": Metric("time", "seconds an iteration", None, None, "Wall time of one iteration."),
    "share_rollout": Metric("sampling", "share of the time", None, None, "Share of the time that sampling takes."),
    "share_score": Metric("scoring", "share of the time", None, None, "Share that rewards, KL and values take."),
    "share_update": Metric("updating", "share of the time", None, None, "Share that the weight updates take."),
}
