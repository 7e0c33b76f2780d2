#!/usr/bin/env bash
# Every line of the pipeline at a size that proves nothing about learning, in about a minute: do the scripts fit together?
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=$(mktemp -d)
trap 'rm -rf "$OUT"' EXIT
D="$OUT/data"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
SMALL="--iterations 2 --rollouts 32 --minibatch 16"
set -x
python -m data.tiny --out_dir "$D" --demonstrations 600 --held_out_demonstrations 60 --prompts 400 --held_out_prompts 64
# held-out data is found by itself: demonstrations_held_out.jsonl, rankings_held_out.jsonl
python sft.py --data "$D/demonstrations.jsonl" --out_dir "$OUT/sft" --n_layer 2 --n_embd 64 --warmup 5
python collect.py --policies "$OUT/sft" --prompts "$D/prompts.jsonl" --n_prompts 128
python collect.py --policies "$OUT/sft" --prompts "$D/prompts_held_out.jsonl" --n_prompts 32
python reward_model.py --policy "$OUT/sft" --data "$D/rankings.jsonl" --out_dir "$OUT/reward_model" --warmup 2
python ppo.py --policy "$OUT/sft" --reward "$OUT/reward_model" --prompts "$D/prompts.jsonl" --out_dir "$OUT/ppo" $SMALL --trace
python ppo.py --policy "$OUT/sft" --reward "$OUT/reward_model" data/tiny.py:gold_reward --reward_weights 1 0.5 --prompts "$D/prompts.jsonl" --out_dir "$OUT/ppo_two_rewards" $SMALL
python ppo.py --policy "$OUT/sft" --reward data/tiny.py:gold_reward --prompts "$D/prompts.jsonl" --out_dir "$OUT/ppo_gold" $SMALL --kl exact --kl_target 4 --train_layers 1 --ptx_coef 0.1 --ptx_data "$D/demonstrations.jsonl"
python ppo.py --policy "$OUT/sft" --reward "$OUT/reward_model" --prompts "$D/prompts.jsonl" --out_dir "$OUT/ppo" $SMALL --trace --resume # done already
python grpo.py --policy "$OUT/sft" --reward "$OUT/reward_model" --prompts "$D/prompts.jsonl" --out_dir "$OUT/grpo" $SMALL
python grpo.py --kind rloo --policy "$OUT/sft" --reward data/tiny.py:gold_reward --prompts "$D/prompts.jsonl" --out_dir "$OUT/rloo" $SMALL
python dpo.py --policy "$OUT/sft" --data "$D/rankings.jsonl" --out_dir "$OUT/dpo" --warmup 2
python evaluate.py --policies "$OUT/sft" "$OUT/ppo" "$OUT/dpo" "$OUT/grpo" --reward "$OUT/reward_model" --prompts "$D/prompts_held_out.jsonl" --n_prompts 64 --best_of 1 4 --out_dir "$OUT/evaluate"
python sample.py --compare "$OUT/sft" "$OUT/ppo" "$OUT/dpo" --reward "$OUT/reward_model" --prompt "Anna: Add 2 and 3."
python -m study.report --run "$OUT"
