#!/usr/bin/env bash
# The whole workflow for one model, in the current folder:
#
#     bash pipeline.sh qwen
#     NUM_BLOCKS=7 SEARCH=race bash pipeline.sh meta-llama/Llama-3.1-8B-Instruct
#     LAUNCH="accelerate launch --multi_gpu" bash pipeline.sh llama      # all GPUs of this machine
#
# Every step writes its result under a temporary name first and takes up interrupted work, so after
# an interruption the same command goes on. Set the variables below to change what is done; what was
# made with other settings is refused, so give those a folder of their own.
set -euo pipefail

unset CDPATH # with it, `cd` prints where it goes
model=${1:?give a model: qwen, llama, granite, smollm, a Hugging Face id, a local folder or a GGUF file}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
name=$(basename -- "$model") # what file names begin with
if [ -d "$model" ]; then
    name=$(basename -- "$(cd -- "$model" && pwd -L)") # of a link, its own name
elif [[ $name == *.[Gg][Gg][Uu][Ff] ]]; then
    name=${name%.*}
fi

input_file=${INPUT_FILE:-}            # your prompts, JSONL; empty: what step 1 takes by itself
launch=${LAUNCH:-python}              # or "accelerate launch --multi_gpu"
num_samples=${NUM_SAMPLES:-}          # prompts to answer; empty: all
max_tokens=${MAX_TOKENS:-4096}        # of an answer
max_samples=${MAX_SAMPLES:-}          # answers that the search uses; empty: all
batch_size=${BATCH_SIZE:-32}
search=${SEARCH:-race}                # or untrained, cosine, or full, the paper's
num_blocks=${NUM_BLOCKS:-4}
num_epochs=${NUM_EPOCHS:-10}
granularity=${GRANULARITY:-channel}    # of the scales: channel, or layer (the paper's)
loss=${LOSS:-kl}                      # what the scales are trained on: kl, or ce (the paper's)
learning_rate=${LEARNING_RATE:-}      # of the scales; empty: the script's own
read -r export_formats <<< "${EXPORT:-}" # for example "folded nemotron_nas"
rank=16                               # of the maps in the skipped blocks' place; 0: none (the paper's)
for format in $export_formats; do
    if [ "$format" != folded ] && [ "$format" != nemotron_nas ]; then
        echo "pipeline.sh: EXPORT: $format is not one of: folded, nemotron_nas" >&2
        exit 2
    fi
    rank=0 # few engines have a place for them
done
rank=${REPLACEMENT_RANK:-$rank}
part=(--validation_split 0.2)         # the search leaves out what step 4a holds out, unless MAX_SAMPLES is set
if [ -n "$max_samples" ]; then part=(--max_samples "$max_samples"); fi
read -ra minutes <<< "${MINUTES:-}"   # that steps are known to take about, in their order

step=0
say() { printf '\n== %s\n' "$*" >&2; }
step() { # what comes now, and about how long it takes
    say "$*${minutes[$step]:+ (about ${minutes[$step]} min)}"
    step=$((step + 1))
}

step "1. $name answers the prompts: greedily, as the model alone would"
python "$here/generate_model_gt_data.py" --model="$model" --max_tokens "$max_tokens" \
    ${input_file:+--input_file "$input_file"} ${num_samples:+--num_samples "$num_samples"}

step "2. its answers become token ids, and labels for what it said"
python "$here/process_gt_data.py" --model="$model"

step "3. search for the $num_blocks attention blocks that its answers need least"
$launch "$here/block_selection.py" --model="$model" --data_path "data/$name-processed-data/data.jsonl" \
    --search "$search" --num_blocks "$num_blocks" --batch_size "$batch_size" --replacement_rank "$rank" \
    "${part[@]}"

what="scales by $granularity"
if [ "$rank" != 0 ]; then what="maps in the skipped blocks' place, and $what"; fi
scaled=scaled_${name}_ckpts
step "4a. train $what, toward what the whole model says"
$launch "$here/param_scale.py" --model="$model" --data_path "data/$name-processed-data/data.jsonl" \
    --blocks_to_skip "./${name}_block_selection.json" --granularity "$granularity" --loss "$loss" \
    --replacement_rank "$rank" --num_epochs "$num_epochs" --batch_size "$batch_size" \
    --validation_split 0.2 ${learning_rate:+--learning_rate "$learning_rate"} \
    --resume ${export_formats:+--export $export_formats}

step "4b. the same without training"
maps=()
if [ "$rank" != 0 ]; then maps=(--replacement_rank "$rank" --data_path "data/$name-processed-data/data.jsonl"); fi
python "$here/unscaled_ckpt.py" --model="$model" --blocks_to_skip "./${name}_block_selection.json" \
    ${maps[@]+"${maps[@]}"}

step "what came of it"
PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}" python -P -m hopscotch_common.report "./${name}_math_final_report.json" \
    "data/$name-processed-data" "./${name}_block_selection.json" "$scaled"

say "to publish a folder, with the model card in it"
epoch=$(python -P -c 'import json, sys; print(json.load(open(sys.argv[1]))["best_epoch"])' "./$scaled/report.json")
for kind in "epoch_$epoch" $export_formats; do
    repository=$name-hopscotch
    if [ "$kind" != "epoch_$epoch" ]; then repository+=-$kind; fi
    printf 'hf upload OWNER/%q %q . --exclude "training_state.*"\n' "$repository" "./$scaled/${name}_scaled_$kind"
done
