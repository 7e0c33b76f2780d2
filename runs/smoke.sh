#!/usr/bin/env bash
# Every command of the pipeline, so small that nothing is learned, in about a minute: do the scripts fit together?
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=$(mktemp -d)
trap 'rm -rf "$OUT"' EXIT
D="$OUT/data"
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
RL=(--policy "$OUT/sft" --prompts "$D/prompts.jsonl" --iterations 2 --rollouts 32 --minibatch 16)
set -x
python -m data.tiny --out_dir "$D" --demonstrations 600 --held_out_demonstrations 60 --prompts 400 --held_out_prompts 64
# the stages find held-out data by its name: demonstrations_held_out.jsonl, rankings_held_out.jsonl
python sft.py --data "$D/demonstrations.jsonl" --out_dir "$OUT/sft" --n_layer 2 --n_embd 64 --warmup 5
python collect.py --policies "$OUT/sft" --prompts "$D/prompts.jsonl" --n_prompts 128
python collect.py --policies "$OUT/sft" --prompts "$D/prompts_held_out.jsonl" --n_prompts 32
python reward_model.py --policy "$OUT/sft" --data "$D/rankings.jsonl" --out_dir "$OUT/reward_model" --warmup 2
python ppo.py "${RL[@]}" --reward "$OUT/reward_model" --out_dir "$OUT/ppo" --trace
python ppo.py "${RL[@]}" --reward "$OUT/reward_model" data/tiny.py:gold_reward --reward_weights 1 0.5 \
    --out_dir "$OUT/ppo_two_rewards"
python ppo.py "${RL[@]}" --reward data/tiny.py:gold_reward --out_dir "$OUT/ppo_gold" --kl exact --kl_target 4 \
    --train_layers 1 --ptx_coef 0.1 --ptx_data "$D/demonstrations.jsonl"
python ppo.py "${RL[@]}" --reward "$OUT/reward_model" --out_dir "$OUT/ppo" --trace --resume # a finished run
python grpo.py "${RL[@]}" --reward "$OUT/reward_model" --out_dir "$OUT/grpo"
python grpo.py "${RL[@]}" --kind rloo --reward data/tiny.py:gold_reward --out_dir "$OUT/rloo"
python dpo.py --policy "$OUT/sft" --data "$D/rankings.jsonl" --out_dir "$OUT/dpo" --warmup 2
python evaluate.py --policies "$OUT/sft" "$OUT/ppo" "$OUT/dpo" "$OUT/grpo" --reward "$OUT/reward_model" \
    --prompts "$D/prompts_held_out.jsonl" --n_prompts 64 --best_of 1 4 --out_dir "$OUT/evaluate"
python sample.py --compare "$OUT/sft" "$OUT/ppo" "$OUT/dpo" --reward "$OUT/reward_model" --prompt "Anna: Add 2 and 3."
python -m study.report --run "$OUT"
