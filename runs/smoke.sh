#!/usr/bin/env bash
# Every line of the pipeline at a size that proves nothing about learning and takes about a minute: do the scripts fit together?
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=$(mktemp -d)
trap 'rm -rf "$OUT"' EXIT
D="$OUT/data"
set -x
python -m data.tiny --out_dir "$D" --demonstrations 600 --held_out_demonstrations 60 --prompts 400 --held_out_prompts 64
python sft.py --data "$D/demonstrations.jsonl" --held_out_data "$D/demonstrations_held_out.jsonl" --out_dir "$OUT/sft" --n_layer 2 --n_embd 64
python collect.py --policies "$OUT/sft" --prompts "$D/prompts.jsonl" --n_prompts 128 --out "$D/rankings.jsonl"
python collect.py --policies "$OUT/sft" --prompts "$D/prompts_held_out.jsonl" --n_prompts 32 --out "$D/rankings_held_out.jsonl"
python reward_model.py --policy "$OUT/sft" --data "$D/rankings.jsonl" --held_out_data "$D/rankings_held_out.jsonl" --prompts "$D/prompts.jsonl" --out_dir "$OUT/reward_model"
python ppo.py --policy "$OUT/sft" --reward "$OUT/reward_model" --prompts "$D/prompts.jsonl" --out_dir "$OUT/ppo" --iterations 2 --rollouts 32 --minibatch 16 --trace
python ppo.py --policy "$OUT/sft" --reward data/tiny.py:gold_reward --prompts "$D/prompts.jsonl" --out_dir "$OUT/ppo_gold" --iterations 2 --rollouts 32 --minibatch 16 --kl exact --kl_target 4 --train_layers 1 --ptx_coef 0.1 --ptx_data "$D/demonstrations.jsonl"
python dpo.py --policy "$OUT/sft" --data "$D/rankings.jsonl" --held_out_data "$D/rankings_held_out.jsonl" --out_dir "$OUT/dpo"
python evaluate.py --policies "$OUT/sft" "$OUT/ppo" "$OUT/dpo" --reward "$OUT/reward_model" --prompts "$D/prompts_held_out.jsonl" --rankings "$D/rankings_held_out.jsonl" --demonstrations "$D/demonstrations_held_out.jsonl" --n_prompts 64 --best_of_prompts 16 --out_dir "$OUT/evaluate"
python sample.py --compare "$OUT/sft" "$OUT/ppo" "$OUT/dpo" --reward "$OUT/reward_model" --prompt "Anna: Add 2 and 3."
