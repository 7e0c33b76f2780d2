"""The bugs that mutate.py puts in, one at a time: the right code, the wrong code, what it would do to a
training run, and the tests that should notice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Mutation:
    file: str
    right: str  # the code as it is; it must stand in the file once, or `which` says which one is meant
    wrong: str  # the bug
    effect: str  # what it would do to a training run
    tests: str  # what should notice: pytest's arguments, run in this order until one fails
    which: int = 0  # 1: the first of several places
    slow: bool = False  # run the tests marked slow too


MUTATIONS = [
    # ------------------------------------------------------------ blocks.py
    Mutation(
        "blocks.py",
        right="is_causal=True",
        wrong="is_causal=False",
        effect="the model sees the future: training loss near 0, samples are noise",
        tests="tests/test_model.py::test_forward_is_gpt2_by_loops",
    ),
    Mutation(
        "blocks.py",
        right='approximate="tanh"',
        wrong='approximate="none"',
        effect="not GPT-2's GELU: imported weights give slightly wrong logits",
        tests="tests/test_model.py::test_forward_is_gpt2_by_loops",
    ),
    Mutation(
        "blocks.py",
        right="dropout = self.dropout if self.training else 0.0",
        wrong="dropout = self.dropout",
        effect="attention drops in evaluation too: samples and log-probs are of another policy each time",
        tests="tests/test_model.py::test_dropout_is_off_in_eval_and_in_generate",
    ),
    Mutation(
        "blocks.py",
        right="return x.to(torch.promote_types(x.dtype, torch.float32))",
        wrong="return x.float()",
        effect="a float64 run is float32 in its output: what the tests compare to ten digits agrees to six",
        tests="tests/test_model.py::test_select_logprobs_works_in_float32_at_least",
    ),
    Mutation(
        "blocks.py",
        right="self.kv[:, rows, :, positions] =",
        wrong="self.kv[:, rows, :, positions.max().expand(len(rows))] =",
        effect="all rows write to the longest row's slot: short prompts read stale keys",
        tests="tests/test_model.py::test_prefill_and_decode_one_token_equal_the_full_forward",
    ),
    Mutation(
        "blocks.py",
        right="torch.stack([k[:, :, 0], v[:, :, 0]], 1).to(self.kv.dtype)",
        wrong="torch.stack([k[:, :, 0], v[:, :, 0]], 1)",
        effect="sampling under autocast crashes",
        tests="tests/test_model.py::test_the_cache_holds_what_was_written_where_it_was_written",
    ),
    Mutation(
        "blocks.py",
        right="config.rope_base ** (-torch.arange(0, D, 2) / D)",
        wrong="config.rope_base ** (-torch.arange(0, D, 2) / (2 * D))",
        effect=(
            "rotary positions of another base than the one asked for: a checkpoint read elsewhere is another model"
        ),
        tests="tests/test_model.py::test_rotary_positions_are_2_by_2_rotations",
    ),
    Mutation(
        "blocks.py",
        right="torch.stack([angles.cos(), angles.sin()], -1)",
        wrong="torch.stack([angles.sin(), angles.cos()], -1)",
        effect="sine and cosine exchanged: every vector is turned by a quarter too, and the wrong way round",
        tests="tests/test_model.py::test_rotary_positions_are_2_by_2_rotations",
    ),
    Mutation(
        "blocks.py",
        right="torch.view_as_complex(at_least_float32(x).unflatten(-1, (-1, 2)))",
        wrong="torch.view_as_complex(at_least_float32(x).unflatten(-1, (2, -1)).mT.contiguous())",
        effect=(
            "the first half of the channels is paired with the second: still rotary, but not what the description says"
        ),
        tests="tests/test_model.py::test_rotary_positions_are_2_by_2_rotations",
    ),
    Mutation(
        "blocks.py",
        right="(qk if turns is None else rotate(qk, turns))",
        wrong="(qk if turns is None else torch.cat([rotate(qk[:, :, :1], turns), qk[:, :, 1:]], 2))",
        effect="queries are turned and keys are not: attention depends on where a text stands, not on distances",
        tests="tests/test_model.py::test_forward_is_gpt2_by_loops",
    ),
    Mutation(
        "blocks.py",
        right="(qk if turns is None else rotate(qk, turns))",
        wrong=(
            "(qk if turns is None else torch.cat([rotate(qk[:, :, :1], turns), rotate(qk[:, :, 1:], turns * "
            "turns.new_tensor([1.0, -1.0]))], 2))"
        ),
        effect="keys are turned the other way: attention depends on the sum of two positions, not on their distance",
        tests="tests/test_model.py::test_forward_is_gpt2_by_loops",
    ),
    Mutation(
        "blocks.py",
        right="at_least_float32(turns))).flatten(-2).to(x.dtype)",
        wrong="at_least_float32(turns))).flatten(-2)",
        effect=(
            "rotary positions make float32 of bfloat16 queries: mixed dtypes in the attention, a crash under autocast"
        ),
        tests="tests/test_model.py::test_rotary_positions_in_other_precisions",
    ),
    Mutation(
        "blocks.py",
        right="self.n_embd // self.n_head % 2)",
        wrong="self.n_embd % 2)",
        effect="an odd number of channels a head is a shape error inside the first forward pass, not a message",
        tests="tests/test_model.py::test_sequences_longer_than_the_block_are_refused",
    ),
    Mutation(
        "blocks.py",
        right=": v.size(2)] = k, v",
        wrong=": v.size(2)] = k, k",
        effect="the prompt's values are its keys: samples lose what the prompt says",
        tests="tests/test_model.py::test_prefill_and_decode_one_token_equal_the_full_forward",
    ),
    Mutation(
        "blocks.py",
        right="torch.stack([k[:, :, 0], v[:, :, 0]], 1)",
        wrong="torch.stack([v[:, :, 0], k[:, :, 0]], 1)",
        effect="keys and values of sampled tokens are exchanged",
        tests="tests/test_model.py::test_the_cache_holds_what_was_written_where_it_was_written",
    ),
    Mutation(
        "blocks.py",
        right="torch.cat([self.kv, self.kv.new_zeros(*self.kv.shape[:3], slots, self.kv.size(4))], 3)",
        wrong="torch.cat([self.kv.new_zeros(*self.kv.shape[:3], slots, self.kv.size(4)), self.kv], 3)",
        effect=(
            "a cache that grows pushes its keys to later slots: the text behind the 16th sampled token "
            "forgets its prompt"
        ),
        tests="tests/test_model.py::test_the_cache_holds_what_was_written_where_it_was_written",
    ),
    Mutation(
        "blocks.py",
        right="alpha=q.size(-1) ** -0.5",
        wrong="alpha=1 / q.size(-1)",
        effect="attention while sampling is softer than while training: the rollout's policy is another one",
        tests="tests/test_model.py::test_attention_written_out_is_attention",
    ),
    Mutation(
        "blocks.py",
        right="x, y = (F.embedding(index, part.flatten(0, 1)) for part in (x, y))",
        wrong="x, y = x.flatten(0, 1)[: len(index)], F.embedding(index, y.flatten(0, 1))",
        effect="the last block adds to the residual stream of other positions",
        tests="tests/test_model.py::test_some_positions_alone_equal_those_of_the_full_forward",
    ),
    Mutation(
        "blocks.py",
        right='std / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else std',
        wrong="std",
        effect="every block adds as much variance as the first: activations grow with depth",
        tests="tests/test_model.py::test_the_new_block_starts_like_one_of_the_gpt_s",
    ),
    Mutation(
        "blocks.py",
        right='elif name.endswith("bias"):',
        wrong='elif name.endswith("no bias"):',
        effect="biases start as torch makes them, at random: not GPT-2's start",
        tests="tests/test_model.py::test_the_new_block_starts_like_one_of_the_gpt_s",
    ),
    # ------------------------------------------------------------ model.py
    Mutation(
        "model.py",
        right="F.linear(at_least_float32(hidden), at_least_float32(self.wte.weight[: self.config.real_vocab]))",
        wrong="F.linear(at_least_float32(hidden), at_least_float32(self.wte.weight))",
        effect="padding rows of an imported vocabulary get probability, and are sampled",
        tests="tests/test_model.py::test_real_vocab_gets_all_the_probability",
    ),
    Mutation(
        "model.py",
        right=(
            "with torch.autocast(hidden.device.type, enabled=False):\n"
            "            return F.linear(at_least_float32(hidden), at_least_float32(self.wte.weight[: "
            "self.config.real_vocab]))"
        ),
        wrong="return F.linear(hidden, self.wte.weight[: self.config.real_vocab])",
        effect="logits in bfloat16: near -100 they are 0.5 apart, and PPO clips noise",
        tests="tests/test_model.py::test_the_output_layer_is_no_less_than_float32_under_autocast",
    ),
    Mutation(
        "model.py",
        right=(
            "with torch.autocast(hidden.device.type, enabled=False):\n"
            "            return F.linear(at_least_float32(hidden), at_least_float32(self.wte.weight[: "
            "self.config.real_vocab]))"
        ),
        wrong="return F.linear(hidden, self.wte.weight[: self.config.real_vocab]).float()",
        effect="logits cast to float32 after the bfloat16 product, when the digits are gone: 0.12 nats of noise",
        tests="tests/test_model.py::test_log_probs_in_bfloat16_are_close_where_bfloat16_logits_are_not",
    ),
    Mutation(
        "model.py",
        right=(
            "with torch.autocast(hidden.device.type, enabled=False):\n"
            "            raw = self.head(at_least_float32(hidden)).squeeze(-1)  # (B, T) or (N,)"
        ),
        wrong="raw = self.head(hidden).squeeze(-1).float()",
        effect="rewards and values in bfloat16: two and a half digits",
        tests="tests/test_model.py::test_the_scalar_head_is_no_less_than_float32_under_autocast",
    ),
    Mutation(
        "model.py",
        right="return self(tokens, F.one_hot(lens - 1, tokens.size(1)).bool())",
        wrong="return self(tokens, F.one_hot((lens - 2).clamp(min=0), tokens.size(1)).bool())",
        effect="the reward is read one token early, before EOS: finished and cut texts score the same",
        tests="tests/test_model.py::test_scalar_model_reads_the_last_real_token_normalised",
    ),
    Mutation(
        "model.py",
        right="return self(tokens, F.one_hot(lens - 1, tokens.size(1)).bool())",
        wrong="return self(tokens)[:, -1]",
        effect="the reward is read at filler: a text's score depends on its batch mates",
        tests="tests/test_model.py::test_padding_changes_nothing",
    ),
    Mutation(
        "model.py",
        right="return (raw - self.mean) / self.std",
        wrong="return raw - self.mean",
        effect="rewards are not normalised: the KL coefficient means something else for every reward model",
        tests="tests/test_model.py::test_scalar_model_reads_the_last_real_token_normalised",
    ),
    Mutation(
        "model.py",
        right="model.gpt.load_state_dict(gpt.state_dict())",
        wrong="model.gpt = gpt",
        effect="reward or value model shares the policy's body: training one moves the other",
        tests="tests/test_model.py::test_scalar_model_copies_the_body_under_a_new_head",
    ),
    Mutation(
        "model.py",
        right="logits = logits if temperature == 1 else logits / temperature",
        wrong="temperature = 1",
        effect="log-probs ignore the temperature the tokens were sampled at",
        tests="tests/test_model.py::test_select_logprobs_is_the_log_softmax_in_value_and_gradient",
    ),
    Mutation(
        "model.py",
        right="logits = at_least_float32(logits)\n    logits = logits if",
        wrong="logits = logits if",
        effect="the log-softmax of bfloat16 logits in bfloat16: two digits of each log-prob",
        tests="tests/test_model.py::test_select_logprobs_works_in_float32_at_least",
    ),
    Mutation(
        "model.py",
        right="logits = model(part, here) if isinstance(model, GPT)",
        wrong="logits = model(part, F.pad(here, (1, 0))) if isinstance(model, GPT)",
        effect="log-probs of a token given itself: off by one",
        tests="tests/test_model.py::test_token_logprobs_frame",
    ),
    Mutation(
        "model.py",
        right="return max(1, 2**26 // (tokens.size(1) * model.config.vocab_size))",
        wrong="return len(tokens)",
        effect="all rows' logits at once: 512 rollouts of GPT-2 don't fit a GPU",
        tests="tests/test_model.py::test_token_logprobs_in_slices_changes_nothing",
    ),
    Mutation(
        "model.py",
        right="return (where >= prompt_lens[:, None]) & (where < lens[:, None])",
        wrong="return (where >= prompt_lens[:, None]) & (where < lens[:, None] - 1)",
        effect="EOS is masked out: the model never learns to stop",
        tests="tests/test_model.py::test_completion_mask_by_hand",
    ),
    Mutation(
        "model.py",
        right="return (where >= prompt_lens[:, None]) & (where < lens[:, None])",
        wrong="return where < lens[:, None]",
        effect="the prompt's tokens count as actions",
        tests="tests/test_model.py::test_completion_mask_by_hand",
    ),
    Mutation(
        "model.py",
        right="mean = masked_mean(x, mask)\n",
        wrong="mean = x.mean()\n",
        effect="whitening counts the filler: advantages shift with the amount of padding",
        tests="tests/test_model.py::test_whiten_under_a_mask",
    ),
    Mutation(
        "model.py",
        right="return torch.where(mask, x, 0.0).sum() / mask.sum().clamp(min=1)",
        wrong="return (x * mask).sum() / mask.sum().clamp(min=1)",
        effect="0 * inf is nan: one infinite figure at filler and the whole step is nan",
        tests="tests/test_model.py::test_masked_mean_by_hand",
    ),
    Mutation(
        "model.py",
        right="behind = torch.arange(S, device=last.device) > positions[:, None]",
        wrong="behind = torch.arange(S, device=last.device) >= positions[:, None]",
        effect="a token can't see itself while sampling: samples come from another policy than the one trained",
        tests="tests/test_model.py::test_prefill_and_decode_one_token_equal_the_full_forward",
    ),
    Mutation(
        "model.py",
        right="behind = torch.arange(S, device=last.device) > positions[:, None]",
        wrong="behind = torch.arange(S, device=last.device) > positions.max().expand(B, 1)",
        effect="short rows see stale slots: filler's keys, and those of rows before",
        tests="tests/test_model.py::test_prefill_and_decode_one_token_equal_the_full_forward",
    ),
    Mutation(
        "model.py",
        right="model.lm_head(model.hidden(tokens, F.one_hot(lens - 1, tokens.size(1)).bool(), caches))",
        wrong="model.lm_head(model.hidden(tokens, None, caches)[:, -1])",
        effect="the first token of short prompts is predicted from filler",
        tests="tests/test_model.py::test_prefill_and_decode_one_token_equal_the_full_forward",
    ),
    Mutation(
        "model.py",
        right=("logits = at_least_float32(logits) / temperature\n    if top_k"),
        wrong=("logits = at_least_float32(logits)\n    if top_k"),
        effect=(
            "sampling ignores the temperature that the log-probs are divided by: the ratio is not 1 and KL "
            "comes out negative"
        ),
        tests="tests/test_model.py::test_sampling_frequencies",
    ),
    Mutation(
        "model.py",
        right="ranked[ranked.cumsum(-1) - ranked >= top_p]",
        wrong="ranked[ranked.cumsum(-1) >= top_p]",
        effect="top-p drops the token that crosses the threshold: a confident model is left with nothing",
        tests="tests/test_model.py::test_top_p_keeps_the_smallest_set",
    ),
    Mutation(
        "model.py",
        right="new = torch.where(going, sample_token(logits, drawn, temperature, top_k, top_p), eos_id)",
        wrong="new = sample_token(logits, drawn, temperature, top_k, top_p)",
        effect="a row that has ended writes on behind its EOS, as long as it is computed",
        tests="tests/test_model.py::test_generate_and_the_slow_sampler_draw_the_same_tokens",
    ),
    Mutation(
        "model.py",
        right="lens = torch.where(ended, stops.int().argmax(1) + 1, prompt_lens + max_new_tokens)",
        wrong="lens = prompt_lens + max_new_tokens",
        effect="filler after EOS counts as sampled tokens",
        tests="tests/test_model.py::test_a_model_whose_next_token_is_known",
    ),
    Mutation(
        "model.py",
        right="cache.keep(going)",
        wrong="cache.keep(torch.arange(alive))",
        effect="when rows are left behind the others go on with the keys of somebody else's text",
        tests="tests/test_model.py::test_rows_left_behind_don_t_disturb_the_others",
    ),
    Mutation(
        "model.py",
        right="fit = max(1, CACHE_NUMBERS // (2 * c.n_layer * c.n_embd * S))",
        wrong="fit = B",
        effect="no slices: 192 rows of GPT-2 at 1,024 positions want 14 GB of cache",
        tests="tests/test_model.py::test_rows_in_slices_are_the_rows_at_once_and_bound_the_cache",
    ),
    Mutation(
        "model.py",
        right="fit = max(1, CACHE_NUMBERS // (2 * c.n_layer * c.n_embd * S))",
        wrong="fit = max(1, CACHE_NUMBERS // (c.n_layer * c.n_embd * S))",
        effect="keys counted and values not: twice the memory that was allowed",
        tests="tests/test_model.py::test_rows_in_slices_are_the_rows_at_once_and_bound_the_cache",
    ),
    Mutation(
        "model.py",
        right="fit = max(1, CACHE_NUMBERS // (2 * c.n_layer * c.n_embd * S))",
        wrong="fit = CACHE_NUMBERS // (2 * c.n_layer * c.n_embd * S)",
        effect="a row larger than the cache may be: a slice of 0 rows, and a traceback",
        tests="tests/test_model.py::test_one_row_goes_whatever_the_cache_may_hold",
    ),
    Mutation(
        "model.py",
        right='options = {"eos_id": eos_id, "temperature": temperature, "top_k"',
        wrong='options = {"eos_id": eos_id, "top_k"',
        effect="large batches are sampled at temperature 1 whatever was asked for",
        tests="tests/test_model.py::test_temperature_reaches_every_token",
    ),
    Mutation(
        "model.py",
        right='"top_p": top_p, "generator": generator}',
        wrong='"top_p": top_p, "generator": None}',
        effect="large batches ignore the seed: a run can't be repeated",
        tests="tests/test_model.py::test_slices_sample_as_the_whole_does",
    ),
    Mutation(
        "model.py",
        right="for i in range(0, B, fit)]",
        wrong="for i in range(0, B - fit + 1, fit)]",
        effect="the last, smaller slice is dropped: rollouts and prompts no longer match",
        tests="tests/test_model.py::test_rows_in_slices_are_the_rows_at_once_and_bound_the_cache",
    ),
    Mutation(
        "model.py",
        right="return join(parts, eos_id)",
        wrong="return join(parts, 0)",
        effect="another filler where slices differ in width: equal seeds give unequal rollouts",
        tests="tests/test_model.py::test_rows_in_slices_are_the_rows_at_once_and_bound_the_cache",
    ),
    Mutation(
        "model.py",
        right="model.train(training)",
        wrong="model.train()",
        effect="sampling leaves dropout on for whatever follows",
        tests="tests/test_model.py::test_dropout_is_off_in_eval_and_in_generate",
    ),
    Mutation(
        "model.py",
        right="if longest + step >= caches[0].kv.size(3):",
        wrong="if longest + step > caches[0].kv.size(3):",
        effect="the cache grows one token too late: completions of more than 16 tokens end in a traceback",
        tests="tests/test_model.py::test_a_completion_may_be_as_long_as_the_block_leaves_room",
    ),
    Mutation(
        "model.py",
        right=(
            "with torch.autocast(hidden.device.type, enabled=False):\n"
            "            return F.linear(at_least_float32(hidden), at_least_float32(self.wte.weight[: "
            "self.config.real_vocab]))"
        ),
        wrong=(
            "with torch.autocast(hidden.device.type, enabled=torch.is_autocast_enabled(hidden.device.type)):\n"
            "            return F.linear(hidden, self.wte.weight[: self.config.real_vocab])"
        ),
        effect="bfloat16 logits are 0.5 apart at -100: 7% of the tokens lie outside the clip after a step of nothing",
        tests="tests/test_ppo_update.py::test_bfloat16_keeps_the_ratios_of_a_network_of_gpt2_s_size",
    ),
    Mutation(
        "model.py",
        right="return rows * T + columns",
        wrong="return rows * T + (columns + 1).clamp(max=T - 1)",
        effect="the network answers one position late: it has seen the token that it is asked for",
        tests="tests/test_model.py::test_some_positions_alone_equal_those_of_the_full_forward",
    ),
    Mutation(
        "model.py",
        right="return rows * T + columns",
        wrong="return rows * where.size(1) + columns",
        effect="from the second row on the positions of a mask (B, T-1) are off by the number of the row",
        tests="tests/test_model.py::test_some_positions_alone_equal_those_of_the_full_forward",
    ),
    Mutation(
        "model.py",
        right="step, index if i + 1 == len(self.h) else None)\n        return self.ln_f(x)",
        wrong="step, None)\n        return self.ln_f(x) if index is None else self.ln_f(x).flatten(0, 1)[index]",
        effect="prompt and filler go through the last block too, and nothing is saved",
        tests="tests/test_model.py::test_nothing_is_computed_that_only_other_positions_need",
    ),
    Mutation(
        "model.py",
        right="rotary_turns(config), persistent=False)",
        wrong="rotary_turns(config))",
        effect="every checkpoint holds a table of angles, and one of another block size can't be loaded",
        tests="tests/test_model.py::test_a_rotary_network_has_no_table_of_positions",
    ),
    Mutation(
        "model.py",
        right="else step.positions[:, None]  # (T,) or (B, 1)",
        wrong="else step.positions[:1, None]  # (T,) or (B, 1)",
        effect="while sampling every row's tokens stand at the first row's position",
        tests="tests/test_model.py::test_prefill_and_decode_one_token_equal_the_full_forward",
    ),
    Mutation(
        "model.py",
        right="return torch.zeros(mask.shape, dtype=found.dtype, device=found.device).masked_scatter(mask, found)",
        wrong="return torch.ones(mask.shape, dtype=found.dtype, device=found.device).masked_scatter(mask, found)",
        effect="prompts and filler have a log-prob of 1: DPO's sums depend on padding",
        tests="tests/test_model.py::test_put_back_by_hand",
    ),
    Mutation(
        "model.py",
        right="masked_scatter(mask, found)",
        wrong="masked_scatter(mask, found.flip(0))",
        effect="figures come back to other tokens than they belong to",
        tests="tests/test_model.py::test_put_back_by_hand",
    ),
    Mutation(
        "model.py",
        right="model(part)[:, :-1][here]",
        wrong="model(part)[:, 1:][here]",
        effect="a model of one's own is asked for a token given itself",
        tests="tests/test_dpo.py::test_gradient_is_on_the_completion_alone",
    ),
    Mutation(
        "model.py",
        right="select_logprobs(logits, part[:, 1:][here], temperature)",
        wrong="select_logprobs(logits, part[:, :-1][here], temperature)",
        effect="the log-prob of the token that was there already",
        tests="tests/test_model.py::test_token_logprobs_frame",
    ),
    Mutation(
        "model.py",
        right="target = uniforms[:, None] * cumulative[:, -1:]",
        wrong="target = uniforms[:, None]",
        effect="numbers are not scaled by what top-p left: ids beyond the vocabulary are drawn",
        tests="tests/test_model.py::test_what_was_cut_off_leaves_its_probability_to_the_others",
    ),
    Mutation(
        "model.py",
        right="target = uniforms[:, None] * cumulative[:, -1:]",
        wrong="target = uniforms[:1, None] * cumulative[:, -1:]",
        effect="every row draws by the first row's number: a group of samples is one sample",
        tests="tests/test_model.py::test_a_token_is_where_the_summed_probability_passes_the_number",
    ),
    Mutation(
        "model.py",
        right="torch.searchsorted(cumulative, target, right=True)",
        wrong="torch.searchsorted(cumulative, target, right=False)",
        effect="a token of probability 0 is drawn where the number is 0 or on a boundary",
        tests="tests/test_model.py::test_numbers_on_a_boundary_and_tokens_of_probability_0",
    ),
    Mutation(
        "model.py",
        right="cumulative = probs.cumsum(-1)",
        wrong="cumulative = probs.sort(-1, descending=True).values.cumsum(-1)",
        effect="ids are drawn by their rank: token 0 has the probability of the best",
        tests="tests/test_model.py::test_sampling_frequencies",
    ),
    Mutation(
        "model.py",
        right="positions[:, None]  # (B, S)\n",
        wrong="positions[:, None] + 1  # (B, S)\n",
        effect="every token sees the slot behind it: filler's keys, or an empty one",
        tests="tests/test_model.py::test_prefill_and_decode_one_token_equal_the_full_forward",
    ),
    Mutation(
        "model.py",
        right="new_zeros(B, H, S).masked_fill_(behind[:, None], -math.inf).view(B * H, 1, S)",
        wrong="new_zeros(H, B, S).masked_fill_(behind, -math.inf).view(B * H, 1, S)",
        effect="heads and rows exchanged: a row looks at as many slots as another row has",
        tests="tests/test_model.py::test_prefill_and_decode_one_token_equal_the_full_forward",
    ),
    Mutation(
        "model.py",
        right="distinct_lens, caches)[source]",
        wrong="distinct_lens, caches)[torch.arange(B, device=device) % len(number)]",
        effect="the first tokens of rows with equal prompts are drawn from other prompts' logits",
        tests="tests/test_model.py::test_copies_of_a_prompt_are_read_once_and_answered_each",
    ),
    Mutation(
        "model.py",
        right="cache.keep(source)",
        wrong="cache.keep(torch.arange(B, device=device) % len(number))",
        effect="rows go on with the keys of another prompt than their own",
        tests="tests/test_model.py::test_copies_of_a_prompt_are_read_once_and_answered_each",
    ),
    Mutation(
        "model.py",
        right=(
            "number = {prompt: n for n, prompt in enumerate(dict.fromkeys(map(tuple, prompts)))}  # of each "
            "distinct prompt\n"
            "    distinct ="
        ),
        wrong="number = {prompt: n for n, prompt in enumerate(map(tuple, prompts))}\n    distinct =",
        effect="copies of a prompt leave rows without any: K samples of each prompt cost as much as K prompts",
        tests="tests/test_model.py::test_copies_of_a_prompt_are_read_once_and_answered_each",
    ),
    Mutation(
        "model.py",
        right="drawn = uniforms[step] if len(rows) == B else uniforms[step, rows]",
        wrong="drawn = uniforms[step, : len(rows)]",
        effect="what a row draws depends on which others have ended: their numbers are handed down",
        tests="tests/test_model.py::test_what_a_row_draws_does_not_depend_on_which_rows_have_left",
    ),
    Mutation(
        "model.py",
        right="drawn = uniforms[step] if len(rows) == B else uniforms[step, rows]",
        wrong="drawn = uniforms[0, rows]",
        effect="the same number for every token of a completion: the frequencies of single tokens are right",
        tests="tests/test_model.py::test_generate_and_the_slow_sampler_draw_the_same_tokens",
    ),
    Mutation(
        "model.py",
        right="alive <= 0.8 * len(rows)",
        wrong="alive <= 0.2 * len(rows)",
        effect="rows that have ended are computed on: sampling takes several times as long",
        tests="tests/test_model.py::test_rows_that_have_ended_are_left_behind",
    ),
    Mutation(
        "model.py",
        right=(
            "                    for cache in caches:\n"
            "                        cache.keep(going)\n"
            "                    rows, new, positions, going = (x[going] for x in (rows, new, positions, "
            "going))"
        ),
        wrong=(
            "                    rows, new, positions, going = (x[going] for x in (rows, new, positions, "
            "going))\n"
            "                    for cache in caches:\n"
            "                        cache.keep(going)"
        ),
        effect="rows are left behind before their cache is: a traceback as soon as one ends",
        tests="tests/test_model.py::test_generate_and_the_slow_sampler_draw_the_same_tokens",
    ),
    Mutation(
        "model.py",
        right="rows, new, positions, going = (x[going] for x in (rows, new, positions, going))",
        wrong=(
            "rows, new, going = (x[going] for x in (rows, new, going))\n"
            "                    positions = positions[: len(rows)]"
        ),
        effect="when rows are left behind the others go on at somebody else's position",
        tests="tests/test_model.py::test_rows_left_behind_don_t_disturb_the_others",
    ),
    Mutation(
        "model.py",
        right="cache.grow(min(16, S - cache.kv.size(3)))",
        wrong="cache.grow(16)",
        effect="the cache grows beyond the last slot: more memory than CACHE_NUMBERS allows",
        tests=(
            "tests/test_model.py::test_a_completion_may_be_as_long_as_the_block_leaves_room "
            "tests/test_model.py::test_rows_in_slices_are_the_rows_at_once_and_bound_the_cache"
        ),
    ),
    Mutation(
        "model.py",
        right="slots = S if on_gpu else min(S, longest + 16)",
        wrong="slots = S if on_gpu else longest + 16",
        effect="a few new tokens need a cache for 16, beyond what CACHE_NUMBERS allows",
        tests="tests/test_model.py::test_slices_sample_as_the_whole_does",
    ),
    Mutation(
        "model.py",
        right="stops = completion_mask(prompt_lens, prompt_lens + max_new_tokens, S) & (tokens == eos_id)",
        wrong="stops = tokens == eos_id",
        effect="an EOS in the prompt, or filler behind a cut completion, ends the text",
        tests=(
            "tests/test_model.py::test_eos_in_the_prompt_ends_nothing "
            "tests/test_model.py::test_a_model_whose_next_token_is_known"
        ),
    ),
    Mutation(
        "model.py",
        right="stops.int().argmax(1) + 1",
        wrong="stops.int().argmax(1)",
        effect="EOS is no part of the completion: stopping is neither rewarded nor learned",
        tests="tests/test_model.py::test_a_model_whose_next_token_is_known",
    ),
    Mutation(
        "model.py",
        right="return Rollout(tokens[:, : int(lens.max())], prompt_lens",
        wrong="return Rollout(tokens, prompt_lens",
        effect="rollouts as wide as the longest there could be: filler is most of the work",
        tests="tests/test_model.py::test_a_model_whose_next_token_is_known",
    ),
    Mutation(
        "model.py",
        right="logits = (x[:, :-1] * self.gpt.wte(tokens[:, 1:])).sum(-1)",
        wrong="logits = (x * self.gpt.wte(tokens)).sum(-1)[:, 1:]",
        effect="the reward model is told how well a token would follow itself: it learns manners and no facts",
        tests="tests/test_model.py::test_what_is_told_is_the_gpt_s_own_logit",
    ),
    Mutation(
        "model.py",
        right="F.pad(logits, (1, 0))",
        wrong="F.pad(logits, (0, 1))",
        effect="the value model is told how expected the next token is, which is the action it is to judge",
        tests="tests/test_model.py::test_later_tokens_change_nothing_before",
    ),
    Mutation(
        "model.py",
        right="        turns = self.gpt.turns_at(torch.arange(T, device=tokens.device))\n",
        wrong="        turns = None\n",
        effect="with rotary positions the new block knows none: it reads a bag of words",
        tests="tests/test_model.py::test_a_told_model_equals_a_loop_over_positions",
    ),
    Mutation(
        "model.py",
        right="            init_weights(self.block, config)\n",
        wrong="",
        effect="the new block starts as torch makes it: what it is told drowns in noise",
        tests="tests/test_model.py::test_the_new_block_starts_like_one_of_the_gpt_s",
    ),
    Mutation(
        "model.py",
        right="        x = self.gpt.hidden(tokens)  # (B, T, C)\n",
        wrong="        x = self.gpt.hidden(tokens).detach()  # (B, T, C)\n",
        effect="the body of a reward model that is told what was expected learns nothing",
        tests="tests/test_model.py::test_the_expectation_is_learned_through",
    ),
    Mutation(
        "model.py",
        right="replace(gpt.config, expectation=expectation)",
        wrong="replace(gpt.config)",
        effect="no reward model is told what was expected: on three layers it learns manners and no facts",
        tests="tests/test_model.py::test_scalar_model_copies_the_body_under_a_new_head",
    ),
    Mutation(
        "model.py",
        right="return self.ln(self.block(x, turns, index=flat_index(where, T)))",
        wrong="return self.block(x, turns, index=flat_index(where, T))",
        effect="the head reads a residual stream of any size: scores explode as the block grows",
        tests="tests/test_model.py::test_a_told_model_equals_a_loop_over_positions",
    ),
    Mutation(
        "model.py",
        right="        if logits.isnan().any():\n",
        wrong="        if False:\n",
        effect="a model that has blown up says one token for ever, or ends in an index error deep inside",
        tests="tests/test_model.py::test_nan_logits_are_refused",
    ),
    Mutation(
        "model.py",
        right="    if temperature:\n        uniforms",
        wrong="    if True:\n        uniforms",
        effect="greedy answers draw random numbers: a script that shows them goes on as another run",
        tests="tests/test_model.py::test_at_temperature_0_nothing_is_drawn",
    ),
    # ------------------------------------------------------------ weights.py
    Mutation(
        "weights.py",
        right="state[key] = value.float().t().contiguous() if key.endswith(TRANSPOSED) else value.float()",
        wrong=(
            "turned = key.endswith(TRANSPOSED) and value.size(0) != value.size(1)\n"
            "        state[key] = value.float().t().contiguous() if turned else value.float()"
        ),
        effect="square matrices of GPT-2's are not transposed: they fit, and the logits are noise",
        tests=(
            "tests/test_weights.py::test_save_pretrained_round_trip "
            "tests/test_weights.py::test_load_pretrained_reads_pytorch_model_bin"
        ),
    ),
    Mutation(
        "weights.py",
        right='TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")',
        wrong='TRANSPOSED = ("attn.c_attn.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")',
        effect="out and in again is the identity, but other tools read a transposed matrix",
        tests="tests/test_weights.py::test_save_pretrained_writes_hugging_faces_layout",
    ),
    Mutation(
        "weights.py",
        right='state["wpe.weight"] = state["wpe.weight"][: config.block_size]',
        wrong='state["wpe.weight"] = state["wpe.weight"][-config.block_size :]',
        effect="a shorter network gets the last positions: every token believes it stands far behind",
        tests="tests/test_weights.py::test_load_pretrained_cuts_the_positions",
    ),
    Mutation(
        "weights.py",
        right="config.block_size = block_size or config.block_size",
        wrong="pass",
        effect="--block_size is ignored with --init gpt2: caches and value models for 1,024 positions",
        tests=(
            "tests/test_weights.py::test_load_pretrained_cuts_the_positions "
            "tests/test_sft.py::test_block_size_is_honoured_or_refused"
        ),
    ),
    Mutation(
        "weights.py",
        right='if found != value and not (key == "n_inner" and found == 4 * shape["n_embd"]):',
        wrong="if False:",
        effect="a relative of GPT-2's is loaded as if it were one: slightly wrong logits",
        tests="tests/test_weights.py::test_load_pretrained_refuses_another_network",
    ),
    Mutation(
        "weights.py",
        right='value = value[:vocab_size] if key == "wte.weight" else value',
        wrong="pass",
        effect="padding rows are exported beside a config that denies them: other tools can't load it",
        tests="tests/test_weights.py::test_save_pretrained_keeps_the_real_vocabulary",
    ),
    Mutation(
        "weights.py",
        right="if set(model.state_dict()) != gpt2:",
        wrong="if False:",
        effect="a network with RMSNorm is exported as GPT-2: other tools add random biases and say nothing",
        tests="tests/test_weights.py::test_save_pretrained_refuses_a_network_that_is_no_longer_gpt2",
    ),
    Mutation(
        "weights.py",
        right="if set(model.state_dict()) != gpt2:",
        wrong="if set(model.state_dict()) - gpt2:",
        effect="a network that lacks parameters of GPT-2's is exported as one",
        tests="tests/test_weights.py::test_save_pretrained_refuses_a_network_that_is_no_longer_gpt2",
    ),
    # ------------------------------------------------------------ data/files.py
    Mutation(
        "data/files.py",
        right="len(ended) != len(ranks) or not",
        wrong="not",
        effect='"ended" of another length than the completions is paired with the wrong texts, or a traceback',
        tests="tests/test_data.py::test_bad_rankings_are_located",
    ),
    Mutation(
        "data/files.py",
        right=" or not all(isinstance(e, bool) for e in ended)",
        wrong="",
        effect='"ended": ["false"] counts as true',
        tests="tests/test_data.py::test_bad_rankings_are_located",
    ),
    Mutation(
        "data/files.py",
        right="    return sound_text(where, key, row[key])",
        wrong="    return row[key]",
        effect="a lone surrogate is a traceback from the vocabulary, without a line",
        tests="tests/test_data.py::test_half_a_character_is_located",
    ),
    Mutation(
        "data/files.py",
        right='[sound_text(where, "completions", c) for group in groups for c in group]',
        wrong="[c for group in groups for c in group]",
        effect="a lone surrogate in a ranking is a traceback from the vocabulary, without a line",
        tests="tests/test_data.py::test_half_a_character_is_located",
    ),
    Mutation(
        "data/files.py",
        right='    name = f"{Path(data).stem}_held_out{Path(data).suffix}"\n',
        wrong='    name = "rankings_held_out.jsonl"\n',
        effect="held-out data of another file in the folder judges own data",
        tests="tests/test_data.py::test_what_belongs_to_a_file_lies_beside_it",
    ),
    Mutation(
        "data/files.py",
        right='    found = sibling(data, "prompts.jsonl")\n',
        wrong='    found = "out/data/prompts.jsonl"\n',
        effect="the reward model of own data is normalised on the demo's prompts",
        tests="tests/test_reward_model.py::test_own_data_reads_no_file_of_the_demo",
    ),
    # ------------------------------------------------------------ data/batches.py
    Mutation(
        "data/batches.py",
        right='random.Random(f"{config.seed} {epoch}").shuffle(order)',
        wrong='random.Random(f"{config.seed}").shuffle(order)',
        effect="the same order in every epoch",
        tests="tests/test_sft.py::test_every_demonstration_once_an_epoch_in_a_fresh_order",
    ),
    Mutation(
        "data/batches.py",
        right="items = sorted(items, key=length)\n",
        wrong="items = list(items)\n",
        effect="texts of all lengths in a micro-batch: a third of the work goes into filler",
        tests="tests/test_sft.py::test_micro_batches_hold_little_filler",
    ),
    Mutation(
        "data/batches.py",
        right="kept = prompt_ids[-room:]",
        wrong="kept = prompt_ids[:room]",
        effect="long prompts lose their end, which is where the question is",
        tests="tests/test_data.py::test_truncation_keeps_the_completion",
    ),
    Mutation(
        "data/batches.py",
        right="ids = [tokenizer.encode(c) + [tokenizer.eos_id] * e for",
        wrong="ids = [tokenizer.encode(c) for",
        effect="no EOS in the training data: the model never stops",
        tests="tests/test_data.py::test_truncation_keeps_the_completion",
    ),
    Mutation(
        "data/batches.py",
        right="ids = [tokenizer.encode(c) + [tokenizer.eos_id] * e for",
        wrong="ids = [tokenizer.encode(c) + [tokenizer.eos_id] for",
        effect=(
            "texts that were cut get an EOS: DPO learns to stop in mid-sentence, the reward model never sees a cut text"
        ),
        tests="tests/test_data.py::test_a_cut_text_gets_no_eos",
    ),
    Mutation(
        "data/batches.py",
        right="encode_group(tokenizer, r.prompt, r.completions, r.ended, block_size)",
        wrong="encode_group(tokenizer, r.prompt, r.completions, [True] * len(r.ended), block_size)",
        effect='"ended" is read and ignored',
        tests="tests/test_reward_model.py::test_cut_texts_are_read_without_eos",
    ),
    Mutation(
        "data/batches.py",
        right=(
            "room = max(1, block_size - max(map(len, ids)))\n"
            "    prompt_ids = tokenizer.encode_prompt(prompt)\n"
            "    kept = prompt_ids[-room:]\n"
            "    return [Example(kept, c[: block_size - len(kept)], len(prompt_ids) + len(c) > block_size) for "
            "c in ids]"
        ),
        wrong=(
            "prompt_ids = tokenizer.encode_prompt(prompt)\n"
            "    kept = [prompt_ids[-max(1, block_size - len(c)) :] for c in ids]\n"
            "    return [\n"
            "        Example(k, c[: block_size - len(k)], len(prompt_ids) + len(c) > block_size)\n"
            "        for k, c in zip(kept, ids)\n"
            "    ]"
        ),
        effect="chosen and rejected of one ranking see different ends of the prompt",
        tests="tests/test_data.py::test_completions_of_one_prompt_see_the_same_prompt",
    ),
    Mutation(
        "data/batches.py",
        right='    note_cut(what or "prompt", cut',
        wrong='    note_cut(what or "prompt", 0',
        effect="prompts are cut in silence: a run trains on prompts of one token",
        tests="tests/test_data.py::test_prompts_keep_their_end_and_what_was_cut_is_counted",
    ),
    Mutation(
        "data/batches.py",
        right="return [p[-room:] for p in ids]",
        wrong="return [p[:room] for p in ids]",
        effect="prompts for sampling lose the question",
        tests="tests/test_data.py::test_prompts_keep_their_end_and_what_was_cut_is_counted",
    ),
    Mutation(
        "data/batches.py",
        right="    note_cut(path, shortened, len(items)",
        wrong="    note_cut(path, 0, len(items)",
        effect="rankings are cut to block_size in silence",
        tests="tests/test_data.py::test_what_does_not_fit_is_counted",
    ),
    Mutation(
        "data/batches.py",
        right=("for i in range(0, len(order), config.batch_size)]\n    return batches"),
        wrong=("for i in range(0, len(order) - config.batch_size + 1, config.batch_size)]\n    return batches"),
        effect="the remainder of an epoch is dropped in silence",
        tests="tests/test_data.py::test_an_epoch_takes_each_row_once",
    ),
    Mutation(
        "data/batches.py",
        right=".shuffle(order)\n",
        wrong=(".shuffle(order)\n        order.sort(key=len)\n"),
        effect="steps of similar lengths: a token of a short text weighs several times one of a long text",
        tests="tests/test_data.py::test_a_step_holds_rows_of_all_lengths",
    ),
    Mutation(
        "data/batches.py",
        right="    items = sorted(items, key=length)\n",
        wrong="",
        effect="micro-batches of mixed lengths: 40% filler",
        tests="tests/test_data.py::test_micro_batches_are_the_whole_step_in_similar_lengths",
    ),
    Mutation(
        "data/batches.py",
        right="sum(ranks) / len(ranks) for c, ranks",
        wrong="min(ranks) for c, ranks",
        effect="in [A, B, A] the text A is trained to beat B although it was ranked below it as often",
        tests="tests/test_data.py::test_a_text_in_several_places_takes_their_mean",
    ),
    Mutation(
        "data/batches.py",
        right=(
            "            if example.completion:  # an empty text that was cut has nothing to read\n"
            "                places.setdefault("
        ),
        wrong="            places.setdefault(",
        effect="a cut empty text is compared: a row without completion tokens",
        tests="tests/test_data.py::test_cut_completions_of_a_file_carry_no_eos",
    ),
    Mutation(
        "data/batches.py",
        right="        if len(order) > 1:\n",
        wrong="        if order:\n",
        effect="rankings that compare nothing stay: their loss is ln 2 for ever",
        tests="tests/test_data.py::test_rankings_that_compare_nothing_are_dropped_and_counted",
    ),
    Mutation(
        "data/batches.py",
        right="load_rankings(held_out_twin(config.data, config.held_out_data), tokenizer",
        wrong='load_rankings("out/data/rankings_held_out.jsonl", tokenizer',
        effect="own data is judged on the demo's held-out rankings",
        tests="tests/test_data.py::test_preferences_come_with_their_held_out_twin",
    ),
    Mutation(
        "data/batches.py",
        right="return items, held_out, task_of(config.data)",
        wrong='return items, held_out, "tiny" if tokenizer.name == "tiny" else ""',
        effect=(
            "own data with the tiny vocabulary gets the embedded task's gates, the task's data with another loses them"
        ),
        tests="tests/test_dpo.py::test_the_task_is_known_by_its_data_not_by_the_vocabulary",
    ),
    Mutation(
        "data/batches.py",
        right='        print(f"{what}: {len(ids):,} prompts")\n',
        wrong="        pass\n",
        effect="nobody sees that the prompts are the demo's",
        tests="tests/test_pipeline.py::test_every_file_that_is_read_is_named",
    ),
    Mutation(
        "data/batches.py",
        right="Ranking(p, [b, w], [0, 1], [True, True])",
        wrong="Ranking(p, [b, w], [0, 1], [True, False])",
        effect="the worse text of a contrast has no EOS: the reward model is judged by that alone",
        tests="tests/test_data.py::test_contrasts_as_rankings",
    ),
    Mutation(
        "data/batches.py",
        right="0.5 + 0.5 * torch.sign(scores[:, i] - scores[:, j])",
        wrong="(scores[:, i] > scores[:, j]).float()",
        effect="equal scores count as wrong: accuracy 0 at the start",
        tests="tests/test_reward_model.py::test_pair_accuracy_by_hand",
    ),
    # ------------------------------------------------------------ data/tokenizer.py
    Mutation(
        "data/tokenizer.py",
        right="self._encoding.encode_ordinary(text)",
        wrong='self._encoding.encode(text, allowed_special="all")',
        effect="a user who types <|endoftext|> ends the prompt",
        tests="tests/test_data.py::test_tiny_round_trip",
    ),
    # ------------------------------------------------------------ data/tiny.py
    Mutation(
        "data/tiny.py",
        right=('question = prompt.partition(": ")[2]\n    # of the ten'),
        wrong=("question = prompt\n    # of the ten"),
        effect=(
            "the split hashes the speaker's name: three quarters of the held-out questions stand in the demonstrations"
        ),
        tests="tests/test_data.py::test_no_held_out_question_occurs_in_another_split",
    ),
    Mutation(
        "data/tiny.py",
        right='{4: "test", 6: "dev"}',
        wrong='{0: "test", 1: "dev"}',
        effect="held-out questions of some families only: the figures are about those",
        tests="tests/test_data.py::test_no_held_out_question_occurs_in_another_split",
    ),
    Mutation(
        "data/tiny.py",
        right="completions = [demonstrate(p, rng) for p in prompts]\n",
        wrong=(
            'prompts[0] = sample_prompt(rng, "train")\n        completions = [demonstrate(p, rng) for p in prompts]\n'
        ),
        effect="a training question among the held-out demonstrations",
        tests="tests/test_data.py::test_no_held_out_question_occurs_in_another_split",
    ),
    Mutation(
        "data/tiny.py",
        right='rng = random.Random(f"{config.seed} {split}")',
        wrong='rng = random.Random(f"{config.seed}") if split == "train" else rng',
        effect="the number of demonstrations decides which prompts are held out: two runs can't be compared",
        tests="tests/test_data.py::test_the_generator_is_seeded",
    ),
    Mutation(
        "data/tiny.py",
        right='return "tiny" if all(',
        wrong='return "tiny" if any(',
        effect="own data with one prompt of the task among it gets the task's truth and gates",
        tests="tests/test_data.py::test_a_task_is_known_by_its_prompts",
    ),
    Mutation(
        "data/tiny.py",
        right="math.log(-math.log(rng.random() or 1e-300))",
        wrong="math.log(rng.random() or 1e-300)",
        effect=(
            "annotators' noise is not Gumbel: rankings are no longer Plackett-Luce and Bayes accuracy is a wrong number"
        ),
        tests="tests/test_data.py::test_annotators_are_plackett_luce",
    ),
    Mutation(
        "data/tiny.py",
        right="if ranks[i] != ranks[j]:",
        wrong="if True:",
        effect="ties count in the annotators' Bayes accuracy: the reward model seems to reach more than its share",
        tests="tests/test_reward_model.py::test_bayes_accuracy_by_hand",
    ),
    Mutation(
        "data/tiny.py",
        right='"right_vs_wrong": (manners + plain, manners + mistaken)',
        wrong='"right_vs_wrong": (manners + plain, mistaken)',
        effect="right answers are polite and wrong ones plain: manners pass for knowledge",
        tests="tests/test_data.py::test_contrasts_differ_in_one_part_of_the_reward_alone",
    ),
    Mutation(
        "data/tiny.py",
        right='"once_vs_repeated": (manners + plain, f"{manners}{plain} {plain}")',
        wrong='"once_vs_repeated": (manners + plain, f"{plain} {plain}")',
        effect="what is repeated has lost its manners too",
        tests="tests/test_data.py::test_contrasts_differ_in_one_part_of_the_reward_alone",
    ),
    Mutation(
        "data/tiny.py",
        right="rng.randint(1, len(words) - 1)",
        wrong="rng.randint(1, len(words))",
        effect="some texts that should be cut are whole, and are dropped as equal",
        tests="tests/test_data.py::test_contrasts_differ_in_one_part_of_the_reward_alone",
    ),
    Mutation(
        "data/tiny.py",
        right="append((prompt, better, worse))",
        wrong="append((prompt, worse, better))",
        effect="the worse text counts as the better one: a good reward model seems to be always wrong",
        tests="tests/test_data.py::test_contrasts_differ_in_one_part_of_the_reward_alone",
    ),
    Mutation(
        "data/tiny.py",
        right='rng = random.Random(f"contrasts {seed}")',
        wrong="rng = random.Random()",
        effect="every reward model is asked something else: their accuracies by part are not comparable",
        tests="tests/test_data.py::test_contrasts_are_seeded_and_draw_all_there_is",
    ),
    Mutation(
        "data/tiny.py",
        right='["", polite + " ", rude + " "]',
        wrong='[polite + " "]',
        effect="the reward model is asked about polite answers alone",
        tests="tests/test_data.py::test_contrasts_are_the_same_text_but_for_what_they_are_about",
    ),
    Mutation(
        "data/tiny.py",
        right="sum(p * p + (1 - p) * (1 - p) for p in sure)",
        wrong="sum(p * p for p in sure)",
        effect="two annotators who are both wrong seem to disagree",
        tests="tests/test_data.py::test_agreement_by_hand",
    ),
    Mutation(
        "data/tiny.py",
        right='gap = abs(row["gold"][i] - row["gold"][j])',
        wrong='gap = (row["gold"][i] - row["gold"][j])',
        effect="pairs that noise has ranked against the truth lower the Bayes accuracy: a model seems to pass it",
        tests="tests/test_data.py::test_bayes_accuracy_is_that_of_a_judge_who_knows",
    ),
    Mutation(
        "data/tiny.py",
        right='"correct": 2.0 * (bool(answers)',
        wrong='"correct": 1.0 * (bool(answers)',
        effect="manners are worth as much as being right: the annotators reward a polite wrong answer",
        tests="tests/test_data.py::test_gold_parts_by_hand",
    ),
    Mutation(
        "data/tiny.py",
        right='["right", "wrong", "evasive"], [0.5, 0.2, 0.3]',
        wrong='["right", "wrong", "evasive"], [0.6, 0.15, 0.25]',
        effect="SFT is better than it is meant to be: RLHF has less left to do",
        tests="tests/test_data.py::test_demonstrations_have_the_stated_rates",
    ),
    Mutation(
        "data/tiny.py",
        right="if rng.random() < 0.08:",
        wrong="if rng.random() < 0.3:",
        effect="every third demonstration rambles",
        tests="tests/test_data.py::test_demonstrations_have_the_stated_rates",
    ),
    # ------------------------------------------------------------ data/prepare.py
    Mutation(
        "data/prepare.py",
        right='extra = text_field(where, {"input": record.get("input") or ""}, "input").strip()',
        wrong='extra = (record.get("input") or "").strip()',
        effect="a lone surrogate in public data is a traceback while writing",
        tests="tests/test_data.py::test_half_a_character_in_public_data_is_located",
    ),
    # ------------------------------------------------------------ cli.py
    Mutation(
        "cli.py",
        right='grad_clip: float = flag(1.0, "largest gradient norm (0: no limit)", low=0)',
        wrong='grad_clip: float = flag(1.0, "largest gradient norm (0: no limit)")',
        effect="a negative --grad_clip turns the gradients round: the loss is climbed",
        tests="tests/test_sft.py::test_grad_clip_0_is_no_limit",
    ),
    Mutation(
        "cli.py",
        right='" ".join(f"{type(error).__name__}: {error}".split())[:240]',
        wrong='f"{type(error).__name__}: {error}".splitlines()[0][:240]',
        effect='a checkpoint of another shape is refused with "Error(s) in loading state_dict for GPT:", and no key',
        tests=(
            "tests/test_common.py::test_a_wrong_state_dict_names_a_key "
            "tests/test_cli.py::test_one_line_keeps_the_useful_part"
        ),
    ),
    Mutation(
        "cli.py",
        right=(
            "    if isinstance(value, float):\n"
            '        check(math.isfinite(value), f"{name} must be a finite number, not {value}")\n'
        ),
        wrong="",
        effect="--temperature inf samples uniformly, --lr nan trains nan",
        tests="tests/test_cli.py::test_ranges",
    ),
    Mutation(
        "cli.py",
        right="for v in value if isinstance(value, list) else [value]:",
        wrong="for v in value[:1] if isinstance(value, list) else [value]:",
        effect="--best_of 4 0 ends in a traceback after the whole evaluation",
        tests="tests/test_cli.py::test_every_value_of_a_list_is_checked",
    ),
    Mutation(
        "cli.py",
        right="value >= low",
        wrong="value > low",
        effect="--grad_clip 0 (off) is refused",
        tests="tests/test_cli.py::test_ranges",
    ),
    Mutation(
        "cli.py",
        right="high is None or value <= high",
        wrong="high is None or value < high",
        effect="--top_p 1 and --gamma 1 are refused",
        tests="tests/test_cli.py::test_ranges",
    ),
    Mutation(
        "cli.py",
        right="value > above",
        wrong="value >= above",
        effect="--temperature 0 divides by 0",
        tests="tests/test_cli.py::test_ranges",
    ),
    Mutation(
        "cli.py",
        right="below is None or value < below",
        wrong="below is None or value <= below",
        effect="--dropout 1 trains on zeros",
        tests="tests/test_cli.py::test_ranges",
    ),
    Mutation(
        "cli.py",
        right='flag(1.0, "largest gradient norm (0: no limit)", low=0)',
        wrong='flag(1.0, "largest gradient norm (0: no limit)")',
        effect="--grad_clip -1 climbs the loss",
        tests="tests/test_cli.py::test_user_mistakes_are_one_line",
    ),
    Mutation(
        "cli.py",
        right='flag(1, "seed of everything random", low=0, high=2**63 - 1)',
        wrong='flag(1, "seed of everything random", low=0)',
        effect="a seed beyond 64 bits is a traceback",
        tests="tests/test_cli.py::test_a_seed_is_what_torch_takes",
    ),
    Mutation(
        "cli.py",
        right="default_factory=lambda: list(default)",
        wrong="default_factory=lambda: default",
        effect="a list default that one config changes is the next one's",
        tests="tests/test_cli.py::test_default_lists_are_not_shared",
    ),
    Mutation(
        "cli.py",
        right="formatter_class=raw, allow_abbrev=False",
        wrong="formatter_class=raw",
        effect="--kl means --kl_coef until a flag --kl exists",
        tests="tests/test_cli.py::test_bad_flags_are_named",
    ),
    Mutation(
        "cli.py",
        right=("        check_ranges(config)\n        results = run(config)"),
        wrong="        results = run(config)",
        effect="a script that forgets to check its ranges trains with them",
        tests="tests/test_cli.py::test_a_range_stops_the_run_before_it_starts",
    ),
    Mutation(
        "cli.py",
        right='if failed and getattr(config, "strict", False):',
        wrong="if failed:",
        effect="every small run ends with status 1",
        tests="tests/test_cli.py::test_exit_statuses",
    ),
    # ------------------------------------------------------------ common.py
    Mutation(
        "common.py",
        right="for module in [*gpt.h[-n:], gpt.ln_f]:",
        wrong="for module in [*gpt.h[:n], gpt.ln_f]:",
        effect="--train_layers trains the first blocks",
        tests="tests/test_sft.py::test_train_layers_moves_the_last_blocks_alone",
    ),
    Mutation(
        "common.py",
        right="check(math.isfinite(loss), ",
        wrong="check(True, ",
        effect="a run whose loss is nan goes on to its end",
        tests="tests/test_sft.py::test_a_run_that_blows_up_stops_and_saves_no_model",
    ),
    Mutation(
        "common.py",
        right='check(all_finite, f"the trained weights are not finite, so {folder} gets no model; lower --lr")',
        wrong="pass",
        effect="weights of inf are saved as a model, and the next stage starts from them",
        tests="tests/test_sft.py::test_a_run_that_blows_up_stops_and_saves_no_model",
    ),
    Mutation(
        "common.py",
        right="check(all_finite, f",
        wrong="check(True, f",
        effect="a run that diverged leaves a model of nan, and every later stage computes nan",
        tests="tests/test_common.py::test_weights_that_are_not_finite_are_no_model",
    ),
    Mutation(
        "common.py",
        right="all(bool(w.isfinite().all()) for w in weights.values())",
        wrong="all(bool(w.isfinite().all()) for w in model.parameters())",
        effect="a reward model whose normalisation is nan is saved",
        tests="tests/test_common.py::test_weights_that_are_not_finite_are_no_model",
    ),
    Mutation(
        "common.py",
        right=(
            "    print(f\"{file}: made by {made['script']}\" + (f\" from {made['config']['data']}\" if "
            '"data" in made["config"] else ""))\n'
        ),
        wrong="",
        effect="the demo's checkpoint among one's own goes unnoticed",
        tests="tests/test_common.py::test_what_was_loaded_is_named",
    ),
    Mutation(
        "common.py",
        right="torch.save(obj, tmp)",
        wrong="return torch.save(obj, path)",
        effect="a crash amid a save leaves half a checkpoint",
        tests="tests/test_common.py::test_atomic_save_leaves_no_half_file",
    ),
    Mutation(
        "common.py",
        right="torch.load(path, map_location=map_location, weights_only=True)",
        wrong="torch.load(path, map_location=map_location, weights_only=False)",
        effect="a downloaded checkpoint may run any code",
        tests="tests/test_common.py::test_a_checkpoint_runs_no_code",
    ),
    Mutation(
        "common.py",
        right="same = scorer.tokenizer == policy.tokenizer",
        wrong="same = True",
        effect="a reward model of another vocabulary gives plausible scores of texts that nobody wrote",
        tests="tests/test_common.py::test_a_scorer_reads_what_the_policy_writes",
    ),
    Mutation(
        "common.py",
        right="check(longest >= needed, f",
        wrong="check(True, f",
        effect="a reward model with a shorter block size: a traceback in the middle of a run",
        tests="tests/test_common.py::test_a_scorer_reads_what_the_policy_writes",
    ),
    Mutation(
        "common.py",
        right="check(longest >= needed, f",
        wrong="check(longest == needed, f",
        effect="a reward model that reads longer texts is refused",
        tests="tests/test_common.py::test_a_scorer_reads_what_the_policy_writes",
    ),
    Mutation(
        "common.py",
        right='if policy.task == "tiny" and task != "tiny":',
        wrong='if policy.task != "tiny" and task == "tiny":',
        effect="the demo's policy on one's own prompts is noted nowhere",
        tests="tests/test_common.py::test_the_demo_s_policy_on_one_s_own_data_is_noted",
    ),
    Mutation(
        "common.py",
        right='foreign = scorer.task == "tiny" and task != "tiny"',
        wrong="foreign = False",
        effect="PPO on one's own prompts maximises the demo's reward model, which stands at the default path",
        tests="tests/test_common.py::test_rewards_that_do_not_fit_are_refused",
    ),
    Mutation(
        "common.py",
        right="[True] * len(completions) if ended is None else ended",
        wrong="[True] * len(completions)",
        effect="a reward function can't see which texts were cut",
        tests="tests/test_common.py::test_a_reward_function_is_told_what_was_cut_if_it_asks",
    ),
    Mutation(
        "common.py",
        right="call_reward(part, prompts, completions, rollout.ended.tolist(), spec)",
        wrong="call_reward(part, prompts, completions, None, spec)",
        effect="in PPO a reward function takes every cut text for a finished one",
        tests="tests/test_common.py::test_rewards_are_combined_as_the_flags_say",
    ),
    Mutation(
        "common.py",
        right="check(all(map(math.isfinite, rewards)), f",
        wrong="check(True, f",
        effect="one nan from the user's function and all weights are nan",
        tests="tests/test_common.py::test_call_reward_checks_what_comes_back",
    ),
    Mutation(
        "common.py",
        right="rewards.append(weight * score_rollout(part, rollout))",
        wrong="rewards.append(score_rollout(part, rollout))",
        effect="--reward_weights holds for functions only",
        tests="tests/test_common.py::test_rewards_are_combined_as_the_flags_say",
    ),
    Mutation(
        "common.py",
        right='parts.sum(0) / (sum(weights) if combine == "mean" else 1.0)',
        wrong="parts.mean(0)",
        effect="the sum of two rewards is half of it, so that kl_coef counts twice",
        tests="tests/test_common.py::test_rewards_are_combined_as_the_flags_say",
    ),
    Mutation(
        "common.py",
        right="return parts.amin(0)",
        wrong="return parts.amin()",
        effect="the worst reward of the batch is everybody's: nothing can be learned",
        tests="tests/test_common.py::test_rewards_are_combined_as_the_flags_say",
    ),
    Mutation(
        "common.py",
        right="model.score(rollout.tokens[part, : int(lens.max())], lens)",
        wrong="model.score(rollout.tokens[part, : int(lens.max())], torch.full_like(lens, int(lens.max())))",
        effect="the reward model is read at the filler",
        tests="tests/test_common.py::test_score_rollout_equals_each_row_alone",
    ),
    Mutation(
        "common.py",
        right="scores[part] = model.score",
        wrong="scores[part.sort().values] = model.score",
        effect="scores of rows sorted by length are not put back in their order: rewards belong to other texts",
        tests="tests/test_common.py::test_score_rollout_equals_each_row_alone",
    ),
    Mutation(
        "common.py",
        right='spec = "data/tiny.py:gold_reward" if task == "tiny" else ""',
        wrong='spec = "data/tiny.py:gold_reward"',
        effect="one's own prompts end in an error of a reward that nobody asked for",
        tests="tests/test_common.py::test_gold_function",
    ),
    Mutation(
        "common.py",
        right='for old in (self.path / "state.pt", self.results):',
        wrong="for old in (self.results,):",
        effect="a run that dies before its first save is resumed from the run before it",
        tests="tests/test_common.py::test_a_fresh_start_leaves_no_state_behind",
    ),
    Mutation(
        "common.py",
        right='for old in (self.path / "state.pt", self.results):',
        wrong='for old in (self.path / "state.pt", self.results, self.path / "model.pt"):',
        effect="a mistyped flag costs the checkpoint that stood there",
        tests="tests/test_common.py::test_a_fresh_start_leaves_no_state_behind",
    ),
    Mutation(
        "common.py",
        right="            refuse_another_config(self.state, config, file)\n",
        wrong="",
        effect="--resume goes on under another seed and learning rate: the result is neither run's",
        tests="tests/test_common.py::test_another_configuration_is_not_resumed",
    ),
    Mutation(
        "common.py",
        right='MAY_DIFFER = ("out_dir", "resume", "strict", "trace", "device", "log_every", "save_every")',
        wrong='MAY_DIFFER = ("out_dir", "resume", "strict", "trace", "device", "log_every", "save_every", "lr")',
        effect="--resume with another learning rate goes on",
        tests="tests/test_common.py::test_another_configuration_is_not_resumed",
    ),
    Mutation(
        "common.py",
        right='"device", "log_every", "save_every")',
        wrong='"log_every", "save_every")',
        effect="a run can't be resumed on another machine's device",
        tests="tests/test_common.py::test_what_changes_no_result_may_differ",
    ),
    Mutation(
        "common.py",
        right="value > saved[name]",
        wrong="value != saved[name]",
        effect="a resumed run with fewer epochs than were trained passes for one of that length",
        tests="tests/test_common.py::test_another_configuration_is_not_resumed",
    ),
    Mutation(
        "common.py",
        right="if name in MAY_DIFFER or (name in saved and saved[name] == value):",
        wrong="if name in MAY_DIFFER or saved.get(name, value) == value:",
        effect="a state without a configuration, or with an older one, is resumed under any",
        tests="tests/test_common.py::test_a_state_from_before_a_flag_existed_is_not_resumed",
    ),
    Mutation(
        "common.py",
        right='self.done = json.loads(self.results.read_text(encoding="utf-8"))',
        wrong="self.done = None",
        effect="--resume of a finished run writes model and results anew, without the gates that had failed",
        tests=(
            "tests/test_common.py::test_a_finished_run_is_done "
            "tests/test_pipeline.py::test_a_finished_run_is_resumed_without_changing_a_byte"
        ),
    ),
    Mutation(
        "common.py",
        right='if self.state["step"] >= total and self.results.exists():',
        wrong="if self.results.exists():",
        effect="a finished run can't be made longer",
        tests="tests/test_common.py::test_a_longer_run_is_not_done_with_the_results_of_the_shorter",
    ),
    Mutation(
        "common.py",
        right="        self.results.unlink(missing_ok=True)  # of the shorter run that this one makes longer\n",
        wrong="",
        effect="a run made longer and killed at its very end returns the shorter run's results",
        tests="tests/test_common.py::test_a_longer_run_is_not_done_with_the_results_of_the_shorter",
    ),
    Mutation(
        "common.py",
        right="check(self.metrics.exists(), f",
        wrong="check(True, f",
        effect=(
            "a run whose log is gone is resumed: its results are those of the resumed part, or a traceback at the end"
        ),
        tests="tests/test_common.py::test_a_run_whose_log_is_gone_is_not_resumed",
    ),
    Mutation(
        "common.py",
        right="check(warmup <= total, f",
        wrong="check(True, f",
        effect="the learning rate never gets to its peak, silently",
        tests="tests/test_common.py::test_a_warm_up_longer_than_the_run_is_refused",
    ),
    Mutation(
        "common.py",
        right=('        except OSError as error:\n            raise UserError(f"--out_dir'),
        wrong=('        except ZeroDivisionError as error:\n            raise UserError(f"--out_dir'),
        effect="--out_dir that is a file: a traceback",
        tests="tests/test_common.py::test_an_out_dir_that_is_a_file",
    ),
    Mutation(
        "common.py",
        right=(
            '            check(math.isfinite(loss), f"the {name} is {loss} at step {step}; lower --lr, or look '
            'at {self.metrics}")\n'
        ),
        wrong="",
        effect="hours of nan",
        tests="tests/test_common.py::test_a_loss_that_is_not_finite_ends_the_run",
    ),
    Mutation(
        "common.py",
        right="f.write(json.dumps(finite(figures))",
        wrong="f.write(json.dumps(figures)",
        effect="a held-out loss of nan makes metrics.jsonl unreadable for other JSON readers",
        tests="tests/test_common.py::test_logs_and_results_are_valid_json",
    ),
    Mutation(
        "common.py",
        right="return [row for row in rows if key in row]",
        wrong="return [row for row in rows if key in row and row['step'] > (self.state or {'step': -1})['step']]",
        effect="after a resume the results are those of the resumed part only",
        tests="tests/test_common.py::test_the_history_is_that_of_the_whole_run",
    ),
    Mutation(
        "common.py",
        right='        torch.set_rng_state(self.state["rng"][0])\n',
        wrong="",
        effect="a resumed run draws other dropout masks than the unbroken one",
        tests="tests/test_common.py::test_a_resumed_run_continues_its_log",
    ),
    Mutation(
        "common.py",
        right="[torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])",
        wrong="[torch.get_rng_state()]",
        effect="on a GPU a resumed run draws other dropout masks than the unbroken one",
        tests="tests/test_common.py::test_the_generator_of_a_gpu_is_part_of_the_state",
    ),
    Mutation(
        "common.py",
        right='if torch.cuda.is_available() and len(self.state["rng"]) > 1:',
        wrong="if torch.cuda.is_available():",
        effect="a run begun on a CPU can't be resumed on a GPU",
        tests="tests/test_common.py::test_the_generator_of_a_gpu_is_part_of_the_state",
    ),
    Mutation(
        "common.py",
        right='os.truncate(self.metrics, self.state["logged"])',
        wrong="pass",
        effect="steps between the last save and the crash stand in the log twice",
        tests="tests/test_common.py::test_a_resumed_run_continues_its_log",
    ),
    Mutation(
        "common.py",
        right="clip_grad_norm_(trainable(model), max_norm or math.inf)",
        wrong="clip_grad_norm_(trainable(model), max_norm)",
        effect="--grad_clip 0 trains nothing",
        tests="tests/test_common.py::test_a_limit_of_0_leaves_the_gradients_alone",
    ),
    Mutation(
        "common.py",
        right="clip_grad_norm_(trainable(model), max_norm or math.inf)",
        wrong="clip_grad_norm_(model.parameters(), max_norm or math.inf)",
        effect="left-over gradients of frozen layers shrink those that are trained",
        tests="tests/test_common.py::test_frozen_parameters_do_not_count_when_clipping",
    ),
    Mutation(
        "common.py",
        right="return (step + 1) / warmup",
        wrong="return step / warmup",
        effect="the first step has learning rate 0",
        tests="tests/test_common.py::test_lr_at_by_hand",
    ),
    Mutation(
        "common.py",
        right="done = (step - warmup) / max(1, total - warmup)",
        wrong="done = step / max(1, total)",
        effect="the learning rate falls at the end of the warm-up, which it never reaches",
        tests="tests/test_common.py::test_lr_at_by_hand",
    ),
    Mutation(
        "common.py",
        right="return step + 1 == total or (every > 0 and (step + 1) % every == 0)",
        wrong="return every > 0 and (step + 1) % every == 0",
        effect="the last state is never saved: a finished run trains its last steps anew",
        tests="tests/test_common.py::test_due_is_every_n_steps_and_at_the_end",
    ),
    Mutation(
        "common.py",
        right="for module in [*gpt.h[-n:], gpt.ln_f]:",
        wrong="for module in gpt.h[-n:]:",
        effect="--train_layers leaves the final LayerNorm frozen",
        tests="tests/test_common.py::test_train_last_layers",
    ),
    Mutation(
        "common.py",
        right="                module.compile(dynamic=True)\n",
        wrong="                torch.compile(module, dynamic=True)\n",
        effect="--compile does nothing: the compiled block is thrown away",
        tests="tests/test_common.py::test_every_block_is_compiled_and_no_name_changes",
    ),
    Mutation(
        "common.py",
        right="seed = (seed * 1_000_003 + k + 1) % (2**63 - 1)",
        wrong="seed = (seed + k + 1) % (2**63 - 1)",
        effect="seed 1 in iteration 2 draws what seed 2 draws in iteration 1",
        tests="tests/test_common.py::test_generators_are_independent_streams",
    ),
    Mutation(
        "common.py",
        right="prompts = [p[-(policy.config.block_size - max_new_tokens) :] for p in prompts]",
        wrong="prompts = [p[: policy.config.block_size - max_new_tokens] for p in prompts]",
        effect="samples answer the beginning of a long prompt, without its question",
        tests="tests/test_common.py::test_sample_prompts_leaves_room_for_an_answer",
    ),
    Mutation(
        "common.py",
        right="token_logprobs(m, rollout.tokens, mask=sampled) for m",
        wrong="token_logprobs(m, rollout.tokens) for m",
        effect="DPO's KL counts prompts and filler",
        tests="tests/test_common.py::test_compare_samples_equals_a_loop",
    ),
    Mutation(
        "common.py",
        right="if eos_rate < 0.8 * ref_eos_rate or kl > 25:",
        wrong="if eos_rate < 0.8 and kl > 25:",
        effect="a DPO run without held-out data that no longer stops says nothing",
        tests="tests/test_common.py::test_a_collapse_is_said_aloud",
    ),
    Mutation(
        "common.py",
        right="ok = low <= value <= high",
        wrong="ok = not (value < low or value > high)",
        effect="nan passes every gate",
        tests="tests/test_common.py::test_gates",
    ),
    Mutation(
        "common.py",
        right="tail = history[-max(1, len(history) // 4) :]",
        wrong="tail = history[-1:]",
        effect="gates look at one noisy iteration",
        tests="tests/test_common.py::test_the_last_quarter_of_a_run",
    ),
    Mutation(
        "common.py",
        right="tokenizer.decode([int(experience.tokens[row, t + 1])])",
        wrong="tokenizer.decode([int(experience.tokens[row, t])])",
        effect="--trace shows every figure beside the token before",
        tests="tests/test_common.py::test_a_trace_shows_one_rollout_token_by_token",
    ),
    Mutation(
        "common.py",
        right='told["ended"] = [True] * len(completions) if ended is None else ended',
        wrong='told["ended"] = [True] * len(completions)',
        effect="a reward function is told that every completion has ended",
        tests="tests/test_ppo.py::test_a_function_may_ask_which_completions_ended",
    ),
    Mutation(
        "common.py",
        right="found = call_reward(part, prompts, completions, rollout.ended.tolist(), spec)",
        wrong="found = call_reward(part, prompts, completions, None, spec)",
        effect="--reward with a function that asks for `ended` is told that all have ended",
        tests="tests/test_ppo.py::test_a_function_may_ask_which_completions_ended",
    ),
    Mutation(
        "common.py",
        right="rewards.append(weight * torch.tensor(found, device=device))",
        wrong="rewards.append(torch.tensor(found, device=device))",
        effect="a function's weight is ignored",
        tests="tests/test_ppo.py::test_several_rewards_by_hand",
    ),
    Mutation(
        "common.py",
        right="return parts.amin(0)",
        wrong="return parts.amin(1)",
        effect="the smallest reward of the batch instead of the smallest of each completion's rewards",
        tests="tests/test_ppo.py::test_several_rewards_by_hand",
    ),
    Mutation(
        "common.py",
        right='parts.sum(0) / (sum(weights) if combine == "mean" else 1.0)',
        wrong='parts.sum(0) / (len(weights) if combine == "mean" else 1.0)',
        effect="a weighted mean that is not divided by its weights",
        tests="tests/test_ppo.py::test_several_rewards_by_hand",
    ),
    Mutation(
        "common.py",
        right="check(len(weights) == len(specs),",
        wrong="check(True,",
        effect="a weight too few, and a traceback instead of the flag's name",
        tests="tests/test_ppo.py::test_a_mix_that_means_nothing_is_refused",
    ),
    Mutation(
        "common.py",
        right="same = scorer.tokenizer == policy.tokenizer\n",
        wrong="same = True\n",
        effect="a reward model of another vocabulary reads other words than were written",
        tests="tests/test_ppo.py::test_a_reward_that_can_not_be_loaded_is_reported",
    ),
    Mutation(
        "common.py",
        right="check(longest >= needed,",
        wrong="check(True,",
        effect="a reward model with a shorter block size ends the run when the first long text comes",
        tests="tests/test_ppo.py::test_a_reward_that_can_not_be_loaded_is_reported",
    ),
    Mutation(
        "common.py",
        right=('"kl_coef": kl_coef,\n        "objective"'),
        wrong=('"kl_coef": kl_coef if kl else 0.0,\n        "objective"'),
        effect="the logged coefficient is not the one that was used",
        tests="tests/test_ppo.py::test_what_is_logged_is_what_was_used",
    ),
    Mutation(
        "common.py",
        right='"entropy": masked_mean(e.entropy, mask).item()',
        wrong='"entropy": e.entropy.mean().item()',
        effect="entropy averaged over pads",
        tests="tests/test_ppo.py::test_what_is_logged_is_what_was_used",
    ),
    Mutation(
        "common.py",
        right="(1 - residual.var(correction=0) / variance)",
        wrong="(1 - (residual**2).mean() / variance)",
        effect="explained variance counts a constant offset as error",
        tests="tests/test_ppo.py::test_what_is_logged_is_what_was_used",
    ),
    Mutation(
        "common.py",
        right="            if isinstance(module, Block):",
        wrong='            if isinstance(module, Block) and module is not getattr(model, "block", None):',
        effect="the block of a reward model that is told what was expected stays uncompiled",
        tests="tests/test_common.py::test_every_block_is_compiled_and_no_name_changes",
    ),
    # ------------------------------------------------------------ sft.py
    Mutation(
        "sft.py",
        right="target_mask = completion_mask[:, 1:].bool()",
        wrong="target_mask = completion_mask[:, :-1].bool()",
        effect="mask off by one: the last prompt token is learned and EOS is not",
        tests="tests/test_sft.py::test_loss_equals_a_loop_over_tokens",
    ),
    Mutation(
        "sft.py",
        right="target_mask = completion_mask[:, 1:].bool()",
        wrong="target_mask = torch.ones_like(completion_mask[:, 1:]).bool()",
        effect="the loss counts prompts and filler: capacity goes into predicting questions",
        tests="tests/test_sft.py::test_loss_equals_a_loop_over_tokens",
    ),
    Mutation(
        "sft.py",
        right="picked = logits if logits.dim() == 2 else logits[:, :-1][target_mask]",
        wrong="picked = logits if logits.dim() == 2 else logits[:, 1:][target_mask]",
        effect="labels not shifted: the model learns to copy its input",
        tests="tests/test_sft.py::test_loss_equals_a_loop_over_tokens",
    ),
    Mutation(
        "sft.py",
        right="F.cross_entropy(at_least_float32(picked),",
        wrong="F.cross_entropy(picked,",
        effect="the loss of bfloat16 logits in bfloat16",
        tests="tests/test_sft.py::test_loss_of_bfloat16_logits_is_taken_in_float32",
    ),
    Mutation(
        "sft.py",
        right="logits = model(tokens, mask[:, 1:])  # (n, V), at",
        wrong="logits = model(tokens, mask)  # (n, V), at",
        effect="logits at the completion's tokens instead of before them: the model learns to copy its input",
        tests="tests/test_sft.py::test_training_steps_are_the_gradient_of_the_whole_batch",
    ),
    Mutation(
        "sft.py",
        right="sft_loss(model(tokens, mask[:, 1:]), tokens, mask, n_tokens=1)",
        wrong="sft_loss(model(tokens, mask), tokens, mask, n_tokens=1)",
        effect="the held-out loss is that of a copy of the input",
        tests="tests/test_sft.py::test_held_out_loss_is_the_mean_over_all_tokens",
    ),
    Mutation(
        "sft.py",
        right="config.dropout, rope_base=config.rope_base)",
        wrong="config.dropout)",
        effect="--rope_base is ignored: positions are learned, as in GPT-2",
        tests="tests/test_sft.py::test_positions_are_those_of_the_flag",
    ),
    Mutation(
        "sft.py",
        right='for name in ("n_layer", "n_head", "n_embd", "rope_base"):',
        wrong='for name in ("n_layer", "n_head", "n_embd"):',
        effect="--rope_base with --init is ignored, and nobody notices",
        tests="tests/test_sft.py::test_sizes_are_refused_where_the_weights_have_their_own",
    ),
    Mutation(
        "sft.py",
        right="part_loss = sft_loss(logits, tokens, mask, n_tokens)",
        wrong="part_loss = sft_loss(logits, tokens, mask) / -(-config.batch_size // (config.micro_batch or 10**9))",
        effect="mean per micro-batch: short completions weigh more, and --micro_batch changes the result",
        tests="tests/test_sft.py::test_training_steps_are_the_gradient_of_the_whole_batch",
    ),
    Mutation(
        "sft.py",
        right="batches = epoch_batches(examples, config)",
        wrong=(
            "ordered = sorted(examples, key=len)\n"
            "    batches = [ordered[i : i + config.batch_size] for i in range(0, len(ordered), "
            "config.batch_size)]\n"
            "    batches = batches * config.epochs"
        ),
        effect="optimiser batches of equal length: a token of a short answer weighs four times one of a long answer",
        tests="tests/test_sft.py::test_every_step_has_about_as_many_completion_tokens",
    ),
    Mutation(
        "sft.py",
        right="batches = epoch_batches(examples, config)",
        wrong=(
            "batches = epoch_batches(examples, config)\n"
            "    batches = batches[: len(batches) // config.epochs] * config.epochs"
        ),
        effect="the same order in every epoch",
        tests="tests/test_sft.py::test_every_demonstration_once_an_epoch_in_a_fresh_order",
    ),
    Mutation(
        "sft.py",
        right="set_lr(optimizer, config.lr * lr_at(step, len(batches), config.warmup))",
        wrong="set_lr(optimizer, config.lr * lr_at(step, len(batches), 0))",
        effect="--warmup is ignored",
        tests="tests/test_sft.py::test_warm_up_and_decay_reach_the_steps",
    ),
    Mutation(
        "sft.py",
        right="set_lr(optimizer, config.lr * lr_at(step, len(batches), config.warmup))",
        wrong='optimizer.param_groups[0]["lr"] = config.lr * lr_at(step, len(batches), config.warmup)',
        effect="the schedule reaches the matrices and not the biases and gains, while the log looks right",
        tests="tests/test_sft.py::test_warm_up_and_decay_reach_the_steps",
    ),
    Mutation(
        "sft.py",
        right="betas=(0.9, 0.99), fused=True",
        wrong="betas=(0.9, 0.99), eps=1e-2, fused=True",
        effect="an epsilon that swamps small gradients: Adam becomes slow SGD with momentum",
        tests="tests/test_sft.py::test_steps_are_adamws_by_the_textbook",
    ),
    Mutation(
        "sft.py",
        right="betas=(0.9, 0.99), fused=True",
        wrong="fused=True",
        effect="another second moment: an optimiser that nobody has chosen",
        tests="tests/test_sft.py::test_steps_are_adamws_by_the_textbook",
    ),
    Mutation(
        "sft.py",
        right='{"params": vectors, "weight_decay": 0.0}',
        wrong='{"params": vectors, "weight_decay": config.weight_decay}',
        effect="decay pulls LayerNorm's gains to 0",
        tests=(
            "tests/test_sft.py::test_decay_spares_biases_and_gains "
            "tests/test_sft.py::test_steps_are_adamws_by_the_textbook"
        ),
    ),
    Mutation(
        "sft.py",
        right="with autocast(device, config.dtype):",
        wrong='with autocast(device, "float32"):',
        effect="--dtype bfloat16 is ignored: the run is merely slow",
        tests="tests/test_sft.py::test_dtype_is_that_of_the_products_in_training",
    ),
    Mutation(
        "sft.py",
        right="compile_blocks(model)",
        wrong="pass",
        effect="--compile is ignored",
        tests="tests/test_sft.py::test_compile_compiles_each_block",
    ),
    Mutation(
        "sft.py",
        right="norm = clip_gradients(model, config.grad_clip)",
        wrong="norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)",
        effect="--grad_clip 0 trains nothing at all",
        tests="tests/test_sft.py::test_grad_clip_0_is_no_limit",
    ),
    Mutation(
        "sft.py",
        right="    train_last_layers(model, config.train_layers)\n",
        wrong="",
        effect="--train_layers is ignored: everything moves",
        tests="tests/test_sft.py::test_train_layers_moves_the_last_blocks_alone",
    ),
    Mutation(
        "sft.py",
        right="        model.train()\n",
        wrong="",
        effect="dropout is off in training: --dropout does nothing",
        tests="tests/test_sft.py::test_dropout_is_on_in_training_and_off_in_evaluation",
    ),
    Mutation(
        "sft.py",
        right='for part in [model.config, *(m for m in model.modules() if hasattr(m, "dropout"))]:',
        wrong="for part in [model.config]:",
        effect="--dropout with --init is written into the checkpoint and drops nothing but embeddings",
        tests="tests/test_sft.py::test_dropout_flag_holds_for_every_start",
    ),
    Mutation(
        "sft.py",
        right="model = load_pretrained(config.init, block_size=config.block_size)",
        wrong="model = load_pretrained(config.init)",
        effect="--block_size is ignored with --init gpt2",
        tests="tests/test_sft.py::test_block_size_is_honoured_or_refused",
    ),
    Mutation(
        "sft.py",
        right="config.block_size in (0, own)",
        wrong="True",
        effect="--block_size is ignored with a checkpoint",
        tests="tests/test_sft.py::test_block_size_is_honoured_or_refused",
    ),
    Mutation(
        "sft.py",
        right='check(not own, f"--{name} is for a model from scratch; {config.init} has its own")',
        wrong="pass",
        effect="--n_layer 12 --init FOLDER trains the folder's two layers, silently",
        tests="tests/test_sft.py::test_sizes_are_refused_where_the_weights_have_their_own",
    ),
    Mutation(
        "sft.py",
        right="if rows > n_vocab:",
        wrong="if False:",
        effect="rows that are no tokens get probability, and are sampled: decoding crashes",
        tests="tests/test_sft.py::test_published_weights_must_have_the_vocabulary_s_rows",
    ),
    Mutation(
        "sft.py",
        right='losses = [row["held_out_loss"] for row in run.history("held_out_loss")]',
        wrong=(
            'losses = [row["held_out_loss"] for row in run.history("held_out_loss")]\n'
            "        losses = losses[1:] if start else losses"
        ),
        effect="after a resume the loss before training is that of a trained model",
        tests="tests/test_sft.py::test_the_first_loss_is_that_before_training_also_after_a_resume",
    ),
    Mutation(
        "sft.py",
        right='if task == "tiny":',
        wrong='if tokenizer.name == "tiny":',
        effect="data of one's own with the demo's vocabulary fails the demo's gates",
        tests="tests/test_sft.py::test_gates_belong_to_the_embedded_task_s_data",
    ),
    Mutation(
        "sft.py",
        right="return total.item() / sum(len(e.completion) for e in examples)",
        wrong="return total.item() / sum(map(len, examples))",
        effect="the held-out loss is divided by the prompts' tokens too: it looks better than it is",
        tests="tests/test_sft.py::test_held_out_loss_is_the_mean_over_all_tokens",
    ),
    Mutation(
        "sft.py",
        right="        optimizer.zero_grad(set_to_none=True)\n",
        wrong="",
        effect="gradients pile up over the run: a momentum of 1",
        tests="tests/test_sft.py::test_training_steps_are_the_gradient_of_the_whole_batch",
    ),
    Mutation(
        "sft.py",
        right=("    model.eval()\n    total"),
        wrong="    total",
        effect="the held-out loss is taken with dropout on: too high, and another one each time",
        tests="tests/test_sft.py::test_held_out_loss_has_no_dropout",
    ),
    Mutation(
        "sft.py",
        right="if held_out and start == 0:",
        wrong="if held_out:",
        effect="a resumed run logs its state as if it were the untrained model's",
        tests="tests/test_sft.py::test_the_first_loss_is_that_before_training_also_after_a_resume",
    ),
    Mutation(
        "sft.py",
        right="check(tokenizer_name == config.tokenizer,",
        wrong="check(True,",
        effect="a checkpoint goes on with a vocabulary in which its ids mean other words",
        tests="tests/test_sft.py::test_impossible_starts_are_refused",
    ),
    Mutation(
        "sft.py",
        right=(
            '        print(f"{config.init}: published weights, {rows:,} token ids, block size '
            '{model.config.block_size}")\n'
        ),
        wrong="",
        effect="nobody sees the block size that the imported weights bring along",
        tests="tests/test_pipeline.py::test_weights_that_are_imported_are_named",
    ),
    # ------------------------------------------------------------ collect.py
    Mutation(
        "collect.py",
        right='row["ended"] = [ended[i] for i in best_first]',
        wrong='row["ended"] = ended',
        effect='"ended" in the order on the screen beside texts from best to worst',
        tests="tests/test_collect.py::test_each_completion_belongs_to_its_prompt",
    ),
    Mutation(
        "collect.py",
        right='                row["ended"] = [ended[i] for i in best_first]\n',
        wrong="",
        effect="that a text was cut by --max_new_tokens is lost: it will get an EOS",
        tests="tests/test_collect.py::test_texts_cut_by_max_new_tokens_keep_that",
    ),
    Mutation(
        "collect.py",
        right="Sample(tokenizer.decode(completion), ended)",
        wrong="Sample(tokenizer.decode(completion), True)",
        effect="every text in a ranking counts as ended",
        tests="tests/test_collect.py::test_texts_cut_by_max_new_tokens_keep_that",
    ),
    Mutation(
        "collect.py",
        right='rng = random.Random(f"{config.seed} {first}")',
        wrong='rng = random.Random(f"{config.seed}")',
        effect="the annotators' noise is repeated for each chunk: its errors don't average out",
        tests="tests/test_collect.py::test_the_annotators_noise_is_new_for_every_chunk",
    ),
    Mutation(
        "collect.py",
        right="generator_for(device, config.seed, first, source)",
        wrong="generator_for(device, config.seed, source)",
        effect="the sampling noise is repeated for each chunk",
        tests="tests/test_collect.py::test_samples_have_a_stream_of_their_own_for_every_chunk",
    ),
    Mutation(
        "collect.py",
        right="                rng.shuffle(answers)",
        wrong="                pass",
        effect="the place on the screen tells which policy wrote an answer",
        tests="tests/test_collect.py::test_the_place_on_the_screen_says_nothing_about_the_policy",
    ),
    Mutation(
        "collect.py",
        right='("" if answer.ended else "   [cut]")',
        wrong='""',
        effect="human annotators can't tell a cut answer from one that was left unfinished",
        tests="tests/test_collect.py::test_human_annotators_see_which_answers_were_cut",
    ),
    Mutation(
        "collect.py",
        right='row["gold"] = [round(golds[i], 4) for i in best_first]',
        wrong='row["gold"] = [round(g, 4) for g in golds]',
        effect="the truth stands beside the wrong texts: Bayes accuracy is a wrong number",
        tests="tests/test_collect.py::test_collected_rankings",
    ),
    Mutation(
        "collect.py",
        right=(
            "    reward_of = dict(zip(completions, rewards, strict=True))\n"
            "    texts = list(reward_of)\n"
            "    order = annotator_ranking([reward_of[t] for t in texts], temperature, rng)\n"
            "    rank_of = {texts[i]: rank for rank, i in enumerate(order)}\n"
            "    return [rank_of[c] for c in completions]"
        ),
        wrong=(
            "    order = annotator_ranking(rewards, temperature, rng)\n"
            "    return [order.index(i) for i in range(len(completions))]"
        ),
        effect="equal texts are ranked one above the other",
        tests="tests/test_collect.py::test_equal_texts_tie",
    ),
    Mutation(
        "collect.py",
        right=(
            '    if content and not content.endswith(b"\\n"):\n        os.truncate(path, content.rfind(b"\\n") + 1)'
        ),
        wrong=('    if False:\n        os.truncate(path, content.rfind(b"\\n") + 1)'),
        effect="after a crash amid a line the next collection stops, or appends to the torn line",
        tests="tests/test_collect.py::test_a_line_torn_within_a_character_is_taken_off",
    ),
    Mutation(
        "collect.py",
        right="    check(not path.is_dir(),",
        wrong="    check(True,",
        effect="--out that is a folder is a traceback",
        tests="tests/test_collect.py::test_an_output_that_can_not_be_a_file_is_reported",
    ),
    Mutation(
        "collect.py",
        right="    prompts = Path(config.prompts)\n",
        wrong='    prompts = Path("out/data/prompts.jsonl")\n',
        effect="rankings of own prompts are appended to the demo's",
        tests="tests/test_collect.py::test_rankings_lie_beside_their_prompts",
    ),
    Mutation(
        "collect.py",
        right="    task = task_of(config.prompts)\n",
        wrong='    task = "tiny" if tokenizer.name == "tiny" else ""\n',
        effect="own prompts in the tiny vocabulary meet the embedded task's truth",
        tests="tests/test_collect.py::test_own_prompts_have_no_truth_unless_it_is_given",
    ),
    Mutation(
        "collect.py",
        right='call_reward(gold, [prompt] * len(texts), texts, ended, "the gold reward")',
        wrong='call_reward(gold, [prompt] * len(texts), texts, None, "the gold reward")',
        effect="a true reward that asks which texts ended is told that all did",
        tests="tests/test_collect.py::test_collected_rankings",
    ),
    Mutation(
        "collect.py",
        right="        note_task(policy, task, config.prompts)\n",
        wrong="        pass\n",
        effect="the demo's policy on own prompts: rarely meant, and not said",
        tests="tests/test_collect.py::test_own_prompts_for_the_demo_s_policy_are_noted",
    ),
    Mutation(
        "collect.py",
        right="sources = [(c.model, t) for c in loaded for t in config.temperatures]",
        wrong="sources = [(c.model, 1.0) for c in loaded for t in config.temperatures]",
        effect="--temperatures is ignored",
        tests="tests/test_collect.py::test_each_completion_belongs_to_its_prompt",
    ),
    # ------------------------------------------------------------ reward_model.py
    Mutation(
        "reward_model.py",
        right="losses = F.softplus(-gap)",
        wrong="losses = F.softplus(gap)",
        effect="the reward model learns to prefer the worse completion",
        tests="tests/test_reward_model.py::test_two_completions_are_bradley_terry",
    ),
    Mutation(
        "reward_model.py",
        right="losses = F.softplus(-gap)",
        wrong="losses = -torch.log(torch.sigmoid(gap))",
        effect="overflows to inf for a large gap, and the next step is nan",
        tests="tests/test_reward_model.py::test_extreme_gaps_stay_finite",
    ),
    Mutation(
        "reward_model.py",
        right="0.5 * (losses + F.softplus(gap))",
        wrong="losses + F.softplus(gap)",
        effect="ties count twice as much as comparisons",
        tests="tests/test_reward_model.py::test_a_tie_asks_for_equal_scores",
    ),
    Mutation(
        "reward_model.py",
        right="present = (ranks[:, i] >= 0) & (ranks[:, j] >= 0)",
        wrong="present = ranks[:, i] >= 0",
        effect="absent completions of shorter rankings are compared: the reward of row 0 leaks into them",
        tests="tests/test_reward_model.py::test_absent_completions_are_ignored",
    ),
    Mutation(
        "reward_model.py",
        right="present.sum().clamp(min=1) if n_pairs is None else n_pairs",
        wrong="present.numel() if n_pairs is None else n_pairs",
        effect="the mean is over absent pairs too: the loss shrinks with ragged rankings",
        tests="tests/test_reward_model.py::test_absent_completions_are_ignored",
    ),
    Mutation(
        "reward_model.py",
        right="model.std.copy_(scores.std())",
        wrong="model.std.copy_(scores.var())",
        effect="normalised by the variance: rewards are off by a factor",
        tests="tests/test_reward_model.py::test_normalise_gives_the_policys_samples_mean_0_and_std_1",
    ),
    Mutation(
        "reward_model.py",
        right="part_loss = ranking_loss(scores, batch.ranks, n_pairs)",
        wrong="part_loss = ranking_loss(scores, batch.ranks)",
        effect="micro-batches are not normalised by the whole step: gradients grow with their number",
        tests="tests/test_reward_model.py::test_training_steps_are_the_gradient_of_all_pairs",
    ),
    Mutation(
        "reward_model.py",
        right="max(longer_wins, 1 - longer_wins)",
        wrong="longer_wins",
        effect='"longer wins 0.25" hides a judge by length who is right in 0.75',
        tests="tests/test_reward_model.py::test_the_length_baseline_may_prefer_the_shorter",
    ),
    Mutation(
        "reward_model.py",
        right="batches = epoch_batches(items, config)",
        wrong="batches = micro_batches(items, config.batch_size) * config.epochs",
        effect="steps of similar lengths, short texts first: a curriculum, and the same one every epoch",
        tests="tests/test_reward_model.py::test_a_step_holds_rankings_of_all_lengths",
    ),
    Mutation(
        "reward_model.py",
        right="texts = [p for p in read_prompts(path) if p not in learned] or read_prompts(path)",
        wrong="texts = [p for p in read_prompts(path) if p in learned]",
        effect="normalised on the prompts that it has learned from: PPO's rewards are off by a factor",
        tests="tests/test_reward_model.py::test_it_is_normalised_on_prompts_that_it_has_not_learned_from",
    ),
    Mutation(
        "reward_model.py",
        right="    train_last_layers(model, config.train_layers)\n",
        wrong="",
        effect="--train_layers is ignored",
        tests="tests/test_reward_model.py::test_only_the_last_layers_are_trained",
    ),
    Mutation(
        "reward_model.py",
        right="norm = clip_gradients(model, config.grad_clip)",
        wrong="norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)",
        effect="--grad_clip 0 scales every gradient down to nothing",
        tests="tests/test_reward_model.py::test_a_gradient_clip_of_0_clips_nothing",
    ),
    Mutation(
        "reward_model.py",
        right="with autocast(device, config.dtype):",
        wrong='with autocast(device, "float32"):',
        effect="--dtype is ignored",
        tests="tests/test_reward_model.py::test_bfloat16_reaches_the_scores",
    ),
    Mutation(
        "reward_model.py",
        right='if bayes is None or "by_part" not in results:',
        wrong="if bayes is None:",
        effect="own data ranked by own simulated annotators ends in a search for the embedded task's figures",
        tests="tests/test_reward_model.py::test_the_task_is_known_by_its_data_not_by_the_vocabulary",
    ),
    Mutation(
        "reward_model.py",
        right='if task == task_of(path) == "tiny":',
        wrong='if task == "tiny":',
        effect="held-out data of one's own beside the task's rankings: a traceback after the training",
        tests="tests/test_reward_model.py::test_parts_of_the_task_need_both_files_to_be_of_it",
    ),
    Mutation(
        "reward_model.py",
        right='if task == task_of(path) == "tiny":',
        wrong='if task_of(path) == "tiny":',
        effect="a reward model of one's own data is judged by the parts of a task it has never seen",
        tests="tests/test_reward_model.py::test_parts_of_the_task_need_both_files_to_be_of_it",
    ),
    Mutation(
        "evaluate.py",
        right="if name in policies and name != baseline:",
        wrong="if name in policies:",
        effect="a baseline in a folder named ppo: a traceback after the sampling",
        tests="tests/test_evaluate.py::test_the_baseline_is_not_measured_against_itself",
    ),
    Mutation(
        "reward_model.py",
        right="    note_task(start_from, task, config.data)\n",
        wrong="",
        effect="the demo's policy on own data: rarely meant, and not said",
        tests="tests/test_reward_model.py::test_the_task_is_known_by_its_data_not_by_the_vocabulary",
    ),
    Mutation(
        "reward_model.py",
        right="policy.config.n_layer < 4",
        wrong="policy.config.n_layer <= 4",
        effect="a network of four blocks is told as well: another model than the one that --help promises",
        tests="tests/test_reward_model.py::test_shallow_networks_are_told_what_was_expected",
    ),
    Mutation(
        "reward_model.py",
        right='told = config.expectation == "yes" or',
        wrong='told = config.expectation != "no" and',
        effect="--expectation yes is ignored on deep networks",
        tests="tests/test_reward_model.py::test_shallow_networks_are_told_what_was_expected",
    ),
    Mutation(
        "reward_model.py",
        right='evaluate(model, items, device)["accuracy"]',
        wrong='evaluate(model, items, device)["length_alone"]',
        effect="accuracy by part is that of a judge by length",
        tests="tests/test_reward_model.py::test_accuracy_part_by_part",
    ),
    Mutation(
        "reward_model.py",
        right='results["by_part"]["right_vs_wrong"], *EXPECTED_RIGHT',
        wrong='results["by_part"].get("polite_vs_plain", 1.0), *EXPECTED_RIGHT',
        effect="the gate on facts looks at manners: it is always passed",
        tests="tests/test_reward_model.py::test_every_gate_can_fail",
    ),
    # ------------------------------------------------------------ ppo.py
    Mutation(
        "ppo.py",
        right=("    if run.done:\n        return run.done\n"),
        wrong="",
        effect="--resume of a finished PPO run writes its model anew",
        tests="tests/test_pipeline.py::test_a_finished_run_is_resumed_without_changing_a_byte",
    ),
    Mutation(
        "ppo.py",
        right='controller.coef = state.get("kl_coef", controller.coef)',
        wrong="controller.coef = config.kl_coef",
        effect="a resumed run starts again with the first KL coefficient",
        tests="tests/test_pipeline.py::test_a_resumed_run_equals_the_unbroken_one",
    ),
    Mutation(
        "ppo.py",
        right="d = logprobs - ref_logprobs\n",
        wrong="d = ref_logprobs - logprobs\n",
        effect="the sign of the KL: the policy is paid for leaving the reference",
        tests="tests/test_ppo_math.py::test_kl_estimators_by_hand",
    ),
    Mutation(
        "ppo.py",
        right="return 0.5 * d * d",
        wrong="return d * d",
        effect="k2 twice too large",
        tests="tests/test_ppo_math.py::test_kl_estimators_by_hand",
    ),
    Mutation(
        "ppo.py",
        right="torch.expm1((-d).clamp(max=60.0)) + d)",
        wrong="torch.expm1(d.clamp(max=60.0)) - d)",
        effect="k3 with the roles exchanged: estimates another divergence",
        tests="tests/test_ppo_math.py::test_kl_estimators_by_hand",
    ),
    Mutation(
        "ppo.py",
        right="return (logp.exp() * (logp - at_least_float32(ref_logits).log_softmax(-1))).sum(-1)",
        wrong=(
            "ref_logp = at_least_float32(ref_logits).log_softmax(-1)\n"
            "    return (ref_logp.exp() * (ref_logp - logp)).sum(-1)"
        ),
        effect="the reverse divergence, KL(reference || policy)",
        tests="tests/test_ppo_math.py::test_exact_kl_by_hand_and_by_loop",
    ),
    Mutation(
        "ppo.py",
        right="rewards = torch.where(mask, -kl_coef * kl, 0.0)",
        wrong="rewards = -kl_coef * kl",
        effect="filler and prompt are penalised too: returns depend on padding",
        tests="tests/test_ppo_math.py::test_kl_of_filler_does_not_reach_the_rewards",
    ),
    Mutation(
        "ppo.py",
        right="last = torch.where(mask, slots, -1).amax(1)  # (B,)",
        wrong="last = torch.where(mask, slots, -1).amax(1).add(1).clamp(max=mask.size(1) - 1)",
        effect=(
            "the score lands one slot late, after EOS: with lambda < 1 it depends on padding, and often it is "
            "masked out"
        ),
        tests="tests/test_ppo_math.py::test_the_score_lands_on_the_last_action_only",
    ),
    Mutation(
        "ppo.py",
        right="last = torch.where(mask, slots, -1).amax(1)  # (B,)",
        wrong="last = torch.full_like(mask[:, 0].long(), mask.size(1) - 1)",
        effect="the score lands at the end of the batch's longest row",
        tests="tests/test_ppo_math.py::test_the_score_lands_on_the_last_action_only",
    ),
    Mutation(
        "ppo.py",
        right="values = torch.where(mask, values, 0.0)\n",
        wrong="pass\n",
        effect="the value after EOS is whatever the value model says about filler",
        tests="tests/test_ppo_math.py::test_gae_equals_two_slow_forms",
    ),
    Mutation(
        "ppo.py",
        right="deltas = torch.where(mask, rewards + gamma * next_values - values, 0.0)",
        wrong="deltas = rewards + gamma * next_values - values",
        effect="filler's deltas flow back into the advantages",
        tests="tests/test_ppo_math.py::test_gae_equals_two_slow_forms",
    ),
    Mutation(
        "ppo.py",
        right="advantages = torch.where(mask, (deltas.to(wide) @ discount).to(deltas.dtype), 0.0)",
        wrong="advantages = (deltas.to(wide) @ discount).to(deltas.dtype)",
        effect="advantages are not 0 on the prompt",
        tests="tests/test_ppo_math.py::test_gae_equals_two_slow_forms",
    ),
    Mutation(
        "ppo.py",
        right="** ahead.clamp(min=0), 0.0)",
        wrong="** ahead.clamp(min=0), 1.0)",
        effect="advantages count the past as well as the future",
        tests="tests/test_ppo_math.py::test_gae_equals_two_slow_forms",
    ),
    Mutation(
        "ppo.py",
        right="return advantages, advantages + values",
        wrong="return advantages, advantages",
        effect="returns are advantages: the value model learns to predict 0",
        tests="tests/test_ppo_math.py::test_gae_equals_two_slow_forms",
    ),
    Mutation(
        "ppo.py",
        right="advantages = whiten(advantages, mask)",
        wrong=("advantages = whiten(advantages, mask)\n        returns = advantages + told['values']"),
        effect="returns from whitened advantages: the value model learns a rescaled reward",
        tests="tests/test_ppo_update.py::test_returns_are_formed_before_whitening",
    ),
    Mutation(
        "ppo.py",
        right="torch.maximum(unclipped, clipped)",
        wrong="torch.minimum(unclipped, clipped)",
        effect="optimistic clipping: the policy is rewarded for leaving the trust region",
        tests="tests/test_ppo_math.py::test_policy_loss_of_all_four_cases_by_hand",
    ),
    Mutation(
        "ppo.py",
        right="loss = torch.where(mask, torch.maximum(unclipped, clipped), 0.0).sum() / n",
        wrong="loss = torch.maximum(unclipped, clipped).mean()",
        effect="the mean counts filler: long batches learn slower",
        tests="tests/test_ppo_math.py::test_policy_loss_at_ratio_1_is_minus_the_mean_advantage",
    ),
    Mutation(
        "ppo.py",
        right="torch.maximum(error, clipped_error)",
        wrong="torch.minimum(error, clipped_error)",
        effect="value clipping as min: the value model stops where it should be pulled back",
        tests="tests/test_ppo_math.py::test_value_loss_by_hand",
    ),
    Mutation(
        "ppo.py",
        right="old_values + (values - old_values).clamp(-clip, clip) - returns",
        wrong="returns + (values - old_values).clamp(-clip, clip) - returns",
        effect="clipped around the return instead of the old value",
        tests="tests/test_ppo_math.py::test_value_loss_by_hand",
    ),
    Mutation(
        "ppo.py",
        right="self.coef *= 1 + error * min",
        wrong="self.coef *= 1 - error * min",
        effect="the controller lowers the penalty when the KL is too high: it runs away",
        tests="tests/test_ppo_math.py::test_adaptive_kl_by_hand",
    ),
    Mutation(
        "ppo.py",
        right="error = min(max(kl / self.target - 1, -0.2), 0.2)",
        wrong="error = kl / self.target - 1",
        effect="the controller's error is not clipped: one bad batch throws the coefficient off",
        tests="tests/test_ppo_math.py::test_adaptive_kl_by_hand",
    ),
    Mutation(
        "ppo.py",
        right="self.coef *= 1 + error * min(1.0, n / self.horizon)",
        wrong="self.coef *= 1 + error * n / self.horizon",
        effect="--kl_horizon 1 drives the coefficient below 0: a bonus for divergence",
        tests="tests/test_ppo_math.py::test_the_adaptive_coefficient_stays_above_0_and_moves_by_a_fifth_at_most",
    ),
    Mutation(
        "ppo.py",
        right="kl_horizon: float = flag(500.0,",
        wrong="kl_horizon: float = flag(10_000.0,",
        effect="the default horizon moves the coefficient by 1.4x at most in a default run: no target is held",
        tests="tests/test_ppo_math.py::test_the_default_horizon_works_within_a_default_run",
    ),
    Mutation(
        "ppo.py",
        right='over which the adaptive coefficient moves by its error", above=0)',
        wrong='over which the adaptive coefficient moves by its error")',
        effect="--kl_horizon 0 is an error without the flag's name, after the models are loaded",
        tests="tests/test_ppo.py::test_impossible_settings_are_refused",
    ),
    Mutation(
        "ppo.py",
        right="check(not config.kl_target or config.kl_coef > 0,",
        wrong="check(True,",
        effect="--kl_coef 0 --kl_target 4 is no one-line error, or stays 0 for ever",
        tests="tests/test_ppo.py::test_impossible_settings_are_refused",
    ),
    Mutation(
        "ppo.py",
        right="if target and init_coef <= 0:",
        wrong="if target and init_coef < 0:",
        effect="a coefficient of 0 stays 0, whatever the KL is",
        tests="tests/test_ppo_math.py::test_a_controller_that_can_not_work_is_refused",
    ),
    Mutation(
        "ppo.py",
        right='controller.update(figures["kl"], config.rollouts)',
        wrong='controller.update(figures["k3"], config.rollouts)',
        effect="the controller is fed with another KL than the one that is penalised",
        tests="tests/test_ppo.py::test_the_adaptive_coefficient_follows_the_logged_kl",
    ),
    Mutation(
        "ppo.py",
        right="ref_logits = reference(tokens, mask) / config.temperature",
        wrong="ref_logits = reference(tokens, mask)",
        effect="the reference is not divided by the temperature: KL is not 0 at the start",
        tests="tests/test_ppo_update.py::test_policy_equal_to_reference_has_no_kl",
    ),
    Mutation(
        "ppo.py",
        right="logits = policy(tokens, mask) / config.temperature  # (n, V)\n            ref",
        wrong="logits = policy(tokens, mask)  # (n, V)\n            ref",
        effect="the rollout is measured at temperature 1: the first ratio is not 1, and the KL is another one",
        tests="tests/test_ppo_update.py::test_experience_equals_the_slow_one",
    ),
    Mutation(
        "ppo.py",
        right="columns[:, rows, : T - 1] = torch.stack",
        wrong="columns[:, sorted(rows), : T - 1] = torch.stack",
        effect="figures of rows sorted by length are not put back in their order: advantages belong to other texts",
        tests="tests/test_ppo_update.py::test_experience_equals_the_slow_one",
    ),
    Mutation(
        "ppo.py",
        right="T = max(lens[i] for i in rows) if cut else rollout.tokens.size(1)",
        wrong="T = rollout.tokens.size(1)",
        effect="every slice is as wide as the longest rollout: filler is most of the work",
        tests="tests/test_ppo_update.py::test_networks_read_rows_of_similar_length_and_answer_at_the_actions_alone",
    ),
    Mutation(
        "ppo.py",
        right="values = value_model(tokens, mask) if",
        wrong="values = value_model(tokens, F.pad(mask, (1, 0))) if",
        effect="values after the action: the baseline has seen what it is a baseline for",
        tests="tests/test_ppo_update.py::test_experience_equals_the_slow_one",
    ),
    Mutation(
        "ppo.py",
        right="kl = distribution_kl(logits, ref_logits) if exact",
        wrong="kl = distribution_kl(ref_logits, logits) if exact",
        effect="--kl exact penalises the reverse divergence",
        tests="tests/test_ppo_update.py::test_experience_equals_the_slow_one",
    ),
    Mutation(
        "ppo.py",
        right="token_logprobs(policy, old.tokens, config.temperature, mask)",
        wrong="token_logprobs(policy, old.tokens, 1.0, mask)",
        effect="the update forgets the temperature: the ratio is not 1",
        tests="tests/test_ppo_update.py::test_the_first_ratio_is_1",
    ),
    Mutation(
        "ppo.py",
        right="put_back(value_model(old.tokens, mask), mask)",
        wrong="put_back(value_model(old.tokens, F.pad(mask, (1, 0))), mask)",
        effect="the critic learns the value after the action, and is asked for the one before it",
        tests="tests/test_ppo_update.py::test_an_update_equals_the_slow_one_for_any_micro_batch",
    ),
    Mutation(
        "ppo.py",
        right="token_logprobs(policy, old.tokens, config.temperature, mask)",
        wrong="token_logprobs(policy, old.tokens, config.temperature)",
        effect="logits of prompts and filler in every update: most of its time and memory for nothing",
        tests="tests/test_ppo_update.py::test_networks_read_rows_of_similar_length_and_answer_at_the_actions_alone",
    ),
    Mutation(
        "ppo.py",
        right="model.eval()  # no dropout in the update",
        wrong="model.train()  # no dropout in the update",
        effect="dropout in the update: the ratio is not 1 before anything is learned",
        tests="tests/test_ppo_update.py::test_the_first_ratio_is_1",
    ),
    Mutation(
        "ppo.py",
        right="n_tokens = experience.action_mask[rows].sum()  # of the whole step",
        wrong="n_tokens = None",
        effect="mean per micro-batch: --micro_batch changes what is learned",
        tests="tests/test_ppo_update.py::test_an_update_equals_the_slow_one_for_any_micro_batch",
    ),
    Mutation(
        "ppo.py",
        right="n_tokens = experience.action_mask[rows].sum()  # of the whole step",
        wrong=(
            "n_tokens = experience.action_mask[rows].sum() / max(1, len(rows) // (config.micro_batch or len(rows)))"
        ),
        effect="not normalised by the whole step: gradients grow with the number of micro-batches",
        tests="tests/test_ppo_update.py::test_an_update_equals_the_slow_one_for_any_micro_batch",
    ),
    Mutation(
        "ppo.py",
        right="T = int(self.lens[index].max()) if cut else self.tokens.size(1)",
        wrong="T = int(self.lens[index].min()) if cut else self.tokens.size(1)",
        effect="rows are cut to the shortest: the ends of the others are not trained, their EOS above all",
        tests="tests/test_ppo_update.py::test_rows_are_cut_to_the_longest_of_them_or_left_as_wide",
    ),
    Mutation(
        "ppo.py",
        right="if not steps and not first_ratio <= 1.001:",
        wrong='if not steps and not first_ratio <= (1.001 if config.dtype == "float32" else 1.2):',
        effect="bfloat16 trains on ratios that start at 1.2",
        tests="tests/test_ppo_update.py::test_a_ratio_that_starts_off_1_stops_the_run",
    ),
    Mutation(
        "ppo.py",
        right='return device.type != "cuda" and config.dtype == "float32"',
        wrong='return device.type != "cuda"',
        effect="in bfloat16 another width rounds differently: the first ratio is off 1",
        tests=("tests/test_ppo_update.py::test_networks_read_rows_of_similar_length_and_answer_at_the_actions_alone"),
    ),
    Mutation(
        "ppo.py",
        right=("            with autocast(device, config.dtype):\n                logprobs = token_logprobs"),
        wrong=('            with autocast(device, "float32"):\n                logprobs = token_logprobs'),
        effect="--dtype is ignored in the update",
        tests="tests/test_ppo_update.py::test_the_dtype_holds_for_the_products_of_every_forward_pass",
    ),
    Mutation(
        "ppo.py",
        right="        with autocast(tokens.device, config.dtype):\n            logits = policy(tokens, mask)",
        wrong='        with autocast(tokens.device, "float32"):\n            logits = policy(tokens, mask)',
        effect="--dtype is ignored where the rollout is measured",
        tests="tests/test_ppo_update.py::test_the_dtype_holds_for_the_products_of_every_forward_pass",
    ),
    Mutation(
        "ppo.py",
        right=(
            "            with autocast(policy.device, config.dtype):\n"
            "                logits = policy(tokens, mask[:, 1:])"
        ),
        wrong=(
            '            with autocast(policy.device, "float32"):\n                logits = policy(tokens, mask[:, 1:])'
        ),
        effect="--dtype is ignored in the PTX term",
        tests="tests/test_ppo_update.py::test_the_dtype_holds_for_the_products_of_every_forward_pass",
    ),
    Mutation(
        "ppo.py",
        right="for part in micro_batches(batch, config.micro_batch):",
        wrong="for part in micro_batches(batch, 0):",
        effect="--micro_batch does not hold for the demonstrations: out of memory with --ptx_coef",
        tests="tests/test_ppo_update.py::test_the_pretraining_term_goes_in_micro_batches",
    ),
    Mutation(
        "ppo.py",
        right="sft_loss(logits, tokens, mask, n_tokens)",
        wrong="sft_loss(logits, tokens, mask)",
        effect="the PTX term is a mean for each micro-batch: it grows with their number",
        tests="tests/test_ppo_update.py::test_the_pretraining_term_goes_in_micro_batches",
    ),
    Mutation(
        "ppo.py",
        right='rng = generator_for(torch.device("cpu"), config.seed, iteration, 3)',
        wrong='rng = generator_for(torch.device("cpu"), config.seed, 3)',
        effect="the same demonstrations in every iteration",
        tests="tests/test_ppo_update.py::test_the_pretraining_term_draws_anew_in_every_step",
    ),
    Mutation(
        "ppo.py",
        right="stats = update(policy, value_model, optimizer, experience, config, rng, extra_losses)",
        wrong="stats = update(policy, value_model, optimizer, experience, config, rng)",
        effect="--ptx_coef is read and forgotten",
        tests="tests/test_ppo.py::test_the_pretraining_term_reaches_the_training",
    ),
    Mutation(
        "ppo.py",
        right="scores = raw_scores - config.eos_penalty * (~rollout.ended)",
        wrong="scores = raw_scores - config.eos_penalty * rollout.ended",
        effect="stopping is punished: completions grow until they are cut",
        tests="tests/test_ppo.py::test_what_is_logged_is_what_was_used",
    ),
    Mutation(
        "ppo.py",
        right="advantages = advantages - kl_coef * own",
        wrong="advantages = advantages",
        effect="with --kl exact no token feels its own divergence: the penalty's gradient is wrong",
        tests=(
            "tests/test_ppo_update.py::test_experience_equals_the_slow_one "
            "tests/test_optimum.py::test_the_penalty_in_the_advantages_has_the_gradient_of_the_kl"
        ),
    ),
    Mutation(
        "ppo.py",
        right="    train_last_layers(policy, config.train_layers)\n",
        wrong="",
        effect="--train_layers is ignored",
        tests="tests/test_ppo.py::test_partial_training_holds_in_the_script",
    ),
    Mutation(
        "ppo.py",
        right="rng = generator_for(device, config.seed, iteration, 1)",
        wrong="rng = generator_for(device, config.seed, 1)",
        effect="the same sampling noise in every iteration",
        tests="tests/test_ppo.py::test_every_iteration_samples_anew",
    ),
    Mutation(
        "ppo.py",
        right="rng = generator_for(cpu, config.seed, iteration, 0)",
        wrong="rng = generator_for(cpu, config.seed, 0)",
        effect="the same prompts in every iteration: the others are never seen",
        tests="tests/test_ppo.py::test_every_iteration_samples_anew",
    ),
    Mutation(
        "ppo.py",
        right="rng = generator_for(cpu, config.seed, iteration, 2)",
        wrong="rng = generator_for(cpu, config.seed, 2)",
        effect="the same minibatches in every iteration",
        tests="tests/test_ppo.py::test_every_iteration_samples_anew",
    ),
    Mutation(
        "ppo.py",
        right='            group["lr"] = peak * factor\n',
        wrong='            group["lr"] = peak\n',
        effect="no warm-up and no decay, though the log shows them",
        tests="tests/test_ppo.py::test_the_learning_rates_warm_up_and_decay",
    ),
    Mutation(
        "ppo.py",
        right='factor = lr_at(iteration, config.iterations, config.warmup, "linear")',
        wrong='factor = lr_at(iteration, config.iterations, config.warmup, "constant")',
        effect="no decay of the learning rate",
        tests="tests/test_ppo.py::test_the_learning_rates_warm_up_and_decay",
    ),
    Mutation(
        "ppo.py",
        right="return torch.optim.Adam(groups, eps=1e-5, fused=True)",
        wrong="return torch.optim.Adam(groups, eps=1e-2, fused=True)",
        effect="Adam becomes plain SGD for the gradients of a large network",
        tests="tests/test_ppo_update.py::test_adam_divides_by_a_small_eps",
    ),
    Mutation(
        "ppo.py",
        right=("    if config.compile:\n        compile_blocks(policy, reference, value_model)\n"),
        wrong="",
        effect="--compile is ignored",
        tests="tests/test_ppo.py::test_every_block_is_compiled",
    ),
    Mutation(
        "ppo.py",
        right='last_quarter(run.history("score"), EXPECTED if usual else ())',
        wrong=(
            'last_quarter([r for r in run.history("score") if r["step"] > state["step"]], EXPECTED if usual else ())'
        ),
        effect="the summary of a resumed run covers the resumed part only",
        tests="tests/test_ppo.py::test_a_resumed_run_tells_of_the_whole_run",
    ),
    Mutation(
        "ppo.py",
        right=(
            'usual = task == "tiny" and len(reward_models) == len(config.reward) == 1 and not config.reward_weights'
        ),
        wrong='usual = task == "tiny"',
        effect="own rewards are judged by the ranges of the task's reward model",
        tests="tests/test_ppo.py::test_only_the_usual_reward_of_the_task_is_judged",
    ),
    Mutation(
        "ppo.py",
        right="if reward_models and len(reward_models) == len(config.reward) and scale:",
        wrong="if reward_models and scale:",
        effect="a critic in the units of one reward of several: explained variance starts at -1.8",
        tests="tests/test_ppo.py::test_with_a_function_in_the_mix_values_start_at_0",
    ),
    Mutation(
        "ppo.py",
        right="        value_model.std /= scale\n",
        wrong="",
        effect="the critic starts in the units of the reward model, not of the weighted reward",
        tests="tests/test_ppo.py::test_the_value_model_starts_in_the_units_of_the_reward",
    ),
    Mutation(
        "ppo.py",
        right='"min": weights[0]}',
        wrong='"min": 1.0}',
        effect="the critic of a weighted minimum starts in the wrong units",
        tests="tests/test_ppo.py::test_the_value_model_starts_in_the_units_of_the_reward",
    ),
    Mutation(
        "ppo.py",
        right="    torch.nn.init.zeros_(value_model.head.weight)\n",
        wrong="",
        effect="without a reward model the critic starts as noise",
        tests="tests/test_ppo.py::test_without_a_reward_model_values_start_at_0",
    ),
    Mutation(
        "ppo.py",
        right='mix = {"weights": config.reward_weights, "combine": config.reward_combine}',
        wrong='mix = {"weights": [], "combine": "sum"}',
        effect="--reward_weights and --reward_combine are ignored",
        tests="tests/test_ppo.py::test_the_weights_reach_the_training",
    ),
    Mutation(
        "ppo.py",
        right="prompts = encode_prompts(texts, tokenizer, room, config.prompts)",
        wrong="prompts = [tokenizer.encode_prompt(p)[-room:] for p in texts]",
        effect="prompts are cut in silence, to one token if need be",
        tests="tests/test_ppo.py::test_prompts_that_are_cut_are_counted",
    ),
    Mutation(
        "ppo.py",
        right=("    if value_model is not None:\n        groups.append"),
        wrong=("    if True:\n        groups.append"),
        effect="no update without a value model: every critic-free variant needs its own optimiser",
        tests="tests/test_grpo_from_parts.py::test_it_raises_a_simple_reward",
    ),
    Mutation(
        "ppo.py",
        right="values = old.values if value_model is None else put_back(",
        wrong="values = put_back(",
        effect="no update without a value model",
        tests="tests/test_ppo_update.py::test_without_a_value_model_the_policy_learns_the_same",
    ),
    Mutation(
        "ppo.py",
        right='sibling(config.prompts, "demonstrations.jsonl") if config.ptx_data == "auto" else config.ptx_data',
        wrong='"out/data/demonstrations.jsonl" if config.ptx_data == "auto" else config.ptx_data',
        effect="--ptx_coef on prompts of one's own mixes in the demo's demonstrations",
        tests="tests/test_ppo.py::test_the_pretraining_term_reaches_the_training",
    ),
    Mutation(
        "ppo.py",
        right="check(not config.ptx_coef or bool(ptx_data),",
        wrong="check(True,",
        effect="--ptx_coef without demonstrations does nothing, in silence",
        tests="tests/test_ppo.py::test_impossible_settings_are_refused",
    ),
    Mutation(
        "ppo.py",
        right='call_reward(gold, asked, completions, rollout.ended.tolist(), "the gold reward")',
        wrong='call_reward(gold, asked, completions, None, "the gold reward")',
        effect="--gold with a function that asks for `ended` is told that all have ended",
        tests="tests/test_ppo.py::test_the_true_reward_is_told_which_completions_ended",
    ),
    # ------------------------------------------------------------ dpo.py
    Mutation(
        "dpo.py",
        right="token_logprobs(model, tokens, mask=completion_mask[:, 1:]).sum(1)",
        wrong="token_logprobs(model, tokens, mask=completion_mask[:, :-1]).sum(1)",
        effect="the mask is off by one: EOS is left out of the sum, the last prompt token is in it",
        tests="tests/test_dpo.py::test_a_completion_is_the_sum_of_its_known_tokens",
    ),
    Mutation(
        "dpo.py",
        right="token_logprobs(model, tokens, mask=completion_mask[:, 1:]).sum(1)",
        wrong="token_logprobs(model, tokens).sum(1)",
        effect="prompt and filler count: the loss depends on padding",
        tests="tests/test_dpo.py::test_a_completion_is_the_sum_of_its_known_tokens",
    ),
    Mutation(
        "dpo.py",
        right="token_logprobs(model, tokens, mask=completion_mask[:, 1:]).sum(1)",
        wrong="token_logprobs(model, tokens, mask=completion_mask[:, 1:]).sum(1) / completion_mask.sum(1)",
        effect="a mean instead of a sum: another loss, known to collapse",
        tests="tests/test_dpo.py::test_a_completion_is_the_sum_of_its_known_tokens",
    ),
    Mutation(
        "dpo.py",
        right="h = chosen_ratio - rejected_ratio",
        wrong="h = policy_chosen - policy_rejected",
        effect="no reference: nothing holds the policy",
        tests="tests/test_dpo.py::test_two_pairs_by_hand",
    ),
    Mutation(
        "dpo.py",
        right="-(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)",
        wrong="-label_smoothing * F.logsigmoid(beta * h) - (1 - label_smoothing) * F.logsigmoid(-beta * h)",
        effect="1 - eps and eps exchanged: learns to prefer the rejected completion",
        tests="tests/test_dpo.py::test_two_pairs_by_hand",
    ),
    Mutation(
        "dpo.py",
        right="losses = (h - 1 / (2 * beta)) ** 2",
        wrong="losses = (beta * h - 1 / 2) ** 2",
        effect="IPO on the scaled margin: beta no longer means what the paper says",
        tests="tests/test_dpo.py::test_two_pairs_by_hand",
    ),
    Mutation(
        "dpo.py",
        right="beta * chosen_ratio.detach()",
        wrong="chosen_ratio.detach()",
        effect="implicit rewards logged without beta: figures can't be compared between runs",
        tests="tests/test_dpo.py::test_implicit_rewards_are_for_logging",
    ),
    Mutation(
        "dpo.py",
        right="strict = (ranks[:, i] >= 0) & (ranks[:, i] < ranks[:, j])",
        wrong="strict = (ranks[:, i] >= 0) & (ranks[:, i] <= ranks[:, j])",
        effect="ties are trained as preferences",
        tests="tests/test_dpo.py::test_rankings_expand_to_all_strict_pairs",
    ),
    Mutation(
        "dpo.py",
        right="(pairs[0].sum() / n_pairs).backward()",
        wrong="pairs[0].mean().backward()",
        effect="mean per micro-batch: --micro_batch changes the size of the step",
        tests="tests/test_dpo.py::test_training_steps_are_the_gradient_of_all_pairs",
    ),
    Mutation(
        "dpo.py",
        right="for item, found in zip(part, logprobs.split",
        wrong="for item, found in zip(items, logprobs.split",
        effect="the reference's log-probs are those of other rankings, as parts are sorted by length",
        tests="tests/test_dpo.py::test_reference_logprobs_do_not_depend_on_the_batches",
    ),
    Mutation(
        "dpo.py",
        right="reference = copy.deepcopy(policy).requires_grad_(False)",
        wrong="reference = policy",
        effect="the reference learns along: KL to it is 0 and a collapse can't be seen",
        tests="tests/test_dpo.py::test_the_reference_stays_frozen",
    ),
    Mutation(
        "dpo.py",
        right="batches = epoch_batches(items, config)",
        wrong="batches = micro_batches(items, config.batch_size) * config.epochs",
        effect="steps of similar lengths, short texts first: a curriculum, and the same one every epoch",
        tests="tests/test_dpo.py::test_a_step_holds_rankings_of_all_lengths",
    ),
    Mutation(
        "dpo.py",
        right="    train_last_layers(policy, config.train_layers)\n",
        wrong="",
        effect="--train_layers is ignored",
        tests="tests/test_dpo.py::test_only_the_last_layers_are_trained",
    ),
    Mutation(
        "dpo.py",
        right="norm = clip_gradients(policy, config.grad_clip)",
        wrong="norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.grad_clip)",
        effect="--grad_clip 0 scales every gradient down to nothing",
        tests="tests/test_dpo.py::test_a_gradient_clip_of_0_clips_nothing",
    ),
    Mutation(
        "dpo.py",
        right="    with autocast(model.device, dtype):",
        wrong='    with autocast(model.device, "float32"):',
        effect="--dtype is ignored",
        tests="tests/test_dpo.py::test_in_bfloat16_policy_and_reference_still_agree_at_the_start",
    ),
    Mutation(
        "dpo.py",
        right=("    policy.eval()\n    return figures_of("),
        wrong="    return figures_of(",
        effect="held-out figures with dropout, where the caller has left it on",
        tests="tests/test_dpo.py::test_held_out_figures_equal_a_loop",
    ),
    Mutation(
        "dpo.py",
        right=(
            "    results = compare_samples(policy, reference, prompts, tokenizer, config.max_new_tokens, "
            "config.seed)\n"
            "    if held_out:\n"
            "        results |= "
        ),
        wrong=(
            "    results = {}\n"
            "    if held_out:\n"
            "        results = compare_samples(policy, reference, prompts, tokenizer, config.max_new_tokens, "
            "config.seed)\n"
            "        results |= "
        ),
        effect="without held-out data a collapse is shown nowhere",
        tests="tests/test_dpo.py::test_a_collapse_shows_without_held_out_data",
    ),
    Mutation(
        "dpo.py",
        right='        gate("DPO held-out loss, share of the start\'s", loss / start, *EXPECTED_LOSS),\n',
        wrong="",
        effect="a run with --lr 1e6 passes by its accuracy alone, with a loss of 4e10",
        tests="tests/test_dpo.py::test_each_gate_can_fail",
    ),
    Mutation(
        "dpo.py",
        right='        gate("DPO EOS rate", results["eos_rate"], *EXPECTED_EOS),\n',
        wrong="",
        effect="a policy that no longer stops passes",
        tests="tests/test_dpo.py::test_each_gate_can_fail",
    ),
    Mutation(
        "dpo.py",
        right="1 / (4 * config.beta**2)",
        wrong="math.log(2)",
        effect="every IPO run fails its gate: its loss starts elsewhere",
        tests="tests/test_dpo.py::test_each_gate_can_fail",
    ),
    Mutation(
        "dpo.py",
        right="    note_task(start_from, task, config.data)\n",
        wrong="",
        effect="the demo's policy on own data: rarely meant, and not said",
        tests="tests/test_dpo.py::test_the_task_is_known_by_its_data_not_by_the_vocabulary",
    ),
    Mutation(
        "dpo.py",
        right='if task != "tiny":',
        wrong="if False:",
        effect="own data gets the embedded task's gates",
        tests=(
            "tests/test_dpo.py::test_own_data_reads_no_file_of_the_demo "
            "tests/test_dpo.py::test_the_task_is_known_by_its_data_not_by_the_vocabulary"
        ),
    ),
    # ------------------------------------------------------------ evaluate.py
    Mutation(
        "evaluate.py",
        right="1.0 if a > b else 0.5 if a == b else 0.0",
        wrong="1.0 if a >= b else 0.0",
        effect="ties count as wins: a policy that changed nothing wins",
        tests="tests/test_evaluate.py::test_win_rate_counts_ties_as_half",
    ),
    Mutation(
        "evaluate.py",
        right="return max(0.0, centre - half), min(1.0, centre + half)",
        wrong="return centre - half, centre + half",
        effect="win rates of -0.000",
        tests="tests/test_evaluate.py::test_wilson_interval_stays_within_0_and_1",
    ),
    Mutation(
        "evaluate.py",
        right="math.comb(i, n - 1) / math.comb(N, n)",
        wrong="math.comb(i + 1, n) / math.comb(N, n) / (N / n)",
        effect="best of n is not weighted by the choices that each sample is the best of",
        tests="tests/test_evaluate.py::test_expected_best_is_the_mean_over_all_choices",
    ),
    Mutation(
        "evaluate.py",
        right="ranked = values.double().gather(1, scores.argsort(dim=1, stable=True))",
        wrong="ranked = values.double().sort(dim=1).values",
        effect="best of n by the gold reward itself: the reward model's errors don't show",
        tests="tests/test_evaluate.py::test_best_of_n_equals_a_loop_over_all_choices",
    ),
    Mutation(
        "evaluate.py",
        right=(
            "ranked = values.double().gather(1, scores.argsort(dim=1, stable=True))  # (P, N), from the worst "
            "score to the best\n"
            "    return ranked @ weights"
        ),
        wrong=("picks = scores[:, :n].argmax(1)\n    return values.double()[torch.arange(len(scores)), picks]"),
        effect="best of n from the first n samples alone: the others are thrown away, and the figures are noisy",
        tests="tests/test_evaluate.py::test_expected_best_is_the_mean_over_all_choices",
    ),
    Mutation(
        "evaluate.py",
        right="repeated = [ids[i] for i in rows for _ in range(most)]",
        wrong="repeated = [ids[i] for _ in range(most) for i in rows]",
        effect="best of n among answers to different prompts",
        tests="tests/test_evaluate.py::test_best_of_n_equals_a_loop_over_all_choices",
    ),
    Mutation(
        "evaluate.py",
        right="best_of_n(reference, reward_model, prompts, ids, gold, tokenizer, config)",
        wrong="best_of_n(reference, reward_model, prompts[:4], ids[:4], gold, tokenizer, config)",
        effect="best of n on fewer prompts than the rows beside it",
        tests="tests/test_evaluate.py::test_best_of_n_stands_on_the_same_prompts",
    ),
    Mutation(
        "evaluate.py",
        right="f\"<={figures['kl_bound']:.2f}\"",
        wrong="f\"{figures['kl_bound']:.2f}\"",
        effect="an upper bound beside exact KLs, as if it were one",
        tests="tests/test_evaluate.py::test_best_of_n_stands_on_the_same_prompts",
    ),
    Mutation(
        "evaluate.py",
        right="max(1, rows_at_a_time(rollout.tokens, policy) // 4)",
        wrong="len(rollout.tokens)",
        effect="eight tensors of the logits' size of a whole batch: 10 GB at GPT-2's vocabulary",
        tests="tests/test_evaluate.py::test_the_kl_goes_through_the_models_a_few_rows_at_a_time",
    ),
    Mutation(
        "evaluate.py",
        right="distribution_kl(policy(tokens, wanted) / temperature, reference(tokens, wanted) / temperature)",
        wrong="distribution_kl(policy(tokens, wanted), reference(tokens, wanted))",
        effect="KL of other distributions than the samples are drawn from",
        tests="tests/test_evaluate.py::test_samples_come_with_their_own_figures",
    ),
    Mutation(
        "evaluate.py",
        right="return put_back(torch.cat(found), mask)",
        wrong="return put_back(torch.cat(found[::-1]), mask)",
        effect="slices put together in another order: KLs belong to other samples",
        tests="tests/test_evaluate.py::test_the_kl_goes_through_the_models_a_few_rows_at_a_time",
    ),
    Mutation(
        "evaluate.py",
        right='return [name if names.index(name) == i else f"{name} ({i + 1})" for i, name in enumerate(names)]',
        wrong="return names",
        effect="--policies a a is one row",
        tests="tests/test_evaluate.py::test_one_checkpoint_twice_is_two_rows",
    ),
    Mutation(
        "evaluate.py",
        right="scorer = load_scorer(config.reward, baseline, device) if",
        wrong='scorer = load_model(config.reward, device, "scalar") if',
        effect="the reward model reads another vocabulary's ids: plausible wrong scores",
        tests="tests/test_evaluate.py::test_a_reward_model_must_read_what_the_policy_writes",
    ),
    Mutation(
        "evaluate.py",
        right="        check_task(scorer, config.reward, task)\n",
        wrong="        pass\n",
        effect="own prompts are scored by the demo's reward model: a plausible table",
        tests="tests/test_evaluate.py::test_the_task_is_known_by_its_prompts_not_by_the_vocabulary",
    ),
    Mutation(
        "evaluate.py",
        right="    task = task_of(config.prompts)\n",
        wrong='    task = "tiny" if tokenizer.name == "tiny" else ""\n',
        effect="own prompts in the tiny vocabulary meet the embedded task's truth and gates",
        tests="tests/test_evaluate.py::test_the_task_is_known_by_its_prompts_not_by_the_vocabulary",
    ),
    Mutation(
        "evaluate.py",
        right="    note_task(baseline, task, config.prompts)\n",
        wrong="",
        effect="the demo's policy on own prompts: rarely meant, and not said",
        tests="tests/test_evaluate.py::test_the_task_is_known_by_its_prompts_not_by_the_vocabulary",
    ),
    Mutation(
        "evaluate.py",
        right="    check(not Path(config.out_dir).is_file(),",
        wrong="    check(True,",
        effect="--out_dir that is a file: a traceback after all the sampling",
        tests="tests/test_evaluate.py::test_a_file_in_the_place_of_the_output_folder_is_reported_first",
    ),
    Mutation(
        "evaluate.py",
        right='samples["completion"], samples["ended"], "the gold reward")',
        wrong='samples["completion"], None, "the gold reward")',
        effect="a true reward that asks which texts ended is told that all did",
        tests="tests/test_evaluate.py::test_results_are_those_of_the_samples",
    ),
    Mutation(
        "evaluate.py",
        right='call_reward(gold, asked, completions, rollout.ended.tolist(), "the gold reward")',
        wrong='call_reward(gold, asked, completions, None, "the gold reward")',
        effect="the same in best-of-n",
        tests="tests/test_evaluate.py::test_best_of_n_equals_a_loop_over_all_choices",
    ),
    Mutation(
        "evaluate.py",
        right='return sibling(prompts, name.replace("prompts", kind)) if "prompts" in name else ""',
        wrong='return f"out/data/{kind}_held_out.jsonl"',
        effect="own prompts are shown beside the demo's demonstrations and rankings",
        tests="tests/test_evaluate.py::test_own_prompts_read_no_file_of_the_demo",
    ),
    Mutation(
        "evaluate.py",
        right='    if results["demonstrations"] not in (None, results["ceiling"]):',
        wrong='    if results["demonstrations"] is not None:',
        effect="perfect demonstrations end the evaluation with a division by zero",
        tests="tests/test_evaluate.py::test_demonstrations_at_the_ceiling_leave_no_way_open",
    ),
    Mutation(
        "evaluate.py",
        right=(
            '    check(not Path(config.out_dir).is_file(), f"--out_dir {config.out_dir} is a file; name a folder")\n'
        ),
        wrong="",
        effect="--out_dir that is a file: a traceback after the whole evaluation",
        tests="tests/test_cli.py::test_user_mistakes_are_one_line",
    ),
    Mutation(
        "evaluate.py",
        right='seed: int = flag(1, "seed of the samples", low=0, high=2**63 - 1)',
        wrong='seed: int = flag(1, "seed of the samples", low=0)',
        effect="a seed beyond 64 bits is a traceback, or some other seed",
        tests="tests/test_cli.py::test_user_mistakes_are_one_line",
    ),
    Mutation(
        "evaluate.py",
        right="config = replace(config, temperature=0.0)",
        wrong="config = replace(config)",
        effect="what is called the answer at temperature 0 is a sample",
        tests="tests/test_evaluate.py::test_correct_answers_are_counted_as_sampled_and_at_temperature_0",
    ),
    Mutation(
        "evaluate.py",
        right="            for i, value in zip(rows, column, strict=True):",
        wrong="            for i, value in enumerate(column):",
        effect="answers at temperature 0 stand in the order of the prompts' lengths: most of them count as wrong",
        tests="tests/test_evaluate.py::test_the_likeliest_answer_is_drawn_by_nobody",
    ),
    Mutation(
        "evaluate.py",
        right='mean([float(e["correct"] > 0) for e in each])',
        wrong="mean([float(sum(e.values()) > 0) for e in each])",
        effect="a polite evasion counts as a right answer",
        tests="tests/test_evaluate.py::test_correct_answers_are_counted_as_sampled_and_at_temperature_0",
    ),
    Mutation(
        "evaluate.py",
        right="greedy[name] = likeliest(found.model,",
        wrong="greedy[name] = likeliest(reference,",
        effect="every policy is shown the baseline's answers at temperature 0",
        tests="tests/test_evaluate.py::test_correct_answers_are_counted_as_sampled_and_at_temperature_0",
    ),
    Mutation(
        "evaluate.py",
        right='start["correct"], 0.0, 0.5)',
        wrong='start["correct"], 0.0, 1.0)',
        effect="a baseline that is always right passes: nothing is left for RLHF to show",
        tests="tests/test_evaluate.py::test_every_gate_can_fail",
    ),
    Mutation(
        "evaluate.py",
        right="gain, 0.15, 1.0)",
        wrong="gain, -1.0, 1.0)",
        effect="a policy that has become polite and no more often right passes",
        tests="tests/test_evaluate.py::test_every_gate_can_fail",
    ),
    Mutation(
        "evaluate.py",
        right="lost, -0.05, 1.0)",
        wrong="lost, -1.0, 1.0)",
        effect="a policy that has forgotten its facts passes",
        tests="tests/test_evaluate.py::test_every_gate_can_fail",
    ),
    Mutation(
        "evaluate.py",
        right='parts["right_vs_wrong"], 0.75, 1.0)',
        wrong='parts["right_vs_wrong"], 0.0, 1.0)',
        effect="a reward model that knows manners and no facts passes",
        tests="tests/test_evaluate.py::test_every_gate_can_fail",
    ),
    Mutation(
        "evaluate.py",
        right='gain, lost = (figures[k] - start[k] for k in ("correct", "correct_greedy"))',
        wrong='gain, lost = (figures[k] for k in ("correct", "correct_greedy"))',
        effect="the baseline's own right answers count as what RLHF has added",
        tests="tests/test_evaluate.py::test_every_gate_can_fail",
    ),
    # ------------------------------------------------------------ sample.py
    Mutation(
        "sample.py",
        right="for policy in loaded[1:] if scorer else ():",
        wrong="for policy in ():",
        effect="of several checkpoints the first alone is checked against the reward model",
        tests="tests/test_evaluate.py::test_a_reward_model_must_read_what_every_policy_writes",
    ),
    Mutation(
        "sample.py",
        right="load_scorer(config.reward, loaded[0], device)",
        wrong='load_model(config.reward, device, "scalar")',
        effect="sample.py shows scores of another vocabulary's ids",
        tests="tests/test_evaluate.py::test_a_reward_model_must_read_what_the_policy_writes",
    ),
]
