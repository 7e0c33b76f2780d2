#!/usr/bin/env bash
# The whole pipeline on the embedded task, offline, on a laptop CPU. Every command can be run by itself.
#   SEED=2 OUT=out2 bash runs/tiny.sh
#   LONG=1 bash runs/tiny.sh        # more of everything, about 10 minutes: how far the same recipe goes
#   STRICT=1 bash runs/tiny.sh      # status 1 if a gate fails; otherwise the last lines name it, and it is no error
set -euo pipefail
cd "$(dirname "$0")/.."
SEED=${SEED:-1}
OUT=${OUT:-out}
# Networks this small gain from a second thread, and lose from more. A thread that waits for the other one spins only for
# a short time. By default it would spin on: that costs a twentieth less on an idle machine, but makes everything 20 times
# slower while any other job runs.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-2000}
DATA="" SFT="" COLLECT="" DPO="" PPO="" GRPO=""
if [ -n "${LONG:-}" ]; then
    DATA="--demonstrations 60000"
    SFT="--epochs 5"
    COLLECT="--n_prompts 0"
    DPO="--lr 5e-5"
    PPO="--iterations 40 --lr 1e-4 --kl_coef 0.2"
    GRPO="--iterations 40 --lr 2.5e-4"
fi
start=$SECONDS
step() { echo; echo "[$((SECONDS - start)) s] $*"; "$@"; }
rm -rf "$OUT/data" # collect.py appends to its files: start fresh ones
rm -f "$OUT"/*/state.pt # of an earlier demo that was stopped: a stage doesn't start over an unfinished run

# 0. the world: demonstrations of mixed quality and prompts; to train on, to choose by (_held_out), for results (_test)
step python -m data.tiny --out_dir "$OUT/data" --seed "$SEED" $DATA

# 1. SFT: imitate the demonstrations
step python sft.py --data "$OUT/data/demonstrations.jsonl" --out_dir "$OUT/sft" --seed "$SEED" $SFT

# 2. sample and rank completions, learn to score them
step python collect.py --policies "$OUT/sft" --prompts "$OUT/data/prompts.jsonl" --seed "$SEED" $COLLECT
step python collect.py --policies "$OUT/sft" --prompts "$OUT/data/prompts_held_out.jsonl" --n_prompts 400 --seed "$SEED"
step python collect.py --policies "$OUT/sft" --prompts "$OUT/data/prompts_test.jsonl" --n_prompts 0 --seed "$SEED"

# 3c. DPO learns from the same rankings. It needs no reward model, so both learn at once, with one thread each. DPO's
# output goes to a file, which is shown when both have ended.
OMP_NUM_THREADS=1 step python dpo.py --policy "$OUT/sft" --data "$OUT/data/rankings.jsonl" --out_dir "$OUT/dpo" \
    --seed "$SEED" $DPO > "$OUT/dpo.log" 2>&1 &
dpo=$!
trap 'kill $dpo 2> /dev/null || true' EXIT # if the reward model fails
OMP_NUM_THREADS=1 step python reward_model.py --policy "$OUT/sft" --data "$OUT/data/rankings.jsonl" \
    --out_dir "$OUT/reward_model" --seed "$SEED"
status=0
wait $dpo || status=$?
cat "$OUT/dpo.log"
[ $status -eq 0 ] || exit $status

# 3a. PPO against the reward model
step python ppo.py --policy "$OUT/sft" --reward "$OUT/reward_model" --prompts "$OUT/data/prompts.jsonl" \
    --out_dir "$OUT/ppo" --seed "$SEED" $PPO

# 3b. the same without a value model: groups of eight completions of a prompt
step python grpo.py --policy "$OUT/sft" --reward "$OUT/reward_model" --prompts "$OUT/data/prompts.jsonl" \
    --out_dir "$OUT/grpo" --seed "$SEED" $GRPO

# 4. compare, on questions that nothing was trained on or chosen by
step python evaluate.py --policies "$OUT/sft" "$OUT/ppo" "$OUT/dpo" "$OUT/grpo" --reward "$OUT/reward_model" \
    --prompts "$OUT/data/prompts_test.jsonl" --n_prompts 0 --out_dir "$OUT/evaluate" --seed "$SEED"
step python sample.py --compare "$OUT/sft" "$OUT/ppo" "$OUT/dpo" "$OUT/grpo" --reward "$OUT/reward_model" \
    --prompt "Anna: What is the opposite of hot?" --temperature 0
echo
echo "done in $((SECONDS - start)) s; talk to it: python sample.py --policy $OUT/ppo"

# 5. a page about all of it, to open in a browser; the last lines name the gates that failed
step python -m study.report --run "$OUT" --seed "$SEED" ${STRICT:+--strict}
